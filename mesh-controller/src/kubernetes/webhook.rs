//! The server that the API server asks: HTTPS, one question a connection. What it answers is in [`super::admission`].
//!
//! An API server shows no certificate unless somebody configures it to, so anybody may ask. A question changes nothing and
//! its answer says nothing that is not in it; what a stranger can take is bounded: connections, the time of each, and
//! the bytes of all bodies together.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, Stream, StreamExt};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_core::config::Settings;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::admission;
use crate::metrics::Metrics;
use crate::server::{Connection, Port};

/// Bounds of the port. Those who ask are a handful of API servers, each with a question for each object that is written.
pub const ADMISSION: Port = Port { protocol: b"http/1.1", connections: 256, per_peer: 64 };
/// The only path.
const PATH: &str = "/validate";
/// Time for a question and its answer: the longest that the chart lets an API server wait.
const WITHIN: Duration = Duration::from_secs(10);
/// Time for the head of a request.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
/// Bytes of a question. An API server takes requests of 3 MiB and stores objects of 1.5 MiB; a question may hold both.
const MAX_BODY_BYTES: usize = 6 << 20;
/// Bytes of all questions at once; the next ones wait.
const MAX_BODIES_BYTES: usize = 4 * MAX_BODY_BYTES;
/// Bytes of a connection's buffer, which a request's head must fit in.
const BUFFER_BYTES: usize = 32 << 10;

/// Answers questions.
#[derive(Debug)]
pub struct Webhook {
    settings: Settings,
    metrics: Arc<Metrics>,
    /// A permit is a byte of a body.
    room: Semaphore,
}

type Answer = Response<Full<Bytes>>;

impl Webhook {
    /// One that judges as a mesh with these settings does.
    pub fn new(settings: Settings, metrics: Arc<Metrics>) -> Self {
        Self { settings, metrics, room: Semaphore::new(MAX_BODIES_BYTES) }
    }

    /// Serves connections until it is dropped.
    pub async fn serve(self, connections: impl Stream<Item = io::Result<Connection>>) {
        let this = Arc::new(self);
        let mut connections = pin!(connections);
        let mut open = FuturesUnordered::new();
        loop {
            tokio::select! {
                Some(()) = open.next() => {}
                Some(accepted) = connections.next() => if let Ok(connection) = accepted {
                    open.push(this.clone().connection(connection));
                },
                // The accept loop has no end.
                else => return,
            }
        }
    }

    async fn connection(self: Arc<Self>, connection: Connection) {
        let service = service_fn(move |request| {
            let this = self.clone();
            async move { Ok::<_, Infallible>(this.answer(request).await) }
        });
        let mut http = http1::Builder::new();
        // A connection that is kept would be closed at the end of its time, perhaps just when a question comes.
        http.keep_alive(false).max_buf_size(BUFFER_BYTES).timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN);
        let served = timeout(WITHIN, http.serve_connection(TokioIo::new(connection), service)).await;
        match served {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "webhook connection"),
            Err(_) => tracing::debug!("webhook connection: too slow"),
        }
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Answer {
        if request.uri().path() != PATH {
            return refuse(StatusCode::NOT_FOUND, &format!("there is only {PATH}"));
        }
        if request.method() != Method::POST {
            return refuse(StatusCode::METHOD_NOT_ALLOWED, "only POST");
        }
        // What is not announced counts as the largest.
        let announced = request.body().size_hint().upper().unwrap_or(MAX_BODY_BYTES as u64);
        let Some(bytes) = u32::try_from(announced).ok().filter(|bytes| *bytes as usize <= MAX_BODY_BYTES) else {
            return refuse(StatusCode::PAYLOAD_TOO_LARGE, &format!("at most {MAX_BODY_BYTES} bytes"));
        };
        let Ok(_room) = self.room.acquire_many(bytes).await else {
            return refuse(StatusCode::SERVICE_UNAVAILABLE, "the controller ends");
        };
        let body = match Limited::new(request.into_body(), MAX_BODY_BYTES).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => return refuse(StatusCode::BAD_REQUEST, &format!("the body cannot be read: {error}")),
        };
        let settings = self.settings.clone();
        // A large object takes a while.
        match spawn_blocking(move || admission::review(&body, &settings)).await {
            Ok(Ok(answer)) => self.judged(&answer),
            Ok(Err(error)) => refuse(StatusCode::BAD_REQUEST, &error.to_string()),
            Err(error) => {
                tracing::error!(%error, "a question was not answered");
                refuse(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "the question was not answered; the controller's log says more",
                )
            }
        }
    }

    fn judged(&self, answer: &admission::Answer) -> Answer {
        match &answer.refusal {
            Some(_) => self.metrics.objects_refused.inc(),
            None => self.metrics.objects_taken.inc(),
        };
        respond(StatusCode::OK, "application/json", answer.to_json().to_string())
    }
}

fn refuse(status: StatusCode, why: &str) -> Answer {
    respond(status, "text/plain", format!("{why}\n"))
}

fn respond(status: StatusCode, kind: &'static str, body: String) -> Answer {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}
