//! The stored configuration of a node proxy, with real processes: a damaged one is refused by name, and nothing is let
//! through without one. What a crash while it is written leaves: `mesh-node/tests/snapshot_store.rs`. That a whole one
//! decides the same without a controller: `node_lifecycle`.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::fs;
use std::path::PathBuf;

use mesh_api::admin::NodeStatus;
use mesh_ctl::sandbox::Part;
use mesh_node::snapshot_store;
use mesh_tests::mesh_bed::{Attempt, MeshBed, eventually, two_nodes};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

const NODE: &str = "node-b";

fn state_dir(bed: &MeshBed) -> PathBuf {
    bed.sandbox.layout.node(NODE).join("state")
}

fn log(bed: &MeshBed) -> String {
    fs::read_to_string(bed.sandbox.layout.log(&Part::Node(NODE.into()))).unwrap()
}

/// Kills the proxy of [`NODE`]; the status of the next one that `wanted` likes.
fn restarted(bed: &MeshBed, what: &str, wanted: impl Fn(&NodeStatus) -> bool) -> NodeStatus {
    let proxy = bed.proxy(NODE);
    kill(Pid::from_raw(proxy), Signal::SIGKILL).unwrap();
    eventually(what, || bed.status(NODE).filter(|s| i32::try_from(s.pid) != Ok(proxy) && wanted(s)))
}

#[test]
fn a_damaged_configuration_is_refused_and_nothing_goes_through_until_the_controller_is_back() {
    let mut bed = MeshBed::up("damaged", two_nodes());
    let far = bed.address("far");
    bed.stream("client", far).wait("traffic", Attempt::is_ok);
    eventually("the configuration on disk", || bed.stored(NODE, "Pod/default/far"));
    let file = state_dir(&bed).join("snapshot");
    let good = fs::read(&file).unwrap();
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let newer = [b"mesh-snapshot-9", good.strip_prefix(b"mesh-snapshot-2").unwrap()].concat();
    let cases = [
        ("one bit is wrong", flipped, "its checksum does not match"),
        ("the end is missing", good[..good.len() / 2].to_vec(), "it is cut short"),
        ("it is of another version", newer, "not of the format mesh-snapshot-2"),
        ("it is empty", Vec::new(), "not of the format mesh-snapshot-2"),
    ];
    for (what, bytes, reason) in cases {
        bed.sandbox.end_part(&Part::Controller).unwrap();
        let told = log(&bed).len();
        fs::write(&file, bytes).unwrap();
        let status = restarted(&bed, "a proxy without a configuration", |status| !status.enrolled.is_empty());
        assert_eq!((status.ready, status.config_source.as_str()), (false, "none"), "{what}: {status:?}");
        assert_eq!(status.waiting_for, ["configuration"], "{what}");
        let ready = bed.page(NODE, 15021, "/healthz/ready").expect("an answer");
        assert!(ready.starts_with("HTTP/1.1 503"), "{what}: {ready}");
        let mut stream = bed.stream("client", far);
        for _ in 0..10 {
            let attempt = stream.wait("an attempt", |_| true);
            assert!(!attempt.is_ok(), "{what}: {attempt:?} went through");
        }
        let said = log(&bed).split_off(told);
        let line = said.lines().find(|line| line.contains("stored configuration cannot be used"));
        let line = line.unwrap_or_else(|| panic!("{what}: nothing of it in {said}"));
        assert!(line.contains(reason) && line.contains("state/snapshot") && line.contains("WARN"), "{what}: {line}");
        bed.sandbox.start_controller().unwrap();
        stream.wait("traffic with the controller's configuration", Attempt::is_ok);
        assert!(
            eventually("readiness", || bed.status(NODE).filter(|s| s.ready)).config_source == "controller",
            "{what}"
        );
        eventually("a good one on disk", || snapshot_store::load(&state_dir(&bed)).ok().flatten());
    }
    bed.sandbox.end_part(&Part::Controller).unwrap();
    let status = restarted(&bed, "a proxy with the stored configuration", |status| status.ready);
    assert_eq!(status.config_source, "snapshot", "what was stored after the damage is whole: {status:?}");
    bed.stream("client", far).wait("traffic", Attempt::is_ok);
}

/// It came in the last moment, and nobody takes over.
#[test]
fn a_policy_that_arrives_as_the_node_is_told_to_end_holds_after_a_start_without_a_controller() {
    let mut bed = MeshBed::up("last", two_nodes());
    let far = bed.address("far");
    bed.stream("client", far).wait("traffic", Attempt::is_ok);
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: nobody, namespace: default}\n\
                  spec: {action: DENY, rules: [{}]}\n";
    // A connection that lasts keeps the proxy draining.
    let mut held = bed.hold("client", far);
    assert_eq!(held.say("hello"), "hello");
    let supervisor = Pid::from_raw(bed.supervisor(NODE));
    let (draft, file) =
        (bed.sandbox.layout.config().join(".nobody"), bed.sandbox.layout.config().join("90-nobody.yaml"));
    fs::write(&draft, policy).unwrap();
    kill(supervisor, Signal::SIGTERM).unwrap();
    fs::rename(&draft, &file).unwrap();
    eventually("its end by the policy", || held.say("still").starts_with("closed").then_some(()));
    bed.sandbox.end_part(&Part::Controller).unwrap();
    assert_eq!(waitpid(supervisor, None), Ok(WaitStatus::Exited(supervisor, 0)));
    bed.sandbox.start_node(NODE, &[]).unwrap();
    bed.sandbox.wait_node_ready(NODE).unwrap();
    let status = eventually("the status", || bed.status(NODE));
    assert_eq!(status.config_source, "snapshot");
    let mut stream = bed.stream("client", far);
    for _ in 0..10 {
        let attempt = stream.wait("an attempt", |_| true);
        assert!(!attempt.is_ok(), "{attempt:?} went through");
    }
}
