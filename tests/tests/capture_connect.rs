//! Connections that a workload opens: captured with the right destination, and unaware of it.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::collections::BTreeSet;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use mesh_ebpf_common::maps;
use mesh_ebpf_common::outcome::{Hook, Reason};
use mesh_node::capture::{Capture, CaptureConfig, in_netns};
use mesh_tests::capture_bed::foreign::RttCounter;
use mesh_tests::capture_bed::proxy::{Mesh, application, reset};
use mesh_tests::capture_bed::tcp::{bind, connect, local_name, mapped, peer_name};
use mesh_tests::capture_bed::{
    Bed, Group, PATIENCE, PEER_V4, POD_V4, POD_V6, count, counts, eventually, peer_ip, read_line, without_net_raw,
};
use nix::sys::socket::{setsockopt, sockopt};

const V4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7)), 8080);
const V6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7)), 8080);

fn refused<T: std::fmt::Debug>(result: io::Result<T>, what: &str) {
    let error = result.expect_err(what);
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{what}: {error}");
}

#[test]
fn connections_carry_their_original_destination() {
    let mesh = Mesh::new();
    for destination in [V4, V6] {
        let mut stream = mesh.dial(destination).expect("connect");
        assert_eq!(read_line(&mut stream).unwrap(), format!("out {destination}"));
        stream.write_all(b"hello\n").unwrap();
        assert_eq!(read_line(&mut stream).unwrap(), "hello");
        assert_eq!(peer_name(stream.as_fd()).unwrap(), destination, "getpeername");
        let own = if destination.is_ipv6() { IpAddr::from(POD_V6) } else { POD_V4.into() };
        assert_eq!(local_name(stream.as_fd()).unwrap().ip(), own, "getsockname");
    }
    assert_eq!(mesh.proxy().without_destination(), 0, "{}", counts(&mesh.capture));
    assert_eq!(mesh.count(Hook::Connect4, Reason::Captured), 1);
    assert_eq!(mesh.count(Hook::Connect6, Reason::Captured), 1);
}

#[test]
fn v4_mapped_v6_as_java_uses_it() {
    let mesh = Mesh::new();
    let mut stream = mesh.dial(mapped(V4)).expect("connect");
    assert_eq!(read_line(&mut stream).unwrap(), format!("out {V4}"));
    assert_eq!(peer_name(stream.as_fd()).unwrap(), mapped(V4));
    assert_eq!(local_name(stream.as_fd()).unwrap().ip(), IpAddr::from(POD_V4.to_ipv6_mapped()));
}

#[test]
fn a_bound_source_address_works() {
    let mesh = Mesh::new();
    for (destination, source) in [(V4, IpAddr::from(POD_V4)), (V6, POD_V6.into())] {
        let socket = mesh.bed.tcp(&mesh.bed.pod, Group::App, destination.is_ipv6());
        bind(socket.as_fd(), SocketAddr::new(source, 0)).expect("bind");
        let mut stream = connect(socket, destination, PATIENCE).expect("connect");
        assert_eq!(read_line(&mut stream).unwrap(), format!("out {destination}"));
        assert_eq!(local_name(stream.as_fd()).unwrap().ip(), source);
    }
}

#[test]
fn v4_and_v6_and_two_loopback_addresses_share_one_source_port() {
    const PORT: u16 = 40123;
    let mesh = Mesh::new();
    let sources = [
        IpAddr::V4(Ipv4Addr::new(127, 0, 0, 1)),
        IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)),
        IpAddr::V4(POD_V4),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ];
    let mut streams = Vec::new();
    for (i, source) in sources.into_iter().enumerate() {
        let socket = mesh.bed.tcp(&mesh.bed.pod, Group::App, source.is_ipv6());
        setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
        bind(socket.as_fd(), SocketAddr::new(source, PORT)).unwrap_or_else(|e| panic!("bind {source}: {e}"));
        let template = if source.is_ipv6() { V6 } else { V4 };
        let destination = SocketAddr::new(template.ip(), 8000 + u16::try_from(i).unwrap());
        streams.push((destination, connect(socket, destination, PATIENCE).expect("connect")));
    }
    for (destination, stream) in &mut streams {
        assert_eq!(read_line(stream).unwrap(), format!("out {destination}"));
    }
}

