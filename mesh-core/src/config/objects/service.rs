//! `v1/Service` and `EndpointSlice`.

use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Labels, Meta, Protocol};

/// `v1/Service`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Service {
    /// Metadata.
    pub meta: Meta,
    /// `spec.type`.
    pub kind: ServiceKind,
    /// `spec.selector`.
    pub selector: Labels,
    /// `spec.clusterIPs` without `None`; empty for a headless service.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// `spec.publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// `spec.internalTrafficPolicy: Local`.
    pub local_only: bool,
    /// `spec.trafficDistribution`, as written.
    pub traffic_distribution: Option<Arc<str>>,
}

/// `spec.type` as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum ServiceKind {
    /// ClusterIP, NodePort, LoadBalancer, headless.
    #[default]
    Addressed,
    /// ExternalName: a DNS alias, no endpoints.
    ExternalName,
}

/// `spec.ports[]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServicePort {
    /// Name, may be empty.
    pub name: Arc<str>,
    /// `port`.
    pub port: u16,
    /// `targetPort`; the port itself when absent.
    pub target: TargetPort,
    /// Protocol.
    pub protocol: Protocol,
    /// `appProtocol`.
    pub app_protocol: Option<Arc<str>>,
}

/// `targetPort`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetPort {
    /// A number.
    Number(u16),
    /// Name of a container port.
    Name(Arc<str>),
}

/// `discovery.k8s.io/v1/EndpointSlice`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EndpointSlice {
    /// Metadata.
    pub meta: Meta,
    /// Label `kubernetes.io/service-name`.
    pub service: Arc<str>,
    /// `ports`.
    pub ports: Vec<SlicePort>,
    /// `endpoints`.
    pub endpoints: Vec<SliceEndpoint>,
}

/// `ports[]` of a slice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlicePort {
    /// Name of the service's port, may be empty.
    pub name: Arc<str>,
    /// Port of the endpoints.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

/// `endpoints[]` of a slice.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SliceEndpoint {
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// `conditions.ready`; absent means ready.
    pub ready: bool,
    /// Name of the pod in `targetRef`, in the slice's namespace.
    pub pod: Option<Arc<str>>,
    /// `nodeName`.
    pub node: Arc<str>,
    /// `zone`.
    pub zone: Arc<str>,
}
