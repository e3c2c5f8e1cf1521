//! What a node tells about itself and its traffic: readiness, metrics, access log.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use http::{Method, Request};
use mesh_ctl::sandbox::{Part, Service, Topology};
use mesh_tests::capture_bed::tcp::{bind, connect};
use mesh_tests::ends::{Family, every_route};
use mesh_tests::greeter::{Greeter, Manner};
use mesh_tests::hostile::{Approach, Ca, Claim, tunnel};
use mesh_tests::mesh_bed::{MeshBed, PATIENCE, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Port of the service, and of its endpoints.
const PORT: u16 = 80;
const TARGET: u16 = 8080;
/// Connections that end.
const CONNECTIONS: u64 = 5;
/// What each of them says.
const WORDS: &str = "a question of thirty-two letters";

/// `far` behind the service `web`, and the others without one.
fn topology() -> Topology {
    let mut topology = every_route().service(Service::new("web").selects("app", "web").port("tcp", PORT, TARGET));
    for workload in topology.workloads.iter_mut().filter(|workload| workload.name == "far") {
        workload.labels.insert("app".to_owned(), "web".to_owned());
        workload.labels.insert("version".to_owned(), "v2".to_owned());
    }
    topology
}

fn vip(bed: &MeshBed) -> SocketAddr {
    let topology = bed.sandbox.topology();
    SocketAddr::new(topology.vips(&topology.services[0])[0], PORT)
}

fn target(bed: &MeshBed, workload: &str) -> SocketAddr {
    SocketAddr::new(bed.address_of(workload, Family::V4), TARGET)
}

/// Labels and value of a metric's series on a node.
fn series(bed: &MeshBed, node: &str, name: &str) -> Vec<(Vec<(String, String)>, u64)> {
    let page = eventually("metrics", || bed.page(node, 15020, "/metrics"));
    let lines = page.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('{')?.split_once("} "));
    lines
        .map(|(labels, value)| {
            let labels = labels.trim_end_matches('"').split("\",").map(|label| {
                let (key, value) = label.split_once("=\"").unwrap_or_else(|| panic!("{name}: {label}"));
                (key.to_owned(), value.to_owned())
            });
            (labels.collect(), value.parse().unwrap())
        })
        .collect()
}

/// Value of the only series with these labels; 0 when there is none.
fn value(bed: &MeshBed, node: &str, name: &str, wanted: &[(&str, &str)]) -> u64 {
    let has = |labels: &Vec<(String, String)>| {
        wanted.iter().all(|(key, value)| labels.iter().any(|(k, v)| k == key && v == value))
    };
    let found: Vec<_> = series(bed, node, name).into_iter().filter(|(labels, _)| has(labels)).collect();
    assert!(found.len() <= 1, "{name} with {wanted:?}: {found:?}");
    found.first().map_or(0, |(_, value)| *value)
}

/// Waits until a value is what it must be, and fails with what it is.
fn settles(what: &str, expected: u64, mut look: impl FnMut() -> u64) {
    let deadline = Instant::now() + PATIENCE;
    while look() != expected && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(look(), expected, "{what}");
}

