//! The configuration that a node holds, as a function of the controller's responses.
//!
//! A stream begins with the versions of what is held and is told the difference. Where one request cannot hold the versions
//! it begins with nothing, and the first response of the type is the whole state: what is not in it is gone.
//!
//! A resource that cannot be used leaves its last good version in force. A policy without one must not count as absent:
//! in its place stands a policy that refuses everything, until a version comes that can be used, or it is removed.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_api::proto::xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource, Status as RpcStatus};
use mesh_api::wds;
use mesh_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, MAX_DISCOVERY_REQUEST_BYTES};
use mesh_core::policy::{Action, Policy, PolicyName, PolicyScope, Rule};
use mesh_core::snapshot::{Change, Snapshot};
use prost::Message;

use crate::snapshot_store::{Stored, Versions, type_index};

/// Resources held, of both types together; a response and the stored configuration have room for as many.
const MAX_RESOURCES: usize = 500_000;
/// Bytes that a request needs besides versions.
const REQUEST_OVERHEAD_BYTES: usize = 4096;
/// What a new stream says that it has of a policy that was refused, so that it is sent again, or its removal.
const REFUSED_VERSION: &str = "refused";
/// Characters of what is said about refused resources.
const MAX_REASON_CHARS: usize = 4096;

/// What is held, and by which versions.
pub(super) struct Held {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) versions: [Versions; 2],
    /// Types that this or an earlier stream has sent in full.
    seen: [bool; 2],
    /// Types whose next response is their whole state.
    whole: [bool; 2],
    /// Policies that were not in a whole state. They go after the workloads that named them.
    leftover: BTreeSet<String>,
    root_namespace: Arc<str>,
    max_request_bytes: usize,
}

/// What became of a response.
pub(super) struct Accepted {
    /// To be sent.
    pub(super) answer: DeltaDiscoveryRequest,
    /// The snapshot is another one.
    pub(super) is_changed: bool,
    /// Resources that were refused.
    pub(super) refused: usize,
}

impl Held {
    /// Begins with what was stored.
    pub(super) fn new(network: &str, root_namespace: Arc<str>, stored: Option<Stored>) -> Self {
        let has_stored = stored.is_some();
        let Stored { changes, versions } = stored.unwrap_or_default();
        let snapshot = Arc::new(Snapshot::in_network(network).apply(&changes));
        Self {
            snapshot,
            versions,
            seen: [has_stored; 2],
            whole: [false; 2],
            leftover: BTreeSet::new(),
            root_namespace,
            max_request_bytes: MAX_DISCOVERY_REQUEST_BYTES,
        }
    }

    /// The request for a type with which a stream begins.
    pub(super) fn opening(&mut self, type_url: &str) -> DeltaDiscoveryRequest {
        let mut request = DeltaDiscoveryRequest { type_url: type_url.to_owned(), ..Default::default() };
        let Some(index) = type_index(type_url) else { return request };
        self.leftover.clear();
        request.initial_resource_versions.clone_from(&self.versions[index]);
        self.whole[index] = request.encoded_len() + REQUEST_OVERHEAD_BYTES > self.max_request_bytes;
        if self.whole[index] {
            request.initial_resource_versions.clear();
        }
        request
    }

    /// Whether all types are there: workloads without their policies would let too much in.
    pub(super) fn is_complete(&self) -> bool {
        self.seen == [true; 2]
    }

    /// Takes a response: applies what is good, and says what is not.
    pub(super) fn accept(&mut self, response: DeltaDiscoveryResponse) -> Accepted {
        let DeltaDiscoveryResponse { type_url, nonce, resources, removed_resources, .. } = response;
        let before = Arc::clone(&self.snapshot);
        let mut refused = Vec::new();
        if let Some(index) = type_index(&type_url) {
            let gone = self.gone(&type_url, removed_resources, &resources);
            self.remove(&type_url, gone);
            let mut changes = Vec::with_capacity(resources.len());
            for resource in resources {
                match self.judge(&type_url, index, &resource) {
                    Ok(change) => {
                        self.versions[index].insert(resource.name, resource.version);
                        changes.push(change);
                    }
                    Err(reason) => {
                        refused.push(format!("{}: {reason}", resource.name));
                        changes.extend(self.placeholder(&type_url, &resource));
                    }
                }
            }
            self.apply(&changes);
            if type_url == ADDRESS_TYPE_URL {
                let leftover = std::mem::take(&mut self.leftover);
                self.remove(AUTHORIZATION_TYPE_URL, leftover);
            }
            self.seen[index] = true;
        } else {
            refused.push(format!("type {type_url} was not asked for"));
        }
        let answer = DeltaDiscoveryRequest {
            error_detail: refusal(&type_url, &refused),
            type_url,
            response_nonce: nonce,
            ..Default::default()
        };
        Accepted { answer, is_changed: !Arc::ptr_eq(&before, &self.snapshot), refused: refused.len() }
    }

