//! The gRPC port: our own accept loop and TLS 1.3.
//!
//! The accept loop belongs to us because a server that stops accepting at the first error of `accept(2)` can be stopped by
//! anybody who opens enough connections (RUSTSEC-2024-0376). Handshakes run side by side, bounded in number and time.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use futures_util::stream::{FuturesUnordered, Stream};
use futures_util::{FutureExt, StreamExt, stream};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use crate::ca::authority::Issued;
use crate::door::unix_now;
use crate::limit::QuietLog;
use crate::metrics::Metrics;

/// Connections at once; each node has one or two.
pub const MAX_CONNECTIONS: usize = 8192;
/// Connections at once from one address, so that one peer cannot take the room of all: handshakes need no token. Enough for
/// 256 nodes behind one translated address.
pub const MAX_PER_PEER: u32 = 512;
/// Handshakes at once.
const MAX_HANDSHAKES: usize = 2048;
/// Time for a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Wait after an error of `accept`, doubled up to [`MAX_BACKOFF`] while errors go on.
const MIN_BACKOFF: Duration = Duration::from_millis(10);
/// Longest wait after an error of `accept`.
const MAX_BACKOFF: Duration = Duration::from_secs(1);

/// Address of the other end.
#[derive(Debug, Clone, Copy)]
pub struct PeerAddr(pub SocketAddr);

/// The certificate that the server shows, replaced in place.
#[derive(Debug, Default)]
pub struct ServerCertificate(ArcSwapOption<CertifiedKey>);

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
#[error("set up TLS: {0}")]
pub struct TlsError(#[from] rustls::Error);

impl ServerCertificate {
    /// Takes a certificate into use for new connections.
    pub fn replace(&self, issued: Issued, key: &rustls_pki_types::PrivateKeyDer<'_>) -> Result<(), TlsError> {
        let key = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(key)?;
        self.0.store(Some(Arc::new(CertifiedKey::new(issued.chain, key))));
        Ok(())
    }
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }
}

/// TLS 1.3 only, h2 only, no client certificates: nodes prove themselves by token.
pub fn tls_acceptor(certificate: Arc<ServerCertificate>) -> Result<TlsAcceptor, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// A connection after its handshake.
#[derive(Debug)]
pub struct Connection {
    tls: TlsStream<TcpStream>,
    peer: SocketAddr,
    _permit: OwnedSemaphorePermit,
    _seat: Seat,
}

/// How many connections each address has.
#[derive(Debug, Clone, Default)]
struct Peers(Arc<Mutex<BTreeMap<IpAddr, u32>>>);

/// One connection of an address.
#[derive(Debug)]
struct Seat {
    peers: Peers,
    ip: IpAddr,
}

impl Peers {
    fn seat(&self, ip: IpAddr) -> Option<Seat> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(ip).or_default();
        if *count >= MAX_PER_PEER {
            return None;
        }
        *count += 1;
        Some(Seat { peers: self.clone(), ip })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut counts = self.peers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.ip) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.ip);
            }
        }
    }
}

/// Accepts connections as long as it is polled. It never ends and never gives an error.
pub fn incoming(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    metrics: Arc<Metrics>,
) -> impl Stream<Item = io::Result<Connection>> {
    let state = Incoming {
        listener,
        acceptor,
        metrics,
        handshakes: FuturesUnordered::new(),
        room: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        peers: Peers::default(),
        backoff: MIN_BACKOFF,
        quiet: Mutex::default(),
    };
    stream::unfold(state, |mut state| async move {
        let connection = state.next().await;
        Some((Ok(connection), state))
    })
}

type Handshake = Pin<Box<dyn Future<Output = Result<Connection, (SocketAddr, String)>> + Send>>;

struct Incoming {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    metrics: Arc<Metrics>,
    handshakes: FuturesUnordered<Handshake>,
    room: Arc<Semaphore>,
    peers: Peers,
    backoff: Duration,
    quiet: Mutex<QuietLog>,
}

impl Incoming {
    async fn next(&mut self) -> Connection {
        loop {
            let may_accept = self.handshakes.len() < MAX_HANDSHAKES;
            tokio::select! {
                Some(done) = self.handshakes.next() => match done {
                    Ok(connection) => return connection,
                    Err((peer, reason)) => self.refused("handshake", &peer.ip().to_string(), &reason),
                },
                accepted = self.listener.accept(), if may_accept => match accepted {
                    Ok((tcp, peer)) => {
                        self.backoff = MIN_BACKOFF;
                        self.begin(tcp, peer);
                    }
                    Err(error) => {
                        // EMFILE, ECONNABORTED and others: the listener itself is still good.
                        self.refused("accept", "", &error.to_string());
                        self.wait().await;
                    }
                },
            }
        }
    }

    /// Backs off, while handshakes that are under way go on (they free descriptors).
    async fn wait(&mut self) {
        sleep(self.backoff).await;
        self.backoff = (self.backoff * 2).min(MAX_BACKOFF);
    }

    fn begin(&mut self, tcp: TcpStream, peer: SocketAddr) {
        let Ok(permit) = self.room.clone().try_acquire_owned() else {
            self.refused("accept", &peer.ip().to_string(), "too many connections");
            return;
        };
        let Some(seat) = self.peers.seat(peer.ip()) else {
            self.refused("accept", &peer.ip().to_string(), "too many connections of this peer");
            return;
        };
        let acceptor = self.acceptor.clone();
        let handshake = async move {
            // A failure shows in the handshake.
            let _ = tcp.set_nodelay(true);
            match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(tcp)).await {
                Ok(Ok(tls)) => Ok(Connection { tls, peer, _permit: permit, _seat: seat }),
                Ok(Err(error)) => Err((peer, format!("TLS handshake: {error}"))),
                Err(_) => Err((peer, "TLS handshake: too slow".to_owned())),
            }
        };
        self.handshakes.push(handshake.boxed());
    }

    fn refused(&self, what: &'static str, peer: &str, reason: &str) {
        self.metrics.refuse(what);
        if self.quiet.lock().unwrap_or_else(PoisonError::into_inner).is_due(peer, unix_now()) {
            tracing::warn!(peer, reason, "connection refused");
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = PeerAddr;

    fn connect_info(&self) -> PeerAddr {
        PeerAddr(self.peer)
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}
