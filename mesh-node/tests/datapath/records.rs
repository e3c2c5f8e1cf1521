//! One record for each end of each connection, however it ends.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::service::Service;
use mesh_core::snapshot::Change;
use mesh_core::workload::{AppProtocol, PortMapping, ServiceName, Workload};
use socket2::{Domain, Socket, Type};
use tokio::io::AsyncReadExt;
use tokio::net::TcpSocket;
use tokio::time::timeout;

use crate::bed::{Bed, Ca, address, eventually, identity, workload};

/// Port of the service.
const PORT: u16 = 80;
/// All attempts together take ten seconds, then the connection fails; this is when the test gives up.
const FAILS_WITHIN: Duration = Duration::from_secs(30);

/// A file that goes with the value.
struct TempFile(PathBuf);

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// An application that does not accept, and whose queue is full: a dial gets no answer.
fn deaf(ip: IpAddr) -> (SocketAddr, Vec<Socket>) {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::new(ip, 0).into()).unwrap();
    listener.listen(0).unwrap();
    let to = listener.local_addr().unwrap();
    let address = to.as_socket().unwrap();
    let mut held = vec![listener];
    for _ in 0..4 {
        let waiting = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        waiting.set_nonblocking(true).unwrap();
        // Under way, or waiting in the queue.
        let _ = waiting.connect(&to);
        held.push(waiting);
    }
    (address, held)
}

/// Makes a connection that is reset in the end; its port.
async fn fails(to: SocketAddr) -> u16 {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(to.ip(), 0)).unwrap();
    let port = socket.local_addr().unwrap().port();
    // The reset may be faster than the end of the dial.
    if let Ok(mut tcp) = socket.connect(to).await {
        let end = timeout(FAILS_WITHIN, tcp.read(&mut [0])).await.expect("it fails");
        assert!(end.is_err(), "reset, not {end:?}");
    }
    port
}

#[tokio::test]
async fn a_connection_that_takes_too_long_on_one_node_has_one_record_for_each_end() {
    let log = TempFile(std::env::temp_dir().join(format!("mesh-records-{}", std::process::id())));
    let vip = address();
    let target = SocketAddr::new(vip, PORT);
    let bed = Bed::logging(Arc::new(move |_, _| Some(target)), log.0.clone());
    let ca = Ca::new();
    bed.trust(&[&ca]);
    for name in ["client", "one", "two"] {
        bed.certify(&ca.issue(&identity(name)));
    }
    let client = bed.serve("client").await;
    let key = ServiceName { namespace: "default".into(), hostname: "deaf.default.svc.cluster.local".into() };
    let mapping = |target_port| PortMapping { service_port: PORT, target_port, app_protocol: AppProtocol::Tcp };
    let mut held = Vec::new();
    for name in ["one", "two"] {
        let ip = bed.serve(name).await.hbone.ip();
        let (at, sockets) = deaf(ip);
        held.push(sockets);
        let endpoint = Workload { services: [(key.clone(), vec![mapping(at.port())])].into(), ..workload(name, ip) };
        bed.configure(&[Change::UpsertWorkload(Arc::new(endpoint))]);
    }
    bed.configure(&[Change::UpsertService(Arc::new(Service {
        key: key.clone(),
        name: "deaf".into(),
        vips: vec![("".into(), vip)],
        ports: vec![mapping(0)],
        subject_alt_names: Vec::new(),
        waypoint: None,
        load_balancing: None,
    }))]);

    let port = fails(client.outbound).await;
    // Records are written in the order of events: when that of a later connection is there, all are.
    bed.configure(&[Change::RemoveService(key)]);
    let later = fails(client.outbound).await;
    let of = |port: u16| -> Vec<String> {
        let text = std::fs::read_to_string(&log.0).unwrap_or_default();
        text.lines().filter(|line| line.contains(&format!(":{port} "))).map(str::to_owned).collect()
    };
    eventually("the record of a later connection", || (!of(later).is_empty()).then_some(())).await;
    assert_eq!(of(port).len(), 2, "{:#?}", of(port));
}
