//! The node proxy's life and death, with real processes under real traffic: what is served, what waits, what is refused.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::time::{Duration, Instant, SystemTime};

use mesh_ctl::sandbox::{Enrolment, Part};
use mesh_tests::mesh_bed::{Attempt, MeshBed, echo, eventually, two_nodes};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// How long traffic may be interrupted by the crash of a proxy.
const HEALED_WITHIN: Duration = Duration::from_secs(1);
/// When a connection to a workload whose node proxy is gone is refused: it might be one that enters the mesh (2 s).
const REFUSED_WITHIN: Duration = Duration::from_secs(3);

fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("signal");
}

/// Exit status of a supervisor that the sandbox started, which is a child of this process.
fn exit_of(pid: i32) -> WaitStatus {
    eventually("exit of the supervisor", || match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)).unwrap() {
        WaitStatus::StillAlive => None,
        ended => Some(ended),
    })
}

fn failures(attempts: &[Attempt]) -> Vec<&Attempt> {
    attempts.iter().filter(|attempt| !attempt.is_ok()).collect()
}

/// Kills the proxy of `node` while connections go to `to`; traffic has to go on with another proxy.
fn survives_a_crash(bed: &MeshBed, node: &str, to: &str) {
    let mut stream = bed.stream("client", bed.address(to));
    stream.wait("traffic", Attempt::is_ok);
    let (proxy, killed) = (bed.proxy(node), SystemTime::now());
    send(proxy, Signal::SIGKILL);
    let healed = stream.wait("traffic after the crash", |attempt| attempt.started >= killed && attempt.is_ok());
    let took = healed.ended().duration_since(killed).unwrap();
    assert!(took < HEALED_WITHIN, "traffic to {to} works {took:?} after the crash of {node}'s proxy: {healed:?}");
    println!("{node} to {to}: works again after {took:?}");
    assert_ne!(bed.proxy(node), proxy, "another process");
    let attempts = stream.end();
    let later: Vec<_> = attempts.iter().filter(|attempt| attempt.started > healed.ended()).cloned().collect();
    assert!(failures(&later).is_empty(), "{:?}", failures(&later));
}

#[test]
fn with_the_controller_down_a_killed_proxy_is_replaced_and_traffic_works_within_a_second() {
    let mut bed = MeshBed::up("crash", two_nodes());
    for node in ["node-a", "node-b"] {
        eventually("the configuration on disk", || bed.stored(node, "Pod/default/far"));
    }
    bed.sandbox.end_part(&Part::Controller).unwrap();
    for (node, to) in [("node-b", "far"), ("node-a", "far"), ("node-a", "near")] {
        survives_a_crash(&bed, node, to);
    }
    for node in ["node-a", "node-b"] {
        let status = bed.status(node).unwrap();
        assert_eq!(status.config_source, "snapshot", "{status:?}");
        assert!(status.ready && !status.controller_connected, "{status:?}");
    }
}

#[test]
fn with_proxy_and_supervisor_gone_connections_are_refused_out_and_in_until_there_is_one_again() {
    let mut bed = MeshBed::up("both", two_nodes());
    let (near, far) = (bed.address("near"), bed.address("far"));
    for (node, what) in [("node-a", "out of"), ("node-b", "into")] {
        let mut stream = bed.stream("client", far);
        stream.wait("traffic", Attempt::is_ok);
        send(bed.supervisor(node), Signal::SIGKILL);
        let refused = stream.wait("refusal", |attempt| !attempt.is_ok());
        let dead = SystemTime::now();
        let mut later = 0;
        stream.wait("five more attempts", |attempt| {
            assert!(attempt.started < dead || !attempt.is_ok(), "{what} {node}: {attempt:?} went through");
            assert!(attempt.started < dead || attempt.took < REFUSED_WITHIN, "{what} {node}: {attempt:?} waits");
            later += usize::from(attempt.started >= dead);
            later == 5
        });
        drop(stream);
        if node == "node-a" {
            let mut local = bed.stream("client", near);
            assert!(!local.wait("an attempt", |_| true).is_ok(), "on the same node");
        }
        println!("{what} {node}: {refused:?}");
        bed.sandbox.start_node(node, &[]).unwrap();
        bed.sandbox.wait_node_ready(node).unwrap();
        bed.stream("client", far).wait("traffic again", Attempt::is_ok);
    }
}

