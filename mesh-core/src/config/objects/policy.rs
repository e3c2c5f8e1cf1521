//! `PeerAuthentication` and `AuthorizationPolicy`.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Labels, Meta};

/// `security.istio.io/PeerAuthentication`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
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
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyRule {
    /// `from[].source`; none when the key is absent. A list that is present and empty is an error.
    pub from: Option<Vec<Source>>,
    /// `to[].operation`; none when the key is absent. A list that is present and empty is an error.
    pub to: Option<Vec<Operation>>,
    /// `when[]`.
    pub when: Vec<Condition>,
}

/// Values of a field and of its `not` form, as written.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Values {
    /// The field.
    pub is: Vec<Arc<str>>,
    /// `not` form.
    pub not: Vec<Arc<str>>,
}

/// `from[].source`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
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
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
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
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Condition {
    /// `key`.
    pub key: Arc<str>,
    /// `values`, `notValues`.
    pub values: Values,
}