    /// What a resource means, or why it cannot be used.
    fn judge(&self, type_url: &str, index: usize, resource: &Resource) -> Result<Change, String> {
        let change = decode(type_url, resource)?;
        let has_room = self.versions.iter().map(Versions::len).sum::<usize>() < MAX_RESOURCES
            || self.versions[index].contains_key(&resource.name);
        if has_room { Ok(change) } else { Err(format!("more than {MAX_RESOURCES} resources")) }
    }

    /// What goes now: what the controller says, and workloads and services that a whole state does not have. Policies that
    /// it does not have are left over.
    fn gone(&mut self, type_url: &str, removed: Vec<String>, resources: &[Resource]) -> BTreeSet<String> {
        let mut gone = BTreeSet::from_iter(removed);
        let there: BTreeSet<&str> = resources.iter().map(|resource| resource.name.as_str()).collect();
        let is_address = type_url == ADDRESS_TYPE_URL;
        if !is_address {
            self.leftover.retain(|name| !there.contains(name.as_str()));
        }
        let Some(index) = type_index(type_url).filter(|index| std::mem::take(&mut self.whole[*index])) else {
            return gone;
        };
        let missing = self.versions[index].keys().filter(|name| !there.contains(name.as_str())).cloned();
        if is_address {
            gone.extend(missing);
        } else {
            self.leftover.extend(missing);
        }
        gone
    }

    /// What stands for a refused resource that there is no good version of.
    fn placeholder(&mut self, type_url: &str, resource: &Resource) -> Option<Change> {
        if type_url != AUTHORIZATION_TYPE_URL {
            return None;
        }
        let name = policy_name(&resource.name);
        if self.snapshot.policy(&name).is_some() {
            return None;
        }
        let content = resource.resource.as_ref().filter(|any| any.type_url == type_url);
        let is_mesh_wide = name.namespace.is_empty() || name.namespace == self.root_namespace;
        let by_name = if is_mesh_wide { PolicyScope::Global } else { PolicyScope::Namespace };
        let read = content.and_then(|any| wds::scope_of_refused(&any.value));
        let (scope, dry_run) = read.unwrap_or((by_name, false));
        if scope == PolicyScope::Workload && !dry_run {
            // Workloads that name it refuse as long as it is not there.
            return None;
        }
        let versions = &mut self.versions[type_index(type_url)?];
        versions.insert(resource.name.clone(), REFUSED_VERSION.to_owned());
        let everything = vec![Rule::default()];
        let policy = Policy { name, scope, action: Action::Deny, dry_run, rules: everything };
        Some(Change::UpsertPolicy(Arc::new(policy)))
    }

    fn remove(&mut self, type_url: &str, names: BTreeSet<String>) {
        let mut changes = Vec::with_capacity(names.len());
        for name in names {
            if let Some(index) = type_index(type_url) {
                self.versions[index].remove(&name);
            }
            match type_url {
                AUTHORIZATION_TYPE_URL => changes.push(Change::RemovePolicy(policy_name(&name))),
                _ => changes.extend(wds::removal(type_url, &name)),
            }
        }
        self.apply(&changes);
    }

    fn apply(&mut self, changes: &[Change]) {
        if !changes.is_empty() {
            self.snapshot = Arc::new(self.snapshot.apply(changes));
        }
    }
}

/// `namespace/name`; a name of another form has no namespace.
fn policy_name(name: &str) -> PolicyName {
    let (namespace, name) = name.split_once('/').unwrap_or(("", name));
    PolicyName { namespace: namespace.into(), name: name.into() }
}

fn refusal(type_url: &str, refused: &[String]) -> Option<RpcStatus> {
    if refused.is_empty() {
        return None;
    }
    let message: String = refused.join("; ").chars().take(MAX_REASON_CHARS).collect();
    tracing::warn!(type_url, refused = refused.len(), reasons = message, "resources refused; last good ones stay");
    // INVALID_ARGUMENT of google.rpc.Code.
    Some(RpcStatus { code: 3, message, details: Vec::new() })
}