#[test]
fn without_keys_and_without_a_controller_connections_are_refused_until_it_is_back() {
    let mut bed = MeshBed::up("nokeys", two_nodes());
    let far = bed.address("far");
    bed.stream("client", far).wait("traffic", Attempt::is_ok);
    bed.sandbox.end_part(&Part::Controller).unwrap();
    let supervisor = bed.supervisor("node-b");
    send(supervisor, Signal::SIGKILL);
    exit_of(supervisor);
    bed.sandbox.start_node("node-b", &[]).unwrap();
    bed.sandbox.wait_node_ready("node-b").unwrap();
    let status = eventually("the state of the workload", || {
        bed.status("node-b").filter(|status| status.enrolled.iter().any(|workload| workload.state != "ready"))
    });
    let state = &status.enrolled[0].state;
    assert!(state.contains("no certificate for spiffe://cluster.local/ns/default/sa/far"), "{state}");
    let mut stream = bed.stream("client", far);
    for _ in 0..20 {
        let attempt = stream.wait("an attempt", |_| true);
        assert!(!attempt.is_ok(), "{attempt:?} went through without a key");
    }
    bed.sandbox.start_controller().unwrap();
    stream.wait("traffic with a new key", Attempt::is_ok);
}

#[test]
fn a_take_over_under_a_stream_of_new_connections_loses_none() {
    let bed = MeshBed::up("take", two_nodes());
    let (mut across, mut local) = (bed.stream("client", bed.address("far")), bed.stream("client", bed.address("near")));
    let mut successors = Vec::new();
    for node in ["node-b", "node-a"] {
        across.wait("traffic", Attempt::is_ok);
        let (old, proxy) = (bed.supervisor(node), bed.proxy(node));
        let mut held = bed.hold("client", bed.address("far"));
        assert_eq!(held.say("before"), "before");
        successors.push(bed.another_node(node, &["--takeover"]));
        eventually("another process that serves", || {
            bed.status(node).filter(|status| status.ready && i32::try_from(status.pid) != Ok(proxy))
        });
        assert_eq!(held.say("while the old one drains"), "while the old one drains", "{node}");
        drop(held);
        assert_eq!(exit_of(old), WaitStatus::Exited(Pid::from_raw(old), 0), "the old supervisor of {node}");
        let ready = bed.page(node, 15021, "/healthz/ready").expect("the readiness port is handed over");
        assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");
        let metrics = bed.page(node, 15020, "/metrics").expect("the metrics port is handed over");
        assert!(metrics.contains("istio_tcp_connections_opened"), "{metrics}");
        let taken = SystemTime::now();
        for stream in [&mut across, &mut local] {
            let mut after = 0;
            stream.wait("fifty connections after the take-over", |attempt| {
                after += usize::from(attempt.started > taken);
                after == 50
            });
        }
    }
    for attempts in [across.end(), local.end()] {
        assert!(failures(&attempts).is_empty(), "{:?} of {}", failures(&attempts), attempts.len());
    }
    for mut successor in successors {
        send(successor.pid(), Signal::SIGTERM);
        assert_eq!(successor.wait_for_exit(), Some(0));
    }
}

