//! The node's own processes reach applications directly, whatever the proxy does; nobody else can pass for one.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use mesh_ebpf_common::decide::{ACK, RST, SYN};
use mesh_ebpf_common::maps;
use mesh_ebpf_common::outcome::{Hook, Reason};
use mesh_node::capture::Capture;
use mesh_tests::capture_bed::packet::{Raw, Segment};
use mesh_tests::capture_bed::proxy::{Mesh, Server, application, reset};
use mesh_tests::capture_bed::tcp::{bind, connect, listen, local_name};
use mesh_tests::capture_bed::{
    Bed, Group, Netns, PATIENCE, PEER_V4, PEER_V6, POD_V4, counts, eventually, peer_ip, pod_ip, read_line,
};
use nix::sys::socket::{setsockopt, sockopt};

const APP_PORT: u16 = 8080;
const REPLACEMENTS: usize = 40;
const MEBIBYTE: usize = 1 << 20;
/// Long enough for an answer that must not come.
const SHORT: Duration = Duration::from_millis(400);
/// A namespace behind the node.
const BEHIND_V4: Ipv4Addr = Ipv4Addr::new(10, 79, 0, 2);
/// A pod on the same bridge.
const BESIDE_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 3);

fn app_address(v6: bool) -> SocketAddr {
    SocketAddr::new(pod_ip(v6), APP_PORT)
}

fn app(mesh: &Mesh) -> Server {
    application(&mesh.bed, &mesh.bed.pod, Group::App, &[app_address(false), app_address(true)])
}

/// A listener of the application's that the test serves itself.
fn listener(mesh: &Mesh, v6: bool) -> TcpListener {
    let socket = mesh.bed.tcp(&mesh.bed.pod, Group::App, v6);
    listen(socket.as_fd(), app_address(v6)).unwrap();
    TcpListener::from(socket)
}

/// A connection of the node's, and the application's side of it.
fn host_flow(mesh: &Mesh, v6: bool) -> (TcpStream, TcpStream) {
    let listener = listener(mesh, v6);
    let client = mesh
        .call_as(Group::Outside, app_address(v6))
        .unwrap_or_else(|e| panic!("call the application: {e}; {}", counts(&mesh.capture)));
    let (served, from) = listener.accept().unwrap();
    assert_eq!(from, local_name(client.as_fd()).unwrap(), "the application sees who called");
    for stream in [&client, &served] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
    }
    (client, served)
}

/// From a port of the caller's choice.
fn call_from(mesh: &Mesh, group: Group, client: SocketAddr) -> io::Result<TcpStream> {
    let socket = mesh.bed.tcp(&mesh.bed.peer, group, client.is_ipv6());
    setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
    bind(socket.as_fd(), client)?;
    connect(socket, app_address(client.is_ipv6()), PATIENCE)
}

fn meets_the_proxy(mesh: &Mesh, mut stream: TcpStream) {
    let client = local_name(stream.as_fd()).unwrap();
    let line = read_line(&mut stream).unwrap_or_else(|e| panic!("{client}: {e}; {}", counts(&mesh.capture)));
    assert_eq!(line, format!("in 15006 {} {client}", app_address(client.is_ipv6())));
}

/// A namespace whose packets the node routes to the workload.
fn behind(bed: &Bed) -> Netns {
    let behind = bed.another("behind");
    bed.peer.ip(&["link", "add", "behind", "type", "veth", "peer", "name", "eth0", "netns", behind.name()]);
    bed.peer.ip(&["addr", "add", "10.79.0.1/24", "dev", "behind"]);
    bed.peer.ip(&["link", "set", "behind", "up"]);
    for (key, value) in [("ip_forward", "1"), ("conf/all/accept_local", "1"), ("conf/behind/accept_local", "1")] {
        bed.peer.sysctl(&format!("ipv4/{key}"), value);
    }
    behind.ip(&["addr", "add", &format!("{BEHIND_V4}/24"), "dev", "eth0"]);
    behind.ip(&["link", "set", "eth0", "up"]);
    behind.ip(&["route", "add", "default", "via", "10.79.0.1"]);
    behind
}

