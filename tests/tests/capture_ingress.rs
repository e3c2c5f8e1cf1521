//! Connections that come to a workload in plaintext: every segment meets the proxy, whatever state the sockets are in.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use mesh_ebpf_common::decide::{ACK, SYN};
use mesh_ebpf_common::outcome::{Hook, Reason};
use mesh_tests::capture_bed::packet::{Raw, Segment};
use mesh_tests::capture_bed::proxy::{Mesh, Server, application};
use mesh_tests::capture_bed::tcp::{bind, connect, listen, local_name};
use mesh_tests::capture_bed::{Group, PATIENCE, PEER_V4, counts, eventually, peer_ip, pod_ip, read_line};
use nix::sys::socket::{setsockopt, sockopt};

const APP_PORT: u16 = 8080;

fn app_address(v6: bool) -> SocketAddr {
    SocketAddr::new(pod_ip(v6), APP_PORT)
}

/// An application in the workload, on both families.
fn app(mesh: &Mesh) -> Server {
    application(&mesh.bed, &mesh.bed.pod, Group::App, &[app_address(false), app_address(true)])
}

fn refused<T: std::fmt::Debug>(result: io::Result<T>, what: &str) {
    let error = result.expect_err(what);
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{what}: {error}");
}

/// Calls the application and checks that the proxy answered in its place, with the original destination.
fn meets_the_proxy(mesh: &Mesh, destination: SocketAddr) {
    let mut stream =
        mesh.call(destination).unwrap_or_else(|e| panic!("call {destination}: {e}; {}", counts(&mesh.capture)));
    let client = local_name(stream.as_fd()).unwrap();
    assert_eq!(read_line(&mut stream).unwrap(), format!("in 15006 {destination} {client}"));
}

#[test]
fn plaintext_goes_to_the_proxy_with_its_original_destination() {
    let mesh = Mesh::new();
    let app = app(&mesh);
    for v6 in [false, true] {
        meets_the_proxy(&mesh, app_address(v6));
        // Nobody listens there; that is the proxy's to find out.
        meets_the_proxy(&mesh, SocketAddr::new(pod_ip(v6), 9999));
    }
    assert_eq!(app.accepted(), 0);
    assert_eq!(mesh.count(Hook::Ingress, Reason::ForeignSocket), 0, "{}", counts(&mesh.capture));
}

#[test]
fn plaintext_goes_to_the_proxy_by_clsact() {
    let mesh = Mesh::with(mesh_tests::capture_bed::Bed::capture_by_clsact);
    let app = app(&mesh);
    for v6 in [false, true] {
        meets_the_proxy(&mesh, app_address(v6));
    }
    assert_eq!(app.accepted(), 0);
    let pins: Vec<String> = mesh.capture.programs_attached().unwrap().into_iter().map(|row| row.name).collect();
    assert!(pins.iter().any(|name| name.ends_with("tc_ingress_clsact")), "{pins:?}");
}

#[test]
fn the_tunnel_port_is_the_proxys() {
    let mesh = Mesh::new();
    for v6 in [false, true] {
        let mut stream = mesh.call(SocketAddr::new(pod_ip(v6), 15008)).expect("call the tunnel port");
        assert!(read_line(&mut stream).unwrap().starts_with("in 15008 "));
    }
    assert!(mesh.count(Hook::Ingress, Reason::HboneListener) >= 2, "{}", counts(&mesh.capture));
}

#[test]
fn the_proxys_other_ports_are_refused_from_outside() {
    let mesh = Mesh::new();
    for v6 in [false, true] {
        for port in [15001, 15006] {
            refused(mesh.call(SocketAddr::new(pod_ip(v6), port)), &format!("port {port}"));
        }
    }
    assert_eq!(mesh.proxy().accepted(), 0);
    assert!(mesh.count(Hook::Ingress, Reason::ReservedPort) >= 4, "{}", counts(&mesh.capture));
}

#[test]
fn without_the_proxy_callers_are_refused_at_once() {
    let mut mesh = Mesh::new();
    let app = app(&mesh);
    mesh.proxy.take().expect("runs").stop();
    for v6 in [false, true] {
        let begin = Instant::now();
        refused(mesh.call(app_address(v6)), "the application's port");
        refused(mesh.call(SocketAddr::new(pod_ip(v6), 15008)), "the tunnel port");
        assert!(begin.elapsed() < Duration::from_millis(900), "refused, not timed out: {:?}", begin.elapsed());
    }
    assert_eq!(app.accepted(), 0);
}

#[test]
fn an_application_cannot_take_the_proxys_place() {
    let mut mesh = Mesh::new();
    mesh.proxy.take().expect("runs").stop();
    let taken: Vec<SocketAddr> = [15006, 15008].map(|port| SocketAddr::new(pod_ip(false), port)).into();
    let impostor = application(&mesh.bed, &mesh.bed.pod, Group::App, &taken);
    let timeout = Duration::from_millis(300);
    for port in [APP_PORT, 15006, 15008] {
        let socket = mesh.bed.tcp(&mesh.bed.peer, Group::Neighbour, false);
        connect(socket, SocketAddr::new(pod_ip(false), port), timeout).expect_err("an impostor's connection");
    }
    assert_eq!(impostor.accepted(), 0, "{}", counts(&mesh.capture));
}

