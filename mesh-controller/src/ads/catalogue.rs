//! All resources as they are now, each with the generation of its last change.
//!
//! That is enough to bring any client up to date: nothing is kept for a client but the generation that it has been sent,
//! and a client that is slow gets the latest state, never a queue of old ones.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Removed resources that are remembered, a type. A client that is further behind has to reconnect and say what it has.
pub const MAX_TOMBSTONES: usize = 65_536;

/// The two types that node proxies read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceType {
    /// `istio.security.Authorization`.
    Authorization,
    /// `istio.workload.Address`.
    Address,
}

/// A resource as it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// Name in its type.
    pub name: Arc<str>,
    /// Content hash.
    pub version: Arc<str>,
    /// Encoded message.
    pub body: Vec<u8>,
    /// Other names that a client may ask for (`network/ip`), sent along.
    pub aliases: Vec<Arc<str>>,
    /// Services that it is an endpoint of: asking for one of them gives this resource as well.
    pub member_of: Vec<Arc<str>>,
    /// A policy that concerns only workloads which name it.
    pub is_named: bool,
}

/// A change of one resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Update {
    /// New or changed.
    Put(ResourceType, Resource),
    /// Gone.
    Remove(ResourceType, Arc<str>),
}

/// A client is further behind than removals are remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client is too far behind; it must reconnect with initial_resource_versions")]
pub struct TooFarBehind;

/// All resources of both types.
#[derive(Debug, Default)]
pub struct Catalogue {
    generation: u64,
    authorizations: Table,
    addresses: Table,
}

#[derive(Debug, Default)]
struct Table {
    entries: BTreeMap<Arc<str>, Entry>,
    /// One for each entry.
    changed: BTreeSet<(u64, Arc<str>)>,
    /// Those of `changed` that are removals.
    tombstones: BTreeSet<(u64, Arc<str>)>,
    /// Newest removal that has been forgotten.
    forgotten: u64,
    /// Resources by what else they may be asked for.
    index: BTreeMap<Arc<str>, BTreeSet<Arc<str>>>,
}

#[derive(Debug)]
struct Entry {
    generation: u64,
    /// None: removed.
    resource: Option<Arc<Resource>>,
}

impl ResourceType {
    /// Both; policies come first, so that a workload does not wait for one that it names.
    pub const ALL: [Self; 2] = [Self::Authorization, Self::Address];

    /// As in requests.
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Authorization => mesh_api::AUTHORIZATION_TYPE_URL,
            Self::Address => mesh_api::ADDRESS_TYPE_URL,
        }
    }

    /// For people.
    pub fn short_name(self) -> &'static str {
        match self {
            Self::Authorization => "Authorization",
            Self::Address => "Address",
        }
    }

    /// From a request.
    pub fn from_type_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.type_url() == url)
    }
}

impl Catalogue {
    /// Applies changes as one generation. Resources with the version that they have already are no change.
    /// Gives how many changed.
    pub fn apply(&mut self, updates: Vec<Update>) -> usize {
        let generation = self.generation + 1;
        let mut changed = 0;
        for update in updates {
            changed += usize::from(match update {
                Update::Put(kind, resource) => self.table_mut(kind).put(generation, resource),
                Update::Remove(kind, name) => self.table_mut(kind).remove(generation, &name),
            });
        }
        if changed > 0 {
            self.generation = generation;
        }
        changed
    }

    /// Counts the steps that changed something.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How many resources a type has.
    pub fn len(&self, kind: ResourceType) -> usize {
        let table = self.table(kind);
        table.entries.len() - table.tombstones.len()
    }

    /// All resources of a type, by name.
    pub fn all(&self, kind: ResourceType) -> impl Iterator<Item = &Arc<Resource>> {
        self.table(kind).entries.values().filter_map(|entry| entry.resource.as_ref())
    }

    /// The resource of a name.
    pub fn named(&self, kind: ResourceType, name: &str) -> Option<&Arc<Resource>> {
        self.table(kind).entries.get(name)?.resource.as_ref()
    }

    /// What a name stands for that a client asks for: a resource, what has the name as an alias, members of a service.
    pub fn resolve(&self, kind: ResourceType, name: &str) -> impl Iterator<Item = &Arc<Resource>> {
        let table = self.table(kind);
        let others = table.index.get(name).into_iter().flatten();
        let others = others.filter(move |other| ***other != *name).filter_map(move |other| self.named(kind, other));
        self.named(kind, name).into_iter().chain(others)
    }

    /// What changed after a generation: the resource, or none where it was removed.
    pub fn since(
        &self,
        kind: ResourceType,
        generation: u64,
    ) -> Result<impl Iterator<Item = (&Arc<str>, Option<&Arc<Resource>>)>, TooFarBehind> {
        let table = self.table(kind);
        // A client at generation 0 holds nothing that could have been removed.
        if generation > 0 && generation < table.forgotten {
            return Err(TooFarBehind);
        }
        let newer = table.changed.range((generation + 1, Arc::from(""))..);
        Ok(newer.map(|(_, name)| (name, table.entries.get(name).and_then(|entry| entry.resource.as_ref()))))
    }

    fn table(&self, kind: ResourceType) -> &Table {
        match kind {
            ResourceType::Authorization => &self.authorizations,
            ResourceType::Address => &self.addresses,
        }
    }

