//! Services: which endpoints they have and how these serve their ports.

use mesh_core::config::Object;
use mesh_core::config::objects::{
    EndpointSlice, Protocol, ServiceKind, SliceEndpoint, SlicePort, TargetPort, WorkloadEntry,
};

use crate::world::{World, container_port, labels, meta, pod, pod_with, service_port, service_with, web};

const WEB: &str = "10.96.0.1:80";
const NONE_READY: &str = "refuse: service default/web.default.svc.cluster.local has no ready endpoint";

#[test]
fn a_service_without_endpoints_refuses() {
    World::new().with(web()).check(WEB, &[NONE_READY]);
    // What no label selects is no endpoint.
    World::new().with(web()).with(pod("db-1", "db", "b", "10.0.0.1")).check(WEB, &[NONE_READY]);
}

#[test]
fn a_port_that_the_service_does_not_have_is_refused() {
    let with_udp = service_with("web", "10.96.0.1", |service| {
        let mut dns = service_port("dns", 53, TargetPort::Number(53));
        dns.protocol = Protocol::Udp;
        service.ports.push(dns);
    });
    let world = World::new().with(with_udp).with(pod("web-1", "web", "b", "10.0.0.1"));
    for port in [53, 81, 8080] {
        let refusal = format!("refuse: service default/web.default.svc.cluster.local has no port {port}");
        world.check(&format!("10.96.0.1:{port}"), &[&refusal]);
    }
}

#[test]
fn only_ready_endpoints_are_used() {
    let unready = |name: &str, ip: &str| pod_with(name, "web", "b", ip, |pod| pod.ready = Some(false));
    let leaving = |name: &str, ip: &str| pod_with(name, "web", "b", ip, |pod| pod.deleting = true);
    let silent = |name: &str, ip: &str| pod_with(name, "web", "b", ip, |pod| pod.ready = None);
    let starting =
        pod_with("web-5", "web", "b", "10.0.0.5", |pod| pod.phase = mesh_core::config::objects::PodPhase::Pending);
    let world = World::new()
        .with(web())
        .with(pod("web-1", "web", "b", "10.0.0.1"))
        .with(unready("web-2", "10.0.0.2"))
        .with(leaving("web-3", "10.0.0.3"))
        .with(silent("web-4", "10.0.0.4"))
        .with(starting);
    world.check(WEB, &["tunnel web-1 10.0.0.1:8080", "tunnel web-4 10.0.0.4:8080"]);
    World::new().with(web()).with(unready("web-2", "10.0.0.2")).check(WEB, &[NONE_READY]);
    World::new().with(web()).with(leaving("web-3", "10.0.0.3")).check(WEB, &[NONE_READY]);
}

#[test]
fn who_dials_a_pod_that_is_not_ready_by_its_address_reaches_it() {
    let unready = pod_with("web-1", "web", "b", "10.0.0.1", |pod| pod.ready = Some(false));
    World::new().with(unready).check("10.0.0.1:8080", &["tunnel web-1 10.0.0.1:8080"]);
}

#[test]
fn publish_not_ready_addresses_uses_all() {
    let all = service_with("web", "10.96.0.1", |service| service.publish_not_ready = true);
    let unready = pod_with("web-2", "web", "b", "10.0.0.2", |pod| pod.ready = Some(false));
    let world = World::new().with(all).with(pod("web-1", "web", "b", "10.0.0.1")).with(unready);
    world.check(WEB, &["tunnel web-1 10.0.0.1:8080", "tunnel web-2 10.0.0.2:8080"]);
}

#[test]
fn a_named_target_port_is_each_pods_own() {
    let other = pod_with("web-2", "web", "b", "10.0.0.2", |pod| pod.ports = vec![container_port("http", 9999)]);
    let without = pod_with("web-3", "web", "b", "10.0.0.3", |pod| pod.ports = vec![container_port("admin", 1)]);
    let world = World::new().with(web()).with(pod("web-1", "web", "b", "10.0.0.1")).with(other).with(without);
    world.check(WEB, &["tunnel web-1 10.0.0.1:8080", "tunnel web-2 10.0.0.2:9999"]);
}

#[test]
fn a_port_of_udp_with_the_same_name_does_not_count() {
    let udp = pod_with("web-1", "web", "b", "10.0.0.1", |pod| pod.ports[0].protocol = Protocol::Udp);
    World::new().with(web()).with(udp).check(WEB, &[NONE_READY]);
}

#[test]
fn a_numbered_target_port_needs_no_container_port() {
    let numbered = service_with("web", "10.96.0.1", |service| service.ports[0].target = TargetPort::Number(7777));
    let bare = pod_with("web-1", "web", "b", "10.0.0.1", |pod| pod.ports.clear());
    World::new().with(numbered).with(bare).check(WEB, &["tunnel web-1 10.0.0.1:7777"]);
}

