//! The Kubernetes API as a source: what its watches have said, told as deltas.
//!
//! Values only: the watches themselves are in [`crate::kubernetes::follow`]. An object that cannot be used keeps its last
//! good version in force; it is gone when the API server says so, and not because a watch is interrupted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_api::admin::Problem;
use mesh_api::k8s::Item;
use mesh_api::problem;
use mesh_core::config::objects::Kind;
use mesh_core::config::{Delta, Object, ObjectKey};

use super::Batch;

/// Objects that are looked at; the next ones are refused, each with a problem. The largest clusters that are known have
/// 150,000 pods.
pub const MAX_OBJECTS: usize = 1_000_000;

/// What is known of a kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum KindState {
    /// No list of it has been read yet.
    #[default]
    Unheard,
    /// All objects are known.
    Listed,
    /// The API server does not serve it.
    Missing,
}

/// What watches have said and nobody has taken yet. One of each object: what is said again takes the place of the last.
#[derive(Debug, Default)]
pub struct Heard {
    changed: BTreeMap<ObjectKey, Option<Item>>,
    kinds: BTreeMap<Kind, Listing>,
    seen: Arc<BTreeMap<ObjectKey, Seen>>,
}

/// Of an object whose author is told what became of it: what the last version says beside its meaning.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Seen {
    /// E.g. `security.istio.io/v1`.
    pub api_version: String,
    /// The API server counts versions of the spec.
    pub generation: i64,
    /// Version of the object as a whole.
    pub resource_version: String,
    /// Whether it is for waypoints.
    pub has_targets: bool,
    /// `status.conditions`, whoever wrote them.
    pub conditions: Vec<serde_json::Value>,
}

#[derive(Debug, Default)]
struct Listing {
    state: KindState,
    exist: BTreeSet<ObjectKey>,
    /// While a list is read: what it has named so far.
    relisted: Option<BTreeSet<ObjectKey>>,
}

/// [`Heard`], for watches and reader.
#[derive(Debug, Clone, Default)]
pub struct SharedHeard(Arc<Mutex<Heard>>);

impl SharedHeard {
    /// For one change.
    pub fn lock(&self) -> MutexGuard<'_, Heard> {
        // Each change is whole before the next one begins.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Heard {
    /// The kinds that are to be followed: none is complete before its first list.
    pub fn expect(&mut self, kinds: impl IntoIterator<Item = Kind>) {
        self.kinds.extend(kinds.into_iter().map(|kind| (kind, Listing::default())));
    }

    /// A list of a kind begins; what it does not name until its end is gone.
    pub fn begin_list(&mut self, kind: Kind) {
        self.kinds.entry(kind).or_default().relisted = Some(BTreeSet::new());
    }

    /// An object is there, new, changed or as before.
    pub fn found(&mut self, key: ObjectKey, item: Item) {
        let listing = self.kinds.entry(key.kind).or_default();
        if let Some(relisted) = &mut listing.relisted {
            relisted.insert(key.clone());
        }
        listing.exist.insert(key.clone());
        self.changed.insert(key, Some(item));
    }

    /// What an object that was found says beside its meaning.
    pub fn saw(&mut self, key: ObjectKey, seen: Seen) {
        Arc::make_mut(&mut self.seen).insert(key, seen);
    }

    fn forget(&mut self, keys: &[ObjectKey]) {
        if keys.iter().any(|key| self.seen.contains_key(key)) {
            let seen = Arc::make_mut(&mut self.seen);
            for key in keys {
                seen.remove(key);
            }
        }
    }

    /// An object is gone.
    pub fn gone(&mut self, key: ObjectKey) {
        self.forget(std::slice::from_ref(&key));
        self.kinds.entry(key.kind).or_default().exist.remove(&key);
        self.changed.insert(key, None);
    }

    /// The list of a kind is complete.
    pub fn end_list(&mut self, kind: Kind) {
        let listing = self.kinds.entry(kind).or_default();
        listing.state = KindState::Listed;
        let Some(relisted) = listing.relisted.take() else { return };
        let gone: Vec<ObjectKey> = listing.exist.difference(&relisted).cloned().collect();
        listing.exist = relisted;
        self.forget(&gone);
        self.changed.extend(gone.into_iter().map(|key| (key, None)));
    }

    /// The API server does not serve a kind: there are no objects of it.
    pub fn missing(&mut self, kind: Kind) {
        let listing = self.kinds.entry(kind).or_default();
        listing.state = KindState::Missing;
        listing.relisted = None;
        let gone: Vec<ObjectKey> = std::mem::take(&mut listing.exist).into_iter().collect();
        self.forget(&gone);
        self.changed.extend(gone.into_iter().map(|key| (key, None)));
    }

    /// What is known of a kind.
    pub fn state(&self, kind: Kind) -> KindState {
        self.kinds.get(&kind).map_or(KindState::Unheard, |listing| listing.state)
    }

