//! The objects in force, with the look-up tables that compilation needs.
//!
//! Holds what was accepted; [`Inputs::upsert`] judges an object before it gets in. Not here: what follows from the objects
//! (`workloads`, `services`, the policies) and which results a change touches (`compiler`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::Settings;
use super::authorization::{self, Enforced};
use super::objects::{
    AuthorizationPolicy, EndpointSlice, Kind, Labels, Namespace, Node, Object, ObjectKey, PeerAuthentication, Pod,
    PodPhase, Service, ServiceAccount, SliceEndpoint, WorkloadEntry,
};
use super::peer_authentication;
use super::problem::{Findings, Problem};
use super::selectors::{SelectorIndex, selects};
use super::services;
use crate::workload::ServiceName;

/// Objects of one kind by namespace and name.
#[derive(Debug)]
pub(crate) struct Table<T> {
    by_namespace: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Arc<T>>>,
}

/// A policy with what it comes to.
#[derive(Debug)]
pub(crate) struct AuthorizationInput {
    pub(crate) object: AuthorizationPolicy,
    pub(crate) enforced: Enforced,
}

/// A service with its key.
#[derive(Debug)]
pub(crate) struct ServiceInput {
    pub(crate) object: Service,
    pub(crate) key: ServiceName,
}

/// All accepted objects.
#[derive(Debug, Clone, Default)]
pub(crate) struct Inputs {
    pub(crate) namespaces: Table<Namespace>,
    pub(crate) nodes: Table<Node>,
    pub(crate) pods: Table<Pod>,
    pub(crate) services: Table<ServiceInput>,
    pub(crate) slices: Table<EndpointSlice>,
    pub(crate) accounts: Table<ServiceAccount>,
    pub(crate) entries: Table<WorkloadEntry>,
    pub(crate) authentications: Table<PeerAuthentication>,
    pub(crate) authorizations: Table<AuthorizationInput>,
    service_selectors: SelectorIndex,
    authentication_selectors: SelectorIndex,
    authorization_selectors: SelectorIndex,
    /// Slices by namespace and service.
    slices_of_service: BTreeMap<(Arc<str>, Arc<str>), BTreeSet<Arc<str>>>,
    /// Slices by namespace and pod.
    slices_of_pod: BTreeMap<(Arc<str>, Arc<str>), BTreeSet<Arc<str>>>,
    pods_of_node: BTreeMap<Arc<str>, BTreeSet<(Arc<str>, Arc<str>)>>,
    claims: BTreeMap<IpAddr, BTreeSet<ObjectKey>>,
}

impl Inputs {
    /// Accepts an object in place of its last version and returns that one, or says why not.
    pub(crate) fn upsert(&mut self, object: &Object, settings: &Settings) -> Result<Option<Object>, Vec<Problem>> {
        let admitted = admit(object, settings)?;
        let old = self.remove(&object.key());
        let meta = object.meta();
        let (ns, name) = (&meta.namespace, &meta.name);
        match object {
            Object::Namespace(o) => self.namespaces.insert(ns, name, Arc::new(o.clone())),
            Object::Node(o) => self.nodes.insert(ns, name, Arc::new(o.clone())),
            Object::ServiceAccount(o) => self.accounts.insert(ns, name, Arc::new(o.clone())),
            Object::Pod(o) => {
                self.pods_of_node.entry(o.node.clone()).or_default().insert((ns.clone(), name.clone()));
                self.pods.insert(ns, name, Arc::new(o.clone()));
            }
            Object::Service(o) => {
                self.service_selectors.insert(ns, name, &o.selector);
                let key = services::key(&o.meta, settings);
                self.services.insert(ns, name, Arc::new(ServiceInput { object: o.clone(), key }));
            }
            Object::EndpointSlice(o) => {
                add(&mut self.slices_of_service, (ns.clone(), o.service.clone()), name);
                for pod in o.endpoints.iter().filter_map(|e| e.pod.as_ref()) {
                    add(&mut self.slices_of_pod, (ns.clone(), pod.clone()), name);
                }
                self.slices.insert(ns, name, Arc::new(o.clone()));
            }
            Object::WorkloadEntry(o) => self.entries.insert(ns, name, Arc::new(o.clone())),
            Object::PeerAuthentication(o) => {
                self.authentication_selectors.insert(ns, name, &o.selector);
                self.authentications.insert(ns, name, Arc::new(o.clone()));
            }
            Object::AuthorizationPolicy(o) => {
                self.authorization_selectors.insert(ns, name, &o.selector);
                let enforced = admitted.unwrap_or(Enforced { policy: None, problems: Vec::new() });
                let input = AuthorizationInput { object: o.clone(), enforced };
                self.authorizations.insert(ns, name, Arc::new(input));
            }
        }
        for ip in claimed(object) {
            self.claims.entry(ip).or_default().insert(object.key());
        }
        Ok(old)
    }