/// Decodes a resource that says it is of `type_url`, and is what its name says.
fn decode(type_url: &str, resource: &Resource) -> Result<Change, String> {
    let any = resource.resource.as_ref().ok_or("it has no content")?;
    if any.type_url != type_url {
        return Err(format!("it is of type {}", any.type_url));
    }
    let change = wds::decode(type_url, &any.value).map_err(|error| error.to_string())?;
    let name = match &change {
        Change::UpsertWorkload(workload) => workload.uid.to_string(),
        Change::UpsertService(service) => service.key.to_string(),
        Change::UpsertPolicy(policy) => policy.name.to_string(),
        // Decoding never says that something is gone.
        Change::RemoveWorkload(_) | Change::RemoveService(_) | Change::RemovePolicy(_) => String::new(),
    };
    if name == resource.name { Ok(change) } else { Err(format!("its content is {name}")) }
}

#[cfg(test)]
mod tests {
    use mesh_api::proto::security as proto;
    use mesh_core::authorize::authorize;
    use mesh_core::flow::{InboundFlow, Refusal, Verdict};

    use super::*;

    fn held() -> Held {
        Held::new("", "root".into(), None)
    }

    fn workload(name: &str) -> Change {
        let proto = mesh_api::proto::workload::Workload {
            uid: format!("c//Pod/ns/{name}"),
            name: name.to_owned(),
            namespace: "ns".to_owned(),
            ..Default::default()
        };
        Change::UpsertWorkload(Arc::new(wds::workload_from_proto(&proto).expect("a workload")))
    }

    fn policy_name(name: &str) -> PolicyName {
        PolicyName { namespace: "ns".into(), name: name.into() }
    }

    fn policy(name: &str) -> Change {
        let (name, scope) = (policy_name(name), PolicyScope::Namespace);
        Change::UpsertPolicy(Arc::new(Policy { name, scope, action: Action::Deny, dry_run: false, rules: vec![] }))
    }

    fn response(type_url: &str, changes: &[Change], removed: &[&str]) -> DeltaDiscoveryResponse {
        let resource = |change| {
            let wds::Resource { type_url, name, content } = wds::encode(change);
            let content = content.expect("no removal");
            let resource = prost_types::Any { type_url: type_url.to_owned(), value: content.bytes.to_vec() };
            Resource { name, version: content.version, resource: Some(resource), ..Default::default() }
        };
        DeltaDiscoveryResponse {
            type_url: type_url.to_owned(),
            resources: changes.iter().map(resource).collect(),
            removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        }
    }

    /// Names of all that is held, policies first.
    fn names(held: &Held) -> Vec<String> {
        let policies = held.snapshot.policies().map(|policy| policy.name.name.to_string());
        policies.chain(held.snapshot.workloads().map(|workload| workload.name.to_string())).collect()
    }

    fn accept(held: &mut Held, type_url: &str, changes: &[Change], removed: &[&str]) {
        let accepted = held.accept(response(type_url, changes, removed));
        assert_eq!(accepted.answer.error_detail, None);
    }

    #[test]
    fn a_stream_begins_with_the_versions_of_what_is_held() {
        let mut held = held();
        accept(&mut held, AUTHORIZATION_TYPE_URL, &[policy("p")], &[]);
        accept(&mut held, ADDRESS_TYPE_URL, &[workload("a"), workload("b")], &[]);
        for (type_url, count) in [(AUTHORIZATION_TYPE_URL, 1), (ADDRESS_TYPE_URL, 2)] {
            assert_eq!(held.opening(type_url).initial_resource_versions.len(), count);
        }
        accept(&mut held, AUTHORIZATION_TYPE_URL, &[], &[]);
        accept(&mut held, ADDRESS_TYPE_URL, &[workload("c")], &["c//Pod/ns/a"]);
        assert_eq!(names(&held), ["p", "b", "c"]);
    }