    /// Whether it is known of every kind what there is.
    pub fn is_complete(&self) -> bool {
        self.kinds.values().all(|listing| listing.state != KindState::Unheard)
    }

    /// Kinds that the API server does not serve.
    pub fn missing_kinds(&self) -> Vec<Kind> {
        let missing = self.kinds.iter().filter(|(_, listing)| listing.state == KindState::Missing);
        missing.map(|(kind, _)| *kind).collect()
    }
}

/// Objects of a cluster.
#[derive(Debug)]
pub struct Cluster {
    /// Where the API server is, for people.
    url: String,
    heard: SharedHeard,
    /// Last good version of each object.
    accepted: BTreeMap<ObjectKey, Object>,
    /// What is wrong with those that are there and cannot be used.
    rejected: BTreeMap<ObjectKey, Problem>,
    /// Of an earlier process, and no list has said yet whether they are still there.
    unconfirmed: BTreeSet<ObjectKey>,
    /// Of the versions that the last batch was made of.
    seen: Arc<BTreeMap<ObjectKey, Seen>>,
}

impl Cluster {
    /// Nothing is known yet.
    pub fn new(url: String, heard: SharedHeard) -> Self {
        let (accepted, rejected, unconfirmed) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
        Self { url, heard, accepted, rejected, unconfirmed, seen: Arc::default() }
    }

    /// Takes over the last good versions of an earlier process.
    pub fn resume(&mut self, objects: Vec<Object>) {
        self.accepted = objects.into_iter().map(|object| (object.key(), object)).collect();
        self.unconfirmed = self.accepted.keys().cloned().collect();
    }

    /// For status.
    pub fn describe(&self) -> Vec<String> {
        let missing = self.heard.lock().missing_kinds();
        let missing = missing.into_iter().map(|kind| format!("{}: no such kind is installed", kind.as_str()));
        std::iter::once(self.url.clone()).chain(missing).collect()
    }

    /// What the versions that the last batch was made of say beside their meaning.
    pub fn seen(&self) -> Arc<BTreeMap<ObjectKey, Seen>> {
        self.seen.clone()
    }

    /// What was said since the last time.
    pub fn poll(&mut self) -> Batch {
        let (mut changed, confirmed) = {
            let mut heard = self.heard.lock();
            let changed = std::mem::take(&mut heard.changed);
            self.seen = heard.seen.clone();
            let is_known = |key: &ObjectKey| heard.state(key.kind) != KindState::Unheard;
            let exists = |key: &ObjectKey| heard.kinds.get(&key.kind).is_some_and(|l| l.exist.contains(key));
            let confirmed: Vec<_> =
                self.unconfirmed.iter().filter(|key| is_known(key)).map(|key| (key.clone(), exists(key))).collect();
            (changed, confirmed)
        };
        for (key, exists) in confirmed {
            self.unconfirmed.remove(&key);
            if !exists {
                changed.entry(key).or_insert(None);
            }
        }
        let (mut deltas, mut new) = (Vec::new(), Vec::new());
        for (key, item) in changed {
            match item {
                None => {
                    self.rejected.remove(&key);
                    if self.accepted.remove(&key).is_some() {
                        deltas.push(Delta::Remove(key));
                    }
                }
                Some(Item::Object(object)) => {
                    if self.accepted.len() >= MAX_OBJECTS && !self.accepted.contains_key(&key) {
                        self.rejected.insert(key.clone(), too_many(&key));
                        continue;
                    }
                    self.rejected.remove(&key);
                    if self.accepted.get(&key) != Some(&object) {
                        self.accepted.insert(key, (*object).clone());
                        new.push(Delta::Upsert(*object));
                    }
                }
                Some(Item::Rejected(finding) | Item::Inert(finding)) => {
                    self.rejected.insert(key, problem::about_object(finding, ""));
                }
            }
        }
        deltas.append(&mut new);
        let mut problems: Vec<Problem> = self.rejected.values().cloned().collect();
        problems.sort();
        Batch { deltas, problems, doubtful: false }
    }
}

