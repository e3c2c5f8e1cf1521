//! A small HTTP/1.1 server for the admin socket, the metrics port and the readiness port.
//!
//! Connections are polled by the server's own task, a bounded number of them, each for a bounded time.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use http::{HeaderValue, Method, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Connections at once; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 32;
/// Life of a connection.
const MAX_AGE: Duration = Duration::from_secs(30);
/// Time for the head of a request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest body of a request, bytes.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// Pause after an error of `accept`.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A request with its whole body.
#[derive(Debug)]
pub struct Request {
    /// Method.
    pub method: Method,
    /// Path and query.
    pub uri: Uri,
    /// Body.
    pub body: Bytes,
}

impl Request {
    /// The value of a parameter of the query.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let pairs = self.uri.query().unwrap_or_default().split('&');
        pairs.filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name).map(|(_, value)| value)
    }
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Status.
    pub status: StatusCode,
    /// `content-type`.
    pub content_type: &'static str,
    /// Body.
    pub body: String,
}

impl Answer {
    /// JSON; a value that cannot be written is our fault, and says so.
    pub fn json(value: &impl serde::Serialize) -> Self {
        match serde_json::to_string(value) {
            Ok(body) => Self { status: StatusCode::OK, content_type: "application/json", body },
            Err(error) => Self::text(StatusCode::INTERNAL_SERVER_ERROR, error),
        }
    }

    /// A line of text.
    pub fn text(status: StatusCode, text: impl std::fmt::Display) -> Self {
        Self { status, content_type: "text/plain; charset=utf-8", body: format!("{text}\n") }
    }
}

/// Where connections come from.
pub trait Listener: Send {
    /// A connection.
    type Io: AsyncRead + AsyncWrite + Send + Unpin + 'static;
    /// The next one.
    fn accept(&self) -> impl Future<Output = io::Result<Self::Io>> + Send;
}

impl Listener for UnixListener {
    type Io = tokio::net::UnixStream;

    async fn accept(&self) -> io::Result<Self::Io> {
        Ok(Self::accept(self).await?.0)
    }
}

impl Listener for TcpListener {
    type Io = tokio::net::TcpStream;

    async fn accept(&self) -> io::Result<Self::Io> {
        Ok(Self::accept(self).await?.0)
    }
}

/// Serves until cancelled.
pub async fn serve<F>(
    listener: impl Listener,
    answer: impl Fn(Request) -> F + Send + Sync + 'static,
    cancel: CancellationToken,
) where
    F: Future<Output = Answer> + Send + 'static,
{
    let answer = Arc::new(answer);
    let mut connections: FuturesUnordered<Pin<Box<dyn Future<Output = ()> + Send>>> = FuturesUnordered::new();
    loop {
        let may_accept = connections.len() < MAX_CONNECTIONS;
        tokio::select! {
            () = cancel.cancelled() => return,
            Some(()) = connections.next() => {}
            accepted = listener.accept(), if may_accept => match accepted {
                Ok(io) => connections.push(Box::pin(connection(io, Arc::clone(&answer)))),
                Err(error) => {
                    tracing::debug!(%error, "accept");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

async fn connection<F>(io: impl AsyncRead + AsyncWrite + Unpin, answer: Arc<impl Fn(Request) -> F>)
where
    F: Future<Output = Answer>,
{
    let service = service_fn(|request: http::Request<Incoming>| async {
        let (head, body) = request.into_parts();
        let answer = match Limited::new(body, MAX_BODY_BYTES).collect().await {
            Ok(body) => answer(Request { method: head.method, uri: head.uri, body: body.to_bytes() }).await,
            Err(error) => Answer::text(StatusCode::PAYLOAD_TOO_LARGE, error),
        };
        let mut response = Response::new(Full::<Bytes>::from(answer.body));
        *response.status_mut() = answer.status;
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(answer.content_type));
        Ok::<_, Infallible>(response)
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    if let Ok(Err(error)) = timeout(MAX_AGE, http.serve_connection(TokioIo::new(io), service)).await {
        tracing::debug!(%error, "connection");
    }
}
