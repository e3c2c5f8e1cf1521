//! What an address means, and how what it means is reached.

use mesh_core::config::Object;
use mesh_core::config::objects::{Meta, Namespace, TargetPort};

use crate::world::{World, labels, meta, pod, pod_with, service_port, service_with, web};

const WEB: &str = "10.96.0.1:80";

#[test]
fn an_address_that_nobody_has_is_left_alone() {
    World::new().check("192.0.2.1:443", &["pass 192.0.2.1:443"]);
    World::new().check("[2001:db8::1]:443", &["pass [2001:db8::1]:443"]);
    World::new().check("[::ffff:192.0.2.1]:443", &["pass 192.0.2.1:443"]);
}

#[test]
fn a_workload_of_another_node_is_reached_through_a_tunnel() {
    let world = World::new().with(pod("web-1", "web", "b", "10.0.0.1")).with(web());
    world.check(WEB, &["tunnel web-1 10.0.0.1:8080"]);
    world.check("10.0.0.1:8080", &["tunnel web-1 10.0.0.1:8080"]);
    world.check("10.0.0.1:5432", &["tunnel web-1 10.0.0.1:5432"]);
    world.check("[::ffff:10.0.0.1]:8080", &["tunnel web-1 10.0.0.1:8080"]);
    world.check("[::ffff:10.96.0.1]:80", &["tunnel web-1 10.0.0.1:8080"]);
}

#[test]
fn a_workload_of_this_node_is_reached_without_one() {
    let mut world = World::new().with(pod("web-1", "web", "a", "10.0.0.1")).with(web());
    world.enrolled.push("web-1");
    world.check(WEB, &["local web-1 10.0.0.1:8080"]);
    world.check("10.0.0.1:81", &["local web-1 10.0.0.1:81"]);
}

#[test]
fn the_mesh_wide_switch_forces_the_tunnel() {
    let mut world = World::new().with(pod("web-1", "web", "a", "10.0.0.1")).with(web());
    world.enrolled.push("web-1");
    world.force_tunnel = true;
    world.check(WEB, &["tunnel web-1 10.0.0.1:8080"]);
}

#[test]
fn only_a_workload_that_this_proxy_serves_is_local() {
    // On this node, but not enrolled here yet.
    let world = World::new().with(pod("web-1", "web", "a", "10.0.0.1")).with(web());
    world.check(WEB, &["tunnel web-1 10.0.0.1:8080"]);
    // Enrolled here, while the configuration still has it elsewhere.
    let mut moved = World::new().with(pod("web-1", "web", "b", "10.0.0.1")).with(web());
    moved.enrolled.push("web-1");
    moved.check(WEB, &["tunnel web-1 10.0.0.1:8080"]);
    // A proxy that does not know its node.
    let mut lost = World::new().with(pod("web-1", "web", "", "10.0.0.1")).with(web());
    lost.local_node = "";
    lost.enrolled.push("web-1");
    lost.check(WEB, &["tunnel web-1 10.0.0.1:8080"]);
}

#[test]
fn a_workload_that_terminates_hbone_itself_is_always_tunnelled_to() {
    let native = pod_with("web-1", "web", "a", "10.0.0.1", |pod| {
        pod.meta.labels.extend(labels(&[("networking.istio.io/tunnel", "http")]));
    });
    let mut world = World::new().with(native).with(web());
    world.enrolled.push("web-1");
    world.check(WEB, &["tunnel web-1 10.0.0.1:8080"]);
}

#[test]
fn a_peer_that_does_not_speak_hbone_is_dialled_in_clear_at_its_own_port() {
    let outside = || {
        pod_with("web-1", "web", "b", "10.0.0.1", |pod| {
            pod.meta.labels.extend(labels(&[("istio.io/dataplane-mode", "none")]));
        })
    };
    let world = World::new().with(outside()).with(web());
    world.check(WEB, &["pass web-1 10.0.0.1:8080"]);
    world.check("10.0.0.1:81", &["pass web-1 10.0.0.1:81"]);
    // A service may have both kinds.
    let both = World::new().with(outside()).with(pod("web-2", "web", "b", "10.0.0.2")).with(web());
    both.check(WEB, &["pass web-1 10.0.0.1:8080", "tunnel web-2 10.0.0.2:8080"]);
}

