//! Kubernetes and Istio objects in the form that compilation reads.
//!
//! Sources (files now, the Kubernetes API next) fill these in. What only Istio's rules can judge, as ports and CIDRs of an
//! AuthorizationPolicy, is still text here and is judged when the object enters the inputs; everything else has its
//! type. Fields that the mesh does not read are left out.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

/// Labels or annotations.
pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// What every object has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
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
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Origin {
    /// File; empty when it came from an API server.
    pub file: Arc<str>,
    /// Line of the object, from 1; 0 when not known.
    pub line: u32,
}

/// Kind of an input object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
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
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Kind.
    pub kind: Kind,
    /// Empty for cluster-wide kinds.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

/// An input object.
#[derive(Debug, Clone, PartialEq, Eq)]
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
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Namespace {
    /// Metadata.
    pub meta: Meta,
}

/// `v1/Node`; only its topology labels are read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Node {
    /// Metadata.
    pub meta: Meta,
}

/// `v1/ServiceAccount`. Identities follow from pods; it is read so that a CA can refuse names that do not exist.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServiceAccount {
    /// Metadata.
    pub meta: Meta,
}

/// `v1/Pod`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerPort {
    /// Name, may be empty.
    pub name: Arc<str>,
    /// `containerPort`.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

/// Transport of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Kind, e.g. `ReplicaSet`.
    pub kind: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

/// `v1/Service`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ServiceKind {
    /// ClusterIP, NodePort, LoadBalancer, headless.
    #[default]
    Addressed,
    /// ExternalName: a DNS alias, no endpoints.
    ExternalName,
}

/// `spec.ports[]`.
#[derive(Debug, Clone, PartialEq, Eq)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetPort {
    /// A number.
    Number(u16),
    /// Name of a container port.
    Name(Arc<str>),
}

/// `discovery.k8s.io/v1/EndpointSlice`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlicePort {
    /// Name of the service's port, may be empty.
    pub name: Arc<str>,
    /// Port of the endpoints.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

/// `endpoints[]` of a slice.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
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

/// `networking.istio.io/WorkloadEntry`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
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

/// `security.istio.io/PeerAuthentication`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerAuthentication {
    /// Metadata.
    pub meta: Meta,
    /// `spec.selector.matchLabels`; absent and empty mean the same.
    pub selector: Labels,
    /// `spec.mtls.mode`.
    pub mode: MtlsMode,
    /// `spec.portLevelMtls`, by workload port.
    pub port_modes: BTreeMap<u16, MtlsMode>,
}

/// `mtls.mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MtlsMode {
    /// Inherit.
    #[default]
    Unset,
    /// Plaintext is accepted.
    Disable,
    /// Both are accepted.
    Permissive,
    /// Plaintext is refused.
    Strict,
}

/// `security.istio.io/AuthorizationPolicy`, values as written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AuthorizationPolicy {
    /// Metadata.
    pub meta: Meta,
    /// `spec.selector.matchLabels`; absent and empty mean the same.
    pub selector: Labels,
    /// `spec.targetRef` and `spec.targetRefs`.
    pub target_refs: Vec<TargetRef>,
    /// `spec.action`.
    pub action: PolicyAction,
    /// `spec.provider.name`.
    pub provider: Arc<str>,
    /// `spec.rules`.
    pub rules: Vec<PolicyRule>,
}

/// `spec.targetRefs[]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TargetRef {
    /// API group, empty for core.
    pub group: Arc<str>,
    /// Kind.
    pub kind: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// Namespace; empty: the policy's.
    pub namespace: Arc<str>,
}

/// `spec.action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PolicyAction {
    /// ALLOW.
    #[default]
    Allow,
    /// DENY.
    Deny,
    /// AUDIT.
    Audit,
    /// CUSTOM: an external authorizer decides.
    Custom,
}

/// `spec.rules[]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PolicyRule {
    /// `from[].source`; none when the key is absent. A list that is present and empty is an error.
    pub from: Option<Vec<Source>>,
    /// `to[].operation`; none when the key is absent. A list that is present and empty is an error.
    pub to: Option<Vec<Operation>>,
    /// `when[]`.
    pub when: Vec<Condition>,
}

/// Values of a field and of its `not` form, as written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Values {
    /// The field.
    pub is: Vec<Arc<str>>,
    /// `not` form.
    pub not: Vec<Arc<str>>,
}

/// `from[].source`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Source {
    /// `principals`, `notPrincipals`.
    pub principals: Values,
    /// `requestPrincipals`, `notRequestPrincipals` (HTTP).
    pub request_principals: Values,
    /// `namespaces`, `notNamespaces`.
    pub namespaces: Values,
    /// `serviceAccounts`, `notServiceAccounts`.
    pub service_accounts: Values,
    /// `ipBlocks`, `notIpBlocks`.
    pub ip_blocks: Values,
    /// `remoteIpBlocks`, `notRemoteIpBlocks` (HTTP).
    pub remote_ip_blocks: Values,
}

/// `to[].operation`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Operation {
    /// `hosts`, `notHosts` (HTTP).
    pub hosts: Values,
    /// `ports`, `notPorts`.
    pub ports: Values,
    /// `methods`, `notMethods` (HTTP).
    pub methods: Values,
    /// `paths`, `notPaths` (HTTP).
    pub paths: Values,
}

/// `when[]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Condition {
    /// `key`.
    pub key: Arc<str>,
    /// `values`, `notValues`.
    pub values: Values,
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
