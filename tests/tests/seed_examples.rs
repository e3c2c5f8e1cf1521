//! The examples that users bring along (`tests/data/examples`), applied to a running mesh: each object does what it says,
//! or says what it does not do.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};

use mesh_api::admin::Problem;
use mesh_ctl::sandbox::{Topology, Workload};
use mesh_tests::mesh_bed::{Held, PATIENCE, eventually};
use mesh_tests::policy_bed::{Family, PolicyBed, server};

/// The port of the servers that nothing says anything about.
const PORT: u16 = 7000;
/// The port that `06-mtls.yaml` calls the health check's.
const HEALTH: u16 = 8080;
/// Outside the mesh, on node-a.
const LEGACY: &str = "legacy-client";

/// Text of an example, and its documents.
fn example(name: &str) -> (String, Vec<String>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/examples").join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let documents = text.split("---\n").map(str::to_owned).collect();
    (text, documents)
}

/// The workloads that the examples name, on both nodes, and one that is not in the mesh.
fn topology(server: impl Fn(&str, &str) -> Workload) -> Topology {
    Topology::new()
        .node("node-a")
        .node("node-b")
        .namespace("default", &[("istio.io/dataplane-mode", "ambient")])
        .namespace("production", &[("istio.io/dataplane-mode", "ambient")])
        .workload(server("frontend", "node-a").namespace("production"))
        .workload(server("backend", "node-b").namespace("production"))
        .workload(server("legacy-app", "node-b"))
        .workload(server("api", "node-a"))
        .workload(server("admin-panel", "node-b"))
        .workload(server("database-api", "node-a"))
        .workload(Workload::new(LEGACY, "node-a").outside_mesh())
}

const FRONTEND: &str = "frontend.production";
const BACKEND: &str = "backend.production";

fn echo_mesh(name: &str) -> PolicyBed {
    PolicyBed::up(name, topology(|name, node| server(name, node, &[PORT, HEALTH])))
}

/// Fails unless mutual TLS reaches all of these on both ports, and plaintext exactly those `NAME:PORT` of them.
fn plaintext_reaches(bed: &PolicyBed, servers: &[&str], plain: &[&str], when: &str) {
    for name in servers {
        let callers = ["api", FRONTEND].into_iter().filter(|caller| caller != name);
        for port in [PORT, HEALTH] {
            for caller in callers.clone() {
                assert!(bed.reaches_one(caller, name, port), "{when}: {caller} to {name}:{port} in mutual TLS");
            }
            let wanted = plain.contains(&&*format!("{name}:{port}"));
            assert_eq!(bed.reaches_one(LEGACY, name, port), wanted, "{when}: plaintext to {name}:{port}");
        }
    }
}

#[test]
fn peer_authentication_for_mesh_namespace_workload_and_port() {
    let bed = echo_mesh("mtls");
    let (whole, documents) = example("06-mtls.yaml");
    let [namespace, mesh, workload] = &documents[..] else { panic!("three objects: {whole}") };
    let servers = [FRONTEND, BACKEND, "legacy-app", "api"];
    let defaults = ["legacy-app:7000", "legacy-app:8080", "api:7000", "api:8080"];
    let all = [&defaults[..], &["frontend.production:7000", "frontend.production:8080"]].concat();
    let all = [&all[..], &["backend.production:7000", "backend.production:8080"]].concat();
    plaintext_reaches(&bed, &servers, &all, "without PeerAuthentication");

    assert_eq!(bed.apply("mtls.yaml", namespace), []);
    plaintext_reaches(&bed, &servers, &defaults, "STRICT in production");
    assert_eq!(bed.apply("mtls.yaml", &format!("{namespace}---\n{mesh}")), []);
    plaintext_reaches(&bed, &servers, &[], "STRICT in the mesh");
    assert_eq!(bed.apply("mtls.yaml", &whole), []);
    plaintext_reaches(&bed, &servers, &defaults[..2], "PERMISSIVE for legacy-app");

    // When its migration is over, the health check's port alone stays open.
    let migrated = workload.replace("mode: PERMISSIVE", "mode: STRICT");
    assert_ne!(&migrated, workload);
    assert_eq!(bed.apply("mtls.yaml", &format!("{namespace}---\n{mesh}---\n{migrated}")), []);
    plaintext_reaches(&bed, &servers, &["legacy-app:8080"], "STRICT for legacy-app, DISABLE on 8080");

    bed.delete("mtls.yaml");
    plaintext_reaches(&bed, &servers, &all, "PeerAuthentication deleted");
}

