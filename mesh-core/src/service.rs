//! Services: names and virtual addresses in front of workloads (domain form of `istio.workload.Service`).

use std::net::IpAddr;
use std::sync::Arc;

use crate::workload::{GatewayAddress, PortMapping, ServiceName};

/// A service. Immutable once in a snapshot. Its endpoints are the workloads that name it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Service {
    /// Key: namespace and hostname.
    pub key: ServiceName,
    /// Short name.
    pub name: Arc<str>,
    /// Virtual addresses with their network (empty: the default one); none for a headless service.
    pub vips: Vec<(Arc<str>, IpAddr)>,
    /// Ports; `target_port` 0 means that each endpoint says.
    pub ports: Vec<PortMapping>,
    /// Identities that an endpoint may present in place of its workload's.
    pub subject_alt_names: Vec<Arc<str>>,
    /// Waypoint that clients must go through.
    pub waypoint: Option<GatewayAddress>,
    /// Preference by place.
    pub load_balancing: Option<LoadBalancing>,
}

/// Preference by place (`trafficDistribution`, `internalTrafficPolicy`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LoadBalancing {
    /// What to match on, most important first.
    pub preference: Vec<Scope>,
    /// What to do with endpoints that do not match all.
    pub mode: LbMode,
    /// Which endpoints count.
    pub health: HealthPolicy,
}

/// What two places may have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// Region.
    Region,
    /// Zone.
    Zone,
    /// Subzone.
    Subzone,
    /// Node.
    Node,
    /// Cluster.
    Cluster,
    /// Network.
    Network,
}

/// What a preference means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LbMode {
    /// Only endpoints that match every scope (`internalTrafficPolicy: Local`).
    Strict,
    /// The best rank that has endpoints (`trafficDistribution`).
    Failover,
    /// Go to the address that was asked for.
    Passthrough,
}

/// Which endpoints take traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum HealthPolicy {
    /// Ready ones.
    #[default]
    OnlyHealthy,
    /// All (`publishNotReadyAddresses`).
    AllowAll,
}