    /// Takes an object out and returns it.
    pub(crate) fn remove(&mut self, key: &ObjectKey) -> Option<Object> {
        let (ns, name) = (&key.namespace, &key.name);
        let old = match key.kind {
            Kind::Namespace => Object::Namespace((*self.namespaces.remove(ns, name)?).clone()),
            Kind::Node => Object::Node((*self.nodes.remove(ns, name)?).clone()),
            Kind::ServiceAccount => Object::ServiceAccount((*self.accounts.remove(ns, name)?).clone()),
            Kind::Pod => Object::Pod((*self.pods.remove(ns, name)?).clone()),
            Kind::Service => Object::Service(self.services.remove(ns, name)?.object.clone()),
            Kind::EndpointSlice => Object::EndpointSlice((*self.slices.remove(ns, name)?).clone()),
            Kind::WorkloadEntry => Object::WorkloadEntry((*self.entries.remove(ns, name)?).clone()),
            Kind::PeerAuthentication => Object::PeerAuthentication((*self.authentications.remove(ns, name)?).clone()),
            Kind::AuthorizationPolicy => {
                Object::AuthorizationPolicy(self.authorizations.remove(ns, name)?.object.clone())
            }
        };
        self.unindex(&old);
        Some(old)
    }

    fn unindex(&mut self, old: &Object) {
        let meta = old.meta();
        let (ns, name) = (&meta.namespace, &meta.name);
        match old {
            Object::Namespace(_) | Object::Node(_) | Object::ServiceAccount(_) | Object::WorkloadEntry(_) => {}
            Object::Pod(o) => take(&mut self.pods_of_node, &o.node, &(ns.clone(), name.clone())),
            Object::Service(o) => self.service_selectors.remove(ns, name, &o.selector),
            Object::EndpointSlice(o) => {
                take(&mut self.slices_of_service, &(ns.clone(), o.service.clone()), name);
                for pod in o.endpoints.iter().filter_map(|e| e.pod.as_ref()) {
                    take(&mut self.slices_of_pod, &(ns.clone(), pod.clone()), name);
                }
            }
            Object::PeerAuthentication(o) => self.authentication_selectors.remove(ns, name, &o.selector),
            Object::AuthorizationPolicy(o) => self.authorization_selectors.remove(ns, name, &o.selector),
        }
        for ip in claimed(old) {
            take(&mut self.claims, &ip, &old.key());
        }
    }

    /// All of them.
    pub(crate) fn objects(&self) -> impl Iterator<Item = Object> {
        let cluster = self.namespaces.all().map(|o| Object::Namespace((**o).clone()));
        let cluster = cluster.chain(self.nodes.all().map(|o| Object::Node((**o).clone())));
        let workloads = self.pods.all().map(|o| Object::Pod((**o).clone()));
        let workloads = workloads.chain(self.entries.all().map(|o| Object::WorkloadEntry((**o).clone())));
        let workloads = workloads.chain(self.accounts.all().map(|o| Object::ServiceAccount((**o).clone())));
        let services = self.services.all().map(|o| Object::Service(o.object.clone()));
        let services = services.chain(self.slices.all().map(|o| Object::EndpointSlice((**o).clone())));
        let policies = self.authentications.all().map(|o| Object::PeerAuthentication((**o).clone()));
        let policies = policies.chain(self.authorizations.all().map(|o| Object::AuthorizationPolicy(o.object.clone())));
        cluster.chain(workloads).chain(services).chain(policies)
    }

    pub(crate) fn namespace(&self, name: &str) -> Option<&Arc<Namespace>> {
        self.namespaces.get("", name)
    }

