//! The configuration as decisions read it: immutable, with its look-up tables.
//!
//! [`Snapshot::apply`] builds the next one from the last; both share what did not change. Not here: where changes come
//! from, and when a snapshot is put in force.
//!
//! Who owns an address that several claim is decided here once, the same on every node and after every restart:
//! a pod before a WorkloadEntry or any other kind, a workload with a network namespace of its own before one on the
//! node's, a healthy one before an unhealthy one, then the smaller uid. A VIP never takes a pod's address
//! ([`Snapshot::addressee`]), and takes any other workload's.

use std::net::IpAddr;
use std::sync::Arc;

use crate::chunked_map::ChunkedMap;
use crate::policy::{Policy, PolicyName, PolicyScope};
use crate::service::Service;
use crate::workload::{Health, NetworkMode, ServiceName, Workload, WorkloadUid};

/// Immutable view of all workloads, services and policies.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The network that this process lives in; addresses of others are not reachable and are not indexed.
    network: Arc<str>,
    workloads: ChunkedMap<WorkloadUid, Arc<Workload>>,
    services: ChunkedMap<ServiceName, Arc<Service>>,
    policies: ChunkedMap<PolicyName, Arc<Policy>>,
    by_address: ChunkedMap<(IpAddr, WorkloadUid), Arc<Workload>>,
    by_name: ChunkedMap<(Arc<str>, Arc<str>, WorkloadUid), Arc<Workload>>,
    by_vip: ChunkedMap<(IpAddr, ServiceName), Arc<Service>>,
    /// Sorted by uid.
    by_service: ChunkedMap<ServiceName, Arc<Vec<Arc<Workload>>>>,
    /// Mesh-wide policies (no namespace) and policies of a namespace.
    unselected: ChunkedMap<(Option<Arc<str>>, PolicyName), Arc<Policy>>,
}

/// One step from a snapshot to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// New or changed.
    UpsertWorkload(Arc<Workload>),
    /// Gone.
    RemoveWorkload(WorkloadUid),
    /// New or changed.
    UpsertService(Arc<Service>),
    /// Gone.
    RemoveService(ServiceName),
    /// New or changed.
    UpsertPolicy(Arc<Policy>),
    /// Gone.
    RemovePolicy(PolicyName),
}