/// The next one cannot get ready, so that the time in which both run is as long as the test likes.
#[test]
fn what_changes_during_a_take_over_is_taken_over_too() {
    let topology = two_nodes().workload(echo("late", "node-a").outside_mesh()).workload(echo("gone", "node-a"));
    let mut bed = MeshBed::up("during", topology);
    let late = bed.address("late");
    bed.stream("client", late).wait("traffic", Attempt::is_ok);
    bed.sandbox.end_part(&Part::Controller).unwrap();
    std::fs::remove_file(bed.sandbox.layout.node("node-a").join("state/snapshot")).unwrap();
    let (old, proxy) = (bed.supervisor("node-a"), bed.proxy("node-a"));
    let mut successor = bed.another_node("node-a", &["--takeover"]);
    let mut meanwhile = bed.stream("client", bed.address("far"));
    let served = |bed: &MeshBed| {
        let status = bed.status("node-a").filter(|status| i32::try_from(status.pid) != Ok(proxy))?;
        Some(status.enrolled.iter().map(|workload| workload.name.clone()).collect::<Vec<_>>())
    };
    assert_eq!(eventually("the next proxy", || served(&bed)).len(), 3, "what there was when it came");
    let told = bed.sandbox.enrol("late", Enrolment::Mesh).expect_err("there is no controller");
    assert!(format!("{told:#}").contains("no certificate"), "{told:#}");
    bed.sandbox.enrol("gone", Enrolment::None).unwrap();
    // From here on nobody but the old supervisor can tell the next proxy.
    bed.sandbox.end_part(&Part::Agent).unwrap();
    eventually("the changes", || {
        served(&bed).filter(|names| names.contains(&"late".to_owned()) && !names.contains(&"gone".to_owned()))
    });
    // It has no configuration, so that it leaves all connections to the one that has.
    for _ in 0..100 {
        let attempt = meanwhile.wait("an attempt", |_| true);
        assert!(attempt.is_ok(), "beside a proxy without configuration: {attempt:?}");
    }
    drop(meanwhile);
    bed.sandbox.start_controller().unwrap();
    assert_eq!(exit_of(old), WaitStatus::Exited(Pid::from_raw(old), 0), "the old supervisor");
    // Nobody but this process ever asked for its certificate.
    let mut stream = bed.stream("client", late);
    stream.wait("traffic with its own identity", Attempt::is_ok);
    for _ in 0..20 {
        let attempt = stream.wait("an attempt", |_| true);
        assert!(attempt.is_ok(), "{attempt:?}");
    }
    send(successor.pid(), Signal::SIGTERM);
    assert_eq!(successor.wait_for_exit(), Some(0));
}

#[test]
fn sigterm_lets_connections_end_refuses_new_ones_and_exits_0() {
    let mut bed = MeshBed::up("term", two_nodes());
    for node in ["node-b", "node-a"] {
        let mut held = bed.hold("client", bed.address("far"));
        assert_eq!(held.say("before"), "before");
        let supervisor = bed.supervisor(node);
        let told = Instant::now();
        send(supervisor, Signal::SIGTERM);
        let refused = bed.stream("client", bed.address("far")).wait("refusal", |attempt| !attempt.is_ok());
        assert!(refused.took < HEALED_WITHIN, "{node}: {refused:?}");
        assert_eq!(held.say("while it drains"), "while it drains", "{node}");
        drop(held);
        assert_eq!(exit_of(supervisor), WaitStatus::Exited(Pid::from_raw(supervisor), 0), "{node}");
        assert!(told.elapsed() < Duration::from_secs(9), "{node} waits for connections only: {:?}", told.elapsed());
        bed.sandbox.start_node(node, &[]).unwrap();
        bed.sandbox.wait_node_ready(node).unwrap();
        bed.stream("client", bed.address("far")).wait("traffic again", Attempt::is_ok);
    }
}

#[test]
fn a_drain_that_takes_too_long_ends_what_is_left_and_exits_0() {
    let mut bed = MeshBed::up("drain", two_nodes());
    bed.sandbox.end_part(&Part::Node("node-b".into())).unwrap();
    bed.sandbox.start_node("node-b", &["--drain".into(), "300ms".into()]).unwrap();
    bed.sandbox.wait_node_ready("node-b").unwrap();
    let mut held = bed.hold("client", bed.address("far"));
    assert_eq!(held.say("before"), "before");
    let supervisor = bed.supervisor("node-b");
    let told = Instant::now();
    send(supervisor, Signal::SIGTERM);
    assert_eq!(exit_of(supervisor), WaitStatus::Exited(Pid::from_raw(supervisor), 0));
    assert!(told.elapsed() < Duration::from_secs(2), "{:?}", told.elapsed());
    let end = held.say("after");
    assert!(end.starts_with("closed"), "{end}");
    bed.logged("node-b", &["connection complete", "closed: drain deadline passed"]);
}

