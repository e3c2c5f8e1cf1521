//! Enrolment with real processes: what the agent says happens, and what goes wrong in between stays closed.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;

use mesh_api::admin::BpfState;
use mesh_api::proto::workload::zds;
use mesh_api::proto::workload::zds::workload_request::Payload;
use mesh_ctl::sandbox::netns::run_in;
use mesh_ctl::sandbox::{Enrolment, Part, Workload};
use mesh_node::seqpacket::{self, Received};
use mesh_tests::mesh_bed::{Attempt, MeshBed, PATIENCE, echo, eventually, two_nodes};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message as _;

/// Entries of the kernel's table of workloads.
fn captured(bed: &MeshBed, node: &str) -> u64 {
    let state: BpfState = eventually("the kernel's state", || bed.admin(node, "/bpf"));
    state.maps.iter().find(|map| map.name == "WORKLOADS").expect("table of workloads").entries
}

fn enrolled(bed: &MeshBed, node: &str) -> Vec<String> {
    let status = eventually("status", || bed.status(node));
    let mut names: Vec<_> = status.enrolled.iter().map(|workload| workload.name.clone()).collect();
    names.sort();
    names
}

#[test]
fn a_port_that_an_application_holds_is_named_and_the_workload_stays_closed_until_it_is_free() {
    let argv = ["mesh-ctl", "sandbox", "serve", "echo", "--port", "15006", "--workload", "holder"];
    let holder = Workload::new("holder", "node-a").runs(argv).ready_on(15006).outside_mesh();
    let mut bed = MeshBed::up("held", two_nodes().workload(holder));
    let far = bed.address("far");
    bed.stream("holder", far).wait("traffic outside the mesh", Attempt::is_ok);
    let refused = bed.sandbox.enrol("holder", Enrolment::Mesh).unwrap_err().to_string();
    assert!(refused.contains("15006") && refused.contains("is held by an application"), "{refused}");
    let status = bed.status("node-a").unwrap();
    let state = &status.enrolled.iter().find(|w| w.name == "holder").expect("listed").state;
    assert!(state.contains("15006"), "{state}");
    let mut closed = bed.stream("holder", far);
    for _ in 0..20 {
        let attempt = closed.wait("an attempt", |_| true);
        assert!(!attempt.is_ok(), "{attempt:?} went through");
    }
    bed.sandbox.end_part(&Part::Workload("holder".into())).unwrap();
    closed.wait("traffic in the mesh, after the agent's next try", Attempt::is_ok);
    assert_eq!(enrolled(&bed, "node-a"), ["client", "holder", "near"]);
}

#[test]
fn a_killed_agent_changes_nothing_and_the_next_one_is_heard() {
    let mut bed = MeshBed::up("agent", two_nodes());
    let mut held = bed.hold("client", bed.address("far"));
    assert_eq!(held.say("before"), "before");
    let agent = bed.sandbox.running(&Part::Agent).expect("runs").pid;
    kill(Pid::from_raw(agent), Signal::SIGKILL).unwrap();
    eventually("the agent's end", || bed.sandbox.running(&Part::Agent).is_none().then_some(()));
    assert_eq!(held.say("without an agent"), "without an agent");
    bed.stream("client", bed.address("far")).wait("a new connection without an agent", Attempt::is_ok);
    bed.sandbox.start_agent().unwrap();
    let late = bed.sandbox.add_workload(echo("late", "node-b")).unwrap();
    eventually("the node proxies' return to the agent", || {
        let proxies = bed.sandbox.agent_status().ok()?.proxies;
        (proxies.get("node-a") == Some(&1) && proxies.get("node-b") == Some(&1)).then_some(())
    });
    bed.sandbox.enrol(&late.key(), Enrolment::Mesh).unwrap();
    assert_eq!(enrolled(&bed, "node-b"), ["far", "late"]);
    assert_eq!(enrolled(&bed, "node-a"), ["client", "near"]);
    assert_eq!(held.say("after"), "after", "announcing it again does not disturb a workload");
}

