//! One connection as the node proxy sees it, and what is decided about it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::identity::SpiffeId;
use crate::policy::PolicyName;
use crate::service::Service;
use crate::workload::Workload;

/// Outbound listener inside a workload's namespace.
pub const OUTBOUND_PORT: u16 = 15001;
/// Inbound plaintext listener inside a workload's namespace.
pub const INBOUND_PORT: u16 = 15006;
/// HBONE.
pub const HBONE_PORT: u16 = 15008;

/// Ports that no application traffic may name.
pub const RESERVED_PORTS: [u16; 3] = [OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT];

/// A captured connect.
#[derive(Debug, Clone)]
pub struct OutboundFlow {
    /// The workload that dialled.
    pub source: Arc<Workload>,
    /// What it dialled.
    pub destination: SocketAddr,
}

/// A connection that wants to reach a workload, just before the application is dialled; also the input when live
/// connections are judged again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InboundFlow {
    /// Verified by mTLS, or known from the enrolment of a workload on the same node. None: plaintext.
    pub client: Option<SpiffeId>,
    /// The client's address as the destination sees it.
    pub source: IpAddr,
    /// Address and port of the workload.
    pub destination: SocketAddr,
}

/// Carries out an outbound connection.
#[derive(Debug, Clone)]
pub enum Plan {
    /// Plain TCP to the address asked for (or to a workload that is not in the mesh).
    Passthrough {
        /// What to dial.
        destination: SocketAddr,
        /// What it is, where known, for telemetry.
        upstream: Option<Upstream>,
    },
    /// HBONE to the endpoint's node proxy.
    Tunnel(Upstream),
    /// The endpoint is enrolled on this node: authorize with both identities and relay.
    Local(Upstream),
    /// HBONE to a waypoint, with the original destination as authority.
    Waypoint {
        /// The waypoint workload to dial.
        gateway: Upstream,
        /// The `:authority`.
        authority: SocketAddr,
    },
    /// Do not carry it.
    Refuse(Refusal),
}

/// A chosen endpoint.
#[derive(Debug, Clone)]
pub struct Upstream {
    /// The endpoint.
    pub workload: Arc<Workload>,
    /// Its address and target port.
    pub address: SocketAddr,
    /// The service that was addressed.
    pub service: Option<Arc<Service>>,
}

/// Why a connection is refused. Logs, metrics and `mesh-ctl` print the same words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No ALLOW policy of those that concern the workload matched.
    #[error("no allow policy matched")]
    NoAllowMatched,
    /// A DENY policy matched.
    #[error("denied by policy {0}")]
    Denied(PolicyName),
    /// The workload names a policy that has not arrived.
    #[error("policy {0} has not arrived yet")]
    PolicyMissing(PolicyName),
    /// The destination workload is not known at this address.
    #[error("no workload at {0}")]
    UnknownWorkload(IpAddr),
    /// The service has no endpoint that may be used.
    #[error("service {0} has no ready endpoint")]
    NoEndpoint(crate::workload::ServiceName),
    /// The service does not have the port.
    #[error("service {0} has no port {1}")]
    NoPort(crate::workload::ServiceName, u16),
    /// Ports of the proxy itself.
    #[error("port {0} belongs to the node proxy")]
    ReservedPort(u16),
    /// A waypoint is required and none is ready; of which service (`namespace/hostname`) or workload (uid).
    #[error("waypoint of {0} is not ready")]
    WaypointNotReady(Arc<str>),
    /// The client's identity belongs to another trust domain.
    #[error("trust domain {0} is not trusted here")]
    ForeignTrustDomain(Arc<str>),
    /// The source is not (or no longer) enrolled.
    #[error("source workload is not enrolled")]
    SourceUnknown,
}

/// Result of authorization.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Let it pass; which ALLOW policy matched, if any concerns the workload.
    Allow(Option<PolicyName>),
    /// Refuse it.
    Deny(Refusal),
}
