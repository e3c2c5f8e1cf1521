//! L4 policies (domain form of `istio.security.Authorization`).

use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;

/// `namespace/name` of a policy.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyName {
    /// Namespace of the object.
    pub namespace: Arc<str>,
    /// Its name, or a generated one for PeerAuthentication.
    pub name: Arc<str>,
}

/// A policy. Immutable once in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Policy {
    /// Key.
    pub name: PolicyName,
    /// Whom it concerns.
    pub scope: PolicyScope,
    /// What a match means.
    pub action: Action,
    /// Judged and reported, not enforced (`istio.io/dry-run`).
    pub dry_run: bool,
    /// OR. None: never matches.
    pub rules: Vec<Rule>,
}

/// Whom a policy concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PolicyScope {
    /// Every workload.
    Global,
    /// Every workload of the policy's namespace.
    Namespace,
    /// Workloads that name the policy.
    Workload,
}

/// What a match means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// Let it pass, unless a DENY matches.
    Allow,
    /// Refuse it.
    Deny,
}

/// AND of clauses. None: always matches.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Rule {
    /// Each must match.
    pub clauses: Vec<Clause>,
}

/// OR of matches. None: always matches.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Clause {
    /// One must match.
    pub matches: Vec<Match>,
}

/// Different fields AND; values of one field OR; `not_` fields must match no value.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Match {
    /// Client's namespace.
    pub namespaces: Vec<StringMatch>,
    /// Excluded client namespaces.
    pub not_namespaces: Vec<StringMatch>,
    /// Client's identity without `spiffe://`.
    pub principals: Vec<StringMatch>,
    /// Excluded identities.
    pub not_principals: Vec<StringMatch>,
    /// Client's namespace and service account.
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// Excluded service accounts.
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// Client's address.
    pub source_ips: Vec<IpNet>,
    /// Excluded client addresses.
    pub not_source_ips: Vec<IpNet>,
    /// Address that the client reached.
    pub destination_ips: Vec<IpNet>,
    /// Excluded destination addresses.
    pub not_destination_ips: Vec<IpNet>,
    /// Workload ports.
    pub destination_ports: Vec<u16>,
    /// Excluded workload ports.
    pub not_destination_ports: Vec<u16>,
}

/// Exact namespace and service account.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceAccountMatch {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Service account.
    pub service_account: Arc<str>,
}

/// Istio's string match, parsed from its YAML form by the order: `*`, leading `*`, trailing `*`, exact.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StringMatch {
    /// The whole value.
    Exact(Arc<str>),
    /// How it begins.
    Prefix(Arc<str>),
    /// How it ends.
    Suffix(Arc<str>),
    /// Present and not empty.
    Presence,
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