#[test]
fn each_port_goes_to_its_own_target() {
    let two = service_with("web", "10.96.0.1", |service| {
        service.ports.push(service_port("admin", 81, TargetPort::Number(9090)));
    });
    let world = World::new().with(two).with(pod("web-1", "web", "b", "10.0.0.1"));
    world.check("10.96.0.1:80", &["tunnel web-1 10.0.0.1:8080"]);
    world.check("10.96.0.1:81", &["tunnel web-1 10.0.0.1:9090"]);
}

#[test]
fn a_headless_service_is_reached_by_the_addresses_of_its_pods() {
    let headless = service_with("web", "10.96.0.1", |service| service.cluster_ips.clear());
    let world = World::new().with(headless).with(pod("web-1", "web", "b", "10.0.0.1"));
    world.check("10.0.0.1:8080", &["tunnel web-1 10.0.0.1:8080"]);
    world.check("10.96.0.1:80", &["pass 10.96.0.1:80"]);
}

#[test]
fn an_external_name_is_no_service_here() {
    let alias = service_with("web", "10.96.0.1", |service| service.kind = ServiceKind::ExternalName);
    World::new().with(alias).with(pod("web-1", "web", "b", "10.0.0.1")).check(WEB, &["pass 10.96.0.1:80"]);
}

fn slice(name: &str, endpoints: &[(&str, &str, bool)]) -> Object {
    let endpoint = |(pod, ip, ready): &(&str, &str, bool)| SliceEndpoint {
        addresses: vec![ip.parse().expect("address")],
        ready: *ready,
        pod: (!pod.is_empty()).then(|| (*pod).into()),
        node: "b".into(),
        zone: "1".into(),
    };
    Object::EndpointSlice(EndpointSlice {
        meta: meta(name),
        service: "web".into(),
        ports: vec![SlicePort { name: "http".into(), port: 8888, protocol: Protocol::Tcp }],
        endpoints: endpoints.iter().map(endpoint).collect(),
    })
}

#[test]
fn slices_say_which_endpoints_a_service_has_and_at_which_port() {
    let world = World::new()
        .with(web())
        .with(pod("web-1", "web", "b", "10.0.0.1"))
        .with(pod("web-2", "web", "b", "10.0.0.2"))
        .with(slice("web-x", &[("web-1", "10.0.0.1", true)]));
    world.check(WEB, &["tunnel web-1 10.0.0.1:8888"]);
}

#[test]
fn an_endpoint_that_its_slice_calls_unready_is_not_used() {
    let silent = pod_with("web-1", "web", "b", "10.0.0.1", |pod| pod.ready = None);
    let unready = slice("web-x", &[("web-1", "10.0.0.1", false), ("web-2", "10.0.0.2", false)]);
    let world = World::new().with(web()).with(silent).with(pod("web-2", "web", "b", "10.0.0.2")).with(unready);
    world.check(WEB, &[NONE_READY]);
}

#[test]
fn endpoints_that_are_no_pods_are_dialled_in_clear() {
    let by_hand = service_with("web", "10.96.0.1", |service| service.selector.clear());
    let world = World::new()
        .with(by_hand)
        .with(slice("web-x", &[("", "192.0.2.7", true), ("", "192.0.2.8", false), ("", "192.0.2.9", true)]));
    world.check(WEB, &["pass web-x-192.0.2.7 192.0.2.7:8888", "pass web-x-192.0.2.9 192.0.2.9:8888"]);
}

#[test]
fn a_workload_entry_serves_its_ports_by_name() {
    let entry = WorkloadEntry {
        meta: meta("vm-1"),
        address: "192.0.2.7".into(),
        labels: labels(&[("app", "web")]),
        ports: [("http".into(), 7070)].into(),
        ..WorkloadEntry::default()
    };
    World::new().with(web()).with(Object::WorkloadEntry(entry)).check(WEB, &["pass vm-1 192.0.2.7:7070"]);
}

#[test]
fn an_endpoint_is_dialled_in_the_family_that_was_asked_for() {
    let dual =
        service_with("web", "10.96.0.1", |service| service.cluster_ips.push("fd00:96::1".parse().expect("address")));
    let both = pod_with("web-1", "web", "b", "10.0.0.1", |pod| pod.ips.push("fd00::1".parse().expect("address")));
    let world = World::new().with(dual).with(both);
    world.check("10.96.0.1:80", &["tunnel web-1 10.0.0.1:8080"]);
    world.check("[fd00:96::1]:80", &["tunnel web-1 [fd00::1]:8080"]);
}

#[test]
fn an_endpoint_of_the_other_family_alone_is_still_an_endpoint() {
    let dual =
        service_with("web", "10.96.0.1", |service| service.cluster_ips.push("fd00:96::1".parse().expect("address")));
    let world = World::new().with(dual).with(pod("web-1", "web", "b", "10.0.0.1"));
    world.check("[fd00:96::1]:80", &["tunnel web-1 10.0.0.1:8080"]);
}
