//! Istio's TCP metrics and the data path's own, with a bounded number of series.
//!
//! Names and labels are ztunnel's. A label value never comes from what a peer merely says: workloads come from the
//! configuration, principals from verified certificates.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use mesh_core::flow::Refusal;
use mesh_core::identity::SpiffeId;
use mesh_core::service::Service;
use mesh_core::workload::Workload;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabel, EncodeLabelSet, LabelSetEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::connections::Connections;

/// Label sets kept at most; what comes on top goes to one series whose labels are all `unknown`.
const MAX_SERIES: usize = 10_000;
/// Scrapes that a series without a connection survives unchanged. At one scrape in 15 s this is half an hour.
const IDLE_SCRAPES: u32 = 120;

/// Which end reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The client's node proxy.
    Source,
    /// The server's node proxy.
    Destination,
}

/// How a connection ended early, in ztunnel's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ResponseFlags {
    /// It did not.
    #[default]
    None,
    /// Refused by policy.
    Deny,
    /// The other end could not be reached.
    Connect,
    /// The TLS handshake failed.
    TlsFailure,
    /// The HTTP/2 connection did not come up.
    H2HandshakeFailure,
    /// No certificate of our own.
    IdentityError,
    /// The identity was withdrawn while the connection lived.
    CertRevoked,
}

impl ResponseFlags {
    /// Label value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::CertRevoked => "CERT_REVOKED",
        }
    }
}

impl From<&Refusal> for ResponseFlags {
    fn from(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::NoAllowMatched
            | Refusal::Denied(_)
            | Refusal::PolicyMissing(_)
            | Refusal::ForeignTrustDomain(_) => Self::Deny,
            Refusal::UnknownWorkload(_)
            | Refusal::NoEndpoint(_)
            | Refusal::NoPort(..)
            | Refusal::ReservedPort(_)
            | Refusal::WaypointNotReady(_)
            | Refusal::SourceUnknown => Self::Connect,
        }
    }
}

/// One end of a connection, as labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Party {
    /// Owner's name.
    pub workload: Option<Arc<str>>,
    /// Canonical service.
    pub canonical: Option<Arc<str>>,
    /// Canonical revision.
    pub revision: Option<Arc<str>>,
    /// Namespace.
    pub namespace: Option<Arc<str>>,
    /// Verified identity.
    pub principal: Option<SpiffeId>,
    /// Cluster.
    pub cluster: Option<Arc<str>>,
}

impl Party {
    /// Labels of a workload and of the identity that it proved.
    pub fn new(workload: Option<&Workload>, principal: Option<&SpiffeId>, local_cluster: &Arc<str>) -> Self {
        let Some(workload) = workload else {
            return Self { principal: principal.cloned(), ..Self::default() };
        };
        let cluster = if workload.cluster.is_empty() { local_cluster } else { &workload.cluster };
        Self {
            workload: Some(Arc::clone(&workload.workload_name)),
            canonical: Some(Arc::clone(&workload.canonical_name)),
            revision: Some(Arc::clone(&workload.canonical_revision)),
            namespace: Some(Arc::clone(workload.namespace())),
            principal: principal.cloned(),
            cluster: Some(Arc::clone(cluster)),
        }
    }
}

/// The labels of a series.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Labels {
    /// Which end reports.
    pub reporter: Reporter,
    /// The client.
    pub source: Party,
    /// The server.
    pub destination: Party,
    /// Host name, namespace and short name of the service addressed.
    pub service: Option<[Arc<str>; 3]>,
    /// How it ended.
    pub flags: ResponseFlags,
    /// Both ends proved who they are.
    pub mutual_tls: bool,
}

impl Labels {
    /// Label form of a service.
    pub fn service_of(service: Option<&Service>) -> Option<[Arc<str>; 3]> {
        service.map(|s| [Arc::clone(&s.key.hostname), Arc::clone(&s.key.namespace), Arc::clone(&s.name)])
    }

    fn overflow() -> Self {
        Self {
            reporter: Reporter::Source,
            source: Party::default(),
            destination: Party::default(),
            service: None,
            flags: ResponseFlags::None,
            mutual_tls: false,
        }
    }
}

