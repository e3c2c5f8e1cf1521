//! Attacks from inside a workload: root in its network namespace sends TCP around the mesh.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::AsFd;
use std::time::Duration;

use mesh_ebpf_common::decide::{ACK, RST, SYN};
use mesh_ebpf_common::outcome::{Hook, Reason};
use mesh_tests::capture_bed::nat::{Nat, translate};
use mesh_tests::capture_bed::packet::{Packet, Raw, Segment, frame};
use mesh_tests::capture_bed::proxy::{Mesh, application};
use mesh_tests::capture_bed::tcp::connect;
use mesh_tests::capture_bed::xdp::Xdp;
use mesh_tests::capture_bed::{Bed, Group, Netns, PATIENCE, PEER_V4, POD_V4, counts, eventually};
use nix::sys::socket::{setsockopt, sockopt};

const OUTSIDE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(PEER_V4), 8084);
const CHILD_V4: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
/// Long enough for an answer that must not come.
const SHORT: Duration = Duration::from_millis(400);

fn timed_out<T: std::fmt::Debug>(result: io::Result<T>, what: &str) {
    let error = result.expect_err(what);
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{what}: {error}");
}

/// A namespace that the workload made behind its own, with the workload as its router.
fn child_of(bed: &Bed) -> Netns {
    let child = bed.another("child");
    bed.pod.ip(&["link", "add", "child", "type", "veth", "peer", "name", "eth0", "netns", child.name()]);
    bed.pod.ip(&["addr", "add", "10.99.0.1/24", "dev", "child"]);
    bed.pod.ip(&["link", "set", "child", "up"]);
    bed.pod.sysctl("ipv4/ip_forward", "1");
    bed.peer.ip(&["route", "add", "10.99.0.0/24", "via", &POD_V4.to_string()]);
    child.ip(&["addr", "add", &format!("{CHILD_V4}/24"), "dev", "eth0"]);
    child.ip(&["link", "set", "eth0", "up"]);
    child.ip(&["route", "add", "default", "via", "10.99.0.1"]);
    child
}

/// What is forwarded is nobody's here, also when it looks like the kernel's own answers: 40 bytes fit into the options
/// of a segment without data, and a reset ends other people's connections.
#[test]
fn a_namespace_behind_the_workloads_own_sends_nothing() {
    let mesh = Mesh::new();
    let server = application(&mesh.bed, &mesh.bed.peer, Group::Outside, &[OUTSIDE]);
    let child = child_of(&mesh.bed);
    let dropped = || mesh.count(Hook::Egress, Reason::NoSocket);
    let before = mesh.bed.peer.tcp_segments();
    timed_out(connect(mesh.bed.tcp(&child, Group::App, false), OUTSIDE, SHORT), "a connection from the child");
    assert!(dropped() > 0, "{}", counts(&mesh.capture));
    let raw = Raw::open(&mesh.bed, &child, Group::App);
    for flags in [SYN, ACK, RST, SYN | ACK, RST | ACK] {
        let already = dropped();
        raw.send(&Segment::new(SocketAddr::from((CHILD_V4, 45000)), OUTSIDE, flags));
        eventually("a forwarded segment is dropped", || dropped() > already);
    }
    assert_eq!(mesh.bed.peer.tcp_segments(), before, "{}", counts(&mesh.capture));
    assert_eq!(server.accepted(), 0);
}

/// What leaves the workload in another way than through tc egress meets the guard at the node's end of the link.
#[test]
fn frames_that_pass_no_queue_are_dropped_at_the_nodes_end() {
    let mesh = Mesh::new();
    let server = application(&mesh.bed, &mesh.bed.peer, Group::Outside, &[OUTSIDE]);
    let packet = Packet::open(&mesh.bed, &mesh.bed.pod, Group::App);
    packet.bypass_queues();
    let (receiver, before) = (mesh.bed.peer.mac("eth0"), mesh.bed.peer.tcp_segments());
    let mut xdp = Xdp::open(&mesh.bed, &mesh.bed.pod, Group::App).expect("AF_XDP");
    let segment = |flags| Segment::new(SocketAddr::from((POD_V4, 45000)), OUTSIDE, flags).bytes();
    let dropped = |reason| mesh.count(Hook::HostIngress, reason);
    for flags in [SYN, ACK, RST, SYN | ACK] {
        let already = dropped(Reason::PacketSocket);
        packet.send_to(receiver, &[], &segment(flags)).unwrap();
        eventually("the frame of a packet socket is dropped", || dropped(Reason::PacketSocket) > already);
        let already = dropped(Reason::RawSocket);
        xdp.send(&frame(receiver, &[], &segment(flags))).expect("send");
        eventually("the frame of an XDP socket is dropped", || dropped(Reason::RawSocket) > already);
    }
    assert_eq!(mesh.bed.peer.tcp_segments(), before, "{}", counts(&mesh.capture));
    assert_eq!(server.accepted(), 0);
}

