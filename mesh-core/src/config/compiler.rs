//! The incremental compiler: inputs, a delta and the last results give changes, problems and the next results.
//!
//! Each object is a unit whose result follows from the inputs alone (`derive`). A delta marks the units whose result
//! may be another now (`touched_by`); these are derived again and compared with what they were. Marking too many
//! costs time, marking too few would be wrong: the property tests compare with a compilation from nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::inputs::Inputs;
use super::objects::{Delta, EndpointSlice, Kind, Labels, Object, ObjectKey, Pod};
use super::problem::{Code, Findings, Problem};
use super::selectors::selects;
use super::{Settings, peer_authentication, services, workloads};
use crate::identity::SpiffeId;
use crate::policy::Policy;
use crate::service::Service;
use crate::snapshot::Change;
use crate::workload::Workload;

/// Inputs and results. Cloning it is a way to try a change.
#[derive(Debug, Clone)]
pub struct Compiler {
    settings: Settings,
    inputs: Inputs,
    results: BTreeMap<ObjectKey, Derived>,
    /// Problems of results, only of objects that have any.
    problems: BTreeMap<ObjectKey, Vec<Problem>>,
    /// Problems of objects that were refused; cleared when the object is accepted or removed.
    refused: BTreeMap<ObjectKey, Vec<Problem>>,
    /// How many workloads each policy selects.
    selected: BTreeMap<ObjectKey, usize>,
    /// On how many workloads a PeerAuthentication is ignored because an older one counts: by both.
    outranked: BTreeMap<(ObjectKey, ObjectKey), usize>,
    started: bool,
}

/// What a step leads to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Compiled {
    /// Policies before the workloads that name them, removals last. Nothing that did not change.
    pub changes: Vec<Change>,
    /// Everything that is wrong now, sorted by object.
    pub problems: Vec<Problem>,
}

/// What one object comes to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Derived {
    workloads: Vec<Arc<Workload>>,
    service: Option<Arc<Service>>,
    policy: Option<Arc<Policy>>,
    selectors: workloads::Selectors,
}

