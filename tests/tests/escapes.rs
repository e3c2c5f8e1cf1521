//! Attacks from inside a workload: root in its network namespace sends TCP around the mesh.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use mesh_ebpf_common::decide::{ACK, RST, SYN};
use mesh_ebpf_common::outcome::{Hook, Reason};
use mesh_tests::capture_bed::packet::{Raw, Segment};
use mesh_tests::capture_bed::proxy::{Mesh, application};
use mesh_tests::capture_bed::tcp::connect;
use mesh_tests::capture_bed::{Bed, Group, Netns, PEER_V4, POD_V4, counts, eventually};

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