    #[test]
    fn what_one_request_cannot_name_is_compared_with_the_whole_state() {
        let mut held = held();
        let many: Vec<Change> = (0..300).map(|i| workload(&format!("w{i}"))).collect();
        let policies: Vec<Change> = (0..300).map(|i| policy(&format!("p{i}"))).collect();
        accept(&mut held, AUTHORIZATION_TYPE_URL, &policies, &[]);
        accept(&mut held, ADDRESS_TYPE_URL, &many, &[]);
        held.max_request_bytes = 10_000;
        for type_url in [AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL] {
            let request = held.opening(type_url);
            assert!(request.encoded_len() < held.max_request_bytes && request.initial_resource_versions.is_empty());
        }
        // What is gone goes, policies after the workloads that may name them.
        accept(&mut held, AUTHORIZATION_TYPE_URL, &policies[..2], &[]);
        assert_eq!(names(&held).len(), 600);
        accept(&mut held, AUTHORIZATION_TYPE_URL, &policies[2..3], &[]);
        accept(&mut held, ADDRESS_TYPE_URL, &many[..1], &[]);
        assert_eq!(names(&held), ["p0", "p1", "p2", "w0"]);
        // It was said once: from now on it is differences again.
        accept(&mut held, ADDRESS_TYPE_URL, &many[1..2], &[]);
        assert_eq!(names(&held), ["p0", "p1", "p2", "w0", "w1"]);
        assert_eq!(held.opening(ADDRESS_TYPE_URL).initial_resource_versions.len(), 2);
    }

    #[test]
    fn a_stream_that_ends_between_the_types_removes_nothing() {
        let mut held = held();
        let policies: Vec<Change> = (0..300).map(|i| policy(&format!("p{i}"))).collect();
        accept(&mut held, AUTHORIZATION_TYPE_URL, &policies, &[]);
        accept(&mut held, ADDRESS_TYPE_URL, &[workload("a")], &[]);
        let max_request_bytes = std::mem::replace(&mut held.max_request_bytes, 10_000);
        held.opening(AUTHORIZATION_TYPE_URL);
        accept(&mut held, AUTHORIZATION_TYPE_URL, &policies[..1], &[]);
        held.max_request_bytes = max_request_bytes;
        assert_eq!(held.opening(AUTHORIZATION_TYPE_URL).initial_resource_versions.len(), 300);
        held.opening(ADDRESS_TYPE_URL);
        accept(&mut held, ADDRESS_TYPE_URL, &[], &[]);
        assert_eq!(names(&held).len(), 301);
    }

    /// A policy with a field that this version does not know, behind those that it knows.
    fn newer_policy(name: &str, scope: proto::Scope) -> Resource {
        let (namespace, short) = name.split_once('/').expect("namespace/name");
        let known = proto::Authorization {
            name: short.to_owned(),
            namespace: namespace.to_owned(),
            scope: scope.into(),
            ..Default::default()
        };
        // Field 99, a number.
        raw_policy(name, [&known.encode_to_vec()[..], &[0x98, 0x06, 0x01]].concat())
    }

    fn raw_policy(name: &str, value: Vec<u8>) -> Resource {
        let resource = Some(prost_types::Any { type_url: AUTHORIZATION_TYPE_URL.to_owned(), value });
        Resource { name: name.to_owned(), version: "2".to_owned(), resource, ..Default::default() }
    }

    fn refuse(held: &mut Held, resource: Resource) {
        let response = DeltaDiscoveryResponse {
            type_url: AUTHORIZATION_TYPE_URL.to_owned(),
            resources: vec![resource],
            ..Default::default()
        };
        let accepted = held.accept(response);
        assert_eq!((accepted.refused, accepted.answer.error_detail.is_some()), (1, true));
    }

    /// What is said to a client of the mesh, by workload of `ns`, `other` and `names-it`, which names the policy `ns/p`.
    fn verdicts(held: &Held) -> [&'static str; 3] {
        [("ns", vec![]), ("other", vec![]), ("ns", vec!["ns/p"])].map(|(namespace, policies)| {
            let workload = mesh_api::proto::workload::Workload {
                uid: "c//Pod/x".to_owned(),
                name: "x".to_owned(),
                namespace: namespace.to_owned(),
                authorization_policies: policies.into_iter().map(str::to_owned).collect(),
                ..Default::default()
            };
            let workload = wds::workload_from_proto(&workload).expect("a workload");
            let flow = InboundFlow {
                client: Some(workload.identity.clone()),
                source: "10.0.0.1".parse().expect("an address"),
                destination: "10.0.0.2:80".parse().expect("an address"),
            };
            match authorize(&held.snapshot, &workload, &flow) {
                Verdict::Allow(_) => "allow",
                Verdict::Deny(Refusal::Denied(_)) => "denied",
                Verdict::Deny(Refusal::PolicyMissing(_)) => "missing",
                Verdict::Deny(other) => panic!("{other:?}"),
            }
        })
    }

