//! Istio's WorkloadEntry, PeerAuthentication and AuthorizationPolicy.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_core::config::objects::{self, Meta, MtlsMode, Object, PolicyAction, PolicyRule, Values};
use serde::Deserialize;

use super::Convert;
use super::meta::{Metadata, Selector, optional_name, port, shorten};
use crate::yaml::{FieldError, field_path};

#[derive(Deserialize)]
pub(super) struct WorkloadEntry {
    metadata: Metadata,
    #[serde(default)]
    spec: EntrySpec,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct EntrySpec {
    address: Arc<str>,
    labels: BTreeMap<Arc<str>, Arc<str>>,
    ports: BTreeMap<Arc<str>, i64>,
    network: Arc<str>,
    locality: Arc<str>,
    weight: u32,
    service_account: Option<String>,
}

impl Convert for WorkloadEntry {
    fn metadata(&mut self) -> Metadata {
        std::mem::take(&mut self.metadata)
    }

    fn convert(self, meta: Meta) -> Result<Object, FieldError> {
        let spec = self.spec;
        if spec.address.is_empty() && spec.network.is_empty() {
            return Err(
                FieldError::new("spec.address", "the entry has no address").hint("add an IP address or a host name")
            );
        }
        let mut ports = BTreeMap::new();
        for (name, number) in spec.ports {
            let number = port(field_path("spec.ports", &name), number)?;
            ports.insert(name, number);
        }
        Ok(Object::WorkloadEntry(objects::WorkloadEntry {
            meta,
            address: spec.address,
            labels: spec.labels,
            ports,
            network: spec.network,
            locality: spec.locality,
            weight: spec.weight,
            service_account: optional_name("spec.serviceAccount", spec.service_account)?,
        }))
    }
}

#[derive(Deserialize)]
pub(super) struct PeerAuthentication {
    metadata: Metadata,
    #[serde(default)]
    spec: PeerSpec,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PeerSpec {
    selector: Selector,
    mtls: Mtls,
    port_level_mtls: BTreeMap<String, Mtls>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Mtls {
    mode: WireMode,
}

#[derive(Deserialize, Default, Clone, Copy)]
#[serde(rename_all = "UPPERCASE")]
enum WireMode {
    #[default]
    Unset,
    Disable,
    Permissive,
    Strict,
}

impl Convert for PeerAuthentication {
    fn metadata(&mut self) -> Metadata {
        std::mem::take(&mut self.metadata)
    }

    fn convert(self, meta: Meta) -> Result<Object, FieldError> {
        let spec = self.spec;
        let mut port_modes = BTreeMap::new();
        for (key, mtls) in &spec.port_level_mtls {
            let path = field_path("spec.portLevelMtls", key);
            let number = key.parse().map_err(|_| {
                let error = FieldError::new(path.as_str(), format!("`{}` is not a port", shorten(key)));
                error.hint("use the number of a workload port, from 1 to 65535")
            })?;
            port_modes.insert(port(path, number)?, mtls.mode.into());
        }
        let selector = spec.selector.match_labels;
        Ok(Object::PeerAuthentication(objects::PeerAuthentication {
            meta,
            selector,
            mode: spec.mtls.mode.into(),
            port_modes,
        }))
    }
}

impl From<WireMode> for MtlsMode {
    fn from(wire: WireMode) -> Self {
        match wire {
            WireMode::Unset => Self::Unset,
            WireMode::Disable => Self::Disable,
            WireMode::Permissive => Self::Permissive,
            WireMode::Strict => Self::Strict,
        }
    }
}

#[derive(Deserialize)]
pub(super) struct AuthorizationPolicy {
    metadata: Metadata,
    #[serde(default)]
    spec: PolicySpec,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PolicySpec {
    selector: Selector,
    target_ref: Option<TargetRef>,
    target_refs: Vec<TargetRef>,
    action: WireAction,
    provider: Provider,
    rules: Vec<WireRule>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct TargetRef {
    group: Arc<str>,
    kind: Arc<str>,
    name: Arc<str>,
    namespace: Arc<str>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Provider {
    name: Arc<str>,
}

#[derive(Deserialize, Default, Clone, Copy)]
#[serde(rename_all = "UPPERCASE")]
enum WireAction {
    #[default]
    Allow,
    Deny,
    Audit,
    Custom,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct WireRule {
    from: Option<Vec<From_>>,
    to: Option<Vec<To>>,
    when: Option<Vec<WireCondition>>,
}

#[derive(Deserialize)]
#[serde(rename = "From")]
struct From_ {
    source: WireSource,
}

#[derive(Deserialize)]
struct To {
    operation: WireOperation,
}

/// A list that is absent, or present and not empty.
type List = Option<Vec<Arc<str>>>;

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct WireSource {
    principals: List,
    not_principals: List,
    request_principals: List,
    not_request_principals: List,
    namespaces: List,
    not_namespaces: List,
    service_accounts: List,
    not_service_accounts: List,
    ip_blocks: List,
    not_ip_blocks: List,
    remote_ip_blocks: List,
    not_remote_ip_blocks: List,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct WireOperation {
    hosts: List,
    not_hosts: List,
    ports: List,
    not_ports: List,
    methods: List,
    not_methods: List,
    paths: List,
    not_paths: List,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireCondition {
    key: Arc<str>,
    #[serde(default)]
    values: List,
    #[serde(default)]
    not_values: List,
}

impl Convert for AuthorizationPolicy {
    fn metadata(&mut self) -> Metadata {
        std::mem::take(&mut self.metadata)
    }

    fn convert(self, meta: Meta) -> Result<Object, FieldError> {
        let spec = self.spec;
        let rules = spec.rules.into_iter().enumerate().map(|(i, rule)| rule.convert(&format!("spec.rules[{i}]")));
        let target_refs = spec.target_ref.into_iter().chain(spec.target_refs).map(|target| objects::TargetRef {
            group: target.group,
            kind: target.kind,
            name: target.name,
            namespace: target.namespace,
        });
        Ok(Object::AuthorizationPolicy(objects::AuthorizationPolicy {
            meta,
            selector: spec.selector.match_labels,
            target_refs: target_refs.collect(),
            action: match spec.action {
                WireAction::Allow => PolicyAction::Allow,
                WireAction::Deny => PolicyAction::Deny,
                WireAction::Audit => PolicyAction::Audit,
                WireAction::Custom => PolicyAction::Custom,
            },
            provider: spec.provider.name,
            rules: rules.collect::<Result<_, _>>()?,
        }))
    }
}

impl WireRule {
    fn convert(self, path: &str) -> Result<PolicyRule, FieldError> {
        let from = self.from.map(|list| {
            list.into_iter()
                .enumerate()
                .map(|(i, from)| from.source.convert(&format!("{path}.from[{i}].source")))
                .collect()
        });
        let to = self.to.map(|list| {
            list.into_iter()
                .enumerate()
                .map(|(i, to)| to.operation.convert(&format!("{path}.to[{i}].operation")))
                .collect()
        });
        if self.when.as_ref().is_some_and(Vec::is_empty) {
            return Err(empty_list(format!("{path}.when")));
        }
        let when = self.when.unwrap_or_default().into_iter().enumerate().map(|(i, wire)| {
            let path = format!("{path}.when[{i}]");
            let values = values(&path, "values", wire.values, wire.not_values)?;
            Ok(objects::Condition { key: wire.key, values })
        });
        Ok(PolicyRule { from: from.transpose()?, to: to.transpose()?, when: when.collect::<Result<_, _>>()? })
    }
}

impl WireSource {
    fn convert(self, path: &str) -> Result<objects::Source, FieldError> {
        Ok(objects::Source {
            principals: values(path, "principals", self.principals, self.not_principals)?,
            request_principals: values(
                path,
                "requestPrincipals",
                self.request_principals,
                self.not_request_principals,
            )?,
            namespaces: values(path, "namespaces", self.namespaces, self.not_namespaces)?,
            service_accounts: values(path, "serviceAccounts", self.service_accounts, self.not_service_accounts)?,
            ip_blocks: values(path, "ipBlocks", self.ip_blocks, self.not_ip_blocks)?,
            remote_ip_blocks: values(path, "remoteIpBlocks", self.remote_ip_blocks, self.not_remote_ip_blocks)?,
        })
    }
}

impl WireOperation {
    fn convert(self, path: &str) -> Result<objects::Operation, FieldError> {
        Ok(objects::Operation {
            hosts: values(path, "hosts", self.hosts, self.not_hosts)?,
            ports: values(path, "ports", self.ports, self.not_ports)?,
            methods: values(path, "methods", self.methods, self.not_methods)?,
            paths: values(path, "paths", self.paths, self.not_paths)?,
        })
    }
}

/// A field and its `not` form. An empty list is refused, as Istio's validation does: whether it means everything or
/// nothing is a guess that a policy must not rest on.
fn values(path: &str, field: &str, is: List, not: List) -> Result<Values, FieldError> {
    if is.as_ref().is_some_and(Vec::is_empty) {
        return Err(empty_list(format!("{path}.{field}")));
    }
    if not.as_ref().is_some_and(Vec::is_empty) {
        let mut letters = field.chars();
        let first = letters.next().unwrap_or_default().to_ascii_uppercase();
        return Err(empty_list(format!("{path}.not{first}{}", letters.as_str())));
    }
    Ok(Values { is: is.unwrap_or_default(), not: not.unwrap_or_default() })
}

fn empty_list(path: String) -> FieldError {
    FieldError::new(path, "the list is empty").hint("remove the field, or give it a value")
}
