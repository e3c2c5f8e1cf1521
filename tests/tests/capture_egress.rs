//! What leaves a workload: TCP of the proxy's and of before enrolment, and nothing else.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use mesh_ebpf_common::decide::{ACK, RST, SYN};
use mesh_ebpf_common::outcome::{Hook, Reason};
use mesh_tests::capture_bed::packet::{Packet, Raw, Segment, syn_behind};
use mesh_tests::capture_bed::proxy::{Listeners, Mesh, application, reset};
use mesh_tests::capture_bed::tcp::{bind, connect, local_name};
use mesh_tests::capture_bed::{
    Bed, Group, PATIENCE, PEER_V4, PEER_V6, POD_V4, POD_V6, counts, eventually, peer_ip, pod_ip, read_line,
};
use nix::sys::socket::{setsockopt, sockopt};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_ARP: u16 = 0x0806;
/// Long enough for an answer that must not come.
const SHORT: Duration = Duration::from_millis(400);

fn segment(flags: u8) -> Segment {
    Segment::new(SocketAddr::from((POD_V4, 45000)), SocketAddr::from((PEER_V4, 8084)), flags)
}

/// A packet socket learns that its frame was dropped.
fn dropped(sent: io::Result<()>) {
    assert_eq!(sent.expect_err("a frame got out").raw_os_error(), Some(libc::ENOBUFS));
}

#[test]
fn the_proxy_speaks_freely() {
    let mesh = Mesh::new();
    for v6 in [false, true] {
        let address = SocketAddr::new(peer_ip(v6), 8084);
        let server = application(&mesh.bed, &mesh.bed.peer, Group::Outside, &[address]);
        let socket = mesh.bed.tcp(&mesh.bed.pod, Group::Proxy, v6);
        let mut stream = connect(socket, address, PATIENCE).expect("the proxy connects");
        assert_eq!(read_line(&mut stream).unwrap(), "app");
        assert_eq!(local_name(stream.as_fd()).unwrap().ip(), pod_ip(v6), "not captured");
        assert_eq!(server.accepted(), 1);
    }
}

#[test]
fn a_process_outside_the_cgroup_is_dropped_and_counted() {
    let mesh = Mesh::new();
    for v6 in [false, true] {
        let address = SocketAddr::new(peer_ip(v6), 8084);
        let server = application(&mesh.bed, &mesh.bed.peer, Group::Outside, &[address]);
        // Now the link layer is resolved, too, and a SYN leaves at once.
        connect(mesh.bed.tcp(&mesh.bed.pod, Group::Proxy, v6), address, PATIENCE).expect("the proxy gets there");
        eventually("the proxy's connection is accepted", || server.accepted() == 1);
        let before = mesh.count(Hook::Egress, Reason::OutsideCgroup);
        let socket = mesh.bed.tcp(&mesh.bed.pod, Group::Outside, v6);
        let error = connect(socket, address, SHORT).expect_err("connect from outside the cgroup");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        assert!(mesh.count(Hook::Egress, Reason::OutsideCgroup) > before, "{}", counts(&mesh.capture));
        assert_eq!(server.accepted(), 1);
    }
}

#[test]
fn raw_tcp_is_dropped_and_counted() {
    let mesh = Mesh::new();
    for group in [Group::App, Group::Outside] {
        let raw = Raw::open(&mesh.bed, &mesh.bed.pod, group);
        let before = mesh.count(Hook::Egress, Reason::RawSocket);
        for flags in [SYN, ACK, RST] {
            raw.send(&segment(flags));
        }
        raw.send(&segment(ACK).with_payload(b"secret"));
        let counted = || mesh.count(Hook::Egress, Reason::RawSocket);
        eventually("all four are counted", || counted() == before + 4);
    }
}

#[test]
fn tcp_from_packet_sockets_is_dropped_and_counted() {
    let mesh = Mesh::new();
    let packet = Packet::open(&mesh.bed, &mesh.bed.pod, Group::App);
    let mut expected = 0;
    // Honest, lying about the protocol, and inside a VLAN tag (of priority only, which receivers take off).
    for (vlan, claimed) in [(None, ETH_P_IP), (None, ETH_P_ARP), (Some(0), ETH_P_IP), (Some(0), ETH_P_ARP)] {
        for flags in [SYN, RST] {
            dropped(packet.send(vlan, claimed, &segment(flags).bytes()));
            expected += 1;
            let counted = mesh.count(Hook::Egress, Reason::PacketSocket);
            assert_eq!(counted, expected, "{vlan:?} {claimed:#x}: {}", counts(&mesh.capture));
        }
    }
    dropped(packet.send(None, ETH_P_IP, &segment(SYN).more_fragments().bytes()));
    assert_eq!(mesh.count(Hook::Egress, Reason::Fragment), 1);
    let event = mesh.capture.events().unwrap().poll().expect("an event");
    assert_eq!((event.reason, event.dst), (Reason::PacketSocket, SocketAddr::from((PEER_V4, 8084))));
}

