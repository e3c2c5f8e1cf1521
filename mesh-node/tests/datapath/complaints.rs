//! What is logged of peers that are refused.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::bed::{Bed, Ca, address, identity, soon};

/// Connections of the peer; enough for each of the workers to accept some.
const CONNECTIONS: usize = 64;

/// The log of this process, in memory.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[tokio::test]
async fn a_peer_is_complained_about_once_by_all_workers_together() {
    let log = Log::default();
    let lines = tracing_subscriber::fmt().with_writer(log.clone()).with_max_level(LevelFilter::WARN).with_ansi(false);
    // The workers are threads of their own; no other test of this process looks at the log.
    tracing::subscriber::set_global_default(lines.finish()).unwrap();
    let (bed, ca, peer) = (Bed::new(2), Ca::new(), address());
    bed.trust(&[&ca]);
    bed.certify(&ca.issue(&identity("far")));
    let far = bed.serve("far").await;
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::new(peer, 0)).unwrap();
        connections.push(socket.connect(far.hbone).await.unwrap());
    }
    for connection in &mut connections {
        connection.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    }
    for mut connection in connections {
        // An alert, and the end or a reset.
        let _ended = soon("the end", connection.read_to_end(&mut Vec::new())).await;
    }
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let complaints: Vec<_> = log.lines().filter(|line| line.contains(&peer.to_string())).collect();
    assert_eq!(complaints.len(), 1, "{complaints:#?}");
}
