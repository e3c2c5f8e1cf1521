//! A server of tunnels in the place of a workload's node proxy, that says what a test wants.

use std::fs::File;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mesh_node::capture::in_netns;
use rustls::ServerConfig;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::Identity;
use super::frames::PREFACE;
use super::raw::Raw;
use crate::mesh_bed::eventually;

/// A client's tunnel, whose preface was read.
pub type Client = Raw<TlsStream<TcpStream>>;

/// What is done with a client.
pub type Script = fn(Client) -> Pin<Box<dyn Future<Output = ()> + Send>>;

/// Serves clients until it is dropped.
#[derive(Debug)]
pub struct Upstream {
    met: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

/// Where it is, and who it says it is.
pub struct Stand<'a> {
    /// Its namespace.
    pub netns: &'a Path,
    /// Where it listens.
    pub address: SocketAddr,
    /// What it proves.
    pub identity: Identity,
    /// What it says before the client has proved anything, in the same flight as its certificate.
    pub early: Vec<u8>,
}

impl Upstream {
    /// Listens inside a namespace, and plays the script with each client.
    ///
    /// # Panics
    /// The address is taken.
    pub fn start(runtime: &Runtime, stand: Stand<'_>, script: Script) -> Self {
        let Stand { netns, address, identity, early } = stand;
        let netns = File::open(netns).expect("namespace");
        // The one before may not be gone yet.
        let bind = || in_netns(netns.as_fd(), || TcpListener::bind(address)).expect("enter").ok();
        let listener = eventually("the address of a server", bind);
        listener.set_nonblocking(true).expect("non-blocking");
        let acceptor = TlsAcceptor::from(server_config(identity));
        let early: Arc<[u8]> = early.into();
        let met = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&met);
        let task = runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("register");
            let mut clients = tokio::task::JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                counter.fetch_add(1, Ordering::Relaxed);
                let (acceptor, early) = (acceptor.clone(), Arc::clone(&early));
                clients.spawn(async move {
                    // A client that does not want this server is one of the outcomes.
                    if let Ok(client) = greet(tcp, &acceptor, &early).await {
                        script(client).await;
                    }
                });
            }
        });
        Self { met, task }
    }

    /// Connections so far.
    pub fn met(&self) -> usize {
        self.met.load(Ordering::Relaxed)
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn server_config((chain, key): Identity) -> Arc<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("certificate and key");
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.send_half_rtt_data = true;
    Arc::new(config)
}

async fn greet(tcp: TcpStream, acceptor: &TlsAcceptor, early: &[u8]) -> io::Result<Client> {
    tcp.set_nodelay(true)?;
    // What does not fit into the buffer of TLS was not meant to be said early.
    let accept = acceptor.accept_with(tcp, |tls| tls.writer().write_all(early).expect("early bytes"));
    let mut tls = accept.await?;
    tls.read_exact(&mut [0; PREFACE.len()]).await?;
    Ok(Raw::new(tls))
}
