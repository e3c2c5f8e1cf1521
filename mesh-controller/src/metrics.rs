//! Counters of the control plane, by Istio's names where Istio has one. Labels come from closed sets only.

use std::sync::Mutex;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// All metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Mutex<Registry>,
    /// `pilot_xds_pushes_total{type}`: responses sent.
    pub pushes: Family<TypeLabel, Counter>,
    /// `pilot_total_xds_rejects_total`: responses that a node refused in part or whole.
    pub rejects: Counter,
    /// `pilot_xds`: streams now.
    pub connected: Gauge,
    /// `citadel_server_success_cert_issuance_count_total`.
    pub certificates: Counter,
    /// `mesh_refused_total{what}`: tokens, CSRs, handshakes and connections.
    pub refused: Family<RefusalLabel, Counter>,
    /// `galley_validation_passed_total`: objects that may be written.
    pub objects_taken: Counter,
    /// `galley_validation_failed_total`: objects that may not.
    pub objects_refused: Counter,
    /// `mesh_config_errors`: problems of severity error now.
    pub config_errors: Gauge,
    /// `mesh_config_resources{type}`.
    pub resources: Family<TypeLabel, Gauge>,
}

/// Resource type.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TypeLabel {
    /// `Address` or `Authorization`.
    pub r#type: &'static str,
}

/// What was refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RefusalLabel {
    /// `token`, `csr`, `handshake`, `accept`, `rate`.
    pub what: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let pushes = Family::default();
        let rejects = Counter::default();
        let connected = Gauge::default();
        let certificates = Counter::default();
        let refused = Family::default();
        let objects_taken = Counter::default();
        let objects_refused = Counter::default();
        let config_errors = Gauge::default();
        let resources = Family::default();
        registry.register("pilot_xds_pushes", "Responses sent to node proxies", pushes.clone());
        registry.register("pilot_total_xds_rejects", "Responses with refused resources", rejects.clone());
        registry.register("pilot_xds", "Connected node proxies", connected.clone());
        registry.register("citadel_server_success_cert_issuance_count", "Certificates issued", certificates.clone());
        registry.register("mesh_refused", "Refused tokens, requests and connections", refused.clone());
        registry.register("galley_validation_passed", "Objects that the webhook lets in", objects_taken.clone());
        registry.register("galley_validation_failed", "Objects that the webhook refuses", objects_refused.clone());
        registry.register(
            "mesh_config_errors",
            "Configuration objects and files that are not applied",
            config_errors.clone(),
        );
        registry.register("mesh_config_resources", "Published resources", resources.clone());
        Self {
            registry: Mutex::new(registry),
            pushes,
            rejects,
            connected,
            certificates,
            refused,
            objects_taken,
            objects_refused,
            config_errors,
            resources,
        }
    }
}

impl Metrics {
    /// Counts a refusal.
    pub fn refuse(&self, what: &'static str) {
        self.refused.get_or_create(&RefusalLabel { what }).inc();
    }

    /// Prometheus' text form.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        encode(&mut text, &registry).expect("writing to a string cannot fail");
        text
    }
}