#[test]
fn a_socket_bound_to_a_device_is_released_or_refused() {
    let mesh = Mesh::new();
    let bound = || {
        let socket = mesh.bed.tcp(&mesh.bed.pod, Group::App, false);
        setsockopt(&socket, sockopt::BindToDevice, &"eth0".into()).expect("SO_BINDTODEVICE");
        socket
    };
    let mut stream = connect(bound(), V4, PATIENCE).expect("connect with CAP_NET_RAW");
    assert_eq!(read_line(&mut stream).unwrap(), format!("out {V4}"));
    let socket = bound();
    let result = without_net_raw(|| connect(socket, V4, PATIENCE));
    refused(result, "a bound socket without CAP_NET_RAW");
    assert_eq!(mesh.count(Hook::Connect4, Reason::BoundDevice), 1, "{}", counts(&mesh.capture));
}

/// Its first subflow is a TCP socket that the hook captures, or it is refused as what it is; which, is the kernel's version's choice.
#[test]
fn a_multipath_socket_does_not_go_around_the_proxy() {
    let mesh = Mesh::new();
    for destination in [V4, V6] {
        let family = if destination.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
        let kind = (family, libc::SOCK_STREAM, libc::IPPROTO_MPTCP);
        let socket = mesh.bed.socket(&mesh.bed.pod, Group::App, kind);
        let counted = |reason| mesh.count(Hook::Connect4, reason) + mesh.count(Hook::Connect6, reason);
        let (captured, refused) = (counted(Reason::Captured), counted(Reason::MptcpSocket));
        match connect(socket, destination, PATIENCE) {
            Ok(mut stream) => {
                assert_eq!(read_line(&mut stream).unwrap(), format!("out {destination}"));
                assert_eq!(counted(Reason::Captured), captured + 1, "{}", counts(&mesh.capture));
            }
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{destination}: {error}");
                assert_eq!(counted(Reason::MptcpSocket), refused + 1, "{}", counts(&mesh.capture));
            }
        }
    }
}

#[test]
fn the_proxys_ports_are_refused_with_a_reason() {
    let mesh = Mesh::new();
    let mut events = mesh.capture.events().expect("events");
    let mut expected = Vec::new();
    for (ip, ports, reason) in [
        (IpAddr::V4(Ipv4Addr::LOCALHOST), &[15001, 15006, 15008][..], Reason::OwnProxyPort),
        (IpAddr::V6(Ipv6Addr::LOCALHOST), &[15001, 15006, 15008], Reason::OwnProxyPort),
        (IpAddr::V6(Ipv4Addr::LOCALHOST.to_ipv6_mapped()), &[15001], Reason::OwnProxyPort),
        (IpAddr::V4(POD_V4), &[15006], Reason::OwnProxyPort),
        (peer_ip(false), &[15008], Reason::HbonePort),
        (peer_ip(true), &[15008], Reason::HbonePort),
    ] {
        for port in ports {
            let destination = SocketAddr::new(ip, *port);
            refused(mesh.dial(destination), &format!("dial {destination}"));
            expected.push((SocketAddr::new(ip.to_canonical(), *port), reason));
        }
    }
    let cookie = mesh.bed.pod.cookie();
    let mut seen = Vec::new();
    eventually("an event for each refusal", || {
        while let Some(event) = events.poll() {
            assert_eq!(event.cookie, Some(cookie), "{event:?}");
            seen.push((event.dst, event.reason));
        }
        seen.len() >= expected.len()
    });
    assert_eq!(seen, expected);
    assert_eq!(mesh.proxy().accepted(), 0);
}

#[test]
fn loopback_and_udp_are_left_alone() {
    let mesh = Mesh::new();
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 8081));
    let app = application(&mesh.bed, &mesh.bed.pod, Group::App, &[local]);
    let mut stream = mesh.dial(local).expect("connect to loopback");
    assert_eq!(read_line(&mut stream).unwrap(), "app");
    assert_eq!(peer_name(stream.as_fd()).unwrap(), local);
    let udp = UdpSocket::from(mesh.bed.socket(&mesh.bed.pod, Group::App, (libc::AF_INET, libc::SOCK_DGRAM, 0)));
    let server = UdpSocket::from(mesh.bed.socket(&mesh.bed.peer, Group::Outside, (libc::AF_INET, libc::SOCK_DGRAM, 0)));
    bind(server.as_fd(), SocketAddr::from((PEER_V4, 5353))).unwrap();
    udp.connect((PEER_V4, 5353)).unwrap();
    udp.send(b"ping").unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(server.recv(&mut [0; 16]).unwrap(), 4);
    assert_eq!(app.accepted(), 1);
    assert!(mesh.count(Hook::Connect4, Reason::NotTcp) >= 1 && mesh.count(Hook::Egress, Reason::NotTcp) >= 1);
    assert_eq!(mesh.count(Hook::Connect4, Reason::Loopback), 1);
}