#[test]
fn a_workload_that_went_while_the_proxy_was_down_is_forgotten_in_the_kernel_too() {
    let mut bed = MeshBed::up("went", two_nodes());
    assert_eq!(captured(&bed, "node-a"), 2);
    kill(Pid::from_raw(bed.supervisor("node-a")), Signal::SIGKILL).unwrap();
    eventually("the supervisor's end", || bed.sandbox.running(&Part::Node("node-a".into())).is_none().then_some(()));
    bed.sandbox.remove_workload("near").unwrap();
    bed.sandbox.start_node("node-a", &[]).unwrap();
    bed.sandbox.wait_node_ready("node-a").unwrap();
    assert_eq!(enrolled(&bed, "node-a"), ["client"]);
    assert_eq!(captured(&bed, "node-a"), 1);
    bed.stream("client", bed.address("far")).wait("traffic", Attempt::is_ok);
}

#[test]
fn a_workload_leaves_the_mesh_and_comes_back() {
    let mut bed = MeshBed::up("leave", two_nodes());
    let far = bed.address("far");
    for _ in 0..2 {
        let mut held = bed.hold("client", far);
        assert_eq!(held.say("in the mesh"), "in the mesh");
        bed.sandbox.enrol("client", Enrolment::None).unwrap();
        assert_eq!(held.say("after it left"), "after it left");
        drop(held);
        eventually("its last connection's end", || (enrolled(&bed, "node-a") == ["near"]).then_some(()));
        assert_eq!(captured(&bed, "node-a"), 1);
        bed.stream("client", far).wait("plain traffic", Attempt::is_ok);
        bed.sandbox.enrol("client", Enrolment::Mesh).unwrap();
        assert_eq!(enrolled(&bed, "node-a"), ["client", "near"]);
        bed.stream("client", far).wait("traffic in the mesh", Attempt::is_ok);
    }
}

/// Puts one more link into a workload's namespace and returns the index of one end.
fn add_link(bed: &MeshBed, workload: &str, name: &str) -> u32 {
    run_in(&bed.sandbox.layout.netns(workload), || {
        let other_end = format!("{name}-peer");
        let link = ["link", "add", name, "type", "veth", "peer", "name", &other_end];
        anyhow::ensure!(Command::new("ip").args(link).status()?.success(), "ip {link:?}");
        Ok(nix::net::if_::if_nametoindex(name)?)
    })
    .unwrap()
}

/// Where a program is attached in a workload's namespace.
fn places(bed: &MeshBed, node: &str, program: &str, workload: &str) -> Vec<String> {
    let state: BpfState = bed.admin(node, "/bpf").expect("the kernel's state");
    let all = state.programs.iter().filter(|row| row.program == program).flat_map(|row| &row.attached_to);
    all.filter(|place| place.starts_with(workload)).cloned().collect()
}

fn is_guarded(bed: &MeshBed, node: &str, workload: &str, index: u32) {
    let place = format!("ifindex {index})");
    for program in ["tc_ingress", "tc_egress_l2"] {
        eventually("the guard", || {
            places(bed, node, program, workload).iter().any(|at| at.ends_with(&place)).then_some(())
        });
    }
}

#[test]
fn an_interface_that_a_workload_gets_later_is_guarded() {
    let bed = MeshBed::up("late", two_nodes());
    let index = add_link(&bed, "near", "late0");
    is_guarded(&bed, "node-a", "near", index);
    bed.stream("client", bed.address("near")).wait("traffic", Attempt::is_ok);
}

/// An adopted workload is not announced as long as there is no agent.
#[test]
fn a_new_proxy_guards_what_came_before_it_and_what_comes_after() {
    let mut bed = MeshBed::up("later", two_nodes());
    bed.sandbox.end_part(&Part::Agent).unwrap();
    let proxy = bed.proxy("node-a");
    kill(Pid::from_raw(proxy), Signal::SIGSTOP).unwrap();
    let before = add_link(&bed, "near", "late0");
    kill(Pid::from_raw(proxy), Signal::SIGKILL).unwrap();
    eventually("another process that serves", || {
        bed.status("node-a").filter(|status| status.ready && i32::try_from(status.pid) != Ok(proxy))
    });
    is_guarded(&bed, "node-a", "near", before);
    let after = add_link(&bed, "near", "late2");
    is_guarded(&bed, "node-a", "near", after);
    bed.stream("client", bed.address("near")).wait("traffic", Attempt::is_ok);
}

