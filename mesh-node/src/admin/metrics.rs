//! The metrics port: Prometheus text, and what is read when it is asked for.

use std::fmt;
use std::sync::Arc;

use http::StatusCode;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::kernel::verdict_name;
use crate::capture::{CaptureError, Count};
use crate::http_server::{self, Answer, Request};
use crate::xds::XdsStatus;

/// The paths: Prometheus' usual one and Istio's.
const PATHS: [&str; 3] = ["/metrics", "/stats/prometheus", "/stats"];
/// OpenMetrics, as the encoder writes it.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Component of `istio_build`: what Istio's dashboards look for.
const COMPONENT: &str = "ztunnel";

/// Shows what was built.
pub fn build(registry: &mut Registry) {
    let build = Family::<[(&str, &str); 2], Gauge>::default();
    build.get_or_create(&[("component", COMPONENT), ("tag", env!("CARGO_PKG_VERSION"))]).set(1);
    registry.register("istio_build", "Component and version", build);
}

/// What the kernel programs counted.
#[derive(Debug, Default)]
pub struct KernelCounts {
    /// Outcomes that occurred, by hook and reason.
    pub outcomes: Vec<Count>,
    /// Events that were counted and not sent.
    pub suppressed_events: u64,
}

/// Reads what the kernel programs counted.
pub type ReadKernel = Box<dyn Fn() -> Result<KernelCounts, CaptureError> + Send + Sync>;

/// Counts of parts that keep them for other purposes too.
pub struct PartCounts {
    /// The controller's stream.
    pub xds: watch::Receiver<XdsStatus>,
    /// The kernel programs.
    pub kernel: ReadKernel,
}

impl fmt::Debug for PartCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PartCounts").finish_non_exhaustive()
    }
}

impl Collector for PartCounts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let refused = self.xds.borrow().refused;
        counter(&mut encoder, "mesh_xds_resources_refused", "Resources of the controller that were refused", refused)?;
        match (self.kernel)() {
            Ok(counts) => kernel(&mut encoder, &counts),
            Err(error) => {
                // The other metrics are good.
                tracing::warn!(%error, "counters of the kernel programs cannot be read");
                Ok(())
            }
        }
    }
}

fn kernel(encoder: &mut DescriptorEncoder<'_>, counts: &KernelCounts) -> Result<(), fmt::Error> {
    let help = "Outcomes in the kernel since its maps were made: connections at connect, segments elsewhere";
    let mut outcomes = encoder.encode_descriptor("mesh_kernel_outcomes", help, None, MetricType::Counter)?;
    for count in &counts.outcomes {
        let labels =
            [("hook", count.hook.name()), ("reason", count.reason.name()), ("verdict", verdict_name(count.verdict))];
        outcomes.encode_family(&labels)?.encode_counter::<[(&str, &str); 0], u64, f64>(&count.count, None)?;
    }
    counter(
        encoder,
        "mesh_kernel_events_suppressed",
        "Drops and refusals in the kernel that were counted and not reported one by one",
        counts.suppressed_events,
    )
}

fn counter(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> Result<(), fmt::Error> {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    metric.encode_counter::<[(&str, &str); 0], u64, f64>(&value, None)
}

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

#[cfg(test)]
mod tests {
    use mesh_ebpf_common::outcome::{Hook, Reason};

    use super::*;

    fn text(status: XdsStatus, kernel: ReadKernel) -> String {
        let mut registry = Registry::default();
        let (_sender, xds) = watch::channel(status);
        registry.register_collector(Box::new(PartCounts { xds, kernel }));
        encode(&registry).expect("text")
    }

    #[test]
    fn outcomes_in_the_kernel_are_shown_by_hook_and_reason() {
        let outcome = |reason: Reason, count| Count { hook: Hook::Egress, reason, verdict: reason.verdict(), count };
        let outcomes = vec![outcome(Reason::ForeignSocket, 5), outcome(Reason::Preexisting, 2)];
        let shown = text(
            XdsStatus::default(),
            Box::new(move || Ok(KernelCounts { outcomes: outcomes.clone(), ..KernelCounts::default() })),
        );
        for labels in ["reason=\"foreign_socket\",verdict=\"drop\"} 5", "reason=\"preexisting\",verdict=\"pass\"} 2"] {
            let line = format!("mesh_kernel_outcomes_total{{hook=\"tc_egress\",{labels}");
            assert!(shown.lines().any(|shown| shown == line), "no `{line}` in\n{shown}");
        }
    }

    #[test]
    fn what_was_refused_and_what_was_not_reported_is_shown() {
        let status = XdsStatus { refused: 3, ..XdsStatus::default() };
        let shown = text(status, Box::new(|| Ok(KernelCounts { suppressed_events: 7, ..KernelCounts::default() })));
        for line in ["mesh_xds_resources_refused_total 3", "mesh_kernel_events_suppressed_total 7"] {
            assert!(shown.lines().any(|shown| shown == line), "no `{line}` in\n{shown}");
        }
    }

    #[test]
    fn a_kernel_that_cannot_be_read_hides_nothing_else() {
        let shown = text(XdsStatus::default(), Box::new(|| Err(CaptureError::NoObject)));
        assert!(shown.contains("mesh_xds_resources_refused_total 0") && !shown.contains("mesh_kernel"), "{shown}");
    }
}
