//! Connections that a workload opens: captured with the right destination, and unaware of it.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;

use mesh_ebpf_common::outcome::{Hook, Reason};
use mesh_node::capture::Capture;
use mesh_tests::capture_bed::proxy::{Listeners, Proxy};
use mesh_tests::capture_bed::tcp::{bind, connect, local_name, mapped, peer_name};
use mesh_tests::capture_bed::{Bed, Group, PATIENCE, POD_V4, POD_V6, count, counts, read_line};

/// A bed with an enrolled workload and a serving proxy. Fields drop in order: the proxy before the bed.
struct Enrolled {
    proxy: Proxy,
    capture: Arc<Capture>,
    bed: Bed,
}

fn enrolled() -> Enrolled {
    let bed = Bed::new();
    let capture = Arc::new(bed.capture());
    let listeners = Listeners::open(&bed, &bed.pod);
    let enrollment = bed.enroll(&capture, &listeners.fds());
    let proxy = listeners.serve(Arc::clone(&capture), enrollment.cookie);
    Enrolled { proxy, capture, bed }
}

const V4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7)), 8080);
const V6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7)), 8080);

#[test]
fn connections_carry_their_original_destination() {
    let mesh = enrolled();
    for destination in [V4, V6] {
        let socket = mesh.bed.tcp(&mesh.bed.pod, Group::App, destination.is_ipv6());
        let mut stream = connect(socket, destination, PATIENCE).expect("connect");
        assert_eq!(read_line(&mut stream).unwrap(), format!("out {destination}"));
        stream.write_all(b"hello\n").unwrap();
        assert_eq!(read_line(&mut stream).unwrap(), "hello");
        assert_eq!(peer_name(stream.as_fd()).unwrap(), destination, "getpeername");
        let own = if destination.is_ipv6() { IpAddr::from(POD_V6) } else { POD_V4.into() };
        assert_eq!(local_name(stream.as_fd()).unwrap().ip(), own, "getsockname");
    }
    assert_eq!(mesh.proxy.without_destination(), 0, "{}", counts(&mesh.capture));
    assert_eq!(count(&mesh.capture, Hook::Connect4, Reason::Captured), 1);
    assert_eq!(count(&mesh.capture, Hook::Connect6, Reason::Captured), 1);
}

#[test]
fn v4_mapped_v6_as_java_uses_it() {
    let mesh = enrolled();
    let socket = mesh.bed.tcp(&mesh.bed.pod, Group::App, true);
    let mut stream = connect(socket, mapped(V4), PATIENCE).expect("connect");
    assert_eq!(read_line(&mut stream).unwrap(), format!("out {V4}"));
    assert_eq!(peer_name(stream.as_fd()).unwrap(), mapped(V4));
    assert_eq!(local_name(stream.as_fd()).unwrap().ip(), IpAddr::from(POD_V4.to_ipv6_mapped()));
}

#[test]
fn a_bound_source_address_works() {
    let mesh = enrolled();
    for (destination, source) in [(V4, IpAddr::from(POD_V4)), (V6, POD_V6.into())] {
        let socket = mesh.bed.tcp(&mesh.bed.pod, Group::App, destination.is_ipv6());
        bind(socket.as_fd(), SocketAddr::new(source, 0)).expect("bind");
        let mut stream = connect(socket, destination, PATIENCE).expect("connect");
        assert_eq!(read_line(&mut stream).unwrap(), format!("out {destination}"));
        assert_eq!(local_name(stream.as_fd()).unwrap().ip(), source);
    }
}
