//! `v1/Pod` and `WorkloadEntry`: what has an address and an identity.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Labels, Meta};

/// `v1/Pod`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pod {
    /// Metadata.
    pub meta: Meta,
    /// `spec.serviceAccountName`; empty means `default`.
    pub service_account: Arc<str>,
    /// `spec.nodeName`.
    pub node: Arc<str>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `status.podIPs`.
    pub ips: Vec<IpAddr>,
    /// `status.phase`.
    pub phase: PodPhase,
    /// Condition `Ready`; none when the status does not say.
    pub ready: Option<bool>,
    /// `metadata.deletionTimestamp` is set.
    pub deleting: bool,
    /// `spec.containers[].ports[]` of all containers, including sidecar containers.
    pub ports: Vec<ContainerPort>,
    /// The controlling entry of `metadata.ownerReferences`.
    pub owner: Option<Owner>,
}

/// `status.phase`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum PodPhase {
    /// Not all containers run.
    Pending,
    /// Runs; also what an absent phase means (files written by hand).
    #[default]
    Running,
    /// All containers ended well.
    Succeeded,
    /// A container ended badly.
    Failed,
    /// The node does not answer.
    Unknown,
}

/// A named container port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerPort {
    /// Name, may be empty.
    pub name: Arc<str>,
    /// `containerPort`.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

/// Transport of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Controlling owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// Kind, e.g. `ReplicaSet`.
    pub kind: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

/// `networking.istio.io/WorkloadEntry`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkloadEntry {
    /// Metadata.
    pub meta: Meta,
    /// `spec.address`: an IP address or a host name.
    pub address: Arc<str>,
    /// `spec.labels` (metadata labels are used as well).
    pub labels: Labels,
    /// `spec.ports`.
    pub ports: BTreeMap<Arc<str>, u16>,
    /// `spec.network`.
    pub network: Arc<str>,
    /// `spec.locality`: `region/zone/subzone`.
    pub locality: Arc<str>,
    /// `spec.weight`; 0 means 1.
    pub weight: u32,
    /// `spec.serviceAccount`; empty means no identity of its own.
    pub service_account: Arc<str>,
}
