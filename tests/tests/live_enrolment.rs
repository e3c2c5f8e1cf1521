//! Running workloads enter the mesh and leave it: what they say to each other goes on.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use mesh_ctl::sandbox::Enrolment;
use mesh_tests::mesh_bed::{Attempt, MeshBed, Stream, eventually, two_nodes};

/// Times that each workload enters the mesh: what is lost is lost in milliseconds of each time.
const ROUNDS: usize = 5;
/// Attempts before and after each change.
const ATTEMPTS: usize = 20;

/// Connections of all pairs: between nodes, within one, and each way.
fn streams(bed: &MeshBed) -> Vec<(&'static str, Stream)> {
    let pairs = [("client", "far"), ("client", "near"), ("far", "near"), ("near", "far")];
    pairs.into_iter().map(|(from, to)| (from, bed.stream(from, bed.address(to)))).collect()
}

fn some_more(streams: &mut [(&'static str, Stream)]) {
    for (_, stream) in streams {
        let enough = stream.so_far().len() + ATTEMPTS;
        let mut seen = stream.seen();
        stream.wait("more attempts", |_| {
            seen += 1;
            seen >= enough
        });
    }
}

/// Ends them; none has lost an attempt.
fn none_failed(streams: Vec<(&'static str, Stream)>) {
    for (from, stream) in streams {
        let attempts = stream.end();
        let failed: Vec<&Attempt> = attempts.iter().filter(|attempt| !attempt.is_ok()).collect();
        assert!(failed.is_empty(), "from {from}: {} of {} failed: {failed:?}", failed.len(), attempts.len());
    }
}

/// Whether the newest connection of a workload of node-a to `far` is one between identities.
fn is_mutual(bed: &MeshBed) -> bool {
    let before =
        std::fs::read_to_string(bed.sandbox.layout.node("node-b").join("access.log")).unwrap_or_default().len();
    bed.stream("client", bed.address("far")).wait("an answer", Attempt::is_ok);
    let log = std::fs::read_to_string(bed.sandbox.layout.node("node-b").join("access.log")).unwrap_or_default();
    log[before..].contains("sa/client")
}

#[test]
fn while_running_workloads_enter_the_mesh_no_connection_fails() {
    let mut bed = MeshBed::up("enter", two_nodes());
    for round in 0..ROUNDS {
        for workload in ["client", "near", "far"] {
            bed.sandbox.enrol(workload, Enrolment::None).unwrap();
        }
        eventually("connections in clear", || (!is_mutual(&bed)).then_some(()));
        let mut streams = streams(&bed);
        let mut held = bed.hold("client", bed.address("far"));
        assert_eq!(held.say("before"), "before");
        some_more(&mut streams);
        // Each comes first once: client, server, and the one that is both.
        let mut order = ["client", "near", "far"];
        order.rotate_left(round % 3);
        for workload in order {
            bed.sandbox.enrol(workload, Enrolment::Mesh).unwrap();
        }
        some_more(&mut streams);
        eventually("mutual TLS", || is_mutual(&bed).then_some(()));
        assert_eq!(held.say("after"), "after", "a connection of before");
        none_failed(streams);
    }
}
