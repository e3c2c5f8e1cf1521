//! Whether this node proxy may be counted on: port 15021.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use http::StatusCode;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::http_server::{self, Answer};

/// The path that Istio's probes ask for.
const PATH: &str = "/healthz/ready";

/// Its parameter: the pod that is asked about. The next pod's proxy has the same port.
const POD: &str = "pod";
/// Time for an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// As much of an answer as says what is waited for.
const MAX_ANSWER_BYTES: u64 = 4096;

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

/// Asks the readiness port at an address about a pod's proxy.
pub fn ask(address: SocketAddr, pod: &str) -> anyhow::Result<ExitCode> {
    let ip = if address.ip().is_unspecified() { Ipv4Addr::LOCALHOST.into() } else { address.ip() };
    let address = SocketAddr::new(ip, address.port());
    let asked = || -> std::io::Result<String> {
        let mut connection = TcpStream::connect_timeout(&address, ANSWER_WITHIN)?;
        connection.set_read_timeout(Some(ANSWER_WITHIN))?;
        write!(connection, "GET {PATH}?{POD}={pod} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        connection.take(MAX_ANSWER_BYTES).read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = asked().with_context(|| format!("ask {address}"))?;
    ensure!(answer.starts_with("HTTP/1.1 200 "), "not ready: {}", answer.lines().last().unwrap_or_default());
    Ok(ExitCode::SUCCESS)
}

/// Serves `/healthz/ready` until cancelled: 200, or 503 with what is waited for, also when another pod is meant.
pub async fn serve(
    listener: TcpListener,
    readiness: watch::Receiver<Readiness>,
    pod: Arc<str>,
    cancel: CancellationToken,
) {
    let answer = move |request: http_server::Request| {
        let answer = match (request.uri.path(), request.parameter(POD)) {
            (PATH, Some(other)) if other != &*pod => {
                Answer::text(StatusCode::SERVICE_UNAVAILABLE, format_args!("this is the node proxy of pod {pod}"))
            }
            (PATH, _) => {
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
            (other, _) => Answer::text(StatusCode::NOT_FOUND, format_args!("no page {other}; there is {PATH}")),
        };
        std::future::ready(answer)
    };
    http_server::serve(listener, answer, cancel).await;
}