impl EncodeLabelSet for Labels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let mut put = |name: &str, value: &str| {
            let value = if value.is_empty() { "unknown" } else { value };
            (name, value).encode(encoder.encode_label())
        };
        let text = |value: &Option<Arc<str>>| value.clone().unwrap_or_default();
        let principal = |party: &Party| party.principal.as_ref().map(ToString::to_string).unwrap_or_default();
        put(
            "reporter",
            match self.reporter {
                Reporter::Source => "source",
                Reporter::Destination => "destination",
            },
        )?;
        put("source_workload", &text(&self.source.workload))?;
        put("source_canonical_service", &text(&self.source.canonical))?;
        put("source_canonical_revision", &text(&self.source.revision))?;
        put("source_workload_namespace", &text(&self.source.namespace))?;
        put("source_principal", &principal(&self.source))?;
        put("source_app", &text(&self.source.canonical))?;
        put("source_version", &text(&self.source.revision))?;
        put("source_cluster", &text(&self.source.cluster))?;
        let service = |index: usize| self.service.as_ref().map(|parts| Arc::clone(&parts[index])).unwrap_or_default();
        put("destination_service", &service(0))?;
        put("destination_service_namespace", &service(1))?;
        put("destination_service_name", &service(2))?;
        put("destination_workload", &text(&self.destination.workload))?;
        put("destination_canonical_service", &text(&self.destination.canonical))?;
        put("destination_canonical_revision", &text(&self.destination.revision))?;
        put("destination_workload_namespace", &text(&self.destination.namespace))?;
        put("destination_principal", &principal(&self.destination))?;
        put("destination_app", &text(&self.destination.canonical))?;
        put("destination_version", &text(&self.destination.revision))?;
        put("destination_cluster", &text(&self.destination.cluster))?;
        put("request_protocol", "tcp")?;
        put("response_flags", self.flags.as_str())?;
        put("connection_security_policy", if self.mutual_tls { "mutual_tls" } else { "unknown" })
    }
}

/// Counters of one label set. A connection holds its series, so that counting costs no look-up.
#[derive(Debug, Default)]
pub struct Series {
    /// Connections opened.
    pub opened: AtomicU64,
    /// Of these, closed.
    pub closed: AtomicU64,
    /// Connections that did not come about.
    pub failed: AtomicU64,
    /// Bytes from the server to the client (Istio counts for the server: istio#32399).
    pub sent: AtomicU64,
    /// Bytes from the client to the server.
    pub received: AtomicU64,
    idle_scrapes: AtomicU64,
    activity: AtomicU64,
}

impl Series {
    fn total(&self) -> u64 {
        [&self.opened, &self.closed, &self.failed, &self.sent, &self.received]
            .iter()
            .map(|counter| counter.load(Ordering::Relaxed))
            .fold(0, u64::wrapping_add)
    }
}

/// The data path's own counters.
#[derive(Debug, Default)]
pub struct Counters {
    /// Tunnels dialled and up.
    pub tunnels_dialled: AtomicU64,
    /// Tunnels that did not come up.
    pub tunnel_failures: AtomicU64,
    /// Tunnels now in pools.
    pub tunnels: AtomicI64,
    /// Tunnels accepted and up.
    pub tunnels_accepted: AtomicU64,
    /// TLS handshakes refused or failed on accepted connections.
    pub handshake_failures: AtomicU64,
    /// Requests answered 400.
    pub bad_requests: AtomicU64,
    /// Tunnels closed because the peer opened and reset too many streams.
    pub reset_floods: AtomicU64,
    /// Accepts that failed and were waited out.
    pub accept_failures: AtomicU64,
    /// Connections turned away because a bound was reached.
    pub connections_shed: AtomicU64,
    /// Live connections closed when judged again.
    pub connections_closed_by_change: AtomicU64,
    /// Dials that moved on to another endpoint.
    pub dial_retries: AtomicU64,
    /// Connections to the proxy's own ports that were not captured there.
    pub direct_dials: AtomicU64,
    /// Access log records dropped because the writer was behind.
    pub log_records_dropped: AtomicU64,
    /// Label sets beyond the bound.
    pub series_overflow: AtomicU64,
}

/// All metrics of the data path.
#[derive(Debug, Default)]
pub struct Metrics {
    series: Mutex<HashMap<Labels, Arc<Series>>>,
    live: RwLock<Vec<Weak<Connections>>>,
    /// The data path's own counters.
    pub counters: Counters,
}

impl Metrics {
    /// Empty metrics, encoded with `registry`.
    pub fn registered(registry: &mut Registry) -> Arc<Self> {
        let metrics = Arc::new(Self::default());
        registry.register_collector(Box::new(Arc::clone(&metrics)));
        metrics
    }

