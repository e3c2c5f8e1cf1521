//! Connections that are there when a policy changes: judged again, ended in time, with the reason in the log.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::time::{Duration, Instant};

use mesh_api::admin::{ConnectionRow, PolicyRow};
use mesh_ctl::sandbox::Workload;
use mesh_tests::mesh_bed::{Attempt, Held, MeshBed, eventually, two_nodes};

/// From a policy's arrival at the node to the end of the last connection that it denies.
const CLOSED_WITHIN: Duration = Duration::from_millis(500);
/// Live connections of each kind.
const CONNECTIONS: usize = 10;

/// `client` may not talk to anybody in the namespace.
const DENY_CLIENT: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: not-the-client, namespace: default}
spec:
  action: DENY
  rules:
  - from: [{source: {principals: [cluster.local/ns/default/sa/client]}}]
";

/// Nobody may come in clear.
const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: default}
spec: {mtls: {mode: STRICT}}
";

fn write(bed: &MeshBed, text: &str) {
    let fresh = bed.sandbox.layout.run.join("fresh.yaml");
    std::fs::write(&fresh, text).unwrap();
    std::fs::rename(&fresh, bed.sandbox.layout.config().join("policy.yaml")).unwrap();
}

/// Waits until a node has a policy whose name contains `name`.
fn arrived(bed: &MeshBed, node: &str, name: &str) -> Instant {
    eventually("the policy's arrival", || {
        let policies: Vec<PolicyRow> = bed.admin(node, "/policies")?;
        policies.iter().any(|policy| policy.name.contains(name)).then(Instant::now)
    })
}

/// Connections that work.
fn hold(bed: &MeshBed, from: &str, to: &str) -> Vec<Held> {
    let mut held: Vec<Held> = (0..CONNECTIONS).map(|_| bed.hold(from, bed.address(to))).collect();
    held.iter_mut().for_each(|held| assert_eq!(held.say("before"), "before", "{from} to {to}"));
    held
}

/// Every one of these has ended in time.
fn ended(held: &mut [Held], arrived: Instant, what: &str) {
    for held in held {
        while !held.say("still there").starts_with("closed") {
            assert!(
                arrived.elapsed() < CLOSED_WITHIN,
                "{what}: open {:?} after the policy's arrival",
                arrived.elapsed()
            );
        }
    }
    println!("{what}: all ended {:?} after the policy's arrival", arrived.elapsed());
}

#[test]
fn a_new_deny_policy_ends_live_connections_across_nodes_and_on_one_and_spares_others() {
    let bed = MeshBed::up("deny", two_nodes().workload(Workload::new("other", "node-a")));
    let mut far = hold(&bed, "client", "far");
    let mut near = hold(&bed, "client", "near");
    let mut spared: Vec<Held> = hold(&bed, "other", "far").into_iter().chain(hold(&bed, "other", "near")).collect();
    write(&bed, DENY_CLIENT);
    ended(&mut far, arrived(&bed, "node-b", "not-the-client"), "across nodes");
    ended(&mut near, arrived(&bed, "node-a", "not-the-client"), "on one node");
    for held in &mut spared {
        assert_eq!(held.say("after"), "after", "another identity");
    }
    for (node, workload) in [("node-b", "far"), ("node-a", "near")] {
        let dst = format!("\"dst.workload\":\"{workload}\"");
        bed.logged(node, &["default/not-the-client", &dst, "\"direction\":\"inbound\""]);
    }
    std::fs::remove_file(bed.sandbox.layout.config().join("policy.yaml")).unwrap();
    bed.stream("client", bed.address("far")).wait("traffic when the policy is gone", Attempt::is_ok);
}

/// Nobody but this one may talk to anybody in the namespace.
fn allow_only(client: &str) -> String {
    format!(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: only-one, namespace: default}}
spec:
  rules:
  - from: [{{source: {{principals: [cluster.local/ns/default/sa/{client}]}}}}]
"
    )
}

#[test]
fn a_policy_that_is_made_replaced_and_deleted_is_followed_by_new_and_live_connections() {
    let outsider = Workload::new("outsider", "node-a").outside_mesh();
    let bed = MeshBed::up("life", two_nodes().workload(Workload::new("other", "node-a")).workload(outsider));
    let both = |from: &str| -> Vec<Held> { ["far", "near"].into_iter().flat_map(|to| hold(&bed, from, to)).collect() };
    let refused = |from: &str, why: &str| {
        for to in ["far", "near"] {
            let attempt = bed.stream(from, bed.address(to)).wait("an attempt", |_| true);
            assert!(!attempt.is_ok(), "{from} to {to}: {why}");
        }
    };
    let both_have = |name: &str| arrived(&bed, "node-a", name).max(arrived(&bed, "node-b", name));
    let (mut client, mut other, mut outsider) = (both("client"), both("other"), both("outsider"));

    write(&bed, &allow_only("client"));
    let at = both_have("only-one");
    ended(&mut other, at, "of others, when the policy was made");
    ended(&mut outsider, at, "in clear, when the policy was made");
    refused("other", "the policy was made");
    refused("outsider", "the policy was made");
    client.iter_mut().for_each(|held| assert_eq!(held.say("allowed"), "allowed"));

    write(&bed, &allow_only("other"));
    // Its name stays, so that its arrival shows in what it lets in.
    for to in ["far", "near"] {
        bed.stream("other", bed.address(to)).wait("traffic that the replaced policy lets in", Attempt::is_ok);
    }
    ended(&mut client, Instant::now(), "of the one that was allowed before");
    refused("client", "the policy was replaced");
    let mut other = both("other");

    std::fs::remove_file(bed.sandbox.layout.config().join("policy.yaml")).unwrap();
    for from in ["client", "outsider"] {
        for to in ["far", "near"] {
            bed.stream(from, bed.address(to)).wait("traffic when the policy is gone", Attempt::is_ok);
        }
    }
    other.iter_mut().for_each(|held| assert_eq!(held.say("spared"), "spared", "when the policy was deleted"));
}

#[test]
fn strict_ends_live_connections_in_clear_and_spares_those_with_an_identity() {
    let outsider = Workload::new("outsider", "node-a").outside_mesh();
    let bed = MeshBed::up("strict", two_nodes().workload(outsider));
    let mut plain = hold(&bed, "outsider", "far");
    let mut proved = hold(&bed, "client", "far");
    let rows: Vec<ConnectionRow> = eventually("the list of connections", || bed.admin("node-b", "/connections"));
    assert_eq!(rows.iter().filter(|row| row.protocol == "TCP").count(), CONNECTIONS, "{rows:?}");
    assert_eq!(rows.iter().filter(|row| row.protocol == "HBONE").count(), CONNECTIONS, "{rows:?}");
    write(&bed, STRICT);
    ended(&mut plain, arrived(&bed, "node-b", "strict"), "in clear");
    for held in &mut proved {
        assert_eq!(held.say("after"), "after", "with an identity");
    }
    assert!(!bed.stream("outsider", bed.address("far")).wait("an attempt", |_| true).is_ok(), "new ones in clear");
}
