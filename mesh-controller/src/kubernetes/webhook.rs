//! The server that the API server asks: HTTPS, one question a connection. What it answers is in [`super::admission`].
//!
//! An API server shows no certificate unless somebody configures it to, so anybody may ask. A question changes nothing and
//! its answer says nothing that is not in it; what a stranger can take is bounded: connections, the time of each, and
//! the room of bodies ([`super::bodies`]).

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, Stream, StreamExt};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_core::config::Settings;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tonic::transport::server::Connected;

use super::admission;
use super::bodies::{Bodies, Unread};
use crate::metrics::Metrics;
use crate::server::{Connection, Port, host_of};

/// Bounds of the port. Those who ask are a handful of API servers, each with a question for each object that is written.
pub const ADMISSION: Port = Port { protocol: b"http/1.1", connections: 256, per_peer: 64 };
/// The only path.
const PATH: &str = "/validate";
/// Time for a question and its answer: the longest that the chart lets an API server wait.
const WITHIN: Duration = Duration::from_secs(10);
/// Time for the head of a request.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
/// Bytes of a connection's buffer, which a request's head must fit in.
const BUFFER_BYTES: usize = 32 << 10;

/// Answers questions.
#[derive(Debug)]
pub struct Webhook {
    settings: Settings,
    metrics: Arc<Metrics>,
    bodies: Bodies,
}

type Answer = Response<Full<Bytes>>;

impl Webhook {
    /// One that judges as a mesh with these settings does.
    pub fn new(settings: Settings, metrics: Arc<Metrics>) -> Self {
        Self { settings, metrics, bodies: Bodies::new(ADMISSION.connections) }
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
        let host = host_of(connection.connect_info().address.ip());
        let service = service_fn(move |request| {
            let this = self.clone();
            async move { Ok::<_, Infallible>(this.answer(host, request).await) }
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

    async fn answer(self: Arc<Self>, host: IpAddr, request: Request<Incoming>) -> Answer {
        if request.uri().path() != PATH {
            return refuse(StatusCode::NOT_FOUND, &format!("there is only {PATH}"));
        }
        if request.method() != Method::POST {
            return refuse(StatusCode::METHOD_NOT_ALLOWED, "only POST");
        }
        let body = match self.bodies.read(host, request.into_body()).await {
            Ok(body) => body,
            Err(error) => {
                let status = match error {
                    Unread::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
                    Unread::TooSlow => StatusCode::REQUEST_TIMEOUT,
                    Unread::Broken(_) => StatusCode::BAD_REQUEST,
                };
                return refuse(status, &error.to_string());
            }
        };
        let settings = self.settings.clone();
        // A large object takes a while. It goes on without a connection, so the body's room goes with it.
        match spawn_blocking(move || admission::review(body.bytes(), &settings)).await {
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
