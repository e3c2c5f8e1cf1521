//! A service's virtual address leads to endpoints that can take the connection, and to those that should.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use mesh_api::admin::WorkloadRow;
use mesh_ctl::sandbox::{Part, Service, Topology, Workload};
use mesh_tests::ends::Family;
use mesh_tests::greeter::{Greeter, Manner};
use mesh_tests::mesh_bed::{MeshBed, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

/// Port of the service, and of its endpoints unless something else is said.
const PORT: u16 = 80;
const TARGET: u16 = 8080;
/// Connections that find every endpoint of two: one is missed by 2 in 2^40.
const MANY: usize = 40;
/// Virtual addresses of services that are written by hand; those of the topology begin at 10.96.0.10.
const VIP4: &str = "10.96.7.7";
const VIP6: &str = "fd00:10:96::707";

/// Three nodes, the first two in one zone; `client` on the first, and an endpoint of `web` on each.
fn three_nodes() -> Topology {
    let web = |name: &str, node: &str| Workload::new(name, node).label("app", "web");
    Topology::new()
        .node_at("node-a", "here", "one")
        .node_at("node-b", "here", "one")
        .node_at("node-c", "here", "two")
        .namespace("default", &[("istio.io/dataplane-mode", "ambient")])
        .workload(Workload::new("client", "node-a"))
        .workload(web("web-a", "node-a"))
        .workload(web("web-b", "node-b"))
        .workload(web("web-c", "node-c"))
}

fn greeters(bed: &MeshBed, names: &[&str]) -> Vec<Greeter> {
    names.iter().map(|name| Greeter::start(bed, name, TARGET, Manner::Polite)).collect()
}

/// Writes the service `web` with more in its `spec`.
fn service(bed: &MeshBed, target: &serde_json::Value, more: &[(&str, &str)]) {
    let mut spec = json!({
        "clusterIP": VIP4, "clusterIPs": [VIP4, VIP6], "selector": {"app": "web"},
        "ports": [{"name": "tcp", "port": PORT, "targetPort": target}],
    });
    more.iter().for_each(|(key, value)| spec[*key] = json!(value));
    let metadata = json!({"name": "web", "namespace": "default"});
    let object = json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec});
    bed.write_config("50-web.yaml", &object.to_string());
    eventually("the service's arrival", || {
        let rows: Vec<mesh_api::admin::ServiceRow> = bed.admin("node-a", "/services")?;
        rows.iter().any(|row| row.vips.iter().any(|vip| vip.contains(VIP4))).then_some(())
    });
}

fn vip(family: Family) -> SocketAddr {
    let ip: IpAddr = [VIP4, VIP6][family as usize].parse().unwrap();
    SocketAddr::new(ip, PORT)
}

/// Writes a workload's pod again, with its readiness and with named ports; returns when the client's node knows.
fn pod(bed: &MeshBed, name: &str, ready: bool, ports: &[(&str, u16)]) {
    let workload = bed.sandbox.workload(name).unwrap();
    let ips: Vec<_> = [Family::V4, Family::V6].map(|family| json!({"ip": bed.address_of(name, family)})).into();
    let ports: Vec<_> = ports.iter().map(|(name, port)| json!({"name": name, "containerPort": port})).collect();
    let metadata = json!({"name": name, "namespace": "default", "uid": workload.uid, "labels": workload.labels});
    let spec = json!({
        "nodeName": workload.node, "serviceAccountName": name,
        "containers": [{"name": "main", "image": "none", "ports": ports}],
    });
    let condition = json!({"type": "Ready", "status": if ready { "True" } else { "False" }});
    let status = json!({"phase": "Running", "podIPs": ips, "conditions": [condition]});
    let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status});
    bed.write_config(&format!("20-pod-{name}.yaml"), &object.to_string());
    let wanted = if ready { "healthy" } else { "unhealthy" };
    for node in ["node-a", &*workload.node] {
        eventually(&format!("{name} is {wanted} on {node}"), || {
            let rows: Vec<WorkloadRow> = bed.admin(node, "/workloads")?;
            rows.iter().any(|row| row.name == name && row.status == wanted).then_some(())
        });
    }
}

