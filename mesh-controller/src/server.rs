//! Ports that strangers reach: our own accept loop and TLS 1.3.
//!
//! The accept loop belongs to us because a server that stops accepting at the first error of `accept(2)` can be stopped by
//! anybody who opens enough connections (RUSTSEC-2024-0376). Handshakes run side by side, bounded in number and time.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
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
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use crate::ca::authority::Issued;
use crate::door::unix_now;
use crate::limit::QuietLog;
use crate::metrics::Metrics;

/// A port and its bounds.
#[derive(Debug, Clone, Copy)]
pub struct Port {
    /// The only protocol that is spoken there (ALPN).
    pub protocol: &'static [u8],
    /// Connections at once.
    pub connections: usize,
    /// Connections at once from one address (of IPv6: one /64, which is what a host has), so that one peer cannot take
    /// the room of all.
    pub per_peer: u32,
}

/// Where nodes are served: HTTP/2, and each node has one or two connections.
pub const NODES: Port = Port { protocol: b"h2", connections: MAX_CONNECTIONS, per_peer: MAX_PER_PEER };

/// Connections of nodes at once.
const MAX_CONNECTIONS: usize = 8192;
/// Connections of nodes at once from one address: handshakes need no token. Enough for 256 nodes behind one translated
/// address.
pub const MAX_PER_PEER: u32 = 512;
/// Handshakes at once.
const MAX_HANDSHAKES: usize = 2048;
/// Time from a handshake to the first call with a good token. Without one a connection only takes room.
const INTRODUCTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Wait after an error of `accept`, doubled up to [`MAX_BACKOFF`] while errors go on.
const MIN_BACKOFF: Duration = Duration::from_millis(10);
/// Longest wait after an error of `accept`.
const MAX_BACKOFF: Duration = Duration::from_secs(1);

/// The other end.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    introduced: Arc<AtomicBool>,
}

impl Peer {
    /// It has shown a good token: its connection may stay beyond the first seconds.
    pub fn introduce(&self) {
        self.introduced.store(true, Ordering::Relaxed);
    }
}

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

/// TLS 1.3 only, one protocol only, no client certificates: nodes prove themselves by token.
pub fn tls_acceptor(certificate: Arc<ServerCertificate>, port: Port) -> Result<TlsAcceptor, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![port.protocol.to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// A connection after its handshake.
#[derive(Debug)]
pub struct Connection {
    tls: TlsStream<TcpStream>,
    peer: Peer,
    /// When it ends unless the peer has introduced itself; none when it has.
    until: Option<Pin<Box<Sleep>>>,
    _permit: OwnedSemaphorePermit,
    _seat: Seat,
}

/// What counts as one peer: an address, or of IPv6 a /64, which is what a host has.
pub fn host_of(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
    }
}

/// How many connections each address has.
#[derive(Debug, Clone)]
struct Peers {
    counts: Arc<Mutex<BTreeMap<IpAddr, u32>>>,
    most: u32,
}

/// One connection of an address.
#[derive(Debug)]
struct Seat {
    peers: Peers,
    ip: IpAddr,
}

impl Peers {
    fn seat(&self, ip: IpAddr) -> Option<Seat> {
        let ip = host_of(ip);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(ip).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Seat { peers: self.clone(), ip })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut counts = self.peers.counts.lock().unwrap_or_else(PoisonError::into_inner);
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
    port: Port,
    metrics: Arc<Metrics>,
) -> impl Stream<Item = io::Result<Connection>> {
    let state = Incoming {
        listener,
        acceptor,
        metrics,
        handshakes: FuturesUnordered::new(),
        room: Arc::new(Semaphore::new(port.connections)),
        peers: Peers { counts: Arc::default(), most: port.per_peer },
        backoff: MIN_BACKOFF,
        accept_at: None,
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
    /// After an error of `accept`: when to try again.
    accept_at: Option<Instant>,
    quiet: Mutex<QuietLog>,
}

impl Incoming {
    async fn next(&mut self) -> Connection {
        loop {
            let may_accept = self.handshakes.len() < MAX_HANDSHAKES && self.accept_at.is_none();
            let accept_at = self.accept_at.unwrap_or_else(Instant::now);
            tokio::select! {
                Some(done) = self.handshakes.next() => match done {
                    Ok(connection) => return connection,
                    Err((peer, reason)) => self.refused("handshake", &peer.ip().to_string(), &reason),
                },
                // Handshakes that are under way go on meanwhile: they free descriptors.
                () = sleep_until(accept_at), if self.accept_at.is_some() => self.accept_at = None,
                accepted = self.listener.accept(), if may_accept => match accepted {
                    Ok((tcp, peer)) => {
                        self.backoff = MIN_BACKOFF;
                        self.begin(tcp, peer);
                    }
                    Err(error) => {
                        // EMFILE, ECONNABORTED and others: the listener itself is still good.
                        self.refused("accept", "", &error.to_string());
                        self.accept_at = Some(Instant::now() + self.backoff);
                        self.backoff = (self.backoff * 2).min(MAX_BACKOFF);
                    }
                },
            }
        }
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
                Ok(Ok(tls)) => {
                    let peer = Peer { address: peer, introduced: Arc::default() };
                    let until = Some(Box::pin(sleep(INTRODUCTION_TIMEOUT)));
                    Ok(Connection { tls, peer, until, _permit: permit, _seat: seat })
                }
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
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl Connection {
    /// An error when the peer has not introduced itself in time. Asked before each use: a server always waits either for
    /// something to read, or for a peer that does not read.
    fn may_stay(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(until) = &mut self.until else { return Ok(()) };
        if self.peer.introduced.load(Ordering::Relaxed) {
            self.until = None;
        } else if until.as_mut().poll(cx).is_ready() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.may_stay(cx)?;
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.may_stay(cx)?;
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.may_stay(cx)?;
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}
