//! Where a waypoint is required, connections go through it or are refused.

use mesh_core::config::objects::{Service, TargetPort};
use mesh_core::config::{Object, Waypoints};
use mesh_core::snapshot::Change;
use mesh_core::workload::{GatewayAddress, GatewayDestination, Health};

use crate::world::{World, labels, named, pod, pod_with, service_port, service_with};

const WEB: &str = "10.96.0.1:80";
const THROUGH: &str = "waypoint way-1 10.0.0.5:15008 for 10.96.0.1:80";
const NOT_READY: &str = "refuse: waypoint of default/web.default.svc.cluster.local is not ready";

fn requires(service: &mut Service) {
    service.meta.labels = labels(&[("istio.io/use-waypoint", "way")]);
}

/// `web` requires a waypoint.
fn world() -> World {
    World::new().with(service_with("web", "10.96.0.1", requires)).with(pod("web-1", "web", "b", "10.0.0.1"))
}

fn waypoint_service() -> Object {
    service_with("way", "10.96.0.5", |service| {
        service.ports = vec![service_port("mesh", 15008, TargetPort::Number(15008))];
    })
}

fn waypoint_pod(name: &str, ip: &str, ready: bool) -> Object {
    pod_with(name, "way", "b", ip, |pod| {
        pod.ready = Some(ready);
        pod.meta.labels.extend(labels(&[("networking.istio.io/tunnel", "http")]));
    })
}

#[test]
fn a_service_that_requires_one_goes_through_it() {
    let world = world().with(waypoint_service()).with(waypoint_pod("way-1", "10.0.0.5", true));
    world.check(WEB, &[THROUGH]);
    let two = world.with(waypoint_pod("way-2", "10.0.0.6", true));
    two.check(WEB, &[THROUGH, "waypoint way-2 10.0.0.6:15008 for 10.96.0.1:80"]);
}

#[test]
fn without_a_ready_one_the_connection_is_refused_never_direct() {
    world().check(WEB, &[NOT_READY]);
    world().with(waypoint_service()).check(WEB, &[NOT_READY]);
    world().with(waypoint_service()).with(waypoint_pod("way-1", "10.0.0.5", false)).check(WEB, &[NOT_READY]);
}

#[test]
fn a_failed_dial_goes_to_another_waypoint_never_around() {
    let mut world = world()
        .with(waypoint_service())
        .with(waypoint_pod("way-1", "10.0.0.5", true))
        .with(waypoint_pod("way-2", "10.0.0.6", true));
    world.excluded.push("way-2".to_owned());
    world.check(WEB, &[THROUGH]);
    world.excluded.push("way-1".to_owned());
    world.check(WEB, &[NOT_READY]);
}

#[test]
fn the_waypoint_itself_reaches_what_is_behind_it() {
    let world = world().with(waypoint_service()).with(waypoint_pod("way-1", "10.0.0.5", true));
    world.check_from("way-1", WEB, &["tunnel web-1 10.0.0.1:8080"]);
}

#[test]
fn the_waypoint_itself_is_not_reached_through_itself() {
    let labelled = pod_with("way-1", "way", "b", "10.0.0.5", |pod| {
        pod.meta.labels.extend(labels(&[("istio.io/use-waypoint", "way")]));
    });
    let world = World::new().with(waypoint_service()).with(labelled);
    world.check("10.0.0.5:80", &["tunnel way-1 10.0.0.5:80"]);
}

#[test]
fn a_workload_that_requires_one_is_reached_through_it() {
    let with_label = |name: &str| {
        pod_with("web-1", "web", "b", "10.0.0.1", |pod| {
            pod.meta.labels.extend(labels(&[("istio.io/use-waypoint", name)]));
        })
    };
    let ready =
        World::new().with(with_label("way")).with(waypoint_service()).with(waypoint_pod("way-1", "10.0.0.5", true));
    ready.check("10.0.0.1:8080", &["waypoint way-1 10.0.0.5:15008 for 10.0.0.1:8080"]);
    ready.check_from("way-1", "10.0.0.1:8080", &["tunnel web-1 10.0.0.1:8080"]);
    let missing = World::new().with(with_label("way"));
    missing.check("10.0.0.1:8080", &["refuse: waypoint of Kubernetes//Pod/default/web-1 is not ready"]);
    World::new().with(with_label("none")).check("10.0.0.1:8080", &["tunnel web-1 10.0.0.1:8080"]);
}

#[test]
fn the_namespaces_label_counts_for_its_services_and_none_takes_it_back() {
    let mut world = World::new().with(pod("web-1", "web", "b", "10.0.0.1"));
    for object in &mut world.objects {
        if let Object::Namespace(namespace) = object {
            namespace.meta.labels.extend(labels(&[("istio.io/use-waypoint", "way")]));
        }
    }
    let objects = world.objects.clone();
    world.with(service_with("web", "10.96.0.1", |_| {})).check(WEB, &[NOT_READY]);
    let mut world = World::new();
    world.objects = objects;
    let open =
        service_with("web", "10.96.0.1", |service| service.meta.labels = labels(&[("istio.io/use-waypoint", "none")]));
    world.with(open).check(WEB, &["tunnel web-1 10.0.0.1:8080"]);
}

#[test]
fn a_mesh_without_waypoints_ignores_the_label() {
    let mut world = world();
    world.settings.waypoints = Waypoints::Ignored;
    world.check(WEB, &["tunnel web-1 10.0.0.1:8080"]);
}

#[test]
fn a_waypoint_given_by_address_is_used_where_it_can_be_reached() {
    let by_address = |network: &str| {
        let mut world = world().with(waypoint_pod("way-1", "10.0.0.5", true)).with(waypoint_service());
        world.network = "near";
        let mut service = world.snapshot().services().find(|s| *s.name == *"web").expect("compiled").as_ref().clone();
        let destination =
            GatewayDestination::Address { network: network.into(), address: "10.0.0.5".parse().expect("address") };
        service.waypoint = Some(GatewayAddress { destination, hbone_port: 15009 });
        world.changes.push(Change::UpsertService(service.into()));
        world
    };
    by_address("near").check(WEB, &["waypoint way-1 10.0.0.5:15009 for 10.96.0.1:80"]);
    by_address("").check_from("way-1", WEB, &["tunnel web-1 10.0.0.1:8080"]);
    by_address("far").check(WEB, &[NOT_READY]);
    let mut failed = by_address("near");
    failed.excluded.push("way-1".to_owned());
    failed.check(WEB, &[NOT_READY]);
    let mut unready = by_address("near");
    let mut waypoint = named(&unready.snapshot(), "way-1").as_ref().clone();
    waypoint.health = Health::Unhealthy;
    unready.changes.push(Change::UpsertWorkload(waypoint.into()));
    unready.check(WEB, &[NOT_READY]);
    let mut gone = by_address("near");
    gone.changes.push(Change::RemoveWorkload(named(&gone.snapshot(), "way-1").uid.clone()));
    gone.check(WEB, &[NOT_READY]);
}