/// Who answers many connections, each how often.
fn answers(bed: &MeshBed, from: &str, to: SocketAddr, connections: usize) -> BTreeMap<String, usize> {
    let mut names = BTreeMap::new();
    for number in 0..connections {
        let name = bed.ask(from, to, "hello").unwrap_or_else(|e| panic!("{from} to {to}, connection {number}: {e}"));
        *names.entry(name).or_default() += 1;
    }
    names
}

/// Exactly these answer.
fn answer(bed: &MeshBed, from: &str, to: SocketAddr, expected: &[&str]) {
    let names = answers(bed, from, to, MANY);
    assert_eq!(names.keys().map(String::as_str).collect::<Vec<_>>(), expected, "{from} to {to}: {names:?}");
}

fn refused(bed: &MeshBed, from: &str, to: SocketAddr, why: &str) {
    let asked = bed.ask(from, to, "hello");
    assert!(asked.is_err(), "{from} to {to}: {asked:?} answered");
    let node = bed.sandbox.workload(from).unwrap().node.clone();
    eventually(&format!("`{why}` in the access log of {node}"), || {
        bed.records(&node).iter().any(|record| record.text("error").contains(why)).then_some(())
    });
}

#[test]
fn only_ready_endpoints_answer_and_changes_count_at_once() {
    let bed = MeshBed::up("ready", three_nodes());
    let _servers = greeters(&bed, &["web-a", "web-b", "web-c"]);
    service(&bed, &json!(TARGET), &[]);
    pod(&bed, "web-b", false, &[]);
    for family in [Family::V4, Family::V6] {
        answer(&bed, "client", vip(family), &["web-a", "web-c"]);
        refused(&bed, "client", SocketAddr::new(vip(family).ip(), PORT + 1), "has no port 81");
        let client = bed.dial("client", vip(family)).unwrap();
        assert_eq!(client.peer_addr().unwrap(), vip(family), "the client sees what it dialled");
    }
    // Its own address still leads there: readiness is the service's business.
    answer(&bed, "client", SocketAddr::new(bed.address_of("web-b", Family::V4), TARGET), &["web-b"]);
    pod(&bed, "web-a", false, &[]);
    pod(&bed, "web-c", false, &[]);
    refused(&bed, "client", vip(Family::V4), "has no ready endpoint");
    pod(&bed, "web-b", true, &[]);
    answer(&bed, "client", vip(Family::V4), &["web-b"]);
    let record = bed.record("node-a", &[("dst.service", "web.default.svc.cluster.local"), ("dst.workload", "web-b")]);
    assert_eq!(record.text("dst.addr"), format!("{}:{TARGET}", bed.address_of("web-b", Family::V4)), "{record:?}");
}

#[test]
fn connections_spread_by_weight() {
    const CONNECTIONS: usize = 200;
    /// Of 200 with a probability of 3/4 each 150 are expected; the standard deviation is 6.
    const HEAVY: RangeInclusive<usize> = 110..=190;
    let machine = |name: &str| Workload::new(name, "node-b").outside_mesh();
    let topology = three_nodes().workload(machine("light")).workload(machine("heavy"));
    let bed = MeshBed::up("weight", topology);
    let _servers = greeters(&bed, &["light", "heavy"]);
    for (name, weight) in [("light", 1), ("heavy", 3)] {
        // A machine instead of a pod: only those have weights.
        std::fs::remove_file(bed.sandbox.layout.config().join(format!("20-pod-{name}.yaml"))).unwrap();
        let spec = json!({"address": bed.address_of(name, Family::V4), "weight": weight, "labels": {"app": "web"}});
        let object = json!({
            "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
            "metadata": {"name": format!("{name}-machine"), "namespace": "default"}, "spec": spec,
        });
        bed.write_config(&format!("30-{name}.yaml"), &object.to_string());
        eventually("the machine's arrival", || {
            let rows: Vec<WorkloadRow> = bed.admin("node-a", "/workloads")?;
            rows.iter().any(|row| row.name == format!("{name}-machine") && row.capacity == weight).then_some(())
        });
    }
    ["web-a", "web-b", "web-c"].iter().for_each(|name| pod(&bed, name, false, &[]));
    service(&bed, &json!(TARGET), &[]);
    let names = answers(&bed, "client", vip(Family::V4), CONNECTIONS);
    assert!(HEAVY.contains(&names["heavy"]), "{names:?}");
    assert_eq!(names["heavy"] + names["light"], CONNECTIONS, "{names:?}");
}

