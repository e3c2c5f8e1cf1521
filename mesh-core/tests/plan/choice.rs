//! Which endpoint takes a connection: place, weight, failed dials.

use std::collections::BTreeMap;

use mesh_core::config::Object;
use mesh_core::config::objects::{Service, WorkloadEntry};
use mesh_core::flow::Plan;
use mesh_core::service::{HealthPolicy, LbMode, LoadBalancing, Scope};
use mesh_core::snapshot::Change;
use mesh_core::workload::Workload;
use proptest::prelude::*;

use crate::world::{World, labels, meta, named, pod, pod_with, service_with, web, words};

const WEB: &str = "10.96.0.1:80";
const NONE_READY: &str = "refuse: service default/web.default.svc.cluster.local has no ready endpoint";
const NEAR: &str = "tunnel near 10.0.0.1:8080";
const ZONE: &str = "tunnel zone 10.0.0.2:8080";
const FAR: &str = "tunnel far 10.0.0.3:8080";

/// Endpoints on the client's node, in its zone, and in another; those that are not named are not ready.
fn places(ready: &[&str], change: impl FnOnce(&mut Service)) -> World {
    let place = |name: &str, node: &str, ip: &str| {
        pod_with(name, "web", node, ip, |pod| pod.ready = Some(ready.contains(&name)))
    };
    World::new()
        .with(service_with("web", "10.96.0.1", change))
        .with(place("near", "a", "10.0.0.1"))
        .with(place("zone", "b", "10.0.0.2"))
        .with(place("far", "c", "10.0.0.3"))
}

#[test]
fn without_a_wish_place_does_not_count() {
    places(&["near", "zone", "far"], |_| {}).check(WEB, &[NEAR, ZONE, FAR]);
    let any = |service: &mut Service| service.traffic_distribution = Some("Any".into());
    places(&["near", "zone", "far"], any).check(WEB, &[NEAR, ZONE, FAR]);
}

#[test]
fn same_zone_is_preferred_and_others_are_the_fallback() {
    for word in ["PreferClose", "PreferSameZone"] {
        let wish = |service: &mut Service| service.traffic_distribution = Some(word.into());
        places(&["near", "zone", "far"], wish).check(WEB, &[NEAR, ZONE]);
        places(&["zone", "far"], wish).check(WEB, &[ZONE]);
        places(&["far"], wish).check(WEB, &[FAR]);
        places(&[], wish).check(WEB, &[NONE_READY]);
    }
}

#[test]
fn same_node_is_preferred_then_the_zone_then_any() {
    let wish = |service: &mut Service| service.traffic_distribution = Some("PreferSameNode".into());
    places(&["near", "zone", "far"], wish).check(WEB, &[NEAR]);
    places(&["zone", "far"], wish).check(WEB, &[ZONE]);
    places(&["far"], wish).check(WEB, &[FAR]);
}

#[test]
fn the_annotation_says_the_same_on_a_service_or_its_namespace() {
    let key = "networking.istio.io/traffic-distribution";
    let on_service = |service: &mut Service| service.meta.annotations = labels(&[(key, "PreferSameNode")]);
    places(&["near", "zone", "far"], on_service).check(WEB, &[NEAR]);
    let mut world = places(&["near", "zone", "far"], |_| {});
    for object in &mut world.objects {
        if let Object::Namespace(namespace) = object {
            namespace.meta.annotations = labels(&[(key, "PreferSameNode")]);
        }
    }
    world.check(WEB, &[NEAR]);
    // The field is nearer than the annotations.
    for object in &mut world.objects {
        if let Object::Service(service) = object {
            service.traffic_distribution = Some("PreferClose".into());
        }
    }
    world.check(WEB, &[NEAR, ZONE]);
}

#[test]
fn a_word_that_is_not_known_is_reported_and_place_does_not_count() {
    let world = places(&["near", "zone", "far"], |service| service.traffic_distribution = Some("Sideways".into()));
    world.check(WEB, &[NEAR, ZONE, FAR]);
    let deltas: Vec<_> = world.objects.iter().cloned().map(mesh_core::config::Delta::Upsert).collect();
    let problems = mesh_core::config::Compiler::new(world.settings).compile(&deltas).problems;
    assert_eq!(problems.iter().map(|p| &*p.field).collect::<Vec<_>>(), ["spec.trafficDistribution"]);
}