fn too_many(key: &ObjectKey) -> Problem {
    Problem {
        object: key.to_string(),
        ..problem::about_file(
            problem::LIMIT,
            "",
            0,
            format!("the cluster has more than {MAX_OBJECTS} objects that the mesh reads"),
            "this one has no effect; use discovery selectors, or several meshes",
        )
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::k8s::from_api_server;
    use serde_json::json;

    use super::*;

    struct World {
        heard: SharedHeard,
        cluster: Cluster,
    }

    impl World {
        fn new() -> Self {
            let heard = SharedHeard::default();
            heard.lock().expect([Kind::Pod, Kind::AuthorizationPolicy]);
            Self { cluster: Cluster::new("https://api".into(), heard.clone()), heard }
        }

        fn found(&self, name: &str, ip: &str) {
            let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "status": {"podIP": ip}});
            self.heard.lock().found(pod_key(name), from_api_server(pod));
        }

        fn list(&self, names: &[&str]) {
            self.heard.lock().begin_list(Kind::Pod);
            names.iter().for_each(|name| self.found(name, "10.0.0.1"));
            self.heard.lock().end_list(Kind::Pod);
        }

        /// `+Kind ns/name` and `-Kind ns/name`, and fields that are wrong.
        fn check(&mut self, deltas: &str, problems: &str) {
            let batch = self.cluster.poll();
            let told = batch.deltas.iter().map(|delta| match delta {
                Delta::Upsert(object) => format!("+{}", object.key()),
                Delta::Remove(key) => format!("-{key}"),
            });
            let told: Vec<_> = told.collect();
            let wrong: Vec<_> = batch.problems.iter().map(|p| format!("{} {}", p.object, p.field)).collect();
            assert_eq!((told.join(", "), wrong.join(", ")), (deltas.to_owned(), problems.to_owned()));
        }
    }

    fn pod_key(name: &str) -> ObjectKey {
        ObjectKey::new(Kind::Pod, "default", name)
    }

    #[test]
    fn what_is_listed_again_and_has_not_changed_is_not_told_again() {
        let mut world = World::new();
        world.list(&["a", "b"]);
        world.check("+Pod default/a, +Pod default/b", "");
        world.list(&["a", "b"]);
        world.check("", "");
        world.found("b", "10.0.0.2");
        world.check("+Pod default/b", "");
        // The watch was interrupted: one object went in between, one came.
        world.list(&["a", "c"]);
        world.check("-Pod default/b, +Pod default/c", "");
        world.heard.lock().gone(pod_key("a"));
        world.check("-Pod default/a", "");
    }

    #[test]
    fn nothing_is_gone_before_the_list_is_complete() {
        let mut world = World::new();
        world.list(&["a", "b"]);
        world.check("+Pod default/a, +Pod default/b", "");
        world.heard.lock().begin_list(Kind::Pod);
        world.found("a", "10.0.0.1");
        world.check("", "");
        // It is interrupted, too, and begins anew.
        world.list(&["b"]);
        world.check("-Pod default/a", "");
    }

    #[test]
    fn an_object_that_cannot_be_used_keeps_its_last_good_version() {
        let mut world = World::new();
        world.list(&["a"]);
        world.check("+Pod default/a", "");
        world.found("a", "10.0.0");
        world.check("", "Pod default/a status.podIP");
        world.check("", "Pod default/a status.podIP");
        world.found("a", "10.0.0.1");
        world.check("", "");
        world.found("a", "10.0.0");
        world.heard.lock().gone(pod_key("a"));
        world.check("-Pod default/a", "");
    }

    #[test]
    fn of_an_earlier_process_stays_what_no_list_denies() {
        let mut world = World::new();
        world.list(&["a", "b"]);
        let objects = world.cluster.poll().deltas.into_iter().filter_map(|delta| match delta {
            Delta::Upsert(object) => Some(object),
            Delta::Remove(_) => None,
        });
        let mut next = World::new();
        next.cluster.resume(objects.collect());
        next.check("", "");
        next.list(&["b"]);
        next.check("-Pod default/a", "");
    }

    #[test]
    fn what_was_seen_is_of_the_versions_that_were_read() {
        let mut world = World::new();
        let saw = |world: &World, name: &str, generation| {
            world.heard.lock().saw(pod_key(name), Seen { generation, ..Seen::default() });
        };
        let generations = |world: &World| -> Vec<(String, i64)> {
            world.cluster.seen().iter().map(|(key, seen)| (key.name.to_string(), seen.generation)).collect()
        };
        saw(&world, "a", 1);
        saw(&world, "b", 1);
        world.list(&["a", "b"]);
        assert_eq!(generations(&world), []);
        world.check("+Pod default/a, +Pod default/b", "");
        assert_eq!(generations(&world), [("a".into(), 1), ("b".into(), 1)]);
        // Heard of and not read yet.
        saw(&world, "a", 2);
        world.heard.lock().gone(pod_key("b"));
        assert_eq!(generations(&world), [("a".into(), 1), ("b".into(), 1)]);
        world.check("-Pod default/b", "");
        assert_eq!(generations(&world), [("a".into(), 2)]);
        world.list(&[]);
        world.check("-Pod default/a", "");
        assert_eq!(generations(&world), []);
    }

    #[test]
    fn a_kind_that_is_missing_has_no_objects_and_is_complete() {
        let mut world = World::new();
        world.list(&["a"]);
        assert!(!world.heard.lock().is_complete());
        world.heard.lock().missing(Kind::AuthorizationPolicy);
        assert!(world.heard.lock().is_complete());
        assert_eq!(
            world.cluster.describe(),
            ["https://api", "AuthorizationPolicy: no such kind is installed"].map(String::from)
        );
        world.check("+Pod default/a", "");
        world.heard.lock().missing(Kind::Pod);
        world.check("-Pod default/a", "");
    }
}