#[test]
fn syn_cookies_lead_to_the_proxy() {
    let mesh = Mesh::new();
    let app = app(&mesh);
    mesh.bed.pod.sysctl("ipv4/tcp_syncookies", "2");
    for v6 in [false, true] {
        // The application's own listener has sent cookies lately and would take back any that is valid.
        let socket = mesh.bed.tcp(&mesh.bed.pod, Group::Proxy, v6);
        let mut local = connect(socket, app_address(v6), PATIENCE).expect("a local connection");
        assert_eq!(read_line(&mut local).unwrap(), "app");
    }
    let local = app.accepted();
    for v6 in [false, true] {
        for _ in 0..4 {
            meets_the_proxy(&mesh, app_address(v6));
            let mut tunnel = mesh.call(SocketAddr::new(pod_ip(v6), 15008)).expect("call the tunnel port");
            assert!(read_line(&mut tunnel).unwrap().starts_with("in 15008 "));
        }
    }
    assert_eq!(app.accepted(), local, "nobody from outside got around the proxy; {}", counts(&mesh.capture));
}

#[test]
fn a_syn_flood_reaches_nobody_else() {
    let mesh = Mesh::new();
    let app = app(&mesh);
    mesh.bed.pod.sysctl("ipv4/tcp_max_syn_backlog", "8");
    let raw = Raw::open(&mesh.bed, &mesh.bed.peer, Group::Outside);
    // Both listeners: 2000 half-open connections each, from addresses that answer nothing.
    for i in 0..2000_u32 {
        let source = std::net::Ipv4Addr::from_bits(PEER_V4.to_bits() + 100 + i % 100);
        for port in [APP_PORT, 15008] {
            let sport = u16::try_from(20000 + i % 30000).unwrap();
            raw.send(&Segment::new(SocketAddr::from((source, sport)), SocketAddr::new(pod_ip(false), port), SYN));
        }
        if i % 500 == 0 {
            meets_the_proxy(&mesh, app_address(false));
        }
    }
    meets_the_proxy(&mesh, app_address(false));
    meets_the_proxy(&mesh, app_address(true));
    assert_eq!(app.accepted(), 0, "{}", counts(&mesh.capture));
}

#[test]
fn stray_segments_reach_nobody_else() {
    let mesh = Mesh::new();
    let app = app(&mesh);
    let raw = Raw::open(&mesh.bed, &mesh.bed.peer, Group::Outside);
    let before = mesh.count(Hook::Ingress, Reason::Assigned);
    for sport in 41000..41010 {
        let client = SocketAddr::from((PEER_V4, sport));
        raw.send(&Segment::new(client, app_address(false), ACK).with_payload(b"stray"));
    }
    eventually("stray segments are counted", || mesh.count(Hook::Ingress, Reason::Assigned) >= before + 10);
    assert_eq!((app.accepted(), mesh.proxy().accepted()), (0, 0));
}

#[test]
fn fragments_are_dropped() {
    let mesh = Mesh::new();
    let raw = Raw::open(&mesh.bed, &mesh.bed.peer, Group::Outside);
    let client = SocketAddr::from((PEER_V4, 42000));
    raw.send(&Segment::new(client, app_address(false), SYN).more_fragments());
    eventually("the fragment is counted", || mesh.count(Hook::Ingress, Reason::Fragment) == 1);
    assert_eq!(mesh.count(Hook::Ingress, Reason::Assigned), 0, "{}", counts(&mesh.capture));
}

/// The server closed first, so its side keeps the connection in TIME_WAIT; the client comes back from the same port.
#[test]
fn a_client_returns_to_a_port_in_time_wait() {
    for (v6, port) in [(false, APP_PORT), (true, APP_PORT), (false, 15008), (true, 15008)] {
        let mesh = Mesh::new();
        let app = app(&mesh);
        let destination = SocketAddr::new(pod_ip(v6), port);
        let client = SocketAddr::new(peer_ip(v6), 43000);
        for round in 0..4 {
            let socket = mesh.bed.tcp(&mesh.bed.peer, Group::Neighbour, v6);
            setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
            bind(socket.as_fd(), client).expect("bind the same port again");
            let begin = Instant::now();
            let mut stream = connect(socket, destination, PATIENCE)
                .unwrap_or_else(|e| panic!("round {round} to {destination}: {e}; {}", counts(&mesh.capture)));
            assert!(begin.elapsed() < Duration::from_millis(1900), "within one retransmission: {:?}", begin.elapsed());
            assert!(read_line(&mut stream).unwrap().ends_with(&client.to_string()));
            // The proxy closes when it reads this word, and only then the client does.
            mesh_tests::capture_bed::proxy::ask_to_close(&mut stream).expect("the proxy closes first");
            stream.shutdown(Shutdown::Both).ok();
        }
        assert_eq!(app.accepted(), 0);
        if port == APP_PORT {
            assert!(mesh.count(Hook::Lookup, Reason::LookupAssigned) >= 3, "{}", counts(&mesh.capture));
        }
    }
}