/// Connections in plaintext and in mutual TLS, across nodes and on one node.
fn hold(bed: &PolicyBed) -> Vec<(&'static str, Held)> {
    let mut all = Vec::new();
    for (what, from) in [("plaintext", LEGACY), ("mutual TLS", "api")] {
        for to in [BACKEND, "database-api"] {
            let mut held = bed.mesh.hold(from, SocketAddr::new(bed.ip(to, Family::V4), PORT));
            assert_eq!(held.say("before"), "before", "{from} to {to}");
            all.push((what, held));
        }
    }
    all
}

#[test]
fn migration_from_permissive_to_strict_ends_plaintext_and_spares_mutual_tls() {
    let bed = echo_mesh("migrate");
    let (whole, documents) = example("14-migration.yaml");
    let [deployment, permissive, strict] = &documents[..] else { panic!("three objects: {whole}") };
    let servers = [FRONTEND, BACKEND, "database-api"];
    let open: Vec<String> = servers.iter().flat_map(|s| [PORT, HEALTH].map(|port| format!("{s}:{port}"))).collect();
    let open: Vec<&str> = open.iter().map(String::as_str).collect();

    // Both phases in one file are one name twice: the first is in force, and that is an error of the file.
    let problems = bed.apply("migration.yaml", &whole);
    let brief: Vec<String> = problems.iter().map(|p| format!("{} {} {}", p.severity, p.code, p.object)).collect();
    assert!(brief.contains(&"error MESH005 PeerAuthentication istio-system/default".to_owned()), "{brief:?}");
    assert!(brief.contains(&"warning MESH006 Deployment app".to_owned()), "{brief:?}");
    plaintext_reaches(&bed, &servers, &open, "both phases in one file");

    bed.apply("migration.yaml", &format!("{deployment}---\n{permissive}"));
    plaintext_reaches(&bed, &servers, &open, "phase 3");
    let mut held = hold(&bed);
    bed.apply("migration.yaml", &format!("{deployment}---\n{strict}"));
    for (what, held) in &mut held {
        match *what {
            "plaintext" => eventually("the end of plaintext", || held.say("still").starts_with("closed").then_some(())),
            _ => assert_eq!(held.say("after"), "after", "{what}"),
        }
    }
    plaintext_reaches(&bed, &servers, &[], "phase 5");
    for (_, held) in held.iter_mut().filter(|(what, _)| *what == "mutual TLS") {
        assert_eq!(held.say("long after"), "long after");
    }
    // Back again: nobody who proved who they are notices.
    bed.apply("migration.yaml", permissive);
    plaintext_reaches(&bed, &servers, &open, "phase 3 again");
    for (_, held) in held.iter_mut().filter(|(what, _)| *what == "mutual TLS") {
        assert_eq!(held.say("at the end"), "at the end");
    }
}

/// A web server on [`HEALTH`], which is also the port that the examples' policies mean.
fn web(name: &str, node: &str) -> Workload {
    let argv = ["mesh-ctl", "sandbox", "serve", "http", "--port", "8080", "--workload", name];
    Workload::new(name, node).label("app", name).runs(argv).ready_on(HEALTH)
}

