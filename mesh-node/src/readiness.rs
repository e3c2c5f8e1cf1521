//! Whether this node proxy may be counted on: port 15021.

use http::StatusCode;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::http_server::{self, Answer};

/// The path that Istio's probes ask for.
const PATH: &str = "/healthz/ready";

/// What readiness waits for; ready when that is nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Readiness {
    /// In words, e.g. `configuration`.
    pub waiting_for: Vec<String>,
}

impl Readiness {
    /// Whether it waits for nothing.
    pub fn is_ready(&self) -> bool {
        self.waiting_for.is_empty()
    }
}

/// Serves `/healthz/ready` until cancelled: 200, or 503 with what is waited for.
pub async fn serve(listener: TcpListener, readiness: watch::Receiver<Readiness>, cancel: CancellationToken) {
    let answer = move |request: http_server::Request| {
        let answer = match request.uri.path() {
            PATH => {
                let now = readiness.borrow();
                if now.is_ready() {
                    Answer::text(StatusCode::OK, "ready")
                } else {
                    Answer::text(
                        StatusCode::SERVICE_UNAVAILABLE,
                        format_args!("waiting for {}", now.waiting_for.join(", ")),
                    )
                }
            }
            other => Answer::text(StatusCode::NOT_FOUND, format_args!("no page {other}; there is {PATH}")),
        };
        std::future::ready(answer)
    };
    http_server::serve(listener, answer, cancel).await;
}