/// The workload's link ends at a bridge of the node, as with most simple networks, and another pod's does, too.
///
/// Its packets keep their sockets: netfilter for bridges, where the kernel has it, would take these away.
fn beside(bed: &Bed) -> Netns {
    let beside = bed.another("beside");
    for family in ["ip", "ip6"] {
        let key = format!("bridge/bridge-nf-call-{family}tables");
        if std::path::Path::new("/proc/sys/net").join(&key).exists() {
            bed.peer.sysctl(&key, "0");
        }
    }
    bed.peer.ip(&["link", "add", "cni0", "type", "bridge"]);
    bed.peer.ip(&["link", "add", "beside", "type", "veth", "peer", "name", "eth0", "netns", beside.name()]);
    bed.peer.ip(&["addr", "flush", "dev", "eth0"]);
    for port in ["eth0", "beside"] {
        bed.peer.ip(&["link", "set", port, "master", "cni0", "up"]);
    }
    bed.peer.ip(&["addr", "add", &format!("{PEER_V4}/24"), "dev", "cni0"]);
    bed.peer.ip(&["addr", "add", &format!("{PEER_V6}/64"), "dev", "cni0", "nodad"]);
    bed.peer.ip(&["link", "set", "cni0", "up"]);
    beside.ip(&["addr", "add", &format!("{BESIDE_V4}/24"), "dev", "eth0"]);
    beside.ip(&["link", "set", "eth0", "up"]);
    beside
}

fn host_flows(capture: &Capture) -> Option<usize> {
    let rows = capture.maps().unwrap();
    rows.iter().find(|row| row.name == maps::HOST_FLOWS).and_then(|row| row.entries)
}

#[test]
fn the_nodes_processes_reach_the_application_with_their_own_address() {
    for open in [Bed::capture, Bed::capture_by_clsact] {
        let mesh = Mesh::with(open);
        for v6 in [false, true] {
            let (mut client, mut served) = host_flow(&mesh, v6);
            served.write_all(b"hello\n").unwrap();
            assert_eq!(read_line(&mut client).unwrap(), "hello");
        }
        assert_eq!(mesh.proxy().accepted(), 0);
        for hook in [Hook::HostEgress, Hook::Ingress, Hook::Egress, Hook::HostIngress] {
            assert!(mesh.count(hook, Reason::HostFlow) > 0, "{}: {}", hook.name(), counts(&mesh.capture));
        }
        assert_eq!(host_flows(&mesh.capture), Some(2));
        let names: Vec<_> = mesh.capture.programs_attached().unwrap().into_iter().map(|row| row.name).collect();
        assert_eq!(names.iter().filter(|name| name.contains("tc_host_egress")).count(), 1, "{names:?}");
    }
}

#[test]
fn the_nodes_processes_reach_the_application_through_a_bridge() {
    let mesh = Mesh::new();
    let _beside = beside(&mesh.bed);
    for v6 in [false, true] {
        host_flow(&mesh, v6);
    }
    assert_eq!(mesh.proxy().accepted(), 0);
}

#[test]
fn a_pod_on_the_nodes_network_meets_the_proxy() {
    for open in [Bed::capture, Bed::capture_by_clsact] {
        let mesh = Mesh::with(open);
        let app = app(&mesh);
        for v6 in [false, true] {
            for group in [Group::Neighbour, Group::App, Group::Proxy] {
                meets_the_proxy(&mesh, mesh.call_as(group, app_address(v6)).expect("call"));
            }
        }
        assert_eq!((app.accepted(), host_flows(&mesh.capture)), (0, Some(0)));
    }
}

#[test]
fn the_proxys_ports_stay_the_proxys() {
    let mesh = Mesh::new();
    for v6 in [false, true] {
        for port in [15001, 15006] {
            mesh.call_as(Group::Outside, SocketAddr::new(pod_ip(v6), port)).expect_err("a port of the proxy");
        }
        let mut tunnel = mesh.call_as(Group::Outside, SocketAddr::new(pod_ip(v6), 15008)).expect("the tunnel's port");
        assert!(read_line(&mut tunnel).unwrap().starts_with("in 15008 "));
    }
    assert_eq!(host_flows(&mesh.capture), Some(0));
}

/// Their processes are in no pod's cgroup, and do not come from the node's namespace.
#[test]
fn what_the_node_forwards_meets_the_proxy() {
    for neighbour in [behind as fn(&Bed) -> Netns, beside] {
        let mesh = Mesh::new();
        let app = app(&mesh);
        let elsewhere = neighbour(&mesh.bed);
        for group in [Group::Outside, Group::Neighbour] {
            let socket = mesh.bed.tcp(&elsewhere, group, false);
            let stream = connect(socket, app_address(false), PATIENCE)
                .unwrap_or_else(|e| panic!("call through the node: {e}; {}", counts(&mesh.capture)));
            meets_the_proxy(&mesh, stream);
        }
        assert_eq!((app.accepted(), host_flows(&mesh.capture)), (0, Some(0)), "{}", counts(&mesh.capture));
    }
}

