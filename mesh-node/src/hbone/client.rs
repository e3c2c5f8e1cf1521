//! The client's end of tunnels: dials them, keeps them in the worker's pool, opens streams on them.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use h2::Reason;
use h2::client::SendRequest;
use http::{Request, StatusCode};
use rustls_pki_types::ServerName;
use socket2::SockRef;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::keepalive::until_dead;
use super::pool::{Checkout, Pool, PoolKey, PooledTunnel, TunnelId};
use super::windows::{Pressure, Share, Windows};
use super::{
    CLIENT_STREAMS, CONNECTION_WINDOW, FRAME_BYTES, FRAME_OVERHEAD_BYTES, HANDSHAKE_TIMEOUT, RESPONSE_HEADER_BYTES,
    SEND_BUFFER_BYTES, STREAM_WINDOW,
};
use crate::dial::{Namespaces, connect, keep_alive};
use crate::identity::{NoCertificate, certificate, has_expired};
use crate::metrics::{Metrics, ResponseFlags, count};
use crate::relay::Stream;
use crate::runtime::{CertifiedIdentity, Enrolled, RootStore, Shared, View};
use crate::tls::{self, PeerProof, PeerRole};
use crate::wire::{TunnelSocket, Turns};

/// Tunnels tried for one stream: a pooled one may turn out to be closing.
const MAX_TUNNELS_TRIED: usize = 3;
/// Dials for one tunnel, when certificates or roots are replaced again and again while it is dialled.
const MAX_DIALS: usize = 3;

