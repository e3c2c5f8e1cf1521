//! The fail-closed table, row by row, with real processes: whatever is missing or broken, traffic stops; it never goes
//! around and no rule is skipped.
//!
//! Proxy and supervisor gone, and keys gone with them: `node_lifecycle`. Outcomes that a program does not expect:
//! `mesh_ebpf_common::outcome`, because no real packet leads there.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, SystemTime};

use mesh_api::admin::{BpfState, CertificateRow, ControllerStatus};
use mesh_core::snapshot::{Change, Snapshot};
use mesh_ctl::sandbox::{Part, Service, Topology, Workload};
use mesh_ebpf_common::LAYOUT_VERSION;
use mesh_ebpf_common::maps::{CAPTURED, MAX_CAPTURED};
use mesh_node::snapshot_store::Storage;
use mesh_tests::bpf_map::BpfMap;
use mesh_tests::mesh_bed::{Attempt, ECHO, MeshBed, PATIENCE, echo, eventually, eventually_within, two_nodes};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("signal");
}

/// As [`two_nodes`], with labels by name, and a workload `other` on node-a that may do what `client` may not.
fn labelled() -> Topology {
    let mut topology = two_nodes().workload(Workload::new("other", "node-a"));
    for workload in &mut topology.workloads {
        *workload = workload.clone().label("app", &workload.name.clone());
    }
    topology
}

/// Twenty connections that begin from now on, none of which may go through.
fn none_gets_through(bed: &MeshBed, from: &str, to: SocketAddr, why: &str) {
    let mut stream = bed.stream(from, to);
    for _ in 0..20 {
        let attempt = stream.wait("an attempt", |_| true);
        assert!(!attempt.is_ok(), "{from} to {to}: {attempt:?} went through: {why}");
    }
}

fn write_config(bed: &MeshBed, file: &str, text: &str) {
    let path = bed.sandbox.layout.config().join(file);
    let fresh = bed.sandbox.layout.run.join("fresh.yaml");
    std::fs::write(&fresh, text).unwrap();
    std::fs::rename(&fresh, &path).unwrap();
}

fn controller(bed: &MeshBed) -> ControllerStatus {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let socket = bed.sandbox.layout.controller_admin();
    eventually("the controller's status", || runtime.block_on(mesh_ctl::admin::get(&socket, "/status")).ok())
}

#[test]
fn while_the_proxy_does_not_come_back_connections_wait_a_second_at_most() {
    let bed = MeshBed::up("wait", two_nodes());
    let far = bed.address("far");
    let mut stream = bed.stream("client", far);
    stream.wait("traffic", Attempt::is_ok);
    // A layout of another version beside ours: every proxy that starts refuses to work with it.
    let foreign = bed.sandbox.layout.bpf().join("node-a/v999");
    std::fs::create_dir(&foreign).unwrap();
    let killed = SystemTime::now();
    send(bed.proxy("node-a"), Signal::SIGKILL);
    let mut after = Vec::new();
    stream.wait("ten attempts", |attempt| {
        after.extend((attempt.started > killed).then(|| attempt.clone()));
        after.len() == 10
    });
    for attempt in &after {
        assert!(!attempt.is_ok(), "{attempt:?} went through without a proxy");
        assert!(attempt.took < Duration::from_millis(1500), "{attempt:?} waited too long");
    }
    assert!(after[0].took > Duration::from_millis(500), "the first one waits for the next proxy: {:?}", after[0]);
    std::fs::remove_dir(&foreign).unwrap();
    stream.wait("traffic with the next proxy", Attempt::is_ok);
}

#[test]
fn a_full_map_refuses_counts_and_reports() {
    let bed = MeshBed::up("full", two_nodes());
    let far = bed.address("far");
    bed.stream("client", far).wait("traffic", Attempt::is_ok);
    let map =
        BpfMap::open(&bed.sandbox.layout.bpf().join(format!("node-a/v{LAYOUT_VERSION}/maps")).join(CAPTURED)).unwrap();
    // The address comes first in the key; a namespace 0 is nobody's.
    let key = |n: usize| [&u64::try_from(n).unwrap().to_ne_bytes()[..], &[0; 24]].concat();
    let filled = (0..=MAX_CAPTURED).take_while(|n| map.put(&key(*n), &[0; 32]).is_ok()).count();
    assert!(filled >= MAX_CAPTURED - 16, "{filled} entries");
    none_gets_through(&bed, "client", far, "its destination cannot be noted");
    let state: BpfState = eventually("the kernel's state", || bed.admin("node-a", "/bpf"));
    let full = state.counters.iter().find(|c| c.reason == "notes_full").expect("counted");
    assert!(full.count >= 20, "{full:?}");
    eventually("an event", || {
        let events: Vec<mesh_api::admin::BpfEvent> = bed.admin("node-a", "/events")?;
        events.iter().any(|event| event.reason == "notes_full").then_some(())
    });
    (0..filled).for_each(|n| map.remove(&key(n)).unwrap());
    bed.stream("client", far).wait("traffic with room again", Attempt::is_ok);
}