#[test]
fn time_wait_without_a_proxy_is_refused() {
    let mut mesh = Mesh::new();
    let app = app(&mesh);
    let client = SocketAddr::new(peer_ip(false), 43001);
    let dial = |mesh: &Mesh| {
        let socket = mesh.bed.tcp(&mesh.bed.peer, Group::Neighbour, false);
        setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
        bind(socket.as_fd(), client).expect("bind");
        connect(socket, app_address(false), PATIENCE)
    };
    let mut stream = dial(&mesh).expect("first");
    read_line(&mut stream).unwrap();
    mesh_tests::capture_bed::proxy::ask_to_close(&mut stream).expect("the proxy closes first");
    drop(stream);
    mesh.proxy.take().expect("runs").stop();
    refused(dial(&mesh), "no proxy");
    assert_eq!(app.accepted(), 0);
}

/// The proxy's connection to the application looks like the client's; segments of the client's own that meet it must
/// not reach the application.
#[test]
fn the_proxys_inner_connection_is_not_open_to_the_outside() {
    let mesh = Mesh::new();
    let app = app(&mesh);
    let client = SocketAddr::new(peer_ip(false), 20001);
    let socket = mesh.bed.tcp(&mesh.bed.pod, Group::Proxy, false);
    setsockopt(&socket, sockopt::IpTransparent, &true).expect("IP_TRANSPARENT");
    setsockopt(&socket, sockopt::Mark, &mesh_ebpf_common::INNER_MARK).expect("SO_MARK");
    bind(socket.as_fd(), client).expect("bind the client's address");
    let mut inner = connect(socket, app_address(false), PATIENCE).expect("the inner connection");
    assert_eq!(read_line(&mut inner).unwrap(), "app");
    let raw = Raw::open(&mesh.bed, &mesh.bed.peer, Group::Outside);
    for flags in [SYN, ACK] {
        raw.send(&Segment::new(client, app_address(false), flags).with_payload(b"outside\n"));
    }
    eventually("both are dropped", || mesh.count(Hook::Ingress, Reason::ForeignSocket) >= 2);
    assert_eq!(app.accepted(), 1);
    // Still alive, and nothing was injected.
    io::Write::write_all(&mut inner, b"inner\n").unwrap();
    assert_eq!(read_line(&mut inner).unwrap(), "inner");
}

#[test]
fn connections_from_before_enrolment_go_on() {
    use mesh_tests::capture_bed::{Bed, proxy::Listeners};
    let bed = Bed::new();
    let capture = std::sync::Arc::new(bed.capture());
    let outside = SocketAddr::from((PEER_V4, 8083));
    let app = application(&bed, &bed.pod, Group::App, &[app_address(false)]);
    let server = application(&bed, &bed.peer, Group::Outside, &[outside]);
    let mut incoming =
        connect(bed.tcp(&bed.peer, Group::Outside, false), app_address(false), PATIENCE).expect("in, before");
    let mut outgoing = connect(bed.tcp(&bed.pod, Group::App, false), outside, PATIENCE).expect("out, before");
    for stream in [&mut incoming, &mut outgoing] {
        assert_eq!(read_line(stream).unwrap(), "app");
    }
    let listeners = Listeners::open(&bed, &bed.pod);
    let enrollment = bed.enroll(&capture, &listeners.fds());
    assert_eq!(enrollment.preexisting, 2);
    let proxy = listeners.serve(std::sync::Arc::clone(&capture), enrollment.cookie);
    for stream in [&mut incoming, &mut outgoing] {
        io::Write::write_all(stream, b"still here\n").unwrap();
        assert_eq!(read_line(stream).unwrap(), "still here", "{}", counts(&capture));
    }
    assert_eq!((app.accepted(), server.accepted(), proxy.accepted()), (1, 1, 0));
}

#[test]
fn many_callers_at_once_all_meet_the_proxy() {
    let mesh = Mesh::new();
    let app = app(&mesh);
    let answers: BTreeSet<IpAddr> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|i| {
                let mesh = &mesh;
                scope.spawn(move || {
                    for _ in 0..25 {
                        meets_the_proxy(mesh, app_address(i % 2 == 0));
                    }
                    peer_ip(i % 2 == 0)
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(answers.len(), 2);
    assert_eq!((app.accepted(), mesh.proxy().accepted()), (0, 200));
}

/// A listener of the application's on its own plaintext port must not matter.
#[test]
fn a_late_listener_of_the_application_changes_nothing() {
    let mesh = Mesh::new();
    meets_the_proxy(&mesh, app_address(false));
    let socket = mesh.bed.tcp(&mesh.bed.pod, Group::App, false);
    listen(socket.as_fd(), app_address(false)).unwrap();
    meets_the_proxy(&mesh, app_address(false));
}