/// An agent of ours in the place of the sandbox's, for one node.
struct Agent {
    listener: OwnedFd,
}

impl Agent {
    fn instead(bed: &mut MeshBed, node: &str) -> Self {
        bed.sandbox.end_part(&Part::Agent).unwrap();
        Self { listener: seqpacket::listen(&bed.sandbox.layout.node_agent(node)).unwrap() }
    }

    fn accept(&self) -> OwnedFd {
        readable(&self.listener);
        let proxy = seqpacket::accept(self.listener.as_fd()).unwrap();
        let hello = zds::ZdsHello::decode(&receive(&proxy)[..]).unwrap();
        assert_eq!(hello.version(), zds::Version::V1);
        proxy
    }
}

fn readable(socket: &OwnedFd) {
    let timeout = PollTimeout::try_from(PATIENCE).unwrap();
    let ready = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout).unwrap();
    assert_eq!(ready, 1, "gave up waiting for the node proxy");
}

fn receive(proxy: &OwnedFd) -> Vec<u8> {
    readable(proxy);
    match seqpacket::receive(proxy.as_fd()).unwrap() {
        Received::Message(message) => message.bytes,
        other => panic!("expected a message, got {other:?}"),
    }
}

fn ask(proxy: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> String {
    seqpacket::send(proxy.as_fd(), bytes, fds).unwrap();
    let response = zds::WorkloadResponse::decode(&receive(proxy)[..]).unwrap();
    let Some(zds::workload_response::Payload::Ack(ack)) = response.payload else { panic!("no acknowledgement") };
    ack.error
}

fn add(uid: &str, name: &str) -> Vec<u8> {
    let info = zds::WorkloadInfo { name: name.into(), namespace: "default".into(), service_account: name.into() };
    let add = zds::AddWorkload { uid: uid.into(), workload_info: Some(info) };
    zds::WorkloadRequest { payload: Some(Payload::Add(add)) }.encode_to_vec()
}

#[test]
fn bad_messages_are_refused_and_counted_and_no_workload_is_disturbed() {
    let mut bed = MeshBed::up("bad", two_nodes());
    let mut held = bed.hold("client", bed.address("far"));
    assert_eq!(held.say("before"), "before");
    let uid = bed.sandbox.workload("far").unwrap().uid.clone();
    let agent = Agent::instead(&mut bed, "node-b");
    let proxy = agent.accept();
    let layout = &bed.sandbox.layout;
    let [far, own] = ["far", "node-b"].map(|key| File::open(layout.netns(key)).unwrap());
    let (null, too_long) = (File::open("/dev/null").unwrap(), vec![0; seqpacket::MAX_MESSAGE_BYTES + 1]);
    let cases: [(&str, &[u8], Vec<BorrowedFd<'_>>, &str); 7] = [
        ("garbage", b"\xff\xff\xff", vec![], "not a WorkloadRequest"),
        ("too long", &too_long, vec![], "a message of more than"),
        ("no descriptor", &add("x", "x"), vec![], "add with 0 descriptors"),
        ("too many descriptors", &add("x", "x"), vec![far.as_fd(), far.as_fd()], "add with 2 descriptors"),
        ("no name", &add("x", "../x"), vec![far.as_fd()], "not a Kubernetes name"),
        ("another's namespace", &add("x", "x"), vec![far.as_fd()], "is that of far"),
        ("the node's own namespace", &add("x", "x"), vec![own.as_fd()], "the node's own"),
    ];
    for (what, bytes, fds, expected) in cases {
        let answer = ask(&proxy, bytes, &fds);
        assert!(answer.contains(expected), "{what}: {answer}");
        assert_eq!(held.say(what), what);
    }
    let answer = ask(&proxy, &add("x", "x"), &[null.as_fd()]);
    assert!(answer.contains("not a network namespace"), "{answer}");
    assert_eq!(ask(&proxy, &add(&uid, "far"), &[far.as_fd()]), "", "a good message is still obeyed");
    let metrics = bed.page("node-b", 15020, "/metrics").expect("metrics");
    assert!(metrics.contains("mesh_enrolment_bad_messages_total 5\n"), "{metrics}");
    assert_eq!(held.say("after"), "after");
    bed.stream("client", bed.address("far")).wait("traffic", Attempt::is_ok);
}