/// What an address stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addressee<'a> {
    /// The address of a workload.
    Workload(&'a Arc<Workload>),
    /// A virtual address.
    Service(&'a Arc<Service>),
}

impl Snapshot {
    /// An empty snapshot for a process in the given network (empty: the default one).
    pub fn in_network(network: &str) -> Self {
        Self { network: network.into(), ..Self::default() }
    }

    /// The next snapshot. Costs a few microseconds for each change, whatever the size.
    pub fn apply(&self, changes: &[Change]) -> Self {
        let mut next = self.clone();
        for change in changes {
            match change {
                Change::UpsertWorkload(workload) => next.upsert_workload(workload),
                Change::RemoveWorkload(uid) => next.remove_workload(uid),
                Change::UpsertService(service) => next.upsert_service(service),
                Change::RemoveService(key) => next.remove_service(key),
                Change::UpsertPolicy(policy) => next.upsert_policy(policy),
                Change::RemovePolicy(name) => next.remove_policy(name),
            }
        }
        next
    }

    /// By uid.
    pub fn workload(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The owner of an address in the local network. IPv4-mapped IPv6 addresses are read as IPv4.
    pub fn workload_at(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        let ip = ip.to_canonical();
        self.by_address.matching(move |(a, _)| a.cmp(&ip)).map(|(_, w)| w).min_by(|a, b| claim(a).cmp(&claim(b)))
    }

    /// A workload as the enrolment protocol names it.
    pub fn workload_named(&self, namespace: &str, name: &str, service_account: &str) -> Option<&Arc<Workload>> {
        let order = move |(ns, n, _): &(Arc<str>, Arc<str>, WorkloadUid)| (**ns).cmp(namespace).then((**n).cmp(name));
        self.by_name
            .matching(order)
            .map(|(_, w)| w)
            .filter(|w| *w.identity.service_account == *service_account)
            .min_by(|a, b| claim(a).cmp(&claim(b)))
    }

    /// By key.
    pub fn service(&self, key: &ServiceName) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// The service with this virtual address in the local network; of several the one with the smallest key.
    pub fn service_at(&self, vip: IpAddr) -> Option<&Arc<Service>> {
        let vip = vip.to_canonical();
        self.by_vip.matching(move |(a, _)| a.cmp(&vip)).map(|(_, s)| s).next()
    }

    /// What a client that dials the address means.
    pub fn addressee(&self, ip: IpAddr) -> Option<Addressee<'_>> {
        match (self.workload_at(ip), self.service_at(ip)) {
            (Some(w), _) if w.uid.is_pod() => Some(Addressee::Workload(w)),
            (_, Some(s)) => Some(Addressee::Service(s)),
            (Some(w), None) => Some(Addressee::Workload(w)),
            (None, None) => None,
        }
    }

    /// Workloads behind a service, ready or not, sorted by uid.
    pub fn endpoints(&self, key: &ServiceName) -> &[Arc<Workload>] {
        self.by_service.get(key).map_or(&[], |list| list.as_slice())
    }

    /// By name.
    pub fn policy(&self, name: &PolicyName) -> Option<&Arc<Policy>> {
        self.policies.get(name)
    }

    /// Policies that concern a workload: mesh-wide, of its namespace, and those that it names. `Err`: it names a policy
    /// that has not arrived.
    pub fn policies_for<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> impl Iterator<Item = Result<&'a Arc<Policy>, &'a PolicyName>> {
        let namespace = workload.namespace();
        let wide = self.unselected.matching(|(ns, _)| ns.as_ref().cmp(&None));
        let own = self.unselected.matching(move |(ns, _)| ns.as_ref().cmp(&Some(namespace)));
        let named = workload.policies.iter().map(|name| self.policies.get(name).ok_or(name));
        wide.chain(own).map(|(_, policy)| Ok(policy)).chain(named)
    }

    /// All, sorted by uid.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.iter().map(|(_, w)| w)
    }

    /// All, sorted by key.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.iter().map(|(_, s)| s)
    }

    /// All, sorted by name.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.iter().map(|(_, p)| p)
    }

    /// The network that this process lives in.
    pub fn network(&self) -> &str {
        &self.network
    }

    /// Whether an address of the named network (empty: the default one) can be dialled from here.
    pub fn is_local_network(&self, network: &str) -> bool {
        network.is_empty() || self.network.is_empty() || *network == *self.network
    }

    fn upsert_workload(&mut self, workload: &Arc<Workload>) {
        self.remove_workload(&workload.uid);
        self.workloads.insert(workload.uid.clone(), workload.clone());
        for key in self.address_keys(workload) {
            self.by_address.insert(key, workload.clone());
        }
        self.by_name.insert(name_key(workload), workload.clone());
        for service in workload.services.keys() {
            let mut list = self.by_service.remove(service).unwrap_or_default();
            let at = list.partition_point(|w| w.uid < workload.uid);
            Arc::make_mut(&mut list).insert(at, workload.clone());
            self.by_service.insert(service.clone(), list);
        }
    }

    fn remove_workload(&mut self, uid: &WorkloadUid) {
        let Some(old) = self.workloads.remove(uid) else { return };
        for key in self.address_keys(&old) {
            self.by_address.remove(&key);
        }
        self.by_name.remove(&name_key(&old));
        for service in old.services.keys() {
            let Some(mut list) = self.by_service.remove(service) else { continue };
            Arc::make_mut(&mut list).retain(|w| w.uid != *uid);
            if !list.is_empty() {
                self.by_service.insert(service.clone(), list);
            }
        }
    }

    fn address_keys(&self, workload: &Workload) -> Vec<(IpAddr, WorkloadUid)> {
        if !self.is_local_network(&workload.network) {
            return Vec::new();
        }
        workload.addresses.iter().map(|ip| (ip.to_canonical(), workload.uid.clone())).collect()
    }

    fn upsert_service(&mut self, service: &Arc<Service>) {
        self.remove_service(&service.key);
        self.services.insert(service.key.clone(), service.clone());
        for (network, vip) in &service.vips {
            if self.is_local_network(network) {
                self.by_vip.insert((vip.to_canonical(), service.key.clone()), service.clone());
            }
        }
    }

    fn remove_service(&mut self, key: &ServiceName) {
        let Some(old) = self.services.remove(key) else { return };
        for (_, vip) in &old.vips {
            self.by_vip.remove(&(vip.to_canonical(), key.clone()));
        }
    }

    fn upsert_policy(&mut self, policy: &Arc<Policy>) {
        self.remove_policy(&policy.name);
        self.policies.insert(policy.name.clone(), policy.clone());
        if let Some(key) = unselected_key(policy) {
            self.unselected.insert(key, policy.clone());
        }
    }

    fn remove_policy(&mut self, name: &PolicyName) {
        let Some(old) = self.policies.remove(name) else { return };
        if let Some(key) = unselected_key(&old) {
            self.unselected.remove(&key);
        }
    }
}

/// Two snapshots are equal when they decide the same; the tables follow from the three sets.
impl PartialEq for Snapshot {
    fn eq(&self, other: &Self) -> bool {
        self.network == other.network
            && self.workloads == other.workloads
            && self.services == other.services
            && self.policies == other.policies
    }
}

/// How strong a workload's claim on an address or a name is; the least wins.
fn claim(workload: &Workload) -> (bool, bool, bool, &WorkloadUid) {
    (
        !workload.uid.is_pod(),
        workload.network_mode == NetworkMode::HostNetwork,
        workload.health == Health::Unhealthy,
        &workload.uid,
    )
}

fn name_key(workload: &Workload) -> (Arc<str>, Arc<str>, WorkloadUid) {
    (workload.namespace().clone(), workload.name.clone(), workload.uid.clone())
}

fn unselected_key(policy: &Policy) -> Option<(Option<Arc<str>>, PolicyName)> {
    match policy.scope {
        PolicyScope::Global => Some((None, policy.name.clone())),
        PolicyScope::Namespace => Some((Some(policy.name.namespace.clone()), policy.name.clone())),
        PolicyScope::Workload => None,
    }
}