/// The link's end goes into a namespace that is not enrolled. tcx goes along, clsact does not.
#[test]
fn a_moved_interface_is_guarded_as_before() {
    for open in [Bed::capture, Bed::capture_by_clsact] {
        let mesh = Mesh::with(open);
        let server = application(&mesh.bed, &mesh.bed.peer, Group::Outside, &[OUTSIDE]);
        let elsewhere = mesh.bed.another("else");
        mesh.bed.pod.ip(&["link", "set", "eth0", "netns", elsewhere.name()]);
        elsewhere.ip(&["addr", "add", &format!("{POD_V4}/24"), "dev", "eth0"]);
        elsewhere.ip(&["link", "set", "eth0", "up"]);
        let result = connect(mesh.bed.tcp(&elsewhere, Group::App, false), OUTSIDE, SHORT);
        timed_out(result, "a connection from the other namespace");
        let dropped = [Hook::Egress, Hook::HostIngress].map(|hook| mesh.count(hook, Reason::OutsideCgroup));
        assert!(dropped.iter().sum::<u64>() > 0, "{}", counts(&mesh.capture));
        assert_eq!(server.accepted(), 0);
    }
}

#[test]
fn without_its_clsact_a_workload_is_guarded_and_can_leave() {
    let mesh = Mesh::with(Bed::capture_by_clsact);
    let server = application(&mesh.bed, &mesh.bed.peer, Group::Outside, &[OUTSIDE]);
    mesh.bed.pod.tc(&["qdisc", "del", "dev", "eth0", "clsact"]);
    let socket = mesh.bed.tcp(&mesh.bed.pod, Group::Outside, false);
    timed_out(connect(socket, OUTSIDE, SHORT), "a connection that nothing in the workload stops");
    assert!(mesh.count(Hook::HostIngress, Reason::OutsideCgroup) > 0, "{}", counts(&mesh.capture));
    assert_eq!(server.accepted(), 0);
    mesh.capture.unenroll(mesh.bed.pod.cookie(), Some(mesh.bed.pod.fd())).expect("unenrol");
    assert_eq!(mesh.capture.adopt().unwrap(), Vec::new());
}

/// Merged segments have lost their sockets; a guard that cannot know the sender would stop everything.
#[test]
fn an_end_that_merges_what_it_receives_is_not_guarded() {
    let mesh = Mesh::new();
    let listeners = mesh.proxy().listeners();
    let fds: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
    let guarded = || {
        let names = mesh.capture.programs_attached().unwrap().into_iter().map(|row| row.name);
        names.filter(|name| name.ends_with("tc_host_ingress")).count()
    };
    assert_eq!(guarded(), 1);
    for (on, expected) in [(true, 0), (false, 1)] {
        mesh.bed.peer.set_gro("eth0", on);
        let enrollment = mesh.bed.enroll(&mesh.capture, &fds);
        assert_eq!((enrollment.node_ends.len(), guarded()), (expected, expected), "GRO: {on}");
    }
}

/// Address translation in the workload would lead what the proxy sends in clear to where it was not to go, or give it
/// somebody else's address.
#[test]
fn the_proxys_segments_leave_as_they_were_made() {
    const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
    const SOMEBODY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 66);
    let victim = SocketAddrV4::new(PEER_V4, 8084);
    for (nat, dialled) in [
        (Nat::Destination(ELSEWHERE, victim), SocketAddr::from((ELSEWHERE, 80))),
        (Nat::Source(POD_V4, SOMEBODY), victim.into()),
    ] {
        let mesh = Mesh::new();
        let server = application(&mesh.bed, &mesh.bed.peer, Group::Outside, &[victim.into()]);
        // Before there is translation, everything is well, and the link layer gets resolved.
        connect(mesh.bed.tcp(&mesh.bed.pod, Group::Proxy, false), victim.into(), PATIENCE).expect("the proxy connects");
        eventually("the connection is accepted", || server.accepted() == 1);
        translate(&mesh.bed.pod, nat);
        let result = connect(mesh.bed.tcp(&mesh.bed.pod, Group::Proxy, false), dialled, SHORT);
        timed_out(result, &format!("{nat:?}"));
        assert!(mesh.count(Hook::Egress, Reason::Rewritten) > 0, "{nat:?}: {}", counts(&mesh.capture));
        assert_eq!(server.accepted(), 1, "{nat:?}");
    }
}

/// Routes in the workload lead the proxy's connection to the application out, and the node would bring it back in, to the
/// proxy: each round one more connection.
#[test]
fn the_proxys_inner_connections_do_not_leave() {
    let mesh = Mesh::new();
    let server = application(&mesh.bed, &mesh.bed.peer, Group::Outside, &[OUTSIDE]);
    let open = || {
        let socket = mesh.bed.tcp(&mesh.bed.pod, Group::Proxy, false);
        setsockopt(&socket, sockopt::Mark, &mesh_ebpf_common::INNER_MARK).unwrap();
        socket
    };
    mesh.bed.pod.ip(&["rule", "del", "fwmark", &mesh_ebpf_common::INNER_MARK.to_string()]);
    timed_out(connect(open(), OUTSIDE, SHORT), "an inner connection");
    assert!(mesh.count(Hook::Egress, Reason::InnerConnection) > 0, "{}", counts(&mesh.capture));
    assert_eq!(server.accepted(), 0);
}