/// Open descriptors of a process.
fn descriptors(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

#[test]
fn descriptors_do_not_pile_up_over_restarts_and_enrolments() {
    let mut bed = MeshBed::up("fds", two_nodes());
    let supervisor = bed.supervisor("node-a");
    let settled = |bed: &MeshBed, what: &str, expected: usize| {
        eventually(what, || (descriptors(bed.supervisor("node-a")) == expected).then_some(()));
    };
    let before = descriptors(supervisor);
    for _ in 0..5 {
        let proxy = bed.proxy("node-a");
        send(proxy, Signal::SIGKILL);
        eventually("the next proxy", || {
            bed.status("node-a").filter(|status| status.ready && i32::try_from(status.pid) != Ok(proxy))
        });
    }
    settled(&bed, "the supervisor's descriptors after restarts", before);
    bed.sandbox.enrol("client", Enrolment::None).unwrap();
    // Namespace, six listeners, info and key of one workload.
    let without = before - 9;
    settled(&bed, "the supervisor's descriptors without a workload", without);
    for _ in 0..3 {
        bed.sandbox.enrol("client", Enrolment::Mesh).unwrap();
        settled(&bed, "the supervisor's descriptors after enrolment", before);
        bed.sandbox.enrol("client", Enrolment::None).unwrap();
        settled(&bed, "the supervisor's descriptors after it left", without);
    }
    let proxy = bed.proxy("node-a");
    let idle = descriptors(proxy);
    for _ in 0..5 {
        bed.sandbox.enrol("client", Enrolment::Mesh).unwrap();
        bed.stream("client", bed.address("far")).wait("traffic", Attempt::is_ok);
        bed.sandbox.enrol("client", Enrolment::None).unwrap();
    }
    eventually("the proxy's descriptors", || (descriptors(proxy) <= idle + 2).then_some(()));
}

#[test]
fn a_second_process_on_a_state_directory_is_told_and_the_first_goes_on() {
    let bed = MeshBed::up("second", two_nodes());
    let mut second = bed.another_node("node-b", &[]);
    assert_eq!(second.wait_for_exit(), Some(1));
    let said = second.stderr();
    assert!(said.contains(&format!("in use by pid {}", bed.supervisor("node-b"))), "{said}");
    bed.stream("client", bed.address("far")).wait("traffic", Attempt::is_ok);
}

#[test]
fn from_start_to_ready_takes_less_than_a_second() {
    let mut bed = MeshBed::up("ready", two_nodes());
    bed.sandbox.end_part(&Part::Node("node-b".into())).unwrap();
    let started = Instant::now();
    bed.sandbox.start_node("node-b", &[]).unwrap();
    eventually("readiness", || bed.status("node-b").filter(|status| status.ready));
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    bed.stream("client", bed.address("far")).wait("traffic", Attempt::is_ok);
}

/// Denies `client` at `far`.
const POLICY: &str = "
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
fn a_restart_with_the_controller_down_decides_the_same() {
    let mut topology = two_nodes();
    topology.workloads.iter_mut().filter(|w| w.name == "far").for_each(|w| *w = w.clone().label("app", "far"));
    let mut bed = MeshBed::up("same", topology.workload(mesh_ctl::sandbox::Workload::new("other", "node-a")));
    let far = bed.address("far");
    bed.stream("client", far).wait("traffic without the policy", Attempt::is_ok);
    std::fs::write(bed.sandbox.layout.config().join("policy.yaml"), POLICY).unwrap();
    bed.stream("client", far).wait("denial", |attempt| !attempt.is_ok());
    bed.stream("other", far).wait("traffic of another identity", Attempt::is_ok);
    eventually("the policy on disk", || bed.stored("node-b", "not-the-client"));
    bed.sandbox.end_part(&Part::Controller).unwrap();
    for node in ["node-a", "node-b"] {
        send(bed.proxy(node), Signal::SIGKILL);
    }
    let mut denied = bed.stream("client", far);
    let mut allowed = bed.stream("other", far);
    let restarted = SystemTime::now();
    for _ in 0..20 {
        let attempt = denied.wait("an attempt", |attempt| attempt.started > restarted);
        assert!(!attempt.is_ok(), "{attempt:?} went through");
    }
    allowed.wait("traffic of another identity", |attempt| attempt.started > restarted && attempt.is_ok());
    for node in ["node-a", "node-b"] {
        assert_eq!(eventually("status", || bed.status(node)).config_source, "snapshot");
    }
}