/// One request by curl; whether it was answered.
fn asks(mut curl: Command, method: &str, to: IpAddr, path: &str) -> bool {
    let url = format!("http://{}{path}", SocketAddr::new(to, HEALTH));
    let seconds = PATIENCE.as_secs().to_string();
    curl.args(["-sS", "-g", "--max-time", &seconds, "-o", "/dev/null", "-w", "%{http_code}", "-X", method, &url]);
    let output = curl.stdin(Stdio::null()).output().unwrap();
    let code = String::from_utf8_lossy(&output.stdout).into_owned();
    // Refused here is a connection that ends without an answer: nobody on the way speaks HTTP.
    assert!(code == "200" || code == "000", "{method} {url}: {code}");
    assert_ne!(output.status.code(), Some(28), "{method} {url}: no end within {seconds} s");
    code == "200"
}

fn request(bed: &PolicyBed, from: &str, method: &str, to: &str) -> bool {
    asks(bed.mesh.sandbox.command(from, "curl").unwrap(), method, bed.ip(to, Family::V4), "/api/users")
}

/// Codes that were reported about a policy.
fn about<'a>(problems: &'a [Problem], policy: &str) -> Vec<&'a Problem> {
    problems.iter().filter(|p| p.object == format!("AuthorizationPolicy {policy}")).collect()
}

/// Fails unless exactly one thing was said about a policy: that it is stricter than written, with field, fact and advice.
fn says_stricter(problems: &[Problem], policy: &str, fields: &str, consequence: &str) {
    let [problem] = about(problems, policy)[..] else { panic!("one problem of {policy}: {problems:?}") };
    assert_eq!((&*problem.code, &*problem.severity, &*problem.field), ("MESH102", "warning", "spec.rules[0]"));
    assert_eq!(problem.message, format!("node proxies do not see {fields}; {consequence}"), "{policy}");
    assert!(problem.line > 0 && problem.hint.contains("waypoint"), "{problem:?}");
}

const IN_PRODUCTION: [(&str, &str); 4] =
    [(FRONTEND, BACKEND), (BACKEND, FRONTEND), ("api", BACKEND), (LEGACY, BACKEND)];

#[test]
fn authorization_deny_all_and_a_principal_that_may() {
    let bed = PolicyBed::up("allow", topology(web));
    let (whole, documents) = example("07-authorization.yaml");
    let [deny_all, allow, ..] = &documents[..] else { panic!("{whole}") };
    let went = |method: &str| IN_PRODUCTION.map(|(from, to)| request(&bed, from, method, to));
    assert_eq!(went("GET"), [true; 4], "without policies");
    assert_eq!(bed.apply("authz.yaml", deny_all), []);
    assert_eq!(went("GET"), [false; 4], "deny-all");
    assert!(request(&bed, FRONTEND, "GET", "api") && request(&bed, LEGACY, "GET", "api"), "another namespace");

    // Methods and paths cannot be seen here: the rule lets nobody in, and says so.
    let problems = bed.apply("authz.yaml", &format!("{deny_all}---\n{allow}"));
    says_stricter(&problems, "production/allow-frontend-to-backend", "methods, paths", "the rule allows nothing there");
    assert_eq!(went("GET"), [false; 4], "deny-all and a rule with HTTP fields");

    // What is left of it at L4 is the principal.
    let l4 = allow.split("      to:\n").next().unwrap();
    assert_ne!(l4, allow);
    assert_eq!(bed.apply("authz.yaml", &format!("{deny_all}---\n{l4}")), []);
    assert_eq!(went("GET"), [true, false, false, false], "the principal alone");
    assert_eq!(went("DELETE"), [true, false, false, false], "the principal alone");
    let line = bed.mesh.logged("node-b", &["policy", "\"dst.workload\":\"backend\"", "\"src.workload\":\"api\""]);
    assert!(line.contains("no allow policy matched"), "the reason is in the log: {line}");
}

/// An IPv4 address that is in none of the blocks of `allow-internal-ips`, for processes of node-a.
const OUTSIDE: &str = "192.0.2.7";

fn give_node_a_an_address_outside(bed: &PolicyBed) {
    let [gateway, _] = Topology::host_addresses(1);
    for (node, arguments) in [
        ("node-a", format!("address add {OUTSIDE}/32 dev lo")),
        ("node-b", format!("route add {OUTSIDE}/32 via {gateway} dev to-node-a onlink")),
    ] {
        let mut ip = bed.mesh.sandbox.host_command(node, "ip").unwrap();
        assert!(ip.args(arguments.split(' ')).status().unwrap().success(), "ip {arguments} on {node}");
    }
}