    #[test]
    fn a_new_policy_that_cannot_be_understood_denies_all_whom_it_may_concern() {
        let check = |resource: Resource, expected: [&str; 3]| {
            let mut held = held();
            refuse(&mut held, resource.clone());
            assert_eq!(verdicts(&held), expected, "{resource:?}");
        };
        check(newer_policy("ns/p", proto::Scope::Namespace), ["denied", "allow", "denied"]);
        check(newer_policy("ns/p", proto::Scope::Global), ["denied", "denied", "denied"]);
        check(newer_policy("ns/p", proto::Scope::WorkloadSelector), ["allow", "allow", "missing"]);
        // Not even whom it concerns can be read: its name says where it applies.
        check(raw_policy("ns/p", vec![0xff]), ["denied", "allow", "denied"]);
        check(raw_policy("root/p", vec![0xff]), ["denied", "denied", "denied"]);
        check(raw_policy("p", vec![0xff]), ["denied", "denied", "denied"]);
        check(Resource { resource: None, ..raw_policy("ns/p", vec![]) }, ["denied", "allow", "denied"]);
    }

    #[test]
    fn one_that_is_judged_and_reported_only_denies_nobody() {
        for scope in [proto::Scope::Namespace, proto::Scope::Global, proto::Scope::WorkloadSelector] {
            let mut held = held();
            let Resource { name, resource, .. } = newer_policy("ns/p", scope);
            let mut value = resource.expect("has a body").value;
            // Field 6, true.
            value.extend([0x30, 0x01]);
            refuse(&mut held, raw_policy(&name, value));
            assert_eq!(verdicts(&held), ["allow"; 3], "{scope:?}");
        }
    }

    #[test]
    fn what_stands_for_a_refused_policy_ends_with_a_good_version_or_a_removal() {
        for name in ["ns/p", "root/p", "p"] {
            let mut held = held();
            refuse(&mut held, raw_policy(name, vec![0xff]));
            refuse(&mut held, raw_policy(name, vec![0xfe]));
            assert_eq!(verdicts(&held)[0], "denied", "{name}");
            // A new stream asks for it again, and would be told of its removal.
            let request = held.opening(AUTHORIZATION_TYPE_URL);
            assert_eq!(request.initial_resource_versions.get(name).map(String::as_str), Some(REFUSED_VERSION));
            accept(&mut held, AUTHORIZATION_TYPE_URL, &[], &[name]);
            assert_eq!(verdicts(&held), ["allow", "allow", "missing"], "{name}");
            assert!(held.opening(AUTHORIZATION_TYPE_URL).initial_resource_versions.is_empty());
        }
        let mut held = held();
        refuse(&mut held, newer_policy("ns/p", proto::Scope::Namespace));
        accept(&mut held, AUTHORIZATION_TYPE_URL, &[policy("p")], &[]);
        assert_eq!(verdicts(&held), ["allow"; 3]);
    }

    #[test]
    fn a_refused_version_leaves_the_good_one_before_it() {
        let mut held = held();
        accept(&mut held, AUTHORIZATION_TYPE_URL, &[policy("p")], &[]);
        refuse(&mut held, newer_policy("ns/p", proto::Scope::Namespace));
        refuse(&mut held, raw_policy("ns/p", vec![0xff]));
        assert_eq!(verdicts(&held), ["allow"; 3]);
    }

    #[test]
    fn what_stands_for_a_refused_policy_is_stored() {
        let mut held = held();
        refuse(&mut held, newer_policy("ns/p", proto::Scope::Namespace));
        let dir = std::env::temp_dir().join(format!("mesh-node-held-{}", std::process::id()));
        std::fs::create_dir(&dir).expect("a fresh name");
        crate::snapshot_store::save(&dir, 1, &held.snapshot, &held.versions).expect("saves");
        let stored = crate::snapshot_store::load(&dir);
        std::fs::remove_dir_all(&dir).expect("its own");
        let mut again = Held::new("", "root".into(), stored.expect("loads"));
        assert_eq!(verdicts(&again)[0], "denied");
        // Refused again beside the removal of what was stored, as a name of another form leads to.
        let mut both = response(AUTHORIZATION_TYPE_URL, &[], &["ns/p"]);
        both.resources.push(raw_policy("ns/p", vec![0xff]));
        again.accept(both);
        assert_eq!(verdicts(&again)[0], "denied");
        accept(&mut again, AUTHORIZATION_TYPE_URL, &[], &["ns/p"]);
        assert_eq!(verdicts(&again)[0], "allow");
    }
}
