//! JSON of the node proxy's and the controller's admin endpoints; `mesh-ctl` reads it.
//!
//! Lists are sorted by name, so that equal states give equal bytes. Times are RFC 3339 in UTC.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `GET /status` of a node proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// Node name.
    pub node: String,
    /// Version of the binary.
    pub version: String,
    /// Process of the proxy.
    pub pid: u32,
    /// Readiness.
    pub ready: bool,
    /// What readiness still waits for.
    pub waiting_for: Vec<String>,
    /// Controller address.
    pub controller: String,
    /// Whether the delta stream is up now.
    pub controller_connected: bool,
    /// Where the configuration in force comes from: `controller`, `snapshot`, `none`.
    pub config_source: String,
    /// Enrolled workloads.
    pub enrolled: Vec<EnrolledWorkload>,
    /// Live connections.
    pub connections: u64,
    /// Resources of the controller that were refused since start.
    #[serde(default)]
    pub refused_resources: u64,
    /// Drops and refusals in the kernel that were counted and not reported one by one.
    #[serde(default)]
    pub suppressed_events: u64,
    /// Seconds since start.
    pub uptime_secs: u64,
}

/// A workload that this node captures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EnrolledWorkload {
    /// UID of the enrolment protocol.
    pub uid: String,
    /// Pod name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
    /// Network namespace cookie.
    pub netns_cookie: u64,
    /// `ready`, or what it waits for.
    pub state: String,
}

/// An element of `GET /workloads`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadRow {
    /// UID.
    pub uid: String,
    /// Pod name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Addresses.
    pub addresses: Vec<String>,
    /// Node it runs on.
    pub node: String,
    /// `HBONE` or `TCP`.
    pub protocol: String,
    /// SPIFFE ID.
    pub identity: String,
    /// `healthy` or `unhealthy`.
    pub status: String,
    /// Waypoint, or empty.
    pub waypoint: String,
    /// Policies that select it.
    pub policies: Vec<String>,
    /// Services that it is an endpoint of.
    pub services: Vec<String>,
    /// Region/zone/subzone.
    pub locality: String,
    /// Weight.
    pub capacity: u32,
}

/// An element of `GET /services`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceRow {
    /// Short name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Full name.
    pub hostname: String,
    /// Virtual addresses.
    pub vips: Vec<String>,
    /// `port->targetPort/protocol`.
    pub ports: Vec<String>,
    /// Waypoint, or empty.
    pub waypoint: String,
    /// Endpoints by workload UID.
    pub endpoints: Vec<EndpointRow>,
}

/// An endpoint of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointRow {
    /// Workload UID.
    pub workload: String,
    /// Address.
    pub address: String,
    /// Node.
    pub node: String,
    /// Whether it takes connections now.
    pub healthy: bool,
    /// Rank by place, 0 is nearest.
    pub rank: u32,
    /// Weight.
    pub weight: u32,
}

/// An element of `GET /policies`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyRow {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// `ALLOW` or `DENY`.
    pub action: String,
    /// `Global`, `Namespace` or `WorkloadSelector`.
    pub scope: String,
    /// Reported, not enforced.
    pub dry_run: bool,
    /// Rules in words, one each.
    pub rules: Vec<String>,
}

/// An element of `GET /certificates`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateRow {
    /// SPIFFE ID.
    pub identity: String,
    /// `Available`, `Initializing`, `Unavailable: REASON`.
    pub state: String,
    /// Chain: leaf, intermediates, roots.
    pub certificates: Vec<CertificateInfo>,
    /// When it will be renewed.
    pub renew_at: String,
}

/// One certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateInfo {
    /// `Leaf`, `Intermediate` or `Root`.
    pub kind: String,
    /// Hexadecimal.
    pub serial: String,
    /// Start of validity.
    pub not_before: String,
    /// End of validity.
    pub not_after: String,
    /// Now within validity.
    pub valid: bool,
    /// PEM.
    pub pem: String,
}

/// An element of `GET /connections`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionRow {
    /// The enrolled workload, `NAME.NAMESPACE`.
    pub workload: String,
    /// `inbound` or `outbound`.
    pub direction: String,
    /// Local address.
    pub local: String,
    /// Address of the other end.
    pub remote: String,
    /// What was asked for (VIP or address), outbound.
    pub target: String,
    /// `HBONE`, `LOCAL` (same node, authorized by identity) or `TCP`.
    pub protocol: String,
    /// The other end's identity, when verified.
    pub peer_identity: String,
    /// Seconds.
    pub age_secs: u64,
    /// Bytes towards the application's peer.
    pub bytes_sent: u64,
    /// Bytes from the application's peer.
    pub bytes_received: u64,
}