#[test]
fn internal_traffic_policy_local_stays_on_the_node_or_refuses() {
    let local = |service: &mut Service| service.local_only = true;
    places(&["near", "zone", "far"], local).check(WEB, &[NEAR]);
    places(&["zone", "far"], local).check(WEB, &[NONE_READY]);
    // A wish for places does not loosen it.
    let both = |service: &mut Service| {
        service.local_only = true;
        service.traffic_distribution = Some("PreferClose".into());
    };
    places(&["zone", "far"], both).check(WEB, &[NONE_READY]);
}

#[test]
fn two_workloads_whose_nodes_are_not_known_share_none() {
    let local = service_with("web", "10.96.0.1", |service| service.local_only = true);
    let nowhere = pod("lost", "lost", "", "10.0.0.8");
    let world = World::new().with(local).with(nowhere).with(pod("web-1", "web", "", "10.0.0.1"));
    world.check_from("lost", WEB, &[NONE_READY]);
}

#[test]
fn a_passthrough_service_goes_where_it_was_dialled() {
    let mut world = places(&["near", "zone", "far"], |_| {});
    let mut service = world.snapshot().services().next().expect("compiled").as_ref().clone();
    service.load_balancing =
        Some(LoadBalancing { preference: Vec::new(), mode: LbMode::Passthrough, health: HealthPolicy::OnlyHealthy });
    world.changes.push(Change::UpsertService(service.into()));
    world.check(WEB, &["pass 10.96.0.1:80"]);
}

#[test]
fn scopes_count_in_their_order() {
    let ranks = |preference: &[Scope], change: &dyn Fn(&mut Workload)| {
        let snapshot = World::new().with(pod("peer", "web", "a", "10.0.0.1")).snapshot();
        let source = named(&snapshot, "client");
        let mut peer = named(&snapshot, "peer").as_ref().clone();
        change(&mut peer);
        let of = |mode| LoadBalancing { preference: preference.to_vec(), mode, health: HealthPolicy::OnlyHealthy };
        [LbMode::Strict, LbMode::Failover].map(|mode| mesh_core::plan::rank(Some(&of(mode)), source, &peer))
    };
    let all = [Scope::Region, Scope::Zone, Scope::Node];
    assert_eq!(ranks(&all, &|_| {}), [Some(0), Some(0)]);
    assert_eq!(ranks(&all, &|w| w.node = "x".into()), [None, Some(1)]);
    // What differs early outweighs what is shared later.
    assert_eq!(ranks(&all, &|w| w.locality.region = "x".into()), [None, Some(3)]);
    assert_eq!(ranks(&[Scope::Cluster, Scope::Network, Scope::Subzone], &|w| w.network = "x".into()), [None, Some(2)]);
    assert_eq!(ranks(&[Scope::Subzone], &|w| w.locality.subzone = "x".into()), [None, Some(1)]);
    assert_eq!(ranks(&[Scope::Cluster], &|w| w.cluster = "x".into()), [None, Some(1)]);
    assert_eq!(ranks(&[], &|w| w.locality.region = "x".into()), [Some(0), Some(0)]);
}

/// How often each endpoint is chosen.
fn shares(world: &World, draws: u64) -> BTreeMap<String, u64> {
    let snapshot = world.snapshot();
    let mut counts = BTreeMap::new();
    for seed in 0..draws {
        let Plan::Passthrough { upstream: Some(upstream), .. } =
            world.plan(&snapshot, ("client", WEB.parse().expect("address")), seed)
        else {
            panic!("an entry is dialled in clear");
        };
        *counts.entry(upstream.workload.name.to_string()).or_default() += 1;
    }
    counts
}

#[test]
fn endpoints_share_by_weight() {
    const DRAWS: u64 = 20_000;
    let weights = [("vm-1", 1_u32), ("vm-2", 3), ("vm-3", 6)];
    let mut world = World::new().with(web());
    for (number, (name, weight)) in (1..).zip(weights) {
        world = world.with(Object::WorkloadEntry(WorkloadEntry {
            meta: meta(name),
            address: format!("192.0.2.{number}").into(),
            labels: labels(&[("app", "web")]),
            ports: [("http".into(), 80)].into(),
            weight,
            ..WorkloadEntry::default()
        }));
    }
    let counts = shares(&world, DRAWS);
    for (name, weight) in weights {
        let (share, count) = (f64::from(weight) / 10.0, counts[name] as f64);
        let deviation = (DRAWS as f64 * share * (1.0 - share)).sqrt();
        let expected = DRAWS as f64 * share;
        assert!((count - expected).abs() < 5.0 * deviation, "{name}: {count}, expected {expected} +- {deviation}");
    }
}