#[test]
fn a_pod_on_the_nodes_network_or_with_a_sidecar_is_dialled_in_clear() {
    let host = pod_with("web-1", "web", "b", "10.0.0.1", |pod| pod.host_network = true);
    World::new().with(host).with(web()).check(WEB, &["pass web-1 10.0.0.1:8080"]);
    let sidecar = pod_with("web-1", "web", "b", "10.0.0.1", |pod| {
        pod.meta.annotations = labels(&[("sidecar.istio.io/status", "injected")]);
    });
    World::new().with(sidecar).with(web()).check(WEB, &["pass web-1 10.0.0.1:8080"]);
}

#[test]
fn a_workload_that_dials_itself_is_left_alone() {
    let own = "pass client 10.0.0.9:80";
    World::new().check("10.0.0.9:80", &[own]);
    World::new().check("[::ffff:10.0.0.9]:80", &[own]);
}

#[test]
fn the_proxys_own_ports_are_refused_wherever_they_are() {
    let on_reserved = service_with("web", "10.96.0.1", |service| {
        service.ports.push(service_port("loop", 81, TargetPort::Number(15008)));
    });
    let world = World::new().with(pod("web-1", "web", "b", "10.0.0.1")).with(on_reserved);
    for port in [15001, 15006, 15008] {
        for ip in ["10.0.0.1", "10.0.0.9", "10.96.0.1", "127.0.0.1", "192.0.2.1"] {
            world.check(&format!("{ip}:{port}"), &[&format!("refuse: port {port} belongs to the node proxy")]);
        }
    }
    world.check("10.96.0.1:81", &["refuse: port 15008 belongs to the node proxy"]);
}

#[test]
fn a_pods_address_wins_over_a_service_that_claims_it() {
    let thief = service_with("thief", "10.0.0.1", |_| {});
    let world = World::new().with(pod("web-1", "web", "b", "10.0.0.1")).with(thief);
    world.check("10.0.0.1:80", &["tunnel web-1 10.0.0.1:80"]);
}

#[test]
fn the_last_pod_that_got_an_address_has_it() {
    let of_age = |name: &str, created: u64, deleting: bool| {
        pod_with(name, "web", "b", "10.0.0.1", |pod| {
            pod.meta.created_secs = created;
            pod.deleting = deleting;
        })
    };
    let two = World::new().with(of_age("old", 1, false)).with(of_age("new", 2, false));
    two.check("10.0.0.1:80", &["tunnel new 10.0.0.1:80"]);
    let leaving = World::new().with(of_age("old", 1, false)).with(of_age("new", 2, true));
    leaving.check("10.0.0.1:80", &["tunnel old 10.0.0.1:80"]);
}

#[test]
fn a_completed_pod_has_no_address() {
    let done =
        pod_with("job-1", "job", "b", "10.0.0.1", |pod| pod.phase = mesh_core::config::objects::PodPhase::Succeeded);
    World::new().with(done).check("10.0.0.1:80", &["pass 10.0.0.1:80"]);
}

#[test]
fn addresses_of_another_network_are_not_ours() {
    let far = || {
        let network = labels(&[("topology.istio.io/network", "far")]);
        let meta = Meta { namespace: "".into(), labels: network, ..meta("shop") };
        let in_shop = pod_with("web-1", "web", "b", "10.0.0.1", |pod| pod.meta.namespace = "shop".into());
        World::new().with(Object::Namespace(Namespace { meta })).with(in_shop)
    };
    let mut world = far();
    world.network = "near";
    world.check("10.0.0.1:80", &["pass 10.0.0.1:80"]);
    let mut world = far();
    world.network = "far";
    world.check("10.0.0.1:80", &["pass web-1 10.0.0.1:80"]);
}