#[test]
fn the_nodes_address_alone_is_no_pass() {
    for neighbour in [behind as fn(&Bed) -> Netns, beside] {
        let mesh = Mesh::new();
        let app = app(&mesh);
        let elsewhere = neighbour(&mesh.bed);
        // The link layer is resolved.
        let socket = mesh.bed.tcp(&elsewhere, Group::Outside, false);
        meets_the_proxy(&mesh, connect(socket, app_address(false), PATIENCE).expect("with its own address"));
        elsewhere.ip(&["addr", "add", &format!("{PEER_V4}/32"), "dev", "lo"]);
        let before = mesh.count(Hook::Ingress, Reason::Assigned);
        let socket = mesh.bed.tcp(&elsewhere, Group::Outside, false);
        bind(socket.as_fd(), SocketAddr::from((PEER_V4, 46000))).unwrap();
        connect(socket, app_address(false), SHORT).expect_err("answers go to the node");
        assert!(mesh.count(Hook::Ingress, Reason::Assigned) > before, "{}", counts(&mesh.capture));
        assert_eq!((app.accepted(), host_flows(&mesh.capture)), (0, Some(0)), "{}", counts(&mesh.capture));
    }
}

#[test]
fn segments_of_others_do_not_get_into_a_connection_of_the_nodes() {
    for neighbour in [behind as fn(&Bed) -> Netns, beside] {
        let mesh = Mesh::new();
        let elsewhere = neighbour(&mesh.bed);
        let (mut client, mut served) = host_flow(&mesh, false);
        let raw = Raw::open(&mesh.bed, &elsewhere, Group::Outside);
        let from = local_name(client.as_fd()).unwrap();
        let forged = || mesh.count(Hook::HostEgress, Reason::ForgedHostFlow);
        for flags in [SYN, ACK, RST] {
            let before = forged();
            raw.send(&Segment::new(from, app_address(false), flags));
            eventually("it is dropped at the node's end", || forged() > before);
        }
        client.write_all(b"still here\n").unwrap();
        assert_eq!(read_line(&mut served).unwrap(), "still here");
    }
}

#[test]
fn a_workload_sends_nothing_else_in_a_connection_of_the_nodes() {
    let mesh = Mesh::new();
    let (client, served) = host_flow(&mesh, false);
    let caller = local_name(client.as_fd()).unwrap();
    let raw = Raw::open(&mesh.bed, &mesh.bed.pod, Group::App);
    for flags in [SYN, ACK, RST] {
        let before = mesh.count(Hook::Egress, Reason::RawSocket);
        raw.send(&Segment::new(app_address(false), caller, flags).with_payload(b"secret"));
        eventually("it is dropped", || mesh.count(Hook::Egress, Reason::RawSocket) > before);
    }
    // What the workload opens is captured as ever, wherever it goes.
    let mut out = mesh.dial(caller).expect("captured");
    assert_eq!(read_line(&mut out).unwrap(), format!("out {caller}"));
    // The process has ended; its address is noted for a while.
    reset(&client).unwrap();
    drop(client);
    let mut served = served;
    served.read(&mut [0]).expect_err("reset");
    drop(served);
    let socket = mesh.bed.tcp(&mesh.bed.pod, Group::Outside, false);
    setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
    bind(socket.as_fd(), app_address(false)).unwrap();
    let before = mesh.count(Hook::Egress, Reason::OutsideCgroup);
    connect(socket, caller, SHORT).expect_err("nothing that the workload opens is an answer");
    assert!(mesh.count(Hook::Egress, Reason::OutsideCgroup) > before, "{}", counts(&mesh.capture));
}

/// Addresses and ports are not enough: two workloads can have the same.
#[test]
fn answers_leave_by_the_link_that_was_called() {
    let mesh = Mesh::new();
    let (_client, mut served) = host_flow(&mesh, false);
    mesh.bed.add_link(40);
    let listeners = mesh.proxy().listeners();
    let fds: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
    mesh.bed.enroll(&mesh.capture, &fds);
    // The way back leads elsewhere now.
    mesh.bed.pod.ip(&["route", "add", &format!("{PEER_V4}/32"), "dev", "late0"]);
    let before = mesh.count(Hook::HostIngress, Reason::OutsideCgroup);
    served.write_all(b"astray\n").unwrap();
    eventually("it is dropped at the other link", || mesh.count(Hook::HostIngress, Reason::OutsideCgroup) > before);
}

