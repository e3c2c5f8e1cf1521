//! Metrics of the controller's stream, with ztunnel's names and labels.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::{Registry, Unit};

use super::TYPES;

/// Type of resources.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TypeLabel {
    url: &'static str,
}

/// Why a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Termination {
    /// The controller could not be reached, or did not take the stream.
    ConnectionError,
    /// It broke.
    Error,
    /// The controller ended it, as it does now and then to spread its load.
    Reconnect,
    /// This process ends.
    Complete,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TerminationLabel {
    reason: Termination,
}

/// Messages and streams.
#[derive(Debug, Clone, Default)]
pub struct XdsMetrics {
    messages: Family<TypeLabel, Counter>,
    bytes: Family<TypeLabel, Counter>,
    terminations: Family<TerminationLabel, Counter>,
}

impl XdsMetrics {
    /// Metrics that `registry` shows.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let istio = registry.sub_registry_with_prefix("istio");
        istio.register("xds_message", "Messages of the controller", metrics.messages.clone());
        istio.register_with_unit("xds_message", "Bytes of these messages", Unit::Bytes, metrics.bytes.clone());
        let help = "Streams from the controller that ended, or did not come up";
        istio.register("xds_connection_terminations", help, metrics.terminations.clone());
        metrics
    }

    /// A message came. Of types that were not asked for nothing is counted: a peer does not choose our labels.
    pub(super) fn message(&self, type_url: &str, bytes: usize) {
        let Some(url) = TYPES.into_iter().find(|known| *known == type_url) else { return };
        self.messages.get_or_create(&TypeLabel { url }).inc();
        self.bytes.get_or_create(&TypeLabel { url }).inc_by(bytes as u64);
    }

    /// A stream ended.
    pub(super) fn ended(&self, reason: Termination) {
        self.terminations.get_or_create(&TerminationLabel { reason }).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_ztunnels() {
        let mut registry = Registry::default();
        let metrics = XdsMetrics::register(&mut registry);
        metrics.message("type.googleapis.com/istio.workload.Address", 40);
        metrics.message("type.googleapis.com/istio.workload.Address", 2);
        metrics.message("type.googleapis.com/not.asked.For", 1);
        metrics.ended(Termination::ConnectionError);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("text");
        let lines: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            lines,
            [
                "istio_xds_message_total{url=\"type.googleapis.com/istio.workload.Address\"} 2",
                "istio_xds_message_bytes_total{url=\"type.googleapis.com/istio.workload.Address\"} 42",
                "istio_xds_connection_terminations_total{reason=\"ConnectionError\"} 1",
            ],
            "{text}"
        );
    }
}