    /// Live connections whose bytes are added at each scrape.
    pub fn watch(&self, connections: &Arc<Connections>) {
        self.live.write().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(connections));
    }

    /// The series of a label set, or the common one when there are too many.
    pub fn series(&self, labels: Labels) -> Arc<Series> {
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = series.get(&labels) {
            return Arc::clone(known);
        }
        let labels = if series.len() < MAX_SERIES {
            labels
        } else {
            self.counters.series_overflow.fetch_add(1, Ordering::Relaxed);
            Labels::overflow()
        };
        Arc::clone(series.entry(labels).or_default())
    }

    /// Adds the bytes of live connections, and forgets series that nobody uses.
    fn settle(&self) -> Vec<(Labels, Arc<Series>)> {
        for connections in self.live.read().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade) {
            connections.flush_bytes();
        }
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        series.retain(|_, one| {
            let total = one.total();
            if Arc::strong_count(one) > 1 || one.activity.swap(total, Ordering::Relaxed) != total {
                one.idle_scrapes.store(0, Ordering::Relaxed);
                return true;
            }
            one.idle_scrapes.fetch_add(1, Ordering::Relaxed) < u64::from(IDLE_SCRAPES)
        });
        series.iter().map(|(labels, one)| (labels.clone(), Arc::clone(one))).collect()
    }
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let series = self.settle();
        let families: [(&str, &str, fn(&Series) -> &AtomicU64); 5] = [
            ("istio_tcp_connections_opened", "TCP connections opened", |s| &s.opened),
            ("istio_tcp_connections_closed", "TCP connections closed", |s| &s.closed),
            ("istio_tcp_connections_failed", "TCP connections that did not come about", |s| &s.failed),
            ("istio_tcp_sent_bytes", "Bytes sent by servers", |s| &s.sent),
            ("istio_tcp_received_bytes", "Bytes received by servers", |s| &s.received),
        ];
        for (name, help, field) in families {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, one) in &series {
                family
                    .encode_family(labels)?
                    .encode_counter::<[(&str, &str); 0], u64, f64>(&field(one).load(Ordering::Relaxed), None)?;
            }
        }
        self.encode_own(encoder, series.len())
    }
}

impl Metrics {
    fn encode_own(&self, mut encoder: DescriptorEncoder<'_>, series: usize) -> Result<(), fmt::Error> {
        let c = &self.counters;
        let counters: [(&str, &str, &AtomicU64); 13] = [
            ("mesh_tunnels_dialled", "Tunnels dialled and up", &c.tunnels_dialled),
            ("mesh_tunnel_failures", "Tunnels that did not come up", &c.tunnel_failures),
            ("mesh_tunnels_accepted", "Tunnels accepted and up", &c.tunnels_accepted),
            ("mesh_handshake_failures", "TLS handshakes that failed on accepted connections", &c.handshake_failures),
            ("mesh_bad_requests", "HBONE requests answered 400", &c.bad_requests),
            ("mesh_reset_floods", "Tunnels closed for too many reset streams", &c.reset_floods),
            ("mesh_accept_failures", "Accepts that failed and were waited out", &c.accept_failures),
            ("mesh_direct_dials", "Connections to the proxy's own ports that were not captured there", &c.direct_dials),
            ("mesh_connections_shed", "Connections turned away at a bound", &c.connections_shed),
            (
                "mesh_connections_closed_by_change",
                "Live connections closed when judged again",
                &c.connections_closed_by_change,
            ),
            ("mesh_dial_retries", "Dials that moved on to another endpoint, or were made again", &c.dial_retries),
            ("mesh_log_records_dropped", "Access log records dropped", &c.log_records_dropped),
            ("mesh_series_overflow", "Label sets beyond the bound", &c.series_overflow),
        ];
        for (name, help, counter) in counters {
            encoder
                .encode_descriptor(name, help, None, MetricType::Counter)?
                .encode_counter::<[(&str, &str); 0], u64, f64>(&counter.load(Ordering::Relaxed), None)?;
        }
        let open: u64 = self
            .live
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .filter_map(Weak::upgrade)
            .map(|connections| connections.len() as u64)
            .sum();
        let gauges: [(&str, &str, i64); 3] = [
            ("istio_tcp_sockets_open", "Connections that are carried now", i64::try_from(open).unwrap_or(i64::MAX)),
            ("mesh_tunnels", "Tunnels in pools", c.tunnels.load(Ordering::Relaxed)),
            ("mesh_metric_series", "Label sets kept", i64::try_from(series).unwrap_or(i64::MAX)),
        ];
        for (name, help, value) in gauges {
            encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)?;
        }
        Ok(())
    }
}

/// Adds one; the order between counters does not matter.
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Who has been complained about lately: the same peer and kind of error is logged once a minute.
#[derive(Debug, Default)]
pub struct LoggedPeers {
    seen: Mutex<HashMap<(IpAddr, &'static str), u64>>,
}

/// Peers remembered; when full, old ones are forgotten first and then all.
const MAX_LOGGED_PEERS: usize = 1024;
/// How long a peer is not complained about again.
const LOG_AGAIN_SECS: u64 = 60;

impl LoggedPeers {
    /// Whether to log this at `now_secs` (any monotonic clock).
    pub fn first(&self, peer: IpAddr, kind: &'static str, now_secs: u64) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.get(&(peer, kind)).is_some_and(|last| now_secs.saturating_sub(*last) < LOG_AGAIN_SECS) {
            return false;
        }
        if seen.len() >= MAX_LOGGED_PEERS {
            seen.retain(|_, last| now_secs.saturating_sub(*last) < LOG_AGAIN_SECS);
            if seen.len() >= MAX_LOGGED_PEERS {
                seen.clear();
            }
        }
        seen.insert((peer, kind), now_secs);
        true
    }
}