/// Labels in Istio's order: reporter, client, service and server, and the rest.
fn labels(reporter: &str, client: [&str; 2], server: [&str; 4], rest: [&str; 2]) -> Vec<(String, String)> {
    let principal = |account: &str| match account {
        "unknown" => account.to_owned(),
        account => format!("spiffe://cluster.local/ns/default/sa/{account}"),
    };
    let [source, source_account] = client;
    let [destination, canonical, version, destination_account] = server;
    let [service, security] = rest;
    let short = if service == "unknown" { "unknown" } else { "web" };
    let (source_principal, destination_principal) = (principal(source_account), principal(destination_account));
    let namespace = if service == "unknown" { "unknown" } else { "default" };
    [
        ("reporter", reporter),
        ("source_workload", source),
        ("source_canonical_service", source),
        ("source_canonical_revision", "latest"),
        ("source_workload_namespace", "default"),
        ("source_principal", &source_principal),
        ("source_app", source),
        ("source_version", "latest"),
        ("source_cluster", "Kubernetes"),
        ("destination_service", service),
        ("destination_service_namespace", namespace),
        ("destination_service_name", short),
        ("destination_workload", destination),
        ("destination_canonical_service", canonical),
        ("destination_canonical_revision", version),
        ("destination_workload_namespace", "default"),
        ("destination_principal", &destination_principal),
        ("destination_app", canonical),
        ("destination_version", version),
        ("destination_cluster", "Kubernetes"),
        ("request_protocol", "tcp"),
        ("response_flags", "-"),
        ("connection_security_policy", security),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

#[test]
fn metrics_have_istios_names_and_labels_and_the_values_of_the_traffic() {
    let bed = MeshBed::up("metrics", topology());
    let _servers = ["near", "far"].map(|name| Greeter::start(&bed, name, TARGET, Manner::Polite));
    let paths = [("client", vip(&bed)), ("client", target(&bed, "near")), ("outsider", target(&bed, "far"))];
    for (from, to) in paths {
        (0..CONNECTIONS).for_each(|_| drop(bed.ask(from, to, WORDS).unwrap()));
    }
    // These stay: their bytes count while they live.
    let open = paths.map(|(from, to)| {
        let stream = bed.dial(from, to).unwrap();
        std::io::Write::write_all(&mut &stream, WORDS.as_bytes()).unwrap();
        std::io::Read::read_exact(&mut &stream, &mut [0; 3]).unwrap();
        stream
    });
    let service = "web.default.svc.cluster.local";
    let (client, far, near) = (["client", "client"], ["far", "web", "v2", "far"], ["near", "near", "latest", "near"]);
    let cases = [
        ("node-a", labels("source", client, far, [service, "mutual_tls"]), 3),
        ("node-b", labels("destination", client, far, [service, "mutual_tls"]), 3),
        ("node-a", labels("source", client, near, ["unknown", "mutual_tls"]), 4),
        ("node-a", labels("destination", client, near, ["unknown", "mutual_tls"]), 4),
        (
            "node-b",
            labels("destination", ["outsider", "unknown"], ["far", "web", "v2", "unknown"], ["unknown", "unknown"]),
            3,
        ),
    ];
    for (node, labels, name_bytes) in cases {
        for (name, expected) in [
            ("istio_tcp_connections_opened_total", CONNECTIONS + 1),
            ("istio_tcp_connections_closed_total", CONNECTIONS),
            ("istio_tcp_received_bytes_total", (CONNECTIONS + 1) * WORDS.len() as u64),
            ("istio_tcp_sent_bytes_total", (CONNECTIONS + 1) * name_bytes),
        ] {
            let found = || series(&bed, node, name).into_iter().find(|(found, _)| *found == labels);
            settles(&format!("{name} on {node} with {labels:?}"), expected, || found().map_or(0, |(_, value)| value));
        }
    }
    drop(open);
}

/// Denies `client` everything.
const DENY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: not-the-client, namespace: default}
spec:
  action: DENY
  rules:
  - from: [{source: {principals: [cluster.local/ns/default/sa/client]}}]
";

#[test]
fn refused_connections_are_counted_with_the_reason() {
    const FAILED: &str = "istio_tcp_connections_failed_total";
    const DENIED: u64 = 3;
    let bed = MeshBed::up("flags", topology());
    // Nobody listens: an endpoint that is there and cannot be reached is no matter of policy.
    assert!(bed.ask("client", vip(&bed), WORDS).is_err());
    let connect = [("response_flags", "CONNECT"), ("destination_workload", "far")];
    for (node, reporter) in [("node-a", "source"), ("node-b", "destination")] {
        let wanted = [&connect[..], &[("reporter", reporter)]].concat();
        settles(&format!("failures on {node}"), 1, || value(&bed, node, FAILED, &wanted));
    }
    // Nor is a port that the service does not have.
    assert!(bed.ask("client", SocketAddr::new(vip(&bed).ip(), PORT + 1), WORDS).is_err());
    let nowhere = [("response_flags", "CONNECT"), ("destination_workload", "unknown")];
    settles("failures without an endpoint", 1, || value(&bed, "node-a", FAILED, &nowhere));
    let _servers = ["near", "far"].map(|name| Greeter::start(&bed, name, TARGET, Manner::Polite));
    bed.write_config("policy.yaml", DENY);
    // It is stored when it is in force; a connection that is ended by its arrival is no refused one.
    for node in ["node-a", "node-b"] {
        eventually("the policy", || bed.stored(node, "not-the-client"));
    }
    for name in ["near", "far"] {
        for _ in 0..DENIED {
            assert!(bed.ask("client", target(&bed, name), WORDS).is_err(), "{name} is open");
        }
    }
    for (name, reporter, node) in [
        ("far", "source", "node-a"),
        ("far", "destination", "node-b"),
        ("near", "source", "node-a"),
        ("near", "destination", "node-a"),
    ] {
        let wanted = [("response_flags", "DENY"), ("destination_workload", name), ("reporter", reporter)];
        settles(&format!("denied at {name} as {reporter}"), DENIED, || value(&bed, node, FAILED, &wanted));
    }
}

/// Linkerd's GHSA-42mr-jpwh-m9rv: whoever chooses destinations must not choose how much memory the proxy needs.
#[test]
fn strangers_and_what_peers_say_add_no_series() {
    const STRANGERS: u8 = 100;
    let bed = MeshBed::up("bounded", topology());
    let server = Greeter::start(&bed, "far", TARGET, Manner::Polite);
    // Destinations that nobody knows: many addresses, many ports.
    for number in 0..STRANGERS {
        let unknown = SocketAddr::new(Ipv4Addr::new(10, 244, 1, 150 + number % 50).into(), 1000 + u16::from(number));
        // It is refused at once or after a while; what counts is that it is tried.
        drop(bed.dial("client", unknown));
    }
    // Sources that nobody knows.
    let outsider = bed.sandbox.layout.netns("outsider");
    for number in 0..STRANGERS {
        let stranger = Ipv4Addr::new(10, 244, 1, 150 + number);
        add_address(&outsider, stranger);
        let socket = bed.socket("outsider", IpAddr::V4(stranger));
        bind(socket.as_fd(), SocketAddr::new(stranger.into(), 0)).unwrap();
        drop(connect(socket, target(&bed, "far"), PATIENCE).unwrap());
    }
    eventually("the strangers' connections", || (server.heard().len() >= usize::from(STRANGERS)).then_some(()));
    // A peer with a good certificate that says something else of itself in each request.
    let ca = Ca::of_the_mesh(&bed.sandbox.layout.controller().join("state"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let identity = ca.issue(&Claim::of("spiffe://cluster.local/ns/default/sa/client"));
        let hbone = SocketAddr::new(bed.address_of("far", Family::V4), 15008);
        let netns = bed.sandbox.layout.netns("node-a");
        let mut send = tunnel(&netns, hbone, Approach::with(identity)).await.unwrap();
        for number in 0..STRANGERS {
            let request = Request::builder()
                .method(Method::CONNECT)
                .uri(target(&bed, "far").to_string())
                .header(
                    "baggage",
                    format!("k8s.pod.name=pod-{number},k8s.namespace.name=ns-{number},service.name=s-{number}"),
                )
                .header("forwarded", format!("for=\"10.0.0.{number}:1\";host=service-{number}"))
                .body(())
                .unwrap();
            let (response, _send) = send.send_request(request, false).unwrap();
            assert_eq!(response.await.unwrap().status(), 200);
        }
    });
    // One for unknown destinations; one for unknown sources, and one for the peer.
    for (node, most) in [("node-a", 1), ("node-b", 2)] {
        for kind in ["opened", "failed"] {
            let all = series(&bed, node, &format!("istio_tcp_connections_{kind}_total"));
            assert!(all.len() <= most, "{node}: {kind}: {all:#?}");
        }
    }
    let kept = eventually("metrics", || bed.page("node-b", 15020, "/metrics"));
    assert!(kept.contains("mesh_series_overflow_total 0\n"), "{kept}");
}

fn add_address(netns: &std::path::Path, address: Ipv4Addr) {
    let file = std::fs::File::open(netns).unwrap();
    let added = mesh_node::capture::in_netns(file.as_fd(), || {
        std::process::Command::new("ip").args(["address", "add", &format!("{address}/32"), "dev", "eth0"]).status()
    });
    assert!(added.unwrap().unwrap().success(), "add {address}");
}

/// Every key of ztunnel's line, in its order, for a connection through a tunnel to a service.
const KEYS: [&str; 16] = [
    "src.addr",
    "src.workload",
    "src.namespace",
    "src.identity",
    "src.cluster",
    "dst.addr",
    "dst.hbone_addr",
    "dst.service",
    "dst.workload",
    "dst.namespace",
    "dst.identity",
    "dst.cluster",
    "direction",
    "bytes_sent",
    "bytes_recv",
    "duration",
];

/// What a record of a connection from `client` to the service `web` says.
fn expected(bed: &MeshBed, direction: &str) -> Vec<(&'static str, String)> {
    let identity = |account: &str| format!("spiffe://cluster.local/ns/default/sa/{account}");
    let (words, name) = (WORDS.len().to_string(), "far".len().to_string());
    let (sent, received) = if direction == "outbound" { (words, name) } else { (name, words) };
    let hbone = SocketAddr::new(bed.address_of("far", Family::V4), 15008);
    let values = [
        String::new(),
        "client".into(),
        "default".into(),
        identity("client"),
        "Kubernetes".into(),
        target(bed, "far").to_string(),
        hbone.to_string(),
        "web.default.svc.cluster.local".into(),
        "far".into(),
        "default".into(),
        identity("far"),
        "Kubernetes".into(),
        direction.to_owned(),
        sent,
        received,
    ];
    KEYS.into_iter().zip(values).collect()
}

#[test]
fn the_access_log_has_ztunnels_keys_in_both_directions_as_json() {
    let bed = MeshBed::up("json", topology());
    let _server = Greeter::start(&bed, "far", TARGET, Manner::Polite);
    bed.ask("client", vip(&bed), WORDS).unwrap();
    for (node, direction) in [("node-a", "outbound"), ("node-b", "inbound")] {
        let record = bed.record(node, &[("direction", direction), ("dst.workload", "far")]);
        assert!(
            record.has(&[("level", "info"), ("scope", "access"), ("message", "connection complete")]),
            "{record:?}"
        );
        assert!(record.text("time").ends_with('Z') && record.text("duration").ends_with("ms"), "{record:?}");
        for (key, wanted) in expected(&bed, direction).into_iter().skip(1) {
            let found = record.0[key].as_str().map_or_else(|| record.0[key].to_string(), str::to_owned);
            assert_eq!(found, wanted, "{key} of {record:?}");
        }
        let source: SocketAddr = record.text("src.addr").parse().unwrap();
        assert_eq!(source.ip(), bed.address_of("client", Family::V4), "{record:?}");
    }
}

#[test]
fn the_access_log_has_ztunnels_keys_in_both_directions_as_text() {
    let mut bed = MeshBed::up("text", topology());
    let mut as_text = Vec::new();
    for node in ["node-a", "node-b"] {
        let mut argv = bed.sandbox.node_argv(node).unwrap();
        argv.iter_mut().filter(|word| *word == "json").for_each(|word| *word = "text".into());
        bed.sandbox.end_part(&Part::Node(node.to_owned())).unwrap();
        as_text.push(bed.run_on(node, &argv));
        let everybody =
            bed.sandbox.topology().workloads.iter().filter(|w| w.node == node && w.name != "outsider").count();
        eventually("the node proxy", || bed.status(node).filter(|s| s.ready && s.enrolled.len() == everybody));
    }
    let _server = Greeter::start(&bed, "far", TARGET, Manner::Polite);
    bed.ask("client", vip(&bed), WORDS).unwrap();
    for (node, direction) in [("node-a", "outbound"), ("node-b", "inbound")] {
        let log = bed.sandbox.layout.node(node).join("access.log");
        let line = eventually(&format!("a line in {}", log.display()), || {
            let text = std::fs::read_to_string(&log).ok()?;
            text.lines().find(|line| line.contains("dst.workload=\"far\"")).map(str::to_owned)
        });
        let parts: Vec<&str> = line.split('\t').collect();
        assert_eq!(parts[1..4], ["info", "access", "connection complete"], "{line}");
        let fields: Vec<(&str, &str)> = parts[4].split(' ').map(|field| field.split_once('=').unwrap()).collect();
        let keys: Vec<&str> = fields.iter().map(|(key, _)| *key).collect();
        assert_eq!(keys, KEYS, "{line}");
        for ((key, found), (_, wanted)) in fields.iter().zip(expected(&bed, direction)).skip(1) {
            assert_eq!(found.trim_matches('"'), wanted, "{key} of {line}");
        }
    }
    drop(as_text);
}

fn readiness(bed: &MeshBed, node: &str) -> Option<String> {
    bed.page(node, 15021, "/healthz/ready")
}

#[test]
fn a_node_is_ready_after_its_first_configuration_and_when_its_workloads_are_enrolled() {
    let node = "node-a";
    let mut bed = MeshBed::up("readiness", topology());
    assert!(readiness(&bed, node).unwrap().starts_with("HTTP/1.1 200 "));
    // As on a machine that has just booted: nothing is stored, and nobody serves yet.
    bed.sandbox.end_part(&Part::Node(node.to_owned())).unwrap();
    bed.sandbox.end_part(&Part::Controller).unwrap();
    std::fs::remove_file(bed.sandbox.layout.node(node).join("state/snapshot")).unwrap();
    bed.sandbox.start_node(node, &[]).unwrap();
    let waits_for = |bed: &MeshBed, what: &str| {
        eventually(&format!("waiting for {what}"), || {
            let page = readiness(bed, node)?;
            let waits = page.starts_with("HTTP/1.1 503 ") && page.trim_end().ends_with(&format!("waiting for {what}"));
            waits.then_some(())
        });
    };
    waits_for(&bed, "configuration");
    bed.sandbox.start_controller().unwrap();
    eventually("readiness", || readiness(&bed, node).filter(|page| page.starts_with("HTTP/1.1 200 ")));

    // And now the agent is there, but has not said yet which workloads there are.
    let agent = Pid::from_raw(bed.sandbox.running(&Part::Agent).unwrap().pid);
    kill(agent, Signal::SIGSTOP).unwrap();
    bed.sandbox.end_part(&Part::Node(node.to_owned())).unwrap();
    bed.sandbox.start_node(node, &[]).unwrap();
    waits_for(&bed, "enrolment of the node's workloads");
    kill(agent, Signal::SIGCONT).unwrap();
    eventually("readiness", || readiness(&bed, node).filter(|page| page.starts_with("HTTP/1.1 200 ")));
    let mut enrolled: Vec<String> = bed.status(node).unwrap().enrolled.into_iter().map(|w| w.name).collect();
    enrolled.sort();
    assert_eq!(enrolled, ["client", "near"], "all of them before the node calls itself ready");

    // The next proxy adopts them, and does not need the agent for that.
    kill(agent, Signal::SIGSTOP).unwrap();
    let proxy = bed.proxy(node);
    kill(Pid::from_raw(proxy), Signal::SIGKILL).unwrap();
    let next =
        eventually("the next proxy", || bed.status(node).filter(|s| s.ready && i32::try_from(s.pid) != Ok(proxy)));
    assert_eq!(next.enrolled.len(), 2, "{next:?}");
    kill(agent, Signal::SIGCONT).unwrap();
}