/// Denies `client` at `far`.
const DENY_CLIENT: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: not-the-client, namespace: default}
spec:
  selector: {matchLabels: {app: far}}
  action: DENY
  rules:
  - from: [{source: {principals: [cluster.local/ns/default/sa/client]}}]
";

#[test]
fn a_policy_that_has_not_arrived_denies() {
    let mut bed = MeshBed::up("policy", labelled().workload(echo("free", "node-b")));
    let (far, free) = (bed.address("far"), bed.address("free"));
    write_config(&bed, "policy.yaml", DENY_CLIENT);
    bed.stream("client", far).wait("denial", |attempt| !attempt.is_ok());
    bed.stream("other", far).wait("traffic that the policy does not concern", Attempt::is_ok);
    eventually("the policy on disk", || bed.stored("node-b", "not-the-client"));
    bed.sandbox.end_part(&Part::Controller).unwrap();
    // As if the controller's connection had broken between the workload and its policy.
    let state = bed.sandbox.layout.node("node-b").join("state");
    let (storage, stored) = Storage::open(state);
    let mut stored = stored.unwrap().expect("stored");
    stored.changes.retain(|change| !matches!(change, Change::UpsertPolicy(_)));
    storage.save(&Snapshot::default().apply(&stored.changes), &stored.versions).unwrap();
    let proxy = bed.proxy("node-b");
    send(proxy, Signal::SIGKILL);
    eventually("the next proxy", || bed.status("node-b").filter(|s| s.ready && i32::try_from(s.pid) != Ok(proxy)));
    bed.stream("client", free).wait("traffic to a workload without policies", Attempt::is_ok);
    none_gets_through(&bed, "client", far, "the policy is not there");
    none_gets_through(&bed, "other", far, "whom it concerns is not known without it");
    let line = bed.logged("node-b", &["not-the-client"]);
    assert!(line.contains("default/not-the-client"), "{line}");
}

#[test]
fn http_fields_that_this_proxy_cannot_judge_make_a_rule_stricter_and_are_reported() {
    let bed = MeshBed::up("http", labelled());
    let far = bed.address("far");
    for (action, file) in [("ALLOW", "allow.yaml"), ("DENY", "deny.yaml")] {
        bed.stream("client", far).wait("traffic without the policy", Attempt::is_ok);
        let policy = DENY_CLIENT.replace("DENY", action) + "    to: [{operation: {methods: [GET]}}]\n";
        write_config(&bed, file, &policy);
        bed.stream("client", far).wait("the policy's arrival", |attempt| !attempt.is_ok());
        none_gets_through(&bed, "client", far, &format!("{action} of GET only"));
        let problem = eventually("the report", || {
            controller(&bed).problems.into_iter().find(|problem| problem.object.contains("default/not-the-client"))
        });
        assert!(problem.field.contains("methods") || problem.message.contains("methods"), "{problem:?}");
        std::fs::remove_file(bed.sandbox.layout.config().join(file)).unwrap();
    }
    bed.stream("client", far).wait("traffic when it is gone", Attempt::is_ok);
}

#[test]
fn a_service_that_needs_a_waypoint_is_refused_until_there_is_one() {
    let topology = labelled().service(Service::new("far").selects("app", "far").port("tcp-echo", ECHO, ECHO));
    let mut bed = MeshBed::up("waypoint", topology);
    let service = bed.sandbox.topology().services.first().expect("service").clone();
    let vip = SocketAddr::new(bed.sandbox.topology().vips(&service)[0], ECHO);
    bed.stream("client", vip).wait("traffic to the service", Attempt::is_ok);
    let file = bed.sandbox.layout.config().join("10-services.yaml");
    let plain = std::fs::read_to_string(&file).unwrap();
    let needs = plain.replacen("metadata:", "metadata:\n  labels: {istio.io/use-waypoint: gate}", 1);
    assert_ne!(plain, needs, "{plain}");
    write_config(&bed, "10-services.yaml", &needs);
    bed.stream("client", vip).wait("refusal", |attempt| !attempt.is_ok());
    none_gets_through(&bed, "client", vip, "its waypoint does not exist");
    bed.logged("node-a", &["connection failed", "waypoint of default/far.default.svc.cluster.local is not ready"]);
    write_config(&bed, "10-services.yaml", &plain);
    bed.stream("client", vip).wait("traffic to the service", Attempt::is_ok);
    // The switch for a mesh without waypoints.
    write_config(&bed, "10-services.yaml", &needs);
    bed.stream("client", vip).wait("refusal", |attempt| !attempt.is_ok());
    bed.sandbox.end_part(&Part::Controller).unwrap();
    bed.sandbox.start_controller_with(&["--waypoints", "ignored"].map(str::to_owned)).unwrap();
    bed.stream("client", vip).wait("traffic where the label is ignored", Attempt::is_ok);
}