#[test]
fn a_socket_used_again_for_loopback_answers_for_itself() {
    let mesh = Mesh::new();
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 8081));
    let _app = application(&mesh.bed, &mesh.bed.pod, Group::App, &[local]);
    let stream = mesh.dial(V4).expect("connect");
    let again = stream.try_clone().unwrap();
    mesh_tests::capture_bed::tcp::disconnect(again.as_fd()).expect("disconnect");
    let mut stream = connect(stream.into(), local, PATIENCE).expect("connect to loopback");
    assert_eq!(read_line(&mut stream).unwrap(), "app");
    assert_eq!(peer_name(stream.as_fd()).unwrap(), local);
}

#[test]
fn a_workload_that_is_not_enrolled_is_untouched() {
    let bed = Bed::new();
    let capture = bed.capture();
    let address = SocketAddr::from((PEER_V4, 8082));
    let server = application(&bed, &bed.peer, Group::Outside, &[address]);
    let mut stream = connect(bed.tcp(&bed.pod, Group::App, false), address, PATIENCE).expect("connect");
    assert_eq!(read_line(&mut stream).unwrap(), "app");
    assert_eq!(server.accepted(), 1);
    assert_eq!(count(&capture, Hook::Connect4, Reason::NotEnrolled), 1);
    assert_eq!(count(&capture, Hook::SockOps, Reason::Noted), 0);
}

#[test]
fn without_the_proxy_connections_are_refused_at_once() {
    let mut mesh = Mesh::new();
    mesh.proxy.take().expect("runs").stop();
    let target = SocketAddr::from((PEER_V4, 8082));
    let server = application(&mesh.bed, &mesh.bed.peer, Group::Outside, &[target]);
    refused(mesh.dial(target), "v4");
    refused(mesh.dial(V6), "v6");
    assert_eq!(server.accepted(), 0, "nothing goes around");
}

#[test]
fn a_full_map_refuses_and_counts() {
    const ENTRIES: u32 = 4;
    let mesh = Mesh::with(|bed| {
        let config = CaptureConfig { map_entries: vec![(maps::CAPTURED, ENTRIES)], ..bed.config() };
        bed.capture_with(&config)
    });
    // Nobody takes the notes of connections to a listener that does not accept: fill the map behind the proxy's back.
    let Mesh { proxy, capture, bed } = mesh;
    proxy.expect("runs").stop();
    let listener = bed.tcp(&bed.pod, Group::Proxy, false);
    mesh_tests::capture_bed::tcp::listen(listener.as_fd(), SocketAddr::from((Ipv4Addr::LOCALHOST, 15001))).unwrap();
    let streams: Vec<_> =
        (0..64).map(|_| connect(bed.tcp(&bed.pod, Group::App, false), V4, PATIENCE).expect("in the backlog")).collect();
    let full = count(&capture, Hook::SockOps, Reason::NotesFull);
    let noted = count(&capture, Hook::SockOps, Reason::Noted);
    assert_eq!(full + noted, 64, "{}", counts(&capture));
    assert!(full > 0, "{}", counts(&capture));
    let mut events = capture.events().unwrap();
    let reasons: BTreeSet<Reason> = std::iter::from_fn(|| events.poll()).map(|event| event.reason).collect();
    assert!(reasons.contains(&Reason::NotesFull), "{reasons:?}");
    let cookie = bed.pod.cookie();
    let without = streams
        .iter()
        .filter(|s| {
            // The application sees its own address; the proxy would see loopback.
            let port = local_name(s.as_fd()).unwrap().port();
            let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            capture.original_dst(cookie, peer).unwrap().is_none()
        })
        .count();
    assert_eq!(u64::try_from(without).unwrap(), full, "a connection without a note has no destination");
}