    /// Services whose selector matches. One without a selector selects nothing.
    pub(crate) fn services_selecting<'a>(
        &'a self,
        namespace: &'a Arc<str>,
        labels: &'a Labels,
    ) -> impl Iterator<Item = &'a Arc<ServiceInput>> {
        self.service_selectors
            .candidates(namespace, labels)
            .filter_map(|name| self.services.get(namespace, name))
            .filter(|s| selects(&s.object.selector, labels))
    }

    /// PeerAuthentications of the namespace whose selector matches.
    pub(crate) fn authentications_selecting<'a>(
        &'a self,
        namespace: &'a Arc<str>,
        labels: &'a Labels,
    ) -> impl Iterator<Item = &'a Arc<PeerAuthentication>> {
        self.authentication_selectors
            .candidates(namespace, labels)
            .filter_map(|name| self.authentications.get(namespace, name))
            .filter(|p| selects(&p.selector, labels))
    }

    /// AuthorizationPolicies of the namespace whose selector matches.
    pub(crate) fn authorizations_selecting<'a>(
        &'a self,
        namespace: &'a Arc<str>,
        labels: &'a Labels,
    ) -> impl Iterator<Item = &'a Arc<AuthorizationInput>> {
        self.authorization_selectors
            .candidates(namespace, labels)
            .filter_map(|name| self.authorizations.get(namespace, name))
            .filter(|p| selects(&p.object.selector, labels))
    }

    /// The PeerAuthentication without selector that counts in a namespace.
    pub(crate) fn default_authentication(&self, namespace: &str) -> Option<&Arc<PeerAuthentication>> {
        peer_authentication::oldest(self.authentications.of(namespace).filter(|p| p.selector.is_empty()))
    }

    /// Whether plaintext is refused by default in a namespace.
    pub(crate) fn namespace_refuses_plaintext(&self, namespace: &str, settings: &Settings) -> bool {
        let mode = |ns: &str| self.default_authentication(ns).map(|p| p.mode).unwrap_or_default();
        let mesh = peer_authentication::refuses_plaintext(mode(&settings.root_namespace), false);
        if *namespace == *settings.root_namespace {
            return mesh;
        }
        peer_authentication::refuses_plaintext(mode(namespace), mesh)
    }

    pub(crate) fn slices_of_service<'a>(
        &'a self,
        namespace: &Arc<str>,
        service: &Arc<str>,
    ) -> impl Iterator<Item = &'a Arc<EndpointSlice>> + use<'a> {
        let names = self.slices_of_service.get_key_value(&(namespace.clone(), service.clone()));
        names.into_iter().flat_map(move |((ns, _), names)| names.iter().filter_map(move |n| self.slices.get(ns, n)))
    }

    pub(crate) fn slices_of_pod<'a>(
        &'a self,
        namespace: &Arc<str>,
        pod: &Arc<str>,
    ) -> impl Iterator<Item = &'a Arc<EndpointSlice>> + use<'a> {
        let names = self.slices_of_pod.get_key_value(&(namespace.clone(), pod.clone()));
        names.into_iter().flat_map(move |((ns, _), names)| names.iter().filter_map(move |n| self.slices.get(ns, n)))
    }

    pub(crate) fn pods_of_node<'a>(&'a self, node: &str) -> impl Iterator<Item = &'a Arc<Pod>> + use<'a> {
        self.pods_of_node.get(node).into_iter().flatten().filter_map(|(ns, name)| self.pods.get(ns, name))
    }

    /// Everything that claims an address.
    pub(crate) fn claimants(&self, ip: IpAddr) -> impl Iterator<Item = &ObjectKey> {
        self.claims.get(&ip).into_iter().flatten()
    }

    /// Which claimant has the address: pods first (a living one, then the newest: it got the address last), then
    /// services, EndpointSlices and WorkloadEntries (the oldest of each). An entry comes last: whoever may write one in a
    /// namespace of their own must not take an endpoint away from the services of another.
    pub(crate) fn owner(&self, ip: IpAddr) -> Option<&ObjectKey> {
        self.claimants(ip).min_by_key(|key| (self.claim_strength(key), *key))
    }

    fn claim_strength(&self, key: &ObjectKey) -> (u8, bool, u64) {
        let (ns, name) = (&key.namespace, &key.name);
        match key.kind {
            Kind::Pod => {
                let pod = self.pods.get(ns, name);
                (0, pod.is_some_and(|p| p.deleting), pod.map_or(0, |p| u64::MAX - p.meta.created_secs))
            }
            Kind::Service => (1, false, self.services.get(ns, name).map_or(0, |s| s.object.meta.created_secs)),
            Kind::EndpointSlice => (2, false, self.slices.get(ns, name).map_or(0, |s| s.meta.created_secs)),
            Kind::WorkloadEntry => (3, false, self.entries.get(ns, name).map_or(0, |e| e.meta.created_secs)),
            // These have no address.
            Kind::Namespace
            | Kind::Node
            | Kind::ServiceAccount
            | Kind::PeerAuthentication
            | Kind::AuthorizationPolicy => (u8::MAX, false, 0),
        }
    }
}