impl Compiler {
    /// A compiler without inputs.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            inputs: Inputs::default(),
            results: BTreeMap::new(),
            problems: BTreeMap::new(),
            refused: BTreeMap::new(),
            selected: BTreeMap::new(),
            outranked: BTreeMap::new(),
            started: false,
        }
    }

    /// Takes a step. An object that is refused leaves its last good version in force.
    pub fn compile(&mut self, deltas: &[Delta]) -> Compiled {
        let mut affected = BTreeSet::new();
        for delta in deltas {
            self.take(delta, &mut affected);
        }
        let mut changes = Changes::default();
        if !self.started {
            self.started = true;
            changes.upserted_policies.push(Arc::new(peer_authentication::static_strict(&self.settings.root_namespace)));
        }
        for key in &affected {
            self.derive_again(key, &mut changes);
        }
        Compiled { changes: changes.in_order(), problems: self.all_problems() }
    }

    /// The settings it was made with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Identities that a node may ask certificates for: those of its pods that have not come to their end, with or
    /// without an address.
    pub fn identities_on(&self, node: &str) -> BTreeSet<SpiffeId> {
        self.inputs
            .pods_of_node(node)
            .filter(|pod| !super::inputs::is_completed(pod))
            .map(|pod| workloads::identity_of(pod, &self.settings))
            .collect()
    }

    /// Keys of all objects in force, sorted.
    pub fn objects(&self) -> impl ExactSizeIterator<Item = &ObjectKey> {
        self.results.keys()
    }

    /// All objects in force, each in the version that was accepted last.
    pub fn in_force(&self) -> impl Iterator<Item = Object> {
        self.inputs.objects()
    }

    /// Whether the last version of an object was refused; one before it may be in force.
    pub fn is_refused(&self, key: &ObjectKey) -> bool {
        self.refused.contains_key(key)
    }

    fn take(&mut self, delta: &Delta, affected: &mut BTreeSet<ObjectKey>) {
        match delta {
            Delta::Upsert(object) => {
                let key = object.key();
                match self.inputs.upsert(object, &self.settings) {
                    Ok(old) => {
                        self.refused.remove(&key);
                        affected.insert(key);
                        self.mark(object, old.as_ref(), affected);
                    }
                    Err(problems) => {
                        self.refused.insert(key, problems);
                    }
                }
            }
            Delta::Remove(key) => {
                self.refused.remove(key);
                if let Some(old) = self.inputs.remove(key) {
                    affected.insert(key.clone());
                    self.touched_by(&old, affected);
                }
            }
        }
    }

    /// Marks what an accepted object touches, as it is and as it was. The inputs hold the new version already.
    fn mark(&self, new: &Object, old: Option<&Object>, affected: &mut BTreeSet<ObjectKey>) {
        if let Some(old) = old {
            // Heartbeats and the like change these often and mean nothing.
            let labels_only = matches!(new, Object::Namespace(_) | Object::Node(_));
            let (was, is) = (old.meta(), new.meta());
            if labels_only && was.labels == is.labels && was.annotations == is.annotations {
                return;
            }
            self.touched_by(old, affected);
        }
        self.touched_by(new, affected);
    }

    /// Units whose result may depend on this version of an object.
    fn touched_by(&self, object: &Object, affected: &mut BTreeSet<ObjectKey>) {
        let meta = object.meta();
        let (ns, name) = (&meta.namespace, &meta.name);
        match object {
            Object::Namespace(_) => self.all_of_namespace(name, affected),
            Object::Node(_) => affected.extend(self.inputs.pods_of_node(name).map(|p| pod_key(p))),
            Object::ServiceAccount(_) => {}
            Object::Pod(o) => self.claimants(o.ips.iter(), affected),
            Object::WorkloadEntry(o) => self.claimants(o.address.parse().iter(), affected),
            Object::Service(o) => {
                self.claimants(o.cluster_ips.iter(), affected);
                for slice in self.inputs.slices_of_service(ns, name) {
                    affected.insert(ObjectKey::new(Kind::EndpointSlice, ns, &slice.meta.name));
                    affected.extend(pods_of_slice(slice));
                }
                self.workloads_selected(ns, &o.selector, affected);
            }
            Object::EndpointSlice(o) => self.touched_by_slice(o, affected),
            Object::PeerAuthentication(o) => self.touched_by_authentication(ns, &o.selector, affected),
            Object::AuthorizationPolicy(o) => self.touched_by_authorization(ns, &o.selector, affected),
        }
    }

    fn claimants<'a>(&self, ips: impl Iterator<Item = &'a std::net::IpAddr>, affected: &mut BTreeSet<ObjectKey>) {
        for ip in ips {
            affected.extend(self.inputs.claimants(ip.to_canonical()).cloned());
        }
    }

    fn all_of_namespace(&self, ns: &Arc<str>, affected: &mut BTreeSet<ObjectKey>) {
        affected.extend(self.inputs.pods.of(ns).map(|p| pod_key(p)));
        affected.extend(self.inputs.entries.of(ns).map(|e| ObjectKey::new(Kind::WorkloadEntry, ns, &e.meta.name)));
        affected.extend(self.inputs.services.of(ns).map(|s| ObjectKey::new(Kind::Service, ns, &s.object.meta.name)));
    }

    /// Workloads of a namespace that a (non-empty) selector matches.
    fn workloads_selected(&self, ns: &Arc<str>, selector: &Labels, affected: &mut BTreeSet<ObjectKey>) {
        if selector.is_empty() {
            return;
        }
        affected.extend(self.inputs.pods.of(ns).filter(|p| selects(selector, &p.meta.labels)).map(|p| pod_key(p)));
        // Entries have two sets of labels; there are few of them.
        affected.extend(self.inputs.entries.of(ns).map(|e| ObjectKey::new(Kind::WorkloadEntry, ns, &e.meta.name)));
    }

    fn touched_by_slice(&self, slice: &EndpointSlice, affected: &mut BTreeSet<ObjectKey>) {
        let ns = &slice.meta.namespace;
        affected.extend(pods_of_slice(slice));
        self.claimants(slice.endpoints.iter().flat_map(|e| &e.addresses), affected);
        // The first slice of a Service takes it from its selector, the last one gives it back.
        let slices = self.inputs.slices_of_service(ns, &slice.service).take(2).count();
        if slices <= 1
            && let Some(service) = self.inputs.services.get(ns, &slice.service)
        {
            self.workloads_selected(ns, &service.object.selector, affected);
        }
    }

    fn touched_by_authentication(&self, ns: &Arc<str>, selector: &Labels, affected: &mut BTreeSet<ObjectKey>) {
        if !selector.is_empty() {
            self.workloads_selected(ns, selector, affected);
            return;
        }
        let all_namespaces = *ns == self.settings.root_namespace;
        let policies = self.inputs.authentications.all().filter(|p| all_namespaces || p.meta.namespace == *ns);
        affected.extend(policies.map(|p| ObjectKey::new(Kind::PeerAuthentication, &p.meta.namespace, &p.meta.name)));
        if all_namespaces {
            affected.extend(self.inputs.pods.all().map(|p| pod_key(p)));
            let entries = self.inputs.entries.all();
            affected.extend(entries.map(|e| ObjectKey::new(Kind::WorkloadEntry, &e.meta.namespace, &e.meta.name)));
        } else {
            self.all_of_namespace(ns, affected);
        }
    }

    fn touched_by_authorization(&self, ns: &Arc<str>, selector: &Labels, affected: &mut BTreeSet<ObjectKey>) {
        if *ns != self.settings.root_namespace {
            self.workloads_selected(ns, selector, affected);
        } else if !selector.is_empty() {
            let pods = self.inputs.pods.all().filter(|p| selects(selector, &p.meta.labels));
            affected.extend(pods.map(|p| pod_key(p)));
            let entries = self.inputs.entries.all();
            affected.extend(entries.map(|e| ObjectKey::new(Kind::WorkloadEntry, &e.meta.namespace, &e.meta.name)));
        }
    }

    fn derive_again(&mut self, key: &ObjectKey, changes: &mut Changes) {
        let (derived, problems) = match self.derive(key) {
            Some((derived, findings)) => (Some(derived), findings.into_problems()),
            None => (None, Vec::new()),
        };
        if problems.is_empty() {
            self.problems.remove(key);
        } else {
            self.problems.insert(key.clone(), problems);
        }
        let old = match derived.clone() {
            Some(derived) => self.results.insert(key.clone(), derived),
            None => self.results.remove(key),
        };
        let (old, new) = (old.unwrap_or_default(), derived.unwrap_or_default());
        if old == new {
            return;
        }
        recount(&mut self.selected, &old.selectors.selected_by, &new.selectors.selected_by);
        recount(&mut self.outranked, &old.selectors.outranked, &new.selectors.outranked);
        changes.between(&old, &new);
    }

    /// What an object comes to, from the inputs alone; none when there is no such object.
    fn derive(&self, key: &ObjectKey) -> Option<(Derived, Findings)> {
        let (inputs, settings) = (&self.inputs, &self.settings);
        let (ns, name) = (&key.namespace, &key.name);
        let mut derived = Derived::default();
        let findings = match key.kind {
            Kind::Namespace => Findings::about(key.clone(), &inputs.namespaces.get(ns, name)?.meta),
            Kind::Node => Findings::about(key.clone(), &inputs.nodes.get(ns, name)?.meta),
            Kind::ServiceAccount => Findings::about(key.clone(), &inputs.accounts.get(ns, name)?.meta),
            Kind::Pod => {
                let pod = inputs.pods.get(ns, name)?;
                let mut findings = Findings::about(key.clone(), &pod.meta);
                derived.set_workload(workloads::of_pod(pod, inputs, settings, &mut findings));
                findings
            }
            Kind::WorkloadEntry => {
                let entry = inputs.entries.get(ns, name)?;
                let mut findings = Findings::about(key.clone(), &entry.meta);
                derived.set_workload(workloads::of_entry(entry, inputs, settings, &mut findings));
                findings
            }
            Kind::EndpointSlice => {
                let slice = inputs.slices.get(ns, name)?;
                let mut findings = Findings::about(key.clone(), &slice.meta);
                let workloads = workloads::of_slice(slice, inputs, settings, &mut findings);
                derived.workloads = workloads.into_iter().map(Arc::new).collect();
                findings
            }
            Kind::Service => {
                let (service, findings) = services::service(inputs.services.get(ns, name)?, inputs, settings);
                derived.service = service.map(Arc::new);
                findings
            }
            Kind::PeerAuthentication => {
                let object = inputs.authentications.get(ns, name)?;
                if *ns != settings.root_namespace {
                    let inherited = inputs.namespace_refuses_plaintext(ns, settings);
                    derived.policy = peer_authentication::converted(object, inherited).map(Arc::new);
                }
                peer_authentication::findings(object, &settings.root_namespace)
            }
            Kind::AuthorizationPolicy => {
                let input = inputs.authorizations.get(ns, name)?;
                derived.policy = input.enforced.policy.clone().map(Arc::new);
                Findings::about(key.clone(), &input.object.meta)
            }
        };
        Some((derived, findings))
    }

    fn all_problems(&self) -> Vec<Problem> {
        let mut all: Vec<Problem> = self.problems.values().chain(self.refused.values()).flatten().cloned().collect();
        for input in self.inputs.authorizations.all() {
            all.extend(input.enforced.problems.iter().cloned());
            let object = &input.object;
            let key = ObjectKey::new(Kind::AuthorizationPolicy, &object.meta.namespace, &object.meta.name);
            if object.target_refs.is_empty() && !self.selects_any(&key, &object.selector) {
                all.push(selects_nothing(key, &object.meta));
            }
        }
        for object in self.inputs.authentications.all() {
            let meta = &object.meta;
            let key = ObjectKey::new(Kind::PeerAuthentication, &meta.namespace, &meta.name);
            let ignored = meta.namespace == self.settings.root_namespace && !object.selector.is_empty();
            if !ignored && !self.selects_any(&key, &object.selector) {
                all.push(selects_nothing(key, meta));
            }
            let winner = self.inputs.default_authentication(&meta.namespace);
            if let Some(winner) = winner.filter(|w| object.selector.is_empty() && w.meta.name != meta.name) {
                all.push(peer_authentication::hidden_by(object, winner));
            }
        }
        for ((younger, older), count) in &self.outranked {
            if let Some(object) = self.inputs.authentications.get(&younger.namespace, &younger.name) {
                all.push(peer_authentication::outranked_by(object, &older.name, *count));
            }
        }
        all.sort_unstable();
        all
    }

    fn selects_any(&self, policy: &ObjectKey, selector: &Labels) -> bool {
        if !selector.is_empty() {
            return self.selected.contains_key(policy);
        }
        let ns = &policy.namespace;
        *ns == self.settings.root_namespace
            || self.inputs.pods.of(ns).next().is_some()
            || self.inputs.entries.of(ns).next().is_some()
    }
}

