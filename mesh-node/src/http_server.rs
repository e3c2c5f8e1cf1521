//! A small HTTP/1.1 server for the admin socket, the metrics port and the readiness port.
//!
//! Connections are polled by the server's own task, a bounded number of them, each for a bounded time. Where anybody can
//! connect, the oldest make room for new ones: connections that say nothing cannot keep a probe waiting.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{AbortHandle, Abortable};
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

/// Connections at once.
const MAX_CONNECTIONS: usize = 32;
/// Connections of one address at once; probes and scrapers have one or two.
const MAX_CONNECTIONS_PER_ADDRESS: usize = 8;
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

/// What is done when there are as many connections as there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// New ones wait in the kernel's backlog: who connects is trusted to come to an end.
    Wait,
    /// The oldest are closed.
    Shed,
}

/// Where connections come from.
pub trait Listener: Send {
    /// A connection.
    type Io: AsyncRead + AsyncWrite + Send + Unpin + 'static;
    /// Who is turned away when there are too many.
    const WHEN_FULL: WhenFull;
    /// The next one, and the address that it comes from, if it has one.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Io, Option<IpAddr>)>> + Send;
}

impl Listener for UnixListener {
    type Io = tokio::net::UnixStream;
    const WHEN_FULL: WhenFull = WhenFull::Wait;

    async fn accept(&self) -> io::Result<(Self::Io, Option<IpAddr>)> {
        Ok((Self::accept(self).await?.0, None))
    }
}

impl Listener for TcpListener {
    type Io = tokio::net::TcpStream;
    const WHEN_FULL: WhenFull = WhenFull::Shed;

    async fn accept(&self) -> io::Result<(Self::Io, Option<IpAddr>)> {
        let (tcp, peer) = Self::accept(self).await?;
        Ok((tcp, Some(peer.ip().to_canonical())))
    }
}

/// An open connection; dropping its future closes it.
struct Open {
    id: u64,
    peer: Option<IpAddr>,
    close: AbortHandle,
}

/// Which connection makes room for another one from `peer`, if one must: an address gives up its own oldest first, then
/// whoever has most. `open` is in the order of age, the oldest first.
fn to_shed(open: &[Option<IpAddr>], peer: Option<IpAddr>) -> Option<usize> {
    let count = |of: Option<IpAddr>| open.iter().filter(|peer| **peer == of).count();
    let crowded = if count(peer) >= MAX_CONNECTIONS_PER_ADDRESS {
        peer
    } else if open.len() >= MAX_CONNECTIONS {
        // Of several the first: the list is in the order of age, and the last maximum would be a young one.
        open.iter().copied().rev().max_by_key(|peer| count(*peer))?
    } else {
        return None;
    };
    open.iter().position(|peer| *peer == crowded)
}

/// Serves until cancelled.
pub async fn serve<L: Listener, F>(
    listener: L,
    answer: impl Fn(Request) -> F + Send + Sync + 'static,
    cancel: CancellationToken,
) where
    F: Future<Output = Answer> + Send + 'static,
{
    let answer = Arc::new(answer);
    let mut connections = FuturesUnordered::new();
    let mut open: Vec<Open> = Vec::new();
    let mut next_id = 0;
    loop {
        let may_accept = L::WHEN_FULL == WhenFull::Shed || open.len() < MAX_CONNECTIONS;
        tokio::select! {
            () = cancel.cancelled() => return,
            Some(ended) = connections.next() => open.retain(|one| one.id != ended),
            accepted = listener.accept(), if may_accept => match accepted {
                Ok((io, peer)) => {
                    if L::WHEN_FULL == WhenFull::Shed {
                        make_room(&mut open, peer);
                    }
                    let (id, (close, closed)) = (next_id, AbortHandle::new_pair());
                    next_id += 1;
                    open.push(Open { id, peer, close });
                    let served = Abortable::new(connection(io, Arc::clone(&answer)), closed);
                    // How it ended makes no difference.
                    connections.push(Box::pin(served.map(move |_| id)));
                }
                Err(error) => {
                    tracing::debug!(%error, "accept");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

fn make_room(open: &mut Vec<Open>, peer: Option<IpAddr>) {
    let peers: Vec<_> = open.iter().map(|one| one.peer).collect();
    if let Some(at) = to_shed(&peers, peer) {
        let shed = open.remove(at);
        tracing::debug!(peer = ?shed.peer, "connection closed to make room");
        shed.close.abort();
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

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpSocket, TcpStream};

    use super::*;

    fn address(last: u8) -> IpAddr {
        Ipv4Addr::new(127, 0, 0, last).into()
    }

    #[test]
    fn an_address_with_too_many_gives_up_its_oldest_and_then_whoever_has_most() {
        let check = |open: &[u8], peer: u8, expected: Option<usize>| {
            let open: Vec<_> = open.iter().map(|last| Some(address(*last))).collect();
            assert_eq!(to_shed(&open, Some(address(peer))), expected, "{open:?}");
        };
        check(&[], 1, None);
        check(&[1; 7], 1, None);
        check(&[[2].as_slice(), &[1; 8]].concat(), 1, Some(1));
        check(&[[2].as_slice(), &[1; 8]].concat(), 3, None);
        let all_alone: Vec<u8> = (1..=32).collect();
        check(&all_alone, 99, Some(0));
        check(&[&all_alone[..29], &[77; 3]].concat(), 99, Some(29));
    }

    async fn dial(from: IpAddr, to: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().expect("socket");
        socket.bind(SocketAddr::new(from, 0)).expect("bind");
        socket.connect(to).await.expect("connect")
    }

    #[tokio::test]
    async fn connections_that_say_nothing_do_not_keep_a_probe_waiting() {
        let listener = TcpListener::bind((address(1), 0)).await.expect("listen");
        let to = listener.local_addr().expect("address");
        let cancel = CancellationToken::new();
        let answer = |_: Request| std::future::ready(Answer::text(StatusCode::OK, "ready"));
        let server = tokio::spawn(serve(listener, answer, cancel.clone()));
        let mut silent = Vec::new();
        for number in 0..100 {
            // Ten of one address, and many addresses.
            silent.push(dial(address(2 + number / 10), to).await);
        }
        let mut probe = dial(address(200), to).await;
        probe.write_all(b"GET / HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n").await.expect("ask");
        let mut heard = String::new();
        // Silent connections are ended by themselves after this time.
        timeout(HEADER_TIMEOUT / 2, probe.read_to_string(&mut heard)).await.expect("in time").expect("an answer");
        assert!(heard.starts_with("HTTP/1.1 200"), "{heard}");
        let mut oldest = silent.swap_remove(0);
        assert_eq!(oldest.read(&mut [0]).await.expect("closed"), 0, "the oldest made room");
        cancel.cancel();
        server.await.expect("ends");
    }
}
