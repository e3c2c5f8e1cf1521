//! The metrics port: Prometheus text.

use std::sync::Arc;

use http::StatusCode;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::http_server::{self, Answer, Request};

/// The paths: Prometheus' usual one and Istio's.
const PATHS: [&str; 3] = ["/metrics", "/stats/prometheus", "/stats"];
/// OpenMetrics, as the encoder writes it.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves until cancelled.
pub async fn serve(listener: TcpListener, registry: Arc<Registry>, cancel: CancellationToken) {
    let answer = move |request: Request| {
        let registry = Arc::clone(&registry);
        async move {
            if !PATHS.contains(&request.uri.path()) {
                let no_page = format!("no page {}; there is {}", request.uri.path(), PATHS[0]);
                return Answer::text(StatusCode::NOT_FOUND, no_page);
            }
            // Up to 10,000 series: long enough to keep a control thread from its other work.
            match tokio::task::spawn_blocking(move || encode(&registry)).await {
                Ok(Ok(body)) => Answer { status: StatusCode::OK, content_type: CONTENT_TYPE, body },
                Ok(Err(error)) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, error),
                Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, error),
            }
        }
    };
    http_server::serve(listener, answer, cancel).await;
}

fn encode(registry: &Registry) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry)?;
    Ok(text)
}