#[test]
fn no_weight_takes_nothing() {
    let mut world =
        World::new().with(web()).with(pod("web-1", "web", "b", "10.0.0.1")).with(pod("web-2", "web", "b", "10.0.0.2"));
    let mut idle = named(&world.snapshot(), "web-1").as_ref().clone();
    idle.capacity = 0;
    world.changes.push(Change::UpsertWorkload(idle.into()));
    world.check(WEB, &["tunnel web-2 10.0.0.2:8080"]);
    let mut idle = named(&world.snapshot(), "web-2").as_ref().clone();
    idle.capacity = 0;
    world.changes.push(Change::UpsertWorkload(idle.into()));
    world.check(WEB, &[NONE_READY]);
}

#[test]
fn an_endpoint_without_weight_does_not_hide_those_farther_away() {
    let wish = |service: &mut Service| service.traffic_distribution = Some("PreferSameNode".into());
    let mut world = places(&["near", "zone", "far"], wish);
    let mut idle = named(&world.snapshot(), "near").as_ref().clone();
    idle.capacity = 0;
    world.changes.push(Change::UpsertWorkload(idle.into()));
    world.check(WEB, &[ZONE]);
}

#[test]
fn endpoints_in_another_network_are_not_dialled() {
    let mut world = places(&["near", "zone", "far"], |_| {});
    world.network = "here";
    for name in ["near", "zone"] {
        let mut elsewhere = named(&world.snapshot(), name).as_ref().clone();
        elsewhere.network = "there".into();
        world.changes.push(Change::UpsertWorkload(elsewhere.into()));
    }
    world.check(WEB, &[FAR]);
}

#[test]
fn the_largest_weights_do_not_overflow() {
    let mut world = World::new().with(web());
    for name in ["web-1", "web-2", "web-3"] {
        let ip = format!("10.0.0.{}", &name[4..]);
        world = world.with(pod(name, "web", "b", &ip));
        let mut heavy = named(&world.snapshot(), name).as_ref().clone();
        heavy.capacity = u32::MAX;
        world.changes.push(Change::UpsertWorkload(heavy.into()));
    }
    world.check(WEB, &["tunnel web-1 10.0.0.1:8080", "tunnel web-2 10.0.0.2:8080", "tunnel web-3 10.0.0.3:8080"]);
}

#[test]
fn a_failed_dial_moves_on_to_what_is_next_best() {
    let mut world =
        places(&["near", "zone", "far"], |service| service.traffic_distribution = Some("PreferSameNode".into()));
    for (failed, next) in [("near", ZONE), ("zone", FAR), ("far", NONE_READY)] {
        world.excluded.push(failed.to_owned());
        world.check(WEB, &[next]);
    }
}

#[test]
fn a_failed_dial_of_a_workload_by_its_own_address_has_nowhere_to_go() {
    let mut world = World::new().with(pod("web-1", "web", "b", "10.0.0.1"));
    world.excluded.push("web-1".to_owned());
    world.check("10.0.0.1:80", &["tunnel web-1 10.0.0.1:80"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    /// Every ready endpoint is tried once, none twice, and then the connection is refused.
    #[test]
    fn failover_never_repeats_an_endpoint(
        ready in prop::collection::vec(any::<bool>(), 0..12),
        wish in prop::sample::select(vec![None, Some("PreferClose"), Some("PreferSameNode")]),
        seed in any::<u64>(),
    ) {
        let service = service_with("web", "10.96.0.1", |service| service.traffic_distribution = wish.map(Into::into));
        let mut world = World::new().with(service);
        for (number, ready) in ready.iter().enumerate() {
            let (name, ip) = (format!("web-{number}"), format!("10.0.1.{number}"));
            let node = ["a", "b", "c"][number % 3];
            world = world.with(pod_with(&name, "web", node, &ip, |pod| pod.ready = Some(*ready)));
        }
        let snapshot = world.snapshot();
        let count = ready.iter().filter(|ready| **ready).count();
        for attempt in 0..count as u64 {
            let plan = world.plan(&snapshot, ("client", WEB.parse().expect("address")), seed.wrapping_add(attempt));
            let Plan::Tunnel(upstream) = plan else { panic!("{}", words(&plan)) };
            let name = upstream.workload.name.to_string();
            prop_assert!(!world.excluded.contains(&name), "{name} again");
            world.excluded.push(name);
        }
        let plan = world.plan(&snapshot, ("client", WEB.parse().expect("address")), seed);
        prop_assert_eq!(words(&plan), NONE_READY);
    }
}