impl Derived {
    fn set_workload(&mut self, selected: workloads::Selected) {
        self.workloads = selected.workload.map(Arc::new).into_iter().collect();
        self.selectors = selected.selectors;
    }
}

/// Changes by kind, so that each comes after what it needs.
#[derive(Default)]
struct Changes {
    upserted_policies: Vec<Arc<Policy>>,
    upserted_services: Vec<Arc<Service>>,
    upserted_workloads: Vec<Arc<Workload>>,
    removed_workloads: Vec<Change>,
    removed_services: Vec<Change>,
    removed_policies: Vec<Change>,
}

impl Changes {
    fn between(&mut self, old: &Derived, new: &Derived) {
        self.upserted_workloads.extend(new.workloads.iter().filter(|w| !old.workloads.contains(w)).cloned());
        let gone = old.workloads.iter().filter(|o| new.workloads.iter().all(|n| n.uid != o.uid));
        self.removed_workloads.extend(gone.map(|w| Change::RemoveWorkload(w.uid.clone())));
        if old.service != new.service {
            match (&old.service, &new.service) {
                (_, Some(service)) => self.upserted_services.push(service.clone()),
                (Some(service), None) => self.removed_services.push(Change::RemoveService(service.key.clone())),
                (None, None) => {}
            }
        }
        if old.policy != new.policy {
            match (&old.policy, &new.policy) {
                (_, Some(policy)) => self.upserted_policies.push(policy.clone()),
                (Some(policy), None) => self.removed_policies.push(Change::RemovePolicy(policy.name.clone())),
                (None, None) => {}
            }
        }
    }