/// `GET /bpf`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BpfState {
    /// Directory of the pins.
    pub pins: String,
    /// Programs.
    pub programs: Vec<BpfProgram>,
    /// Maps.
    pub maps: Vec<BpfMap>,
    /// Non-zero counters.
    pub counters: Vec<BpfCounter>,
}

/// A loaded program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BpfProgram {
    /// Hook, e.g. `cgroup/connect4`.
    pub hook: String,
    /// Program name.
    pub program: String,
    /// Kernel's id.
    pub id: u32,
    /// Kernel's tag, hexadecimal.
    pub tag: String,
    /// Pin.
    pub pinned: String,
    /// Cgroup, or workloads and interfaces.
    pub attached_to: Vec<String>,
}

/// A map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BpfMap {
    /// Name.
    pub name: String,
    /// Kind.
    pub kind: String,
    /// Entries now.
    pub entries: u64,
    /// Bound.
    pub capacity: u64,
    /// Decoded rows, `key: value` in words; only with `GET /bpf?map=NAME`.
    pub rows: Vec<BTreeMap<String, String>>,
}

/// A counter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BpfCounter {
    /// Hook.
    pub hook: String,
    /// Outcome.
    pub reason: String,
    /// `pass`, `redirect`, `drop`, `refuse`.
    pub verdict: String,
    /// Sum over CPUs.
    pub count: u64,
}

/// An element of `GET /events`: a drop or refusal that a kernel program reported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BpfEvent {
    /// When it was read.
    pub time: String,
    /// Hook.
    pub hook: String,
    /// Reason.
    pub reason: String,
    /// Source address.
    pub source: String,
    /// Destination address.
    pub destination: String,
    /// Workload `NAME.NAMESPACE` if known, else the namespace cookie.
    pub workload: String,
}

/// Body of `POST /authz`: would this connection be let in?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuthzQuestion {
    /// Client's identity; empty: plaintext.
    pub client: String,
    /// Client's address.
    pub source: String,
    /// Destination address and port.
    pub destination: String,
}

/// Answer of `POST /authz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuthzAnswer {
    /// `allow` or `deny`.
    pub decision: String,
    /// The deciding policy, or empty.
    pub policy: String,
    /// The reason in words.
    pub reason: String,
    /// Every policy that was looked at, in order, with its outcome and what kept it from matching.
    pub trace: Vec<PolicyTrace>,
}

/// What one policy said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyTrace {
    /// `namespace/name`.
    pub policy: String,
    /// `ALLOW` or `DENY`.
    pub action: String,
    /// Whether it matched.
    pub matched: bool,
    /// The rule that matched, or why none did.
    pub detail: String,
}

/// `GET /status` of the controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ControllerStatus {
    /// Version of the binary.
    pub version: String,
    /// Trust domain.
    pub trust_domain: String,
    /// Configuration sources.
    pub sources: Vec<String>,
    /// Pushed resources by type URL.
    pub resources: BTreeMap<String, u64>,
    /// Connected node proxies.
    pub nodes: Vec<ConnectedNode>,
    /// What is wrong with the configuration.
    pub problems: Vec<Problem>,
    /// SHA-256 fingerprints of the trusted roots.
    pub roots: Vec<String>,
}

/// A node proxy as the controller sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectedNode {
    /// Node name, from its token.
    pub node: String,
    /// Peer address.
    pub address: String,
    /// `SYNCED`, `STALE` or `NOT SENT`.
    pub sync: String,
    /// The same by type: short names of type URLs (`Address`).
    #[serde(default)]
    pub types: BTreeMap<String, String>,
    /// Seconds since the last ACK.
    pub last_ack_secs: u64,
    /// Rejected resources and why.
    pub rejected: BTreeMap<String, String>,
}

/// What is wrong with an object of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// Stable, `MESHnnn`.
    pub code: String,
    /// `error` (object not applied) or `warning`.
    pub severity: String,
    /// `Kind namespace/name`, or empty when the file does not parse.
    pub object: String,
    /// File, or empty.
    pub file: String,
    /// Line, from 1; 0 when not known.
    pub line: u32,
    /// Path of the field, e.g. `spec.rules[0].to[0].operation.ports[1]`.
    pub field: String,
    /// The fact and its consequence.
    pub message: String,
    /// What to do.
    pub hint: String,
}