#[test]
fn the_nearest_place_that_has_ready_endpoints_answers() {
    let bed = MeshBed::up("close", three_nodes());
    let _servers = greeters(&bed, &["web-a", "web-b", "web-c"]);
    for (distribution, nearest, next) in
        [("PreferClose", &["web-a", "web-b"][..], &["web-b"][..]), ("PreferSameNode", &["web-a"], &["web-b"])]
    {
        service(&bed, &json!(TARGET), &[("trafficDistribution", distribution)]);
        eventually(distribution, || {
            (answers(&bed, "client", vip(Family::V4), MANY).len() == nearest.len()).then_some(())
        });
        answer(&bed, "client", vip(Family::V6), nearest);
        pod(&bed, "web-a", false, &[]);
        answer(&bed, "client", vip(Family::V4), next);
        pod(&bed, "web-b", false, &[]);
        answer(&bed, "client", vip(Family::V4), &["web-c"]);
        pod(&bed, "web-a", true, &[]);
        pod(&bed, "web-b", true, &[]);
        answer(&bed, "client", vip(Family::V4), nearest);
    }
}

#[test]
fn an_internal_traffic_policy_of_local_never_leaves_the_node() {
    let bed = MeshBed::up("local", three_nodes().workload(Workload::new("other", "node-c")));
    let _servers = greeters(&bed, &["web-a", "web-b", "web-c"]);
    service(&bed, &json!(TARGET), &[("internalTrafficPolicy", "Local")]);
    answer(&bed, "client", vip(Family::V4), &["web-a"]);
    answer(&bed, "other", vip(Family::V6), &["web-c"]);
    pod(&bed, "web-a", false, &[]);
    refused(&bed, "client", vip(Family::V4), "has no ready endpoint");
    answer(&bed, "other", vip(Family::V4), &["web-c"]);
    pod(&bed, "web-a", true, &[]);
    answer(&bed, "client", vip(Family::V4), &["web-a"]);
}

#[test]
fn a_target_port_by_name_is_each_pods_own() {
    let bed = MeshBed::up("named", three_nodes());
    let ports = [("web-a", 8080), ("web-b", 9090)];
    let _servers = ports.map(|(name, port)| Greeter::start(&bed, name, port, Manner::Polite));
    service(&bed, &json!("entrance"), &[]);
    for (name, port) in ports {
        pod(&bed, name, true, &[("metrics", 9999), ("entrance", port)]);
    }
    // This one has no port of that name, and is no endpoint for it.
    pod(&bed, "web-c", true, &[("metrics", TARGET)]);
    // Until the last of the three has arrived, the others may be tried in vain.
    eventually("the named ports", || {
        let asked: Vec<_> = (0..MANY).map(|_| bed.ask("client", vip(Family::V4), "hello")).collect();
        asked.iter().all(Result::is_ok).then_some(())
    });
    answer(&bed, "client", vip(Family::V4), &["web-a", "web-b"]);
    answer(&bed, "client", vip(Family::V6), &["web-a", "web-b"]);
}

#[test]
fn a_headless_service_is_its_pods() {
    let topology =
        three_nodes().service(Service::new("pods").selects("app", "web").port("tcp", PORT, TARGET).headless());
    let bed = MeshBed::up("headless", topology);
    let names = ["web-a", "web-b", "web-c"];
    let _servers = greeters(&bed, &names);
    let mut getent = bed.sandbox.command("client", "getent").unwrap();
    getent.args(["ahosts", "pods"]);
    let ran = mesh_tests::sandbox_bed::finish(getent);
    let found: BTreeSet<IpAddr> =
        ran.succeeds().stdout.lines().map(|line| line.split(' ').next().unwrap().parse().unwrap()).collect();
    assert_eq!(found.len(), 2 * names.len(), "{}", ran.all());
    for name in names {
        for family in [Family::V4, Family::V6] {
            let ip = bed.address_of(name, family);
            assert!(found.contains(&ip), "{name} at {ip}: {}", ran.all());
            assert_eq!(bed.ask("client", SocketAddr::new(ip, TARGET), "hello").unwrap(), name, "at {ip}");
        }
        bed.carried("client", name);
    }
}

