//! Small HTTP/1.1 servers: the admin socket (JSON, Unix) and the metrics port (Prometheus text, TCP).
//!
//! Connections are polled by the server's own task, a bounded number of them, each for a bounded time.

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use http::{Method, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::time::{sleep, timeout};

/// Connections at once; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 32;
/// Life of a connection.
const MAX_AGE: Duration = Duration::from_secs(30);
/// Time for the head of a request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Wait after an error of `accept`.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// An answer to `GET path`.
#[derive(Debug)]
pub enum Answer {
    /// JSON text.
    Json(String),
    /// Plain text.
    Text(String),
    /// Not yet, and what is waited for.
    Unavailable(String),
    /// No such path; what there is.
    NotFound(&'static str),
}

/// Answers requests.
pub trait Pages: Send + Sync + 'static {
    /// Answers `GET path` (without its query).
    fn get(&self, path: &str) -> impl Future<Output = Answer> + Send;
}

/// A listener of either kind.
#[derive(Debug)]
pub enum Listener {
    /// Admin.
    Unix(UnixListener),
    /// Metrics.
    Tcp(TcpListener),
}

/// Listens on a Unix socket that only our user can use, in place of what an earlier process left there.
pub fn listen_unix(path: &Path) -> io::Result<Listener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) => {
            use std::os::unix::fs::FileTypeExt;
            if !found.file_type().is_socket() {
                return Err(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    "there is something there that is not a socket",
                ));
            }
            std::fs::remove_file(path)?;
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(Listener::Unix(listener))
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

impl Listener {
    async fn accept(&self) -> io::Result<Box<dyn Io>> {
        Ok(match self {
            Self::Unix(listener) => Box::new(listener.accept().await?.0),
            Self::Tcp(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

/// Serves until it is dropped.
pub async fn serve(listener: Listener, pages: Arc<impl Pages>) {
    let mut connections: FuturesUnordered<Pin<Box<dyn Future<Output = ()> + Send>>> = FuturesUnordered::new();
    loop {
        let may_accept = connections.len() < MAX_CONNECTIONS;
        tokio::select! {
            Some(()) = connections.next() => {}
            accepted = listener.accept(), if may_accept => match accepted {
                Ok(io) => connections.push(Box::pin(connection(io, pages.clone()))),
                Err(error) => {
                    tracing::debug!(%error, "admin accept");
                    sleep(ACCEPT_BACKOFF).await;
                }
            },
        }
    }
}

async fn connection(io: Box<dyn Io>, pages: Arc<impl Pages>) {
    let service = service_fn(move |request: http::Request<Incoming>| {
        let pages = pages.clone();
        async move {
            let answer = match *request.method() {
                Method::GET => pages.get(request.uri().path()).await,
                _ => return Ok(respond(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET\n".into())),
            };
            Ok::<_, Infallible>(match answer {
                Answer::Json(json) => respond(StatusCode::OK, "application/json", json),
                Answer::Text(text) => respond(StatusCode::OK, "text/plain; version=0.0.4", text),
                Answer::Unavailable(why) => respond(StatusCode::SERVICE_UNAVAILABLE, "text/plain", why + "\n"),
                Answer::NotFound(known) => respond(StatusCode::NOT_FOUND, "text/plain", format!("try {known}\n")),
            })
        }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    let served = timeout(MAX_AGE, http.serve_connection(TokioIo::new(io), service)).await;
    if let Ok(Err(error)) = served {
        tracing::debug!(%error, "admin connection");
    }
}

fn respond(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}