    fn in_order(self) -> Vec<Change> {
        let policies = self.upserted_policies.into_iter().map(Change::UpsertPolicy);
        let services = self.upserted_services.into_iter().map(Change::UpsertService);
        let workloads = self.upserted_workloads.into_iter().map(Change::UpsertWorkload);
        let removed = self.removed_workloads.into_iter().chain(self.removed_services).chain(self.removed_policies);
        policies.chain(services).chain(workloads).chain(removed).collect()
    }
}

/// Takes what is counted of one object to what is counted of it now.
fn recount<K: Ord + Clone>(counts: &mut BTreeMap<K, usize>, old: &[K], new: &[K]) {
    for key in new {
        *counts.entry(key.clone()).or_default() += 1;
    }
    for key in old {
        if let Some(count) = counts.get_mut(key) {
            *count -= 1;
            if *count == 0 {
                counts.remove(key);
            }
        }
    }
}

fn pod_key(pod: &Pod) -> ObjectKey {
    ObjectKey { kind: Kind::Pod, namespace: pod.meta.namespace.clone(), name: pod.meta.name.clone() }
}

fn pods_of_slice(slice: &EndpointSlice) -> impl Iterator<Item = ObjectKey> {
    let ns = &slice.meta.namespace;
    slice.endpoints.iter().filter_map(|e| e.pod.as_ref()).map(|pod| ObjectKey {
        kind: Kind::Pod,
        namespace: ns.clone(),
        name: pod.clone(),
    })
}

fn selects_nothing(key: ObjectKey, meta: &super::objects::Meta) -> Problem {
    let mut findings = Findings::about(key, meta);
    findings.warn(
        Code::SelectsNothing,
        if meta.namespace.is_empty() { "" } else { "spec.selector" },
        "selects no workload; it has no effect now",
        "compare the selector with the labels of the pods, and the namespace with theirs",
    );
    findings.into_problems().remove(0)
}