/// Out and in: the one who looks into a loss must see between whom it was.
#[test]
fn what_cannot_be_judged_is_dropped_with_its_addresses() {
    /// IPv6's destination options, and its fragment header.
    const OPTIONS: u8 = 60;
    const FRAGMENT: u8 = 44;
    let mesh = Mesh::new();
    let mut events = mesh.capture.events().unwrap();
    let inside = (Packet::open(&mesh.bed, &mesh.bed.pod, Group::App), [POD_V4.into(), POD_V6.into()]);
    let outside = (Packet::open(&mesh.bed, &mesh.bed.peer, Group::Outside), [PEER_V4.into(), PEER_V6.into()]);
    let receiver = mesh.bed.pod.mac("eth0");
    for (hook, (packet, from), to) in [(Hook::Egress, &inside, outside.1), (Hook::Ingress, &outside, inside.1)] {
        let whole = Segment::new(SocketAddr::new(from[0], 45000), SocketAddr::new(to[0], 8084), SYN);
        let (IpAddr::V6(src), IpAddr::V6(dst)) = (from[1], to[1]) else { panic!("the second is IPv6") };
        let behind = |kinds: &[u8]| {
            let headers: Vec<(u8, &[u8])> = kinds.iter().map(|kind| (*kind, &[0; 7][..])).collect();
            syn_behind(SocketAddrV6::new(src, 45000, 0, 0), SocketAddrV6::new(dst, 8084, 0, 0), &headers)
        };
        for (reason, v6, bytes) in [
            (Reason::Fragment, false, whole.clone().more_fragments().bytes()),
            (Reason::Malformed, false, whole.bytes()[..30].to_vec()),
            (Reason::Malformed, true, behind(&[])[..50].to_vec()),
            (Reason::Fragment, true, behind(&[OPTIONS, FRAGMENT])),
            (Reason::HeaderChain, true, behind(&[OPTIONS; 7])),
        ] {
            // A packet socket hears that its frame was dropped on the way out, which is not what this is about.
            let _lost = packet.send_to(receiver, &[], &bytes);
            let mut event = None;
            eventually("an event", || {
                event = event.or_else(|| events.poll());
                event.is_some()
            });
            let event = event.expect("waited for");
            let family = usize::from(v6);
            assert_eq!((event.hook, event.reason), (Some(hook), reason));
            assert_eq!((event.src.ip(), event.dst.ip()), (from[family], to[family]), "{event:?}");
        }
    }
}

/// An application that binds what an old connection had is not that connection.
#[test]
fn the_address_of_an_old_connection_is_no_pass() {
    let bed = Bed::new();
    let capture = Arc::new(bed.capture());
    let outside = SocketAddr::from((PEER_V4, 8085));
    let server = application(&bed, &bed.peer, Group::Outside, &[outside]);
    let client = SocketAddr::from((POD_V4, 45100));
    let open = |group| {
        let socket = bed.tcp(&bed.pod, group, false);
        setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
        bind(socket.as_fd(), client).expect("bind");
        socket
    };
    let mut old = connect(open(Group::App), outside, PATIENCE).expect("before enrolment");
    assert_eq!(read_line(&mut old).unwrap(), "app");
    let listeners = Listeners::open(&bed, &bed.pod);
    assert_eq!(bed.enroll(&capture, &listeners.fds()).preexisting, 1);
    // A reset, so that no TIME_WAIT keeps the address.
    reset(&old).unwrap();
    drop(old);
    connect(open(Group::Outside), outside, SHORT).expect_err("the address alone is not enough");
    assert_eq!(server.accepted(), 1, "{}", counts(&capture));
}

#[test]
fn the_kernels_own_answers_leave() {
    let mesh = Mesh::new();
    let raw = Raw::open(&mesh.bed, &mesh.bed.peer, Group::Outside);
    // An ACK that belongs to nothing goes to the proxy's listener, where the kernel answers with a reset.
    raw.send(&Segment::new(SocketAddr::from((PEER_V4, 45200)), SocketAddr::from((POD_V4, 8080)), ACK));
    let passed = || mesh.count(Hook::Egress, Reason::KernelReply) + mesh.count(Hook::Egress, Reason::ProxySocket);
    eventually("the reset leaves", || passed() >= 1);
    let dropped = [Reason::RawSocket, Reason::NoSocket, Reason::OutsideCgroup];
    assert!(dropped.iter().all(|reason| mesh.count(Hook::Egress, *reason) == 0), "{}", counts(&mesh.capture));
}

#[test]
fn events_are_limited_and_the_rest_is_counted() {
    const SENT: u64 = 1000;
    let mesh = Mesh::new();
    let raw = Raw::open(&mesh.bed, &mesh.bed.pod, Group::App);
    for _ in 0..SENT {
        raw.send(&segment(SYN));
    }
    eventually("all are counted", || mesh.count(Hook::Egress, Reason::RawSocket) == SENT);
    let mut events = mesh.capture.events().unwrap();
    let received = u64::try_from(std::iter::from_fn(|| events.poll()).count()).unwrap();
    assert!(received > 0 && received < SENT, "{received}");
    assert_eq!(received + mesh.capture.suppressed_events().unwrap(), SENT);
}
