//! The gRPC port: our own accept loop and TLS 1.3.
//!
//! The accept loop belongs to us because a server that stops accepting at the first error of `accept(2)` can be stopped by
//! anybody who opens enough connections (RUSTSEC-2024-0376). Handshakes run side by side, bounded in number and time.

use std::io;
use std::net::SocketAddr;
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
/// Handshakes at once.
const MAX_HANDSHAKES: usize = 256;
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
        let acceptor = self.acceptor.clone();
        let handshake = async move {
            // A failure shows in the handshake.
            let _ = tcp.set_nodelay(true);
            match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(tcp)).await {
                Ok(Ok(tls)) => Ok(Connection { tls, peer, _permit: permit }),
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
