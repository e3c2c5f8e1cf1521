//! Metrics of enrolment, with ztunnel's names where it has them.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Counts of workloads and messages.
#[derive(Debug, Clone, Default)]
pub struct EnrolMetrics {
    /// Workloads that are served.
    pub active: Gauge,
    /// Workloads that the agent announced and that are not served.
    pub pending: Gauge,
    /// Workloads that were enrolled or adopted since the start.
    pub started: Counter,
    /// Workloads that left since the start.
    pub stopped: Counter,
    /// Messages of the agent that were refused.
    pub bad_messages: Counter,
}

impl EnrolMetrics {
    /// Metrics that `registry` shows.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let workloads = registry.sub_registry_with_prefix("workload_manager");
        workloads.register("active_proxy_count", "Workloads that are served", metrics.active.clone());
        workloads.register("pending_proxy_count", "Workloads that wait to be served", metrics.pending.clone());
        workloads.register("proxies_started", "Workloads that were enrolled", metrics.started.clone());
        workloads.register("proxies_stopped", "Workloads that left", metrics.stopped.clone());
        registry.register("mesh_enrolment_bad_messages", "Refused messages of the agent", metrics.bad_messages.clone());
        metrics
    }
}
