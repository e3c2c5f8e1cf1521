//! Kubernetes and Istio objects in the form that compilation reads.
//!
//! Sources (files now, the Kubernetes API next) fill these in. What only Istio's rules can judge, as ports and CIDRs of an
//! AuthorizationPolicy, is still text here and is judged when the object enters the inputs; everything else has its
//! type. Fields that the mesh does not read are left out.
//!
//! The serde form is for what a controller stores, to be read by the same version or a later one: a new field needs a
//! default. An unknown one is refused, because a policy without it might be a looser one.

mod policy;
mod service;
mod workload;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use policy::{
    AuthorizationPolicy, Condition, MtlsMode, Operation, PeerAuthentication, PolicyAction, PolicyRule, Source,
    TargetRef, Values,
};
pub use service::{EndpointSlice, Service, ServiceKind, ServicePort, SliceEndpoint, SlicePort, TargetPort};
pub use workload::{ContainerPort, Owner, Pod, PodPhase, Protocol, WorkloadEntry};

/// Labels or annotations.
pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// What every object has.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Meta {
    /// Empty for cluster-wide kinds.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// `metadata.labels`.
    pub labels: Labels,
    /// `metadata.annotations`.
    pub annotations: Labels,
    /// `metadata.creationTimestamp`, Unix seconds; 0 when absent.
    pub created_secs: u64,
    /// Where it was read.
    pub origin: Origin,
}

/// Where an object was read, for messages.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Origin {
    /// File; empty when it came from an API server.
    pub file: Arc<str>,
    /// Line of the object, from 1; 0 when not known.
    pub line: u32,
}

/// Kind of an input object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// `v1/Namespace`.
    Namespace,
    /// `v1/Node`.
    Node,
    /// `v1/Pod`.
    Pod,
    /// `v1/Service`.
    Service,
    /// `discovery.k8s.io/v1/EndpointSlice`.
    EndpointSlice,
    /// `v1/ServiceAccount`.
    ServiceAccount,
    /// `networking.istio.io/WorkloadEntry`.
    WorkloadEntry,
    /// `security.istio.io/PeerAuthentication`.
    PeerAuthentication,
    /// `security.istio.io/AuthorizationPolicy`.
    AuthorizationPolicy,
}

/// Key of an object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectKey {
    /// Kind.
    pub kind: Kind,
    /// Empty for cluster-wide kinds.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

/// An input object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Object {
    Namespace(Namespace),
    Node(Node),
    Pod(Pod),
    Service(Service),
    EndpointSlice(EndpointSlice),
    ServiceAccount(ServiceAccount),
    WorkloadEntry(WorkloadEntry),
    PeerAuthentication(PeerAuthentication),
    AuthorizationPolicy(AuthorizationPolicy),
}

/// One step of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delta {
    /// New or changed.
    Upsert(Object),
    /// Gone.
    Remove(ObjectKey),
}

/// `v1/Namespace`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Namespace {
    /// Metadata.
    pub meta: Meta,
}

/// `v1/Node`; only its topology labels are read.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Node {
    /// Metadata.
    pub meta: Meta,
}

/// `v1/ServiceAccount`. Identities follow from pods; it is read so that a CA can refuse names that do not exist.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServiceAccount {
    /// Metadata.
    pub meta: Meta,
}

impl Meta {
    /// A label's value, or the annotation's of the same name; the label wins.
    pub fn label_or_annotation(&self, key: &str) -> Option<&str> {
        self.labels.get(key).or_else(|| self.annotations.get(key)).map(|v| &**v)
    }

    /// A label's value; empty when absent.
    pub fn label(&self, key: &str) -> &str {
        self.labels.get(key).map_or("", |v| v)
    }
}

impl Object {
    /// Its key.
    pub fn key(&self) -> ObjectKey {
        let meta = self.meta();
        ObjectKey { kind: self.kind(), namespace: meta.namespace.clone(), name: meta.name.clone() }
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Namespace(_) => Kind::Namespace,
            Self::Node(_) => Kind::Node,
            Self::Pod(_) => Kind::Pod,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::ServiceAccount(_) => Kind::ServiceAccount,
            Self::WorkloadEntry(_) => Kind::WorkloadEntry,
            Self::PeerAuthentication(_) => Kind::PeerAuthentication,
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
        }
    }

    /// Its metadata.
    pub fn meta(&self) -> &Meta {
        match self {
            Self::Namespace(o) => &o.meta,
            Self::Node(o) => &o.meta,
            Self::Pod(o) => &o.meta,
            Self::Service(o) => &o.meta,
            Self::EndpointSlice(o) => &o.meta,
            Self::ServiceAccount(o) => &o.meta,
            Self::WorkloadEntry(o) => &o.meta,
            Self::PeerAuthentication(o) => &o.meta,
            Self::AuthorizationPolicy(o) => &o.meta,
        }
    }
}

impl ObjectKey {
    /// A key from its parts.
    pub fn new(kind: Kind, namespace: &str, name: &str) -> Self {
        Self { kind, namespace: namespace.into(), name: name.into() }
    }
}

impl Kind {
    /// As written in `kind:`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::ServiceAccount => "ServiceAccount",
            Self::WorkloadEntry => "WorkloadEntry",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
        }
    }

    /// Whether objects of the kind have no namespace.
    pub fn is_cluster_wide(self) -> bool {
        matches!(self, Self::Namespace | Self::Node)
    }
}

impl fmt::Display for ObjectKey {
    /// `Kind namespace/name`, or `Kind name`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind.as_str(), self.name)
        } else {
            write!(f, "{} {}/{}", self.kind.as_str(), self.namespace, self.name)
        }
    }
}
