//! Random histories of a configuration, in any order and batching: after each batch the results are those of one
//! compilation from nothing.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh_core::config::objects::ObjectKey;
use mesh_core::config::{Compiled, Compiler, Delta, Object, Settings};
use mesh_core::policy::PolicyName;
use mesh_core::snapshot::{Change, Snapshot};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::world::{ADDRESSES, Step, step};

const SHORT: u32 = 400;
const LONG: u32 = 20_000;
const MAX_STEPS: usize = 60;

#[test]
fn any_order_and_batching_gives_what_one_compilation_gives() {
    let is_long = std::env::var("MESH_TEST_LONG").is_ok_and(|value| value == "1");
    let config = Config { cases: if is_long { LONG } else { SHORT }, failure_persistence: None, ..Config::default() };
    let batch = prop::collection::vec(step(), 1..8);
    let history = prop::collection::vec(batch, 1..MAX_STEPS / 4);
    let result = TestRunner::new(config).run(&(history, any::<u64>()), |(batches, seed)| {
        let mut run = Run::new();
        for (index, batch) in batches.iter().enumerate() {
            run.step(batch, seed.wrapping_add(index as u64))?;
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

/// What stands under a key: the version in force, and one that was refused since.
#[derive(Default)]
struct Entry {
    good: Option<Object>,
    refused: Option<Object>,
}

struct Run {
    compiler: Compiler,
    model: BTreeMap<ObjectKey, Entry>,
    state: State,
    snapshot: Snapshot,
}

impl Run {
    fn new() -> Self {
        Self {
            compiler: Compiler::new(Settings::default()),
            model: BTreeMap::new(),
            state: State::default(),
            snapshot: Snapshot::default(),
        }
    }

    fn step(&mut self, batch: &[Step], seed: u64) -> Result<(), TestCaseError> {
        let deltas: Vec<Delta> = batch.iter().map(|step| self.remember(step)).collect();
        let compiled = self.compiler.compile(&deltas);
        self.state.take(&compiled)?;
        self.snapshot = self.snapshot.apply(&compiled.changes);

        let fresh = self.compile_all(seed);
        let mut expected = State::default();
        expected.take(&fresh)?;
        prop_assert_eq!(&self.state.resources, &expected.resources, "after {:#?}", batch);
        prop_assert_eq!(&compiled.problems, &fresh.problems, "after {:#?}", batch);
        same_answers(&self.snapshot, &Snapshot::default().apply(&fresh.changes))
    }

    fn remember(&mut self, step: &Step) -> Delta {
        match step {
            Step::Good(object) => {
                self.model.insert(object.key(), Entry { good: Some(object.clone()), refused: None });
                Delta::Upsert(object.clone())
            }
            Step::Bad(object) => {
                self.model.entry(object.key()).or_default().refused = Some(object.clone());
                Delta::Upsert(object.clone())
            }
            Step::Remove(key) => {
                self.model.remove(key);
                Delta::Remove(key.clone())
            }
        }
    }

    /// One compilation of what stands, in an order by chance; a refused version comes after the good one of its key.
    fn compile_all(&self, seed: u64) -> Compiled {
        let mut entries: Vec<(u64, &Entry)> = self.model.values().zip(1..).map(|(e, at)| (mix(seed, at), e)).collect();
        entries.sort_by_key(|(place, _)| *place);
        let versions = entries.iter().flat_map(|(_, entry)| entry.good.iter().chain(&entry.refused));
        let deltas: Vec<Delta> = versions.cloned().map(Delta::Upsert).collect();
        Compiler::new(Settings::default()).compile(&deltas)
    }
}

/// A place for each, by chance (splitmix64).
fn mix(seed: u64, at: u64) -> u64 {
    let mut x = seed.wrapping_add(at.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
}

/// Resources by type and name, as a node holds them.
#[derive(Default, Debug)]
struct State {
    resources: BTreeMap<(&'static str, String), Change>,
}

impl State {
    /// Applies changes one by one, each of which must be a change and find what it needs.
    fn take(&mut self, compiled: &Compiled) -> Result<(), TestCaseError> {
        let mut names = Vec::new();
        for change in &compiled.changes {
            let (key, is_removal) = key_of(change);
            prop_assert!(!names.contains(&key), "{:?} is changed twice", key);
            names.push(key.clone());
            let old = if is_removal {
                self.resources.remove(&key)
            } else {
                self.resources.insert(key.clone(), change.clone())
            };
            prop_assert_ne!(old.as_ref(), (!is_removal).then_some(change), "{:?} is no change", key);
            self.names_what_is_there(change)?;
        }
        Ok(())
    }

    /// No workload names a policy that is not there, not even between two changes.
    fn names_what_is_there(&self, change: &Change) -> Result<(), TestCaseError> {
        let has = |name: &PolicyName| self.resources.contains_key(&("policy", name.to_string()));
        match change {
            Change::UpsertWorkload(workload) => {
                prop_assert!(workload.policies.iter().all(has), "{:?} names {:?}", workload.uid, workload.policies);
            }
            Change::RemovePolicy(name) => {
                let named = self.resources.values().any(|resource| match resource {
                    Change::UpsertWorkload(workload) => workload.policies.contains(name),
                    _ => false,
                });
                prop_assert!(!named, "{name} is removed while a workload names it");
            }
            _ => {}
        }
        Ok(())
    }
}

fn key_of(change: &Change) -> ((&'static str, String), bool) {
    match change {
        Change::UpsertWorkload(w) => (("workload", w.uid.to_string()), false),
        Change::RemoveWorkload(uid) => (("workload", uid.to_string()), true),
        Change::UpsertService(s) => (("service", s.key.to_string()), false),
        Change::RemoveService(key) => (("service", key.to_string()), true),
        Change::UpsertPolicy(p) => (("policy", p.name.to_string()), false),
        Change::RemovePolicy(name) => (("policy", name.to_string()), true),
    }
}

/// The tables of a snapshot follow from its contents, whatever its history.
fn same_answers(one: &Snapshot, other: &Snapshot) -> Result<(), TestCaseError> {
    prop_assert_eq!(one, other);
    for ip in ADDRESSES.iter().map(|ip| ip.parse::<IpAddr>().expect("address")) {
        prop_assert_eq!(one.addressee(ip), other.addressee(ip));
        prop_assert_eq!(one.workload_at(ip), other.workload_at(ip));
        prop_assert_eq!(one.service_at(ip), other.service_at(ip));
    }
    for service in one.services() {
        prop_assert_eq!(one.endpoints(&service.key), other.endpoints(&service.key));
        let members = one.workloads().filter(|w| w.services.contains_key(&service.key)).count();
        prop_assert_eq!(one.endpoints(&service.key).len(), members);
    }
    for workload in one.workloads() {
        let all = |snapshot: &Snapshot| {
            snapshot.policies_for(workload).map(|p| p.cloned().map_err(Clone::clone)).collect::<Vec<_>>()
        };
        prop_assert_eq!(all(one), all(other));
        let (namespace, account) = (workload.namespace(), &workload.identity.service_account);
        prop_assert_eq!(
            one.workload_named(namespace, &workload.name, account),
            other.workload_named(namespace, &workload.name, account)
        );
    }
    Ok(())
}
