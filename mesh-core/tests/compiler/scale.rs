//! A large mesh: what one change touches.

use std::time::Instant;

use mesh_core::config::{Compiler, Delta, Object, Settings};
use mesh_core::policy::PolicyName;
use mesh_core::snapshot::{Change, Snapshot};

use crate::fleet;

const SERVICES: usize = 1_000;
const SERVICES_LONG: usize = 10_000;

struct Mesh {
    compiler: Compiler,
    snapshot: Snapshot,
    services: usize,
}

impl Mesh {
    fn new() -> Self {
        let is_long = std::env::var("MESH_TEST_LONG").is_ok_and(|value| value == "1");
        let services = if is_long { SERVICES_LONG } else { SERVICES };
        let everything = fleet::everything(services);
        let mut compiler = Compiler::new(Settings::default());
        let start = Instant::now();
        let compiled = compiler.compile(&everything);
        println!("{} objects from nothing: {:?}", everything.len(), start.elapsed());
        assert!(compiled.problems.is_empty(), "{:#?}", compiled.problems.first());
        let snapshot = Snapshot::default().apply(&compiled.changes);
        assert_eq!(snapshot.workloads().count(), services * fleet::PODS_PER_SERVICE);
        Self { compiler, snapshot, services }
    }

    /// Takes a step and gives its changes.
    fn change(&mut self, what: &str, delta: Delta) -> Vec<Change> {
        let start = Instant::now();
        let compiled = self.compiler.compile(&[delta]);
        let compiled_in = start.elapsed();
        self.snapshot = self.snapshot.apply(&compiled.changes);
        println!(
            "{what}: {} changes, compiled in {compiled_in:?}, applied in {:?}",
            compiled.changes.len(),
            start.elapsed() - compiled_in
        );
        assert!(compiled.problems.is_empty(), "{:#?}", compiled.problems.first());
        compiled.changes
    }
}

#[test]
fn one_changed_pod_is_one_changed_resource() {
    let mut mesh = Mesh::new();
    let pods = mesh.services * fleet::PODS_PER_SERVICE;
    // Behind a service with a slice and behind one without, with a policy that selects it and without.
    for number in [0, fleet::PODS_PER_SERVICE, pods / 2 + 3, pods - 1] {
        let mut pod = fleet::pod(number);
        let mut check = |what: &str, pod: &mesh_core::config::objects::Pod| {
            let changes = mesh.change(what, Delta::Upsert(Object::Pod(pod.clone())));
            let [Change::UpsertWorkload(workload)] = &changes[..] else { panic!("{what}: {changes:?}") };
            assert_eq!(*workload.name, *pod.meta.name, "{what}");
        };
        pod.ready = Some(false);
        check("a pod gets unready", &pod);
        pod.ips = vec![fleet::address(11, number)];
        check("a pod has another address", &pod);
        pod.meta.labels.insert("version".into(), "v2".into());
        check("a pod has another label", &pod);
        pod.meta.labels.insert("istio.io/dataplane-mode".into(), "none".into());
        check("a pod leaves the mesh", &pod);
        let again = mesh.change("nothing new", Delta::Upsert(Object::Pod(pod.clone())));
        assert!(again.is_empty(), "{again:?}");
        let key = Object::Pod(pod.clone()).key();
        let gone = mesh.change("a pod is gone", Delta::Remove(key));
        assert!(matches!(&gone[..], [Change::RemoveWorkload(_)]), "{gone:?}");
        let back = mesh.change("a pod is new", Delta::Upsert(Object::Pod(fleet::pod(number))));
        assert!(matches!(&back[..], [Change::UpsertWorkload(_)]), "{back:?}");
    }
    let fresh = Compiler::new(Settings::default()).compile(&fleet::everything(mesh.services));
    assert!(mesh.snapshot == Snapshot::default().apply(&fresh.changes), "what was undone left traces");
}

#[test]
fn a_policy_that_selects_one_service_changes_its_pods_alone() {
    let mut mesh = Mesh::new();
    let mut policy = mesh_core::config::objects::AuthorizationPolicy::default();
    policy.meta.namespace = "ns-0".into();
    policy.meta.name = "one".into();
    policy.selector.insert("app".into(), "app-1".into());
    let object = Object::AuthorizationPolicy(policy);
    let changes = mesh.change("a policy selects ten pods", Delta::Upsert(object.clone()));
    assert_eq!(changes.len(), 1 + fleet::PODS_PER_SERVICE);
    let name = PolicyName { namespace: "ns-0".into(), name: "one".into() };
    assert!(matches!(&changes[0], Change::UpsertPolicy(policy) if policy.name == name));
    let changes = mesh.change("and is gone", Delta::Remove(object.key()));
    assert_eq!(changes.len(), 1 + fleet::PODS_PER_SERVICE);
    assert_eq!(changes.last(), Some(&Change::RemovePolicy(name)));
}
