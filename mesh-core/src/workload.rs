//! Workloads: what runs, where, under which identity (domain form of `istio.workload.Workload`).

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::identity::SpiffeId;
use crate::policy::PolicyName;

/// A workload's unique name, for a pod `CLUSTER//Pod/NAMESPACE/NAME`. Never an address: addresses are used again.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkloadUid(pub Arc<str>);

/// `namespace/hostname` of a service.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    /// Namespace of the Service object.
    pub namespace: Arc<str>,
    /// Fully qualified, e.g. `web.default.svc.cluster.local`.
    pub hostname: Arc<str>,
}

/// How to reach a workload's node proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Tunnel {
    /// Not in the mesh: plain TCP.
    #[default]
    None,
    /// HBONE on port 15008.
    Hbone,
}

/// Whether the workload shares the node's network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum NetworkMode {
    /// A namespace of its own.
    #[default]
    Standard,
    /// The node's.
    HostNetwork,
}

/// Readiness of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Health {
    /// Takes new connections.
    #[default]
    Healthy,
    /// Ready no more, or not yet.
    Unhealthy,
}

/// What kind of object owns a workload, for telemetry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum WorkloadType {
    /// `Deployment` (also ReplicaSet, StatefulSet, DaemonSet).
    Deployment,
    /// `CronJob`.
    CronJob,
    /// A bare pod.
    #[default]
    Pod,
    /// `Job`.
    Job,
}

/// Where a workload runs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Locality {
    /// `topology.kubernetes.io/region`.
    pub region: Arc<str>,
    /// `topology.kubernetes.io/zone`.
    pub zone: Arc<str>,
    /// `topology.istio.io/subzone`.
    pub subzone: Arc<str>,
}

/// Port of a service as one endpoint serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortMapping {
    /// Port of the service.
    pub service_port: u16,
    /// Port of the workload; 0 where the endpoint does not serve it.
    pub target_port: u16,
    /// What is spoken on it.
    pub app_protocol: AppProtocol,
}

/// Declared protocol of a port (`appProtocol`, or the port name's prefix).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum AppProtocol {
    /// Not declared.
    #[default]
    Unknown,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
    /// gRPC.
    Grpc,
    /// Opaque TCP.
    Tcp,
    /// TLS, opaque.
    Tls,
}

/// Where a waypoint or a gateway listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GatewayAddress {
    /// Its address or service.
    pub destination: GatewayDestination,
    /// Its HBONE port.
    pub hbone_port: u16,
}

/// Address or name of a gateway.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GatewayDestination {
    /// In the local network or the named one.
    Address {
        /// Empty: the default network.
        network: Arc<str>,
        /// VIP or workload address.
        address: IpAddr,
    },
    /// A service.
    Hostname(ServiceName),
}

/// A running instance. Immutable once in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Workload {
    /// Key.
    pub uid: WorkloadUid,
    /// Pod name.
    pub name: Arc<str>,
    /// Trust domain, namespace and service account.
    pub identity: SpiffeId,
    /// At most one a family matters; the first is primary.
    pub addresses: Vec<IpAddr>,
    /// Name of a host behind an address that is not known, else empty.
    pub hostname: Arc<str>,
    /// Empty: the default network.
    pub network: Arc<str>,
    /// Empty: the local cluster.
    pub cluster: Arc<str>,
    /// Node it runs on; empty when not known.
    pub node: Arc<str>,
    /// How peers reach it.
    pub tunnel: Tunnel,
    /// It terminates HBONE itself.
    pub native_tunnel: bool,
    /// Whether it shares the node's namespace.
    pub network_mode: NetworkMode,
    /// `service.istio.io/canonical-name`.
    pub canonical_name: Arc<str>,
    /// `service.istio.io/canonical-revision`.
    pub canonical_revision: Arc<str>,
    /// Kind of the owner.
    pub workload_type: WorkloadType,
    /// Name of the owner.
    pub workload_name: Arc<str>,
    /// Topology.
    pub locality: Locality,
    /// Weight among the endpoints of a service; 0 takes no traffic.
    pub capacity: u32,
    /// Readiness.
    pub health: Health,
    /// Waypoint that inbound traffic must come through.
    pub waypoint: Option<GatewayAddress>,
    /// East-west gateway of another network.
    pub network_gateway: Option<GatewayAddress>,
    /// Policies that select it by name; all must be known before it accepts.
    pub policies: Vec<PolicyName>,
    /// Services that it is an endpoint of.
    pub services: BTreeMap<ServiceName, Vec<PortMapping>>,
}

impl WorkloadUid {
    /// Whether it names a Kubernetes pod (`CLUSTER//Pod/NAMESPACE/NAME`).
    pub fn is_pod(&self) -> bool {
        let mut segments = self.0.split('/').skip(1);
        segments.next() == Some("") && segments.next() == Some("Pod")
    }
}

impl Workload {
    /// Namespace, which is part of the identity.
    pub fn namespace(&self) -> &Arc<str> {
        &self.identity.namespace
    }

    /// HBONE address for the given workload address.
    pub fn hbone_addr(ip: IpAddr) -> SocketAddr {
        SocketAddr::new(ip, crate::flow::HBONE_PORT)
    }
}

impl fmt::Display for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