/// A workload whose captured connections wait in a backlog.
fn unaccepted() -> (Bed, Arc<Capture>, OwnedFd) {
    let Mesh { proxy, capture, bed } = Mesh::new();
    proxy.expect("runs").stop();
    let listener = bed.tcp(&bed.pod, Group::Proxy, false);
    mesh_tests::capture_bed::tcp::listen(listener.as_fd(), SocketAddr::from((Ipv4Addr::LOCALHOST, 15001))).unwrap();
    (bed, capture, listener)
}

/// State of the workload's IPv4 socket with this local port, as proc(5) writes it.
fn tcp_state(bed: &Bed, port: u16) -> Option<String> {
    let table = in_netns(bed.pod.fd(), || std::fs::read_to_string("/proc/thread-self/net/tcp")).unwrap().unwrap();
    let mut lines = table.lines().skip(1).map(|line| line.split_ascii_whitespace().skip(1));
    lines.find_map(|mut fields| {
        fields.next()?.ends_with(&format!(":{port:04X}")).then(|| fields.nth(1))?.map(str::to_owned)
    })
}

fn notes(capture: &Capture) -> usize {
    let rows = capture.maps().unwrap();
    rows.iter().find(|row| row.name == maps::CAPTURED).and_then(|row| row.entries).unwrap()
}

#[test]
fn a_connection_that_is_reset_early_takes_its_note_along() {
    let (bed, capture, _listener) = unaccepted();
    let stream = connect(bed.tcp(&bed.pod, Group::App, false), V4, PATIENCE).expect("in the backlog");
    assert_eq!(notes(&capture), 1);
    reset(&stream).unwrap();
    drop(stream);
    eventually("the note is removed", || notes(&capture) == 0);
    assert_eq!(count(&capture, Hook::SockOps, Reason::NoteRemoved), 1);
}

#[test]
fn a_client_that_said_all_and_left_is_still_carried_where_it_wanted_to_go() {
    let (bed, capture, listener) = unaccepted();
    let mut stream = connect(bed.tcp(&bed.pod, Group::App, false), V4, PATIENCE).expect("in the backlog");
    let port = local_name(stream.as_fd()).unwrap().port();
    stream.write_all(b"and nothing more").unwrap();
    drop(stream);
    // FIN_WAIT2: only now the client's socket is gone, and a note that it takes along would be missing.
    eventually("the end's acknowledgement", || tcp_state(&bed, port) == Some("05".to_owned()));
    let (mut accepted, from) = TcpListener::from(listener).accept().unwrap();
    assert_eq!(capture.original_dst(bed.pod.cookie(), from).unwrap(), Some(V4));
    let mut said = String::new();
    accepted.read_to_string(&mut said).unwrap();
    assert_eq!(said, "and nothing more");
    assert_eq!(notes(&capture), 0);
}

#[test]
fn notes_that_nobody_can_take_any_more_go_with_the_next_enrolment() {
    let (bed, capture, listener) = unaccepted();
    for _ in 0..3 {
        drop(connect(bed.tcp(&bed.pod, Group::App, false), V4, PATIENCE).expect("in the backlog"));
    }
    let waiting = connect(bed.tcp(&bed.pod, Group::App, false), V4, PATIENCE).expect("in the backlog");
    bed.enroll(&capture, &[listener.as_fd()]);
    assert_eq!(notes(&capture), 4, "the backlog is still there");
    drop(waiting);
    nix::sys::socket::shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Both).unwrap();
    bed.enroll(&capture, &[]);
    assert_eq!(notes(&capture), 0);
}

/// Another program at the workload's cgroup has asked for callbacks, too.
#[test]
fn callbacks_that_somebody_else_asked_for_still_come() {
    let mesh = Mesh::new();
    let foreign = RttCounter::attach(&mesh.bed.cgroup(Group::App)).expect("attach");
    let mut stream = mesh.dial(SocketAddr::new(peer_ip(false), 8080)).expect("dial");
    read_line(&mut stream).unwrap();
    for _ in 0..5 {
        stream.write_all(b"echo\n").unwrap();
        assert_eq!(read_line(&mut stream).unwrap(), "echo");
    }
    assert!(foreign.calls().unwrap() > 0, "{}", counts(&mesh.capture));
}