/// The sum of a metric's series on a node.
fn metric(bed: &MeshBed, node: &str, name: &str) -> u64 {
    let page = eventually("metrics", || bed.page(node, 15020, "/metrics"));
    let values = page.lines().filter_map(|line| line.strip_prefix(name)?.split(' ').next_back()?.parse::<u64>().ok());
    values.sum()
}

#[test]
fn a_failed_dial_moves_on_to_another_endpoint_and_no_byte_goes_twice() {
    let bed = MeshBed::up("moves", three_nodes());
    service(&bed, &json!(TARGET), &[]);
    // Nobody listens in the other two: one is on the client's node, the other behind a tunnel.
    for alone in ["web-a", "web-b", "web-c"] {
        let retries = metric(&bed, "node-a", "mesh_dial_retries_total");
        let server = Greeter::start(&bed, alone, TARGET, Manner::Polite);
        let words: BTreeSet<String> = (0..MANY).map(|number| format!("{alone} {number}")).collect();
        for family in [Family::V4, Family::V6] {
            for words in &words {
                assert_eq!(bed.ask("client", vip(family), words).unwrap(), alone, "{words}");
            }
        }
        let mut heard = server.heard();
        assert_eq!(heard.len(), 2 * MANY, "{alone}: each once");
        heard.sort();
        heard.dedup();
        assert_eq!(heard.into_iter().collect::<BTreeSet<_>>(), words, "{alone}");
        assert!(metric(&bed, "node-a", "mesh_dial_retries_total") > retries, "{alone}: nothing had to move on");
    }
    let asked = bed.ask("client", vip(Family::V4), "hello");
    assert!(asked.is_err(), "{asked:?} answered, but nobody listens");
    // What the last of the endpoints said: the one on this node, or a peer's proxy.
    let reasons = ["Connection refused", "peer answered 503"];
    eventually("the failure's record", || {
        let last = bed.records("node-a").pop()?;
        reasons.iter().any(|reason| last.text("error").contains(reason)).then_some(())
    });
}

#[test]
fn a_node_that_is_gone_is_left_out_before_the_client_sees_an_error() {
    let bed = MeshBed::up("gone", three_nodes());
    service(&bed, &json!(TARGET), &[]);
    pod(&bed, "web-a", false, &[]);
    let _servers = greeters(&bed, &["web-b", "web-c"]);
    answer(&bed, "client", vip(Family::V4), &["web-b", "web-c"]);
    kill(Pid::from_raw(bed.supervisor("node-b")), Signal::SIGKILL).unwrap();
    eventually("the supervisor's end", || bed.sandbox.running(&Part::Node("node-b".into())).is_none().then_some(()));
    answer(&bed, "client", vip(Family::V4), &["web-c"]);
}

#[test]
fn what_a_server_has_heard_is_never_told_to_another() {
    let bed = MeshBed::up("once", three_nodes());
    service(&bed, &json!(TARGET), &[]);
    let servers = ["web-a", "web-b", "web-c"].map(|name| Greeter::start(&bed, name, TARGET, Manner::Rude));
    let words: Vec<String> = (0..2 * MANY).map(|number| format!("only once {number}")).collect();
    for words in &words {
        // The name may arrive or not; the end is a reset.
        assert!(bed.ask("client", vip(Family::V4), words).is_err(), "{words}: an orderly end");
    }
    let heard = || servers.iter().flat_map(Greeter::heard).collect::<Vec<_>>();
    eventually("the servers hear all", || (heard().len() >= words.len()).then_some(()));
    let mut heard = heard();
    heard.sort();
    let mut words = words;
    words.sort();
    assert_eq!(heard, words);
    assert!(servers.iter().all(|server| !server.heard().is_empty()), "each has heard some");
}