#[test]
fn authorization_by_address_lets_in_from_inside_the_blocks_alone() {
    let bed = PolicyBed::up("blocks", topology(web));
    give_node_a_an_address_outside(&bed);
    let [v4, v6] = Family::BOTH.map(|family| bed.ip("admin-panel", family));
    let node = |more: &[&str]| {
        let mut curl = bed.mesh.sandbox.host_command("node-a", "curl").unwrap();
        curl.args(more);
        asks(curl, "GET", v4, "/")
    };
    let pod = |from: &str, to| asks(bed.mesh.sandbox.command(from, "curl").unwrap(), "GET", to, "/");
    let went = || {
        [
            // 10.244.0.0/16, in mutual TLS and in clear.
            pod("api", v4),
            pod(LEGACY, v4),
            // A node's own address, 172.30.0.2.
            node(&[]),
            // Neither.
            node(&["--interface", OUTSIDE]),
            pod("api", v6),
            pod(LEGACY, v6),
        ]
    };
    assert_eq!(went(), [true; 6], "without policies");
    let (_, documents) = example("07-authorization.yaml");
    let blocks = documents.iter().find(|d| d.contains("allow-internal-ips")).unwrap();
    assert_eq!(bed.apply("authz.yaml", blocks), []);
    assert_eq!(went(), [true, true, true, false, false, false], "allow-internal-ips");
    assert!(request(&bed, LEGACY, "GET", "api"), "it selects admin-panel alone");
}

#[test]
fn authorization_by_what_only_a_waypoint_can_see_is_stricter_and_says_so() {
    let bed = PolicyBed::up("http", topology(web));
    let (whole, documents) = example("07-authorization.yaml");
    let document = |name: &str| documents.iter().find(|d| d.contains(&format!("name: {name}\n"))).unwrap().as_str();
    let went =
        |to: &str| ["GET", "DELETE"].map(|method| [FRONTEND, LEGACY].map(|from| request(&bed, from, method, to)));
    let (nobody, everybody) = ([[false; 2]; 2], [[true; 2]; 2]);
    for (policy, server, fields, consequence) in [
        ("require-jwt", "api", "request attributes, requestPrincipals", "the rule allows nothing there"),
        ("read-only-access", "database-api", "methods", "the rule allows nothing there"),
        ("deny-delete", "database-api", "methods", "the rule denies every connection there"),
    ] {
        assert_eq!(went(server), everybody, "{server} without policies");
        let problems = bed.apply("authz.yaml", document(policy));
        says_stricter(&problems, &format!("default/{policy}"), fields, consequence);
        assert_eq!(went(server), nobody, "{policy}");
        assert_eq!(went("legacy-app"), everybody, "{policy} selects {server} alone");
        bed.delete("authz.yaml");
    }

    // All of them together, as the file has them.
    let problems = bed.apply("authz.yaml", &whole);
    let mut stricter: Vec<&str> = problems.iter().filter(|p| p.code == "MESH102").map(|p| &*p.object).collect();
    stricter.sort_unstable();
    let expected = [
        "AuthorizationPolicy default/deny-delete",
        "AuthorizationPolicy default/read-only-access",
        "AuthorizationPolicy default/require-jwt",
        "AuthorizationPolicy production/allow-frontend-to-backend",
    ];
    assert_eq!(stricter, expected, "{problems:?}");
    assert_eq!(problems.len(), stricter.len(), "nothing else is wrong with it: {problems:?}");
    for closed in [BACKEND, "api", "database-api"] {
        assert_eq!(went(closed), nobody, "{closed}");
    }
    for open in ["admin-panel", "legacy-app"] {
        assert_eq!(went(open), everybody, "{open}");
    }
    bed.ctl(&["status"]).exits(0).prints("MESH102").prints("require-jwt");
}
