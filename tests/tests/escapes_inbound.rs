//! Attacks from outside on a workload's application: ways to reach it that are not the proxy's.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::net::SocketAddr;

use mesh_ebpf_common::decide::SYN;
use mesh_ebpf_common::outcome::{Hook, Reason};
use mesh_tests::capture_bed::packet::{Packet, Segment};
use mesh_tests::capture_bed::proxy::{Mesh, application};
use mesh_tests::capture_bed::{Group, PEER_V4, POD_V4, counts, eventually};

const APP: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(POD_V4), 8080);

/// The kernel takes off tags of VLAN 0 wherever it finds them, also where no program sees it. With SYN cookies, which a
/// flood brings about, the whole handshake and a request would get around the proxy.
#[test]
fn a_tag_inside_a_tag_hides_nothing() {
    let mesh = Mesh::new();
    let app = application(&mesh.bed, &mesh.bed.pod, Group::App, &[APP]);
    mesh.bed.pod.sysctl("ipv4/tcp_syncookies", "2");
    let packet = Packet::open(&mesh.bed, &mesh.bed.peer, Group::Outside);
    let receiver = mesh.bed.pod.mac("eth0");
    let send = |tags: &[u16]| {
        let segment = Segment::new(SocketAddr::from((PEER_V4, 45000)), APP, SYN);
        packet.send_to(receiver, tags, &segment.bytes()).unwrap();
    };
    let assigned = || mesh.count(Hook::Ingress, Reason::Assigned);
    for tags in [&[][..], &[0]] {
        let before = assigned();
        send(tags);
        eventually("one tag makes no difference", || assigned() > before);
    }
    let before = assigned();
    for tags in [&[0, 0][..], &[0, 0, 0], &[5, 0], &[0, 5]] {
        let dropped = mesh.count(Hook::Ingress, Reason::Malformed);
        send(tags);
        eventually("more are dropped", || mesh.count(Hook::Ingress, Reason::Malformed) > dropped);
    }
    assert_eq!((assigned(), app.accepted()), (before, 0), "{}", counts(&mesh.capture));
    assert_eq!(mesh.count(Hook::Egress, Reason::OutsideCgroup), 0, "the application has answered nobody");
}
