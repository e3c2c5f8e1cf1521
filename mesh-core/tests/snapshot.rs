//! Who has an address or a name that several claim, and what a snapshot answers after any changes.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::config::objects::{Meta, Pod};
use mesh_core::config::{Compiler, Delta, Object, Settings};
use mesh_core::service::Service;
use mesh_core::snapshot::{Addressee, Change, Snapshot};
use mesh_core::workload::{Health, NetworkMode, ServiceName, Workload, WorkloadUid};
use proptest::prelude::*;

const IP: &str = "10.0.0.1";

/// A workload at [`IP`] with the uid.
fn workload(uid: &str) -> Workload {
    let meta = Meta { namespace: "default".into(), name: "web".into(), ..Meta::default() };
    let pod = Object::Pod(Pod { meta, ips: vec![ip(IP)], ..Pod::default() });
    let compiled = Compiler::new(Settings::default()).compile(&[Delta::Upsert(pod)]);
    let of_pod = compiled.changes.iter().find_map(|change| match change {
        Change::UpsertWorkload(workload) => Some(workload.as_ref().clone()),
        _ => None,
    });
    Workload { uid: WorkloadUid(uid.into()), ..of_pod.expect("compiled") }
}

fn service(name: &str) -> Service {
    Service {
        key: ServiceName { namespace: "default".into(), hostname: name.into() },
        name: name.into(),
        vips: vec![("".into(), ip(IP))],
        ports: Vec::new(),
        subject_alt_names: Vec::new(),
        waypoint: None,
        load_balancing: None,
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("address")
}

/// Who has [`IP`], whatever the order in which the claims came.
#[track_caller]
fn check_owner(claims: &[Change], expected: &str) {
    let mut backwards = claims.to_vec();
    backwards.reverse();
    for order in [claims, &backwards] {
        let snapshot = Snapshot::default().apply(order);
        let owner = match snapshot.addressee(ip(IP)) {
            Some(Addressee::Workload(workload)) => workload.uid.to_string(),
            Some(Addressee::Service(service)) => service.name.to_string(),
            None => "nobody".to_owned(),
        };
        assert_eq!(owner, expected);
    }
}

fn claim(uid: &str, change: impl FnOnce(&mut Workload)) -> Change {
    let mut workload = workload(uid);
    change(&mut workload);
    Change::UpsertWorkload(Arc::new(workload))
}

const POD: &str = "c//Pod/default/web";
const ENTRY: &str = "c/networking.istio.io/WorkloadEntry/default/web";

#[test]
fn a_pod_has_its_address_before_anything_else() {
    let vip = || Change::UpsertService(Arc::new(service("svc")));
    check_owner(&[claim(POD, |_| {}), claim(ENTRY, |_| {})], POD);
    check_owner(&[claim(POD, |_| {}), vip()], POD);
    check_owner(&[claim(POD, |w| w.health = Health::Unhealthy), claim(ENTRY, |_| {})], POD);
}

#[test]
fn a_virtual_address_wins_over_what_is_no_pod() {
    check_owner(&[claim(ENTRY, |_| {}), Change::UpsertService(Arc::new(service("svc")))], "svc");
}

#[test]
fn a_workload_with_a_network_of_its_own_comes_before_one_on_the_nodes() {
    let on_node = |uid: &str| claim(uid, |w| w.network_mode = NetworkMode::HostNetwork);
    check_owner(
        &[on_node("c//Pod/default/a"), claim("c//Pod/default/b", |w| w.health = Health::Unhealthy)],
        "c//Pod/default/b",
    );
}

#[test]
fn a_healthy_one_comes_before_an_unhealthy_one_and_the_smaller_uid_decides() {
    let unhealthy = |uid: &str| claim(uid, |w| w.health = Health::Unhealthy);
    check_owner(&[unhealthy("c//Pod/default/a"), claim("c//Pod/default/b", |_| {})], "c//Pod/default/b");
    check_owner(&[claim("c//Pod/default/b", |_| {}), claim("c//Pod/default/a", |_| {})], "c//Pod/default/a");
}

#[test]
fn of_two_services_with_one_address_the_smaller_key_has_it() {
    let of = |name: &str| Change::UpsertService(Arc::new(service(name)));
    check_owner(&[of("b"), of("a")], "a");
}

#[test]
fn who_is_gone_leaves_the_address_to_the_next() {
    let gone = Change::RemoveWorkload(WorkloadUid(POD.into()));
    let snapshot = Snapshot::default().apply(&[claim(POD, |_| {}), claim(ENTRY, |_| {}), gone]);
    assert_eq!(snapshot.workload_at(ip(IP)).map(|w| w.uid.to_string()), Some(ENTRY.to_owned()));
}

#[test]
fn enrolment_names_a_workload_by_namespace_name_and_account() {
    let snapshot = Snapshot::default().apply(&[claim(POD, |_| {}), claim(ENTRY, |_| {})]);
    let found = snapshot.workload_named("default", "web", "default").map(|w| w.uid.to_string());
    assert_eq!(found, Some(POD.to_owned()));
    for (namespace, name, account) in
        [("default", "web", "other"), ("other", "web", "default"), ("default", "we", "default")]
    {
        assert_eq!(snapshot.workload_named(namespace, name, account), None);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Put { pod: bool, name: usize, addresses: Vec<usize>, services: Vec<usize>, far: bool },
    Take { pod: bool, name: usize },
}

const ADDRESSES: [&str; 4] = ["10.0.0.1", "10.0.0.2", "fd00::1", "::ffff:10.0.0.2"];
const SERVICES: [&str; 3] = ["a", "b", "c"];

fn step() -> impl Strategy<Value = Step> {
    let some = |count: usize| prop::sample::subsequence((0..count).collect::<Vec<_>>(), 0..=count);
    let put = (any::<bool>(), 0_usize..4, some(4), some(3), prop::bool::weighted(0.2))
        .prop_map(|(pod, name, addresses, services, far)| Step::Put { pod, name, addresses, services, far });
    prop_oneof![3 => put, 1 => (any::<bool>(), 0_usize..4).prop_map(|(pod, name)| Step::Take { pod, name })]
}

fn uid(pod: bool, name: usize) -> String {
    if pod { format!("c//Pod/default/{name}") } else { format!("c/networking.istio.io/WorkloadEntry/default/{name}") }
}

fn change(step: &Step) -> Change {
    match step {
        Step::Take { pod, name } => Change::RemoveWorkload(WorkloadUid(uid(*pod, *name).into())),
        Step::Put { pod, name, addresses, services, far } => claim(&uid(*pod, *name), |workload| {
            workload.addresses = addresses.iter().map(|at| ip(ADDRESSES[*at])).collect();
            workload.network = if *far { "far".into() } else { "".into() };
            let key = |at: &usize| ServiceName { namespace: "default".into(), hostname: SERVICES[*at].into() };
            workload.services = services.iter().map(|at| (key(at), Vec::new())).collect();
        }),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// The tables say what a look at all workloads says, and a snapshot that somebody holds does not change.
    #[test]
    fn look_ups_agree_with_a_look_at_everything(steps in prop::collection::vec(step(), 1..40)) {
        let mut snapshot = Snapshot::in_network("near");
        for step in &steps {
            let before = snapshot.clone();
            let kept: Vec<Arc<Workload>> = before.workloads().cloned().collect();
            snapshot = snapshot.apply(&[change(step)]);
            prop_assert!(before.workloads().eq(kept.iter()));
            let all: Vec<&Arc<Workload>> = snapshot.workloads().collect();
            for text in ADDRESSES {
                let here = |w: &&&Arc<Workload>| *w.network != *"far" && w.addresses.iter().any(|a| a.to_canonical() == ip(text).to_canonical());
                let owner = all.iter().filter(here).min_by_key(|w| (!w.uid.is_pod(), w.uid.clone()));
                prop_assert_eq!(snapshot.workload_at(ip(text)), owner.copied(), "{}", text);
            }
            for name in SERVICES {
                let key = ServiceName { namespace: "default".into(), hostname: name.into() };
                let members: Vec<_> = all.iter().filter(|w| w.services.contains_key(&key)).map(|w| &w.uid).collect();
                prop_assert_eq!(snapshot.endpoints(&key).iter().map(|w| &w.uid).collect::<Vec<_>>(), members);
            }
        }
    }
}