/// Why a tunnel did not come up.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// TCP.
    #[error("dial {address}: {source}")]
    Connect {
        /// Where to.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// TLS: the other end is not who it should be, does not accept us, or does not speak TLS 1.3.
    #[error("TLS with {address}: {source}")]
    Tls {
        /// Where to.
        address: SocketAddr,
        /// What went wrong.
        source: io::Error,
    },
    /// HTTP/2.
    #[error("HTTP/2 with {address}: {source}")]
    Http2 {
        /// Where to.
        address: SocketAddr,
        /// What went wrong.
        source: h2::Error,
    },
    /// A handshake took too long.
    #[error("{what} with {address} took longer than {} s", HANDSHAKE_TIMEOUT.as_secs())]
    Slow {
        /// Where to.
        address: SocketAddr,
        /// Which handshake.
        what: &'static str,
    },
    /// We cannot prove who the client is.
    #[error("{0}")]
    NoCertificate(#[from] NoCertificate),
    /// The other end said with its handshake that it takes no streams.
    #[error("{address} ends tunnels as soon as they are made")]
    Unwilling {
        /// Where to.
        address: SocketAddr,
    },
    /// The client or the server left while the tunnel was dialled, or certificates changed too often.
    #[error("tunnel to {address}: what it was dialled for has changed meanwhile")]
    Outdated {
        /// Where to.
        address: SocketAddr,
    },
    /// The dialling task is gone.
    #[error("dial was abandoned")]
    Abandoned,
}

/// Why a stream was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No tunnel.
    #[error("{0}")]
    Dial(Arc<DialError>),
    /// The other node proxy said no.
    #[error("peer answered {0}")]
    Answer(StatusCode),
    /// The tunnel broke before the answer.
    #[error("tunnel: {0}")]
    Lost(#[source] h2::Error),
    /// The other node proxy takes no streams.
    #[error("peer takes no streams")]
    Refusing,
    /// All tunnels are full.
    #[error("too many tunnels to one workload")]
    Full,
}

impl OpenError {
    /// Whether another endpoint of the service may do better.
    pub fn try_elsewhere(&self) -> bool {
        match self {
            Self::Dial(_) | Self::Lost(_) | Self::Refusing | Self::Full => true,
            Self::Answer(status) => *status == StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// For metrics.
    pub fn flags(&self) -> ResponseFlags {
        match self {
            Self::Dial(error) => match **error {
                DialError::Tls { .. } => ResponseFlags::TlsFailure,
                DialError::Http2 { .. } | DialError::Unwilling { .. } => ResponseFlags::H2HandshakeFailure,
                DialError::NoCertificate(_) => ResponseFlags::IdentityError,
                DialError::Slow { .. }
                | DialError::Connect { .. }
                | DialError::Outdated { .. }
                | DialError::Abandoned => ResponseFlags::Connect,
            },
            Self::Answer(StatusCode::UNAUTHORIZED) => ResponseFlags::Deny,
            Self::Answer(_) | Self::Lost(_) | Self::Refusing | Self::Full => ResponseFlags::Connect,
        }
    }
}

/// A pooled tunnel's handle.
#[derive(Debug, Clone)]
pub struct Tunnel {
    send: SendRequest<Bytes>,
    pressure: Arc<Pressure>,
    open: Arc<AtomicBool>,
    identity: Arc<CertifiedIdentity>,
    roots: Arc<RootStore>,
    server: Arc<PeerProof>,
}

impl PooledTunnel for Tunnel {
    fn is_open(&self) -> bool {
        // h2 refuses new streams after GOAWAY or an error; asking costs a lock that nobody else holds.
        // A server whose certificate has run out has to prove anew who it is, on a tunnel of its own.
        self.open.load(Ordering::Relaxed)
            && !has_expired(self.server.not_after_secs)
            && matches!(
                self.send.clone().poll_ready(&mut Context::from_waker(Waker::noop())),
                Poll::Ready(Ok(())) | Poll::Pending
            )
    }

    fn stream_limit(&self) -> u32 {
        u32::try_from(self.send.current_max_send_streams()).unwrap_or(u32::MAX)
    }
}

/// What a tunnel is wanted for. Certificate and roots are those of the moment when it is dialled.
#[derive(Debug, Clone)]
pub struct Target {
    /// Which tunnel.
    pub key: Arc<PoolKey>,
    /// Whose namespace the socket is made in.
    pub source: Arc<Enrolled>,
}

type DialResult = Option<Result<(), Arc<DialError>>>;
type Attempt = watch::Receiver<DialResult>;

/// The tunnels of one worker.
#[derive(Debug)]
pub struct Tunnels {
    pool: Mutex<Pool<Tunnel, WaitFor>>,
    shared: Arc<Shared>,
    namespaces: Arc<Namespaces>,
    metrics: Arc<Metrics>,
}

/// An attempt that callers wait for.
#[derive(Debug, Clone)]
struct WaitFor(Attempt);

/// An open stream and its place on a tunnel.
#[derive(Debug)]
pub struct Opened {
    /// What to relay with.
    pub stream: Stream,
    /// Keep until the stream has ended.
    pub lease: Lease,
    /// What the server proved itself with.
    pub server: Arc<PeerProof>,
}

/// A place on a tunnel, given back when dropped.
#[derive(Debug)]
pub struct Lease {
    tunnels: Arc<Tunnels>,
    key: Arc<PoolKey>,
    id: TunnelId,
}

/// A dial. One whose task dies must leave the key free: later callers would wait for it as long as the process lives.
struct UnderWay<'a> {
    tunnels: &'a Tunnels,
    key: &'a PoolKey,
    ended: bool,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.tunnels.pool().dial_failed(self.key);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.tunnels.pool().release(&self.key, self.id, Instant::now());
    }
}

impl Tunnels {
    /// None yet.
    pub fn new(shared: Arc<Shared>, namespaces: Arc<Namespaces>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { pool: Mutex::default(), shared, namespaces, metrics })
    }

    /// Opens a stream, on a tunnel that is there or on a fresh one. Nothing of the connection's bytes is sent before
    /// the answer, so a stream that a tunnel refuses can be tried on the next tunnel.
    pub async fn open(self: &Arc<Self>, target: &Target, request: &Request<()>) -> Result<Opened, OpenError> {
        let mut tried = 0;
        loop {
            let (lease, mut tunnel) = self.tunnel(target).await?;
            tried += 1;
            match ask(&mut tunnel, request.clone()).await {
                Ok((StatusCode::OK, stream)) => return Ok(Opened { stream, lease, server: tunnel.server }),
                Ok((status, _)) => return Err(OpenError::Answer(status)),
                Err(error) if tried < MAX_TUNNELS_TRIED && another_tunnel_may_do(&error) => {
                    // This one takes no more streams, or none now; a REFUSED_STREAM alone does not say which.
                    self.pool().closed(&lease.key, lease.id);
                }
                Err(error) => return Err(OpenError::Lost(error)),
            }
        }
    }

    /// Drops tunnels that must not take new connections under `view`: of workloads that are gone, or made with
    /// certificates or roots that have been replaced.
    pub fn retain_valid(&self, view: &View) {
        let out = self.pool().retain(|key, tunnel| is_valid(view, key, tunnel));
        self.retired(&out);
    }

    /// Drops tunnels that have been idle for long.
    pub fn expire(&self) {
        let out = self.pool().expire(Instant::now());
        self.retired(&out);
    }

    /// Drops all.
    pub fn clear(&self) {
        let out = self.pool().retain(|_, _| false);
        self.retired(&out);
    }

    /// Number of tunnels.
    pub fn len(&self) -> usize {
        self.pool().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn retired(&self, tunnels: &[Tunnel]) {
        for tunnel in tunnels {
            tunnel.open.store(false, Ordering::Relaxed);
        }
    }

    fn pool(&self) -> MutexGuard<'_, Pool<Tunnel, WaitFor>> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn tunnel(self: &Arc<Self>, target: &Target) -> Result<(Lease, Tunnel), OpenError> {
        loop {
            let mut sender = None;
            let checkout = self.pool().checkout(&target.key, || {
                let (tx, rx) = watch::channel(None);
                sender = Some(tx);
                WaitFor(rx)
            });
            let attempt = match checkout {
                Checkout::Use(id, tunnel) => {
                    let lease = Lease { tunnels: Arc::clone(self), key: Arc::clone(&target.key), id };
                    return Ok((lease, tunnel));
                }
                Checkout::Refusing => return Err(OpenError::Refusing),
                Checkout::Full => return Err(OpenError::Full),
                Checkout::Wait(attempt) => attempt,
                Checkout::Dial(attempt) => {
                    if let Some(sender) = sender {
                        // A task of its own: others wait for this dial too, whatever becomes of the first caller.
                        tokio::spawn(Box::pin(Arc::clone(self).dial_for_all(target.clone(), sender)));
                    }
                    attempt
                }
            };
            wait(attempt).await.map_err(OpenError::Dial)?;
        }
    }

    async fn dial_for_all(self: Arc<Self>, target: Target, done: watch::Sender<DialResult>) {
        let mut under_way = UnderWay { tunnels: &self, key: &target.key, ended: false };
        let result = match self.dial_valid(&target).await {
            Ok((tunnel, driver)) => {
                count(&self.metrics.counters.tunnels_dialled);
                // No await before the pool has it: a change from here on finds it there.
                let id = self.pool().dialled(&target.key, tunnel.clone(), Instant::now());
                under_way.ended = true;
                let open = Arc::clone(&tunnel.open);
                tokio::spawn(Box::pin(Arc::clone(&self).drive(driver, Arc::clone(&target.key), id, open)));
                // The driver reads what came with the handshake. Without a look at it, everybody who waits would find no
                // tunnel and dial again, for ever.
                tokio::task::yield_now().await;
                if tunnel.is_open() { Ok(()) } else { Err(DialError::Unwilling { address: target.key.address }) }
            }
            Err(error) => Err(error),
        };
        if result.is_err() {
            count(&self.metrics.counters.tunnel_failures);
        }
        drop(under_way);
        done.send_replace(Some(result.map_err(Arc::new)));
    }

    /// Dials until the tunnel is one that may take connections: [`Self::retain_valid`] sees only those in the pool, so
    /// that a change while it is dialled would be missed.
    async fn dial_valid(&self, target: &Target) -> Result<(Tunnel, Driver), DialError> {
        for _ in 0..MAX_DIALS {
            let view = self.shared.view.load_full();
            if !is_wanted(&view, &target.key) {
                break;
            }
            let (tunnel, driver) = self.dial(&view, target).await?;
            if is_valid(&self.shared.view.load(), &target.key, &tunnel) {
                return Ok((tunnel, driver));
            }
        }
        Err(DialError::Outdated { address: target.key.address })
    }

    async fn dial(&self, view: &View, target: &Target) -> Result<(Tunnel, Driver), DialError> {
        let address = target.key.address;
        let identity = certificate(view, &target.key.source_identity)?;
        let connect_error = |source| DialError::Connect { address, source };
        let socket = self.namespaces.socket(target.source.netns.as_fd(), address.ip()).map_err(connect_error)?;
        keep_alive(&SockRef::from(&socket)).map_err(connect_error)?;
        let tcp = connect(socket, address).await.map_err(connect_error)?;
        let config = tls::client_config(&identity, &view.roots, target.key.expected.clone())
            .map_err(|error| DialError::Tls { address, source: io::Error::other(error) })?;
        // The name is neither sent nor compared: who the server must be is in the configuration.
        let name = ServerName::from(address.ip());
        let handshake = TlsConnector::from(config).connect(name, TunnelSocket::new(tcp));
        let tls = timeout(HANDSHAKE_TIMEOUT, handshake)
            .await
            .map_err(|_| DialError::Slow { address, what: "TLS handshake" })?
            .map_err(|source| DialError::Tls { address, source: tls::plainly(source) })?;
        let session = tls.get_ref().1;
        if session.alpn_protocol() != Some(tls::ALPN_H2) {
            return Err(DialError::Tls { address, source: io::Error::other("peer does not speak h2") });
        }
        let server = PeerProof::new(session.peer_certificates(), PeerRole::Server, Arc::clone(&view.roots))
            .map_err(|error| DialError::Tls { address, source: io::Error::other(error) })?;
        let (send, connection) = timeout(HANDSHAKE_TIMEOUT, builder().handshake(Turns::new(tls)))
            .await
            .map_err(|_| DialError::Slow { address, what: "HTTP/2 preface" })?
            .map_err(|source| DialError::Http2 { address, source })?;
        let windows = Windows::new(STREAM_WINDOW, Instant::now());
        let tunnel = Tunnel {
            send,
            pressure: windows.pressure(),
            open: Arc::new(AtomicBool::new(true)),
            identity,
            roots: Arc::clone(&view.roots),
            server: Arc::new(server),
        };
        Ok((tunnel, Driver { connection, windows }))
    }

    /// Runs a tunnel until its end.
    async fn drive(self: Arc<Self>, mut driver: Driver, key: Arc<PoolKey>, id: TunnelId, open: Arc<AtomicBool>) {
        self.metrics.counters.tunnels.fetch_add(1, Ordering::Relaxed);
        let pings = driver.connection.ping_pong();
        tokio::select! {
            result = driver.run() => {
                if let Err(error) = result {
                    tracing::debug!(address = %key.address, %error, "tunnel ended");
                }
            }
            () = async {
                match pings {
                    Some(pings) => until_dead(pings).await,
                    None => std::future::pending().await,
                }
            } => tracing::debug!(address = %key.address, "tunnel does not answer pings"),
        }
        open.store(false, Ordering::Relaxed);
        self.pool().closed(&key, id);
        self.metrics.counters.tunnels.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What makes a tunnel go.
struct Driver {
    connection: h2::client::Connection<Turns<TlsStream<TunnelSocket>>, Bytes>,
    windows: Windows,
}

impl Driver {
    async fn run(&mut self) -> Result<(), h2::Error> {
        loop {
            tokio::select! {
                ended = &mut self.connection => return ended,
                window = self.windows.due() => {
                    let sent = self.connection.set_initial_window_size(window);
                    self.windows.changed(window, &sent, Instant::now());
                }
            }
        }
    }
}

fn builder() -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_BYTES)
        .max_header_list_size(RESPONSE_HEADER_BYTES)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .initial_max_send_streams(CLIENT_STREAMS as usize)
        .data_frame_budget(FRAME_OVERHEAD_BYTES)
        .enable_push(false);
    builder
}