#[test]
fn a_configuration_that_does_not_parse_is_reported_and_the_last_good_state_stays() {
    let bed = MeshBed::up("parse", labelled());
    let (near, far) = (bed.address("near"), bed.address("far"));
    write_config(&bed, "policy.yaml", DENY_CLIENT);
    bed.stream("client", far).wait("denial", |attempt| !attempt.is_ok());
    bed.stream("client", near).wait("traffic elsewhere", Attempt::is_ok);
    for (what, broken, line) in [
        ("not YAML", DENY_CLIENT.replace("spec:", "spec: ["), None),
        ("an unknown field", DENY_CLIENT.replace("  action: DENY", "  actoin: DENY"), Some(7)),
        ("a wrong type", DENY_CLIENT.replace("DENY", "[1, 2]"), Some(7)),
    ] {
        write_config(&bed, "policy.yaml", &broken);
        let problem = eventually(what, || controller(&bed).problems.into_iter().find(|p| p.severity == "error"));
        assert!(problem.file.ends_with("policy.yaml") && problem.line > 0, "{what}: {problem:?}");
        assert!(line.is_none_or(|line| problem.line == line), "{what}: {problem:?}");
        // The rest of the configuration is applied: this one denies at the other server.
        let elsewhere = DENY_CLIENT.replace("not-the-client", "nor-here").replace("app: far", "app: near");
        write_config(&bed, "elsewhere.yaml", &elsewhere);
        bed.stream("client", near).wait("the rest's arrival", |attempt| !attempt.is_ok());
        none_gets_through(&bed, "client", far, what);
        bed.stream("other", far).wait("traffic that the policy does not concern", Attempt::is_ok);
        std::fs::remove_file(bed.sandbox.layout.config().join("elsewhere.yaml")).unwrap();
        bed.stream("client", near).wait("traffic elsewhere", Attempt::is_ok);
        write_config(&bed, "policy.yaml", DENY_CLIENT);
        eventually("the good one's arrival", || {
            controller(&bed).problems.iter().all(|p| p.severity != "error").then_some(())
        });
    }
}

#[test]
fn an_unknown_destination_inside_the_mesh_network_is_not_answered_by_somebody_else() {
    let bed = MeshBed::up("unknown", two_nodes());
    let nobody = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 244, 2, 200)), ECHO);
    let attempt = bed.stream("client", nobody).wait("an attempt", |_| true);
    assert!(!attempt.is_ok(), "{attempt:?}");
    bed.logged("node-a", &["connection failed", "10.244.2.200"]);
}

/// How long a certificate is accepted after its end, and a margin.
const EXPIRED_AFTER: Duration = Duration::from_secs(90);

#[test]
fn an_expired_certificate_refuses_with_its_name_and_others_go_on() {
    let topology = labelled();
    let mut mesh = mesh_ctl::sandbox::Mesh::beside().unwrap();
    mesh.controller_args = ["--leaf-ttl".into(), "3s".into()].to_vec();
    let mut bed = MeshBed::with("expired", topology, mesh);
    let (near, far) = (bed.address("near"), bed.address("far"));
    bed.stream("client", far).wait("traffic", Attempt::is_ok);
    // node-b does not hear of the certificates that last; then nobody issues any more.
    let stopped = bed.proxy("node-b");
    send(stopped, Signal::SIGSTOP);
    bed.sandbox.end_part(&Part::Controller).unwrap();
    bed.sandbox.start_controller_with(&["--leaf-ttl".into(), "24h".into()]).unwrap();
    let lasts = |row: &CertificateRow| row.certificates.first().is_some_and(|leaf| leaf.not_after > tomorrow());
    eventually_within(EXPIRED_AFTER, "certificates that last on node-a", || {
        let rows: Vec<CertificateRow> = bed.admin("node-a", "/certificates")?;
        (!rows.is_empty() && rows.iter().all(lasts)).then_some(())
    });
    bed.sandbox.end_part(&Part::Controller).unwrap();
    send(stopped, Signal::SIGCONT);
    let mut stream = bed.stream("client", far);
    let refused = eventually_within(EXPIRED_AFTER, "refusal", || {
        Some(stream.wait("an attempt", |_| true)).filter(|attempt| !attempt.is_ok())
    });
    none_gets_through(&bed, "client", far, &format!("its certificate has expired: {refused:?}"));
    bed.stream("client", near).wait("traffic between other identities", Attempt::is_ok);
    let log = bed.sandbox.layout.log(&Part::Node("node-b".into()));
    eventually("the reason", || {
        let said = std::fs::read_to_string(&log).ok()?;
        said.contains("spiffe://cluster.local/ns/default/sa/far has expired").then_some(())
    });
    assert!(PATIENCE < EXPIRED_AFTER);
}

/// RFC 3339 in UTC, which compares as text: twelve hours from now.
fn tomorrow() -> String {
    let later = time::OffsetDateTime::now_utc() + time::Duration::hours(12);
    later.format(&time::format_description::well_known::Rfc3339).unwrap()
}