#[test]
fn a_probe_works_while_the_proxy_is_gone() {
    let mut mesh = Mesh::new();
    let app = app(&mesh);
    mesh.proxy.take().expect("runs").stop();
    for v6 in [false, true] {
        let mut stream = mesh.call_as(Group::Outside, app_address(v6)).expect("call the application");
        assert_eq!(read_line(&mut stream).unwrap(), "app");
        mesh.call(app_address(v6)).expect_err("a pod meets nobody");
    }
    assert_eq!(app.accepted(), 2);
    // Nobody listens there, which a probe has to learn at once.
    let error = mesh.call_as(Group::Outside, SocketAddr::new(POD_V4.into(), 9999)).expect_err("nobody listens");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}

#[test]
fn much_goes_both_ways_and_either_side_ends_first() {
    for v6 in [false, true] {
        let mesh = Mesh::new();
        let (mut client, mut served) = host_flow(&mesh, v6);
        let server = thread::spawn(move || {
            served.write_all(b"first\n").unwrap();
            let mut received = Vec::new();
            served.read_to_end(&mut received).unwrap();
            // The other side has closed its half already.
            served.write_all(&received).unwrap();
            received.len()
        });
        assert_eq!(read_line(&mut client).unwrap(), "first");
        client.write_all(&vec![7; MEBIBYTE]).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        client.read_to_end(&mut back).unwrap();
        assert_eq!((server.join().unwrap(), back.len()), (MEBIBYTE, MEBIBYTE));
        for process_resets in [false, true] {
            let (one, other) = host_flow(&mesh, v6);
            let (one, mut other) = if process_resets { (one, other) } else { (other, one) };
            reset(&one).unwrap();
            drop(one);
            assert_eq!(other.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        }
        assert_eq!(mesh.count(Hook::Ingress, Reason::ForeignSocket), 0, "{}", counts(&mesh.capture));
        assert_eq!(mesh.count(Hook::Egress, Reason::OutsideCgroup), 0, "{}", counts(&mesh.capture));
        assert_eq!(mesh.proxy().accepted(), 0);
    }
}

/// The port of a probe that has ended is the next one's, whoever that is.
#[test]
fn a_port_has_the_owner_that_it_has_now() {
    for v6 in [false, true] {
        let mesh = Mesh::new();
        let app = app(&mesh);
        let client = SocketAddr::new(peer_ip(v6), 47000);
        for round in 1..=3 {
            let mut probe = call_from(&mesh, Group::Outside, client).expect("a probe");
            assert_eq!(read_line(&mut probe).unwrap(), "app", "round {round}; {}", counts(&mesh.capture));
            // So that no TIME_WAIT keeps the port.
            reset(&probe).unwrap();
            drop(probe);
            let pod = call_from(&mesh, Group::Neighbour, client).expect("a pod");
            reset(&pod).unwrap();
            meets_the_proxy(&mesh, pod);
            assert_eq!(app.accepted(), round);
        }
    }
}

/// The application closes first, so that its side keeps the connection in TIME_WAIT; the probe comes back.
#[test]
fn a_probe_returns_to_a_port_in_time_wait() {
    for v6 in [false, true] {
        let mesh = Mesh::new();
        let app = app(&mesh);
        for round in 1..=3 {
            let mut probe = call_from(&mesh, Group::Outside, SocketAddr::new(peer_ip(v6), 47001)).expect("a probe");
            assert_eq!(read_line(&mut probe).unwrap(), "app");
            mesh_tests::capture_bed::proxy::ask_to_close(&mut probe).expect("the application closes first");
            drop(probe);
            assert_eq!(app.accepted(), round, "{}", counts(&mesh.capture));
        }
    }
}

#[test]
fn replacements_under_load_lose_no_probe() {
    for open in [Bed::capture as fn(&Bed) -> Capture, Bed::capture_by_clsact] {
        let mesh = Mesh::with(open);
        let app = app(&mesh);
        let (done, probes) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            for v6 in [false, true] {
                let (mesh, done, probes) = (&mesh, &done, &probes);
                scope.spawn(move || {
                    while !done.load(Ordering::SeqCst) {
                        let mut stream = mesh.call_as(Group::Outside, app_address(v6)).expect("a probe");
                        assert_eq!(read_line(&mut stream).expect("an answer"), "app");
                        probes.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
            let listeners = mesh.proxy().listeners();
            let fds: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
            for _ in 0..REPLACEMENTS {
                let next = open(&mesh.bed);
                mesh.bed.enroll(&next, &fds);
            }
            done.store(true, Ordering::SeqCst);
        });
        let probes = probes.into_inner();
        assert_eq!((app.accepted(), mesh.proxy().accepted()), (probes, 0));
        assert!(probes > 50, "there was load: {probes}");
    }
}