async fn wait(WaitFor(mut attempt): WaitFor) -> Result<(), Arc<DialError>> {
    match attempt.wait_for(Option::is_some).await {
        Ok(result) => result.clone().unwrap_or(Ok(())),
        Err(_) => Err(Arc::new(DialError::Abandoned)),
    }
}

async fn ask(tunnel: &mut Tunnel, request: Request<()>) -> Result<(StatusCode, Stream), h2::Error> {
    std::future::poll_fn(|cx| tunnel.send.poll_ready(cx)).await?;
    let (response, send) = tunnel.send.send_request(request, false)?;
    let (head, recv) = response.await?.into_parts();
    Ok((head.status, Stream { send, recv, share: Share::new(Arc::clone(&tunnel.pressure)) }))
}

/// The stream was certainly not carried, or nobody has sent a byte on it yet; a fresh tunnel may work.
fn another_tunnel_may_do(error: &h2::Error) -> bool {
    error.is_io() || error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM)
}

fn is_valid(view: &View, key: &PoolKey, tunnel: &Tunnel) -> bool {
    view.certs.get(&key.source_identity).is_some_and(|cert| Arc::ptr_eq(cert, &tunnel.identity))
        && Arc::ptr_eq(&view.roots, &tunnel.roots)
        && is_wanted(view, key)
}

/// Whether both ends are still there.
fn is_wanted(view: &View, key: &PoolKey) -> bool {
    view.enrolled.contains_key(&key.source) && view.snapshot.workload(&key.destination).is_some()
}
