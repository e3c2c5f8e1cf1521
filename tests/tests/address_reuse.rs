//! A workload is deleted, and another one gets its address: whoever still believes that the first one is there must not
//! talk to the second.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use mesh_api::admin::ConnectionRow;
use mesh_ctl::sandbox::{Enrolment, Part, Workload};
use mesh_tests::mesh_bed::{Attempt, MeshBed, echo, eventually, two_nodes};

const OTHER: &str = "spiffe://cluster.local/ns/default/sa/other";

/// Removes `far`, and enrols a workload of another account with its address.
fn replace_far(bed: &mut MeshBed) {
    let host = bed.sandbox.workload("far").unwrap().host;
    let address = bed.address("far");
    bed.sandbox.remove_workload("far").unwrap();
    let third = Workload { host, ..echo("third", "node-b").account("other") };
    bed.sandbox.add_workload(third).unwrap();
    assert_eq!(bed.address("third"), address, "the address is used again");
    bed.sandbox.enrol("third", Enrolment::Mesh).unwrap();
    bed.sandbox.start_workload("third").unwrap();
}

/// The node of the client has not heard of the change: its controller is away. The node of the servers has the
/// certificate of the new one, whose account it knows.
#[test]
fn who_believes_that_the_old_workload_is_there_does_not_talk_to_the_new_one() {
    let topology = two_nodes().workload(Workload::new("cousin", "node-b").account("other"));
    let mut bed = MeshBed::up("reuse", topology);
    let far = bed.address("far");
    let mut held = bed.hold("client", far);
    assert_eq!(held.say("before"), "before");
    bed.sandbox.end_part(&Part::Controller).unwrap();
    replace_far(&mut bed);
    assert!(held.say("after").starts_with("closed"), "the old connection is over");

    let mut stream = bed.stream("client", far);
    for _ in 0..20 {
        let attempt = stream.wait("an attempt", |_| true);
        assert!(!attempt.is_ok(), "{attempt:?} went to somebody else");
    }
    let log = bed.sandbox.layout.node("node-a").join("access.log");
    eventually("the reason", || {
        let said = std::fs::read_to_string(&log).ok()?;
        let is_reason = |line: &str| line.contains(&format!("peer is {OTHER}, expected")) && line.contains("sa/far");
        said.lines().any(is_reason).then_some(())
    });

    bed.sandbox.start_controller().unwrap();
    stream.wait("traffic to the new one", Attempt::is_ok);
    let mut held = bed.hold("client", far);
    assert_eq!(held.say("who"), "who");
    let connections: Vec<ConnectionRow> = bed.admin("node-a", "/connections").unwrap();
    let row = connections.iter().find(|row| row.remote == far.to_string()).unwrap();
    assert_eq!(row.peer_identity, OTHER, "{row:?}");
}

/// Everybody has heard of it: a tunnel to the old one is not used for the new one, though identity and address are the
/// same.
#[test]
fn a_workload_that_is_made_again_gets_tunnels_of_its_own() {
    let mut bed = MeshBed::up("again", two_nodes());
    let far = bed.address("far");
    let mut held = bed.hold("client", far);
    assert_eq!(held.say("before"), "before");
    let dialled = |bed: &MeshBed| {
        let metrics = bed.page("node-a", 15020, "/metrics").expect("metrics");
        let line = metrics.lines().find_map(|line| line.strip_prefix("mesh_tunnels_dialled_total "));
        line.expect("counted").parse::<u64>().unwrap()
    };
    let before = dialled(&bed);
    let old = bed.sandbox.workload("far").unwrap().clone();
    bed.sandbox.remove_workload("far").unwrap();
    assert!(held.say("after").starts_with("closed"), "the old connection is over");
    bed.sandbox.add_workload(Workload { host: old.host, ..echo("far", "node-b") }).unwrap();
    assert_ne!(bed.sandbox.workload("far").unwrap().uid, old.uid);
    bed.sandbox.enrol("far", Enrolment::Mesh).unwrap();
    bed.sandbox.start_workload("far").unwrap();
    bed.stream("client", far).wait("traffic to the new one", Attempt::is_ok);
    assert!(dialled(&bed) > before, "a new tunnel");
}