/// Whether a pod has come to its end; its address may belong to another by now.
pub(crate) fn is_completed(pod: &Pod) -> bool {
    matches!(pod.phase, PodPhase::Succeeded | PodPhase::Failed)
}

/// Endpoints of a slice that are known by address only.
pub(crate) fn foreign_endpoints(slice: &EndpointSlice) -> impl Iterator<Item = &SliceEndpoint> {
    slice.endpoints.iter().filter(|e| e.pod.is_none())
}

/// What makes an object unusable, or what an AuthorizationPolicy comes to.
fn admit(object: &Object, settings: &Settings) -> Result<Option<Enforced>, Vec<Problem>> {
    let refused = |findings: Findings| if findings.has_errors() { Err(findings.into_problems()) } else { Ok(None) };
    match object {
        Object::AuthorizationPolicy(o) => authorization::compile(o, settings).map(Some),
        Object::PeerAuthentication(o) => refused(peer_authentication::findings(o, &settings.root_namespace)),
        Object::Service(o) => refused(services::findings(o)),
        Object::Namespace(_)
        | Object::Node(_)
        | Object::Pod(_)
        | Object::EndpointSlice(_)
        | Object::ServiceAccount(_)
        | Object::WorkloadEntry(_) => Ok(None),
    }
}

/// Addresses that an object claims for itself. Pods on the node's network share the node's address and claim none.
fn claimed(object: &Object) -> Vec<IpAddr> {
    match object {
        Object::Pod(o) if o.host_network || is_completed(o) => Vec::new(),
        Object::Pod(o) => o.ips.iter().map(IpAddr::to_canonical).collect(),
        Object::Service(o) => o.cluster_ips.iter().map(IpAddr::to_canonical).collect(),
        Object::WorkloadEntry(o) => o.address.parse::<IpAddr>().ok().iter().map(IpAddr::to_canonical).collect(),
        Object::EndpointSlice(o) => foreign_endpoints(o).flat_map(|e| &e.addresses).map(IpAddr::to_canonical).collect(),
        Object::Namespace(_)
        | Object::Node(_)
        | Object::ServiceAccount(_)
        | Object::PeerAuthentication(_)
        | Object::AuthorizationPolicy(_) => Vec::new(),
    }
}

fn add<K: Ord, V: Ord + Clone>(index: &mut BTreeMap<K, BTreeSet<V>>, key: K, value: &V) {
    index.entry(key).or_default().insert(value.clone());
}

fn take<K: Ord, V: Ord>(index: &mut BTreeMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = index.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            index.remove(key);
        }
    }
}

impl<T> Table<T> {
    pub(crate) fn get(&self, namespace: &str, name: &str) -> Option<&Arc<T>> {
        self.by_namespace.get(namespace)?.get(name)
    }

    /// All of a namespace, by name.
    pub(crate) fn of(&self, namespace: &str) -> impl Iterator<Item = &Arc<T>> {
        self.by_namespace.get(namespace).into_iter().flat_map(BTreeMap::values)
    }

    /// All, by namespace and name.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<T>> {
        self.by_namespace.values().flat_map(BTreeMap::values)
    }

    fn insert(&mut self, namespace: &Arc<str>, name: &Arc<str>, value: Arc<T>) {
        self.by_namespace.entry(namespace.clone()).or_default().insert(name.clone(), value);
    }

    fn remove(&mut self, namespace: &Arc<str>, name: &Arc<str>) -> Option<Arc<T>> {
        let names = self.by_namespace.get_mut(namespace)?;
        let value = names.remove(name);
        if names.is_empty() {
            self.by_namespace.remove(namespace);
        }
        value
    }
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        Self { by_namespace: self.by_namespace.clone() }
    }
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { by_namespace: BTreeMap::new() }
    }
}