    fn table_mut(&mut self, kind: ResourceType) -> &mut Table {
        match kind {
            ResourceType::Authorization => &mut self.authorizations,
            ResourceType::Address => &mut self.addresses,
        }
    }
}

impl Table {
    fn put(&mut self, generation: u64, resource: Resource) -> bool {
        let name = resource.name.clone();
        let current = self.entries.get(&name).and_then(|entry| entry.resource.as_ref());
        if current.is_some_and(|current| current.version == resource.version) {
            return false;
        }
        self.forget(&name);
        for key in resource.aliases.iter().chain(&resource.member_of) {
            self.index.entry(key.clone()).or_default().insert(name.clone());
        }
        self.changed.insert((generation, name.clone()));
        self.entries.insert(name, Entry { generation, resource: Some(Arc::new(resource)) });
        true
    }

    fn remove(&mut self, generation: u64, name: &Arc<str>) -> bool {
        if self.entries.get(name).is_none_or(|entry| entry.resource.is_none()) {
            return false;
        }
        self.forget(name);
        self.changed.insert((generation, name.clone()));
        self.tombstones.insert((generation, name.clone()));
        self.entries.insert(name.clone(), Entry { generation, resource: None });
        while self.tombstones.len() > MAX_TOMBSTONES {
            let Some(oldest) = self.tombstones.pop_first() else { break };
            self.changed.remove(&oldest);
            self.entries.remove(&oldest.1);
            self.forgotten = oldest.0;
        }
        true
    }

    /// Takes an entry out of the indices.
    fn forget(&mut self, name: &Arc<str>) {
        let Some(entry) = self.entries.get(name) else { return };
        let at = (entry.generation, name.clone());
        self.changed.remove(&at);
        self.tombstones.remove(&at);
        let Some(resource) = &entry.resource else { return };
        for key in resource.aliases.iter().chain(&resource.member_of) {
            if let Some(names) = self.index.get_mut(key) {
                names.remove(name);
                if names.is_empty() {
                    self.index.remove(key);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ResourceType::{Address, Authorization};
    use super::*;

    fn put(name: &str, version: &str, aliases: &[&str]) -> Update {
        let aliases = aliases.iter().map(|a| Arc::from(*a)).collect();
        let (name, version) = (name.into(), version.into());
        Update::Put(Address, Resource { name, version, body: vec![], aliases, member_of: vec![], is_named: false })
    }

    fn remove(name: &str) -> Update {
        Update::Remove(Address, name.into())
    }

    fn since(catalogue: &Catalogue, generation: u64) -> Vec<String> {
        let all = catalogue.since(Address, generation).unwrap();
        all.map(|(name, resource)| format!("{}{name}", if resource.is_some() { '+' } else { '-' })).collect()
    }

    #[test]
    fn a_resource_is_listed_under_its_last_change_only() {
        let mut catalogue = Catalogue::default();
        assert_eq!(catalogue.apply(vec![put("a", "1", &[]), put("b", "1", &[])]), 2);
        assert_eq!(catalogue.apply(vec![put("a", "1", &[])]), 0);
        assert_eq!(catalogue.generation(), 1, "nothing changed");
        catalogue.apply(vec![put("a", "2", &[])]);
        catalogue.apply(vec![remove("b"), remove("never")]);
        assert_eq!(since(&catalogue, 0), ["+a", "-b"]);
        assert_eq!(since(&catalogue, 2), ["-b"]);
        assert_eq!(since(&catalogue, 3), [""; 0]);
        catalogue.apply(vec![put("b", "1", &[])]);
        assert_eq!(since(&catalogue, 2), ["+b"]);
        assert_eq!((catalogue.len(Address), catalogue.len(Authorization)), (2, 0));
    }

    #[test]
    fn aliases_follow_their_resource() {
        let mut catalogue = Catalogue::default();
        let ask = |c: &Catalogue, name: &str| c.resolve(Address, name).map(|r| r.name.to_string()).collect::<Vec<_>>();
        catalogue.apply(vec![
            put("a", "1", &["/10.0.0.1", "ns/svc"]),
            put("b", "1", &["/10.0.0.1"]),
            put("ns/svc", "1", &[]),
        ]);
        assert_eq!(ask(&catalogue, "/10.0.0.1"), ["a", "b"]);
        assert_eq!(ask(&catalogue, "ns/svc"), ["ns/svc", "a"]);
        catalogue.apply(vec![put("a", "2", &["/10.0.0.2"]), remove("b")]);
        assert_eq!((ask(&catalogue, "/10.0.0.1"), ask(&catalogue, "/10.0.0.2")), (vec![], vec!["a".to_owned()]));
    }

    #[test]
    fn removals_are_remembered_up_to_a_bound() {
        let mut catalogue = Catalogue::default();
        let names: Vec<String> = (0..=MAX_TOMBSTONES).map(|i| format!("n{i}")).collect();
        catalogue.apply(names.iter().map(|n| put(n, "1", &[])).collect());
        catalogue.apply(vec![remove("n0")]);
        catalogue.apply(names[1..].iter().map(|n| remove(n)).collect());
        assert_eq!(catalogue.since(Address, 1).err(), Some(TooFarBehind));
        assert_eq!(since(&catalogue, 2).len(), MAX_TOMBSTONES);
        assert_eq!(
            since(&catalogue, 0).len(),
            MAX_TOMBSTONES,
            "a new client is told what it never had, which is harmless"
        );
        assert_eq!(catalogue.len(Address), 0);
    }
}
