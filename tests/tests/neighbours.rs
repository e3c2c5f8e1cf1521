//! What one workload can do to others on its node: the kernel's tables are shared.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;

use mesh_ebpf_common::maps;
use mesh_ebpf_common::outcome::{Hook, Reason};
use mesh_node::capture::{Capture, EnrollRequest};
use mesh_tests::capture_bed::proxy::{Listeners, Mesh, Proxy};
use mesh_tests::capture_bed::tcp::{begin_connect, connect, repair};
use mesh_tests::capture_bed::{Bed, Group, Netns, PATIENCE, chain, counts, read_line};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const OUTSIDE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7)), 8080);
const OTHER_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 3);

/// A second workload of the node, with a proxy that serves it.
struct Other {
    proxy: Proxy,
    netns: Netns,
}

impl Other {
    fn enroll(bed: &Bed, capture: &Arc<Capture>) -> Self {
        let netns = bed.another("other");
        let listeners = Listeners::open(bed, &netns);
        let fds = listeners.fds();
        let request =
            EnrollRequest { uid: "test/other", netns: netns.fd(), v4: Some(OTHER_V4), v6: None, listeners: &fds };
        let enrollment = capture.enroll(&request).unwrap_or_else(|e| panic!("{}", chain(&e)));
        let proxy = listeners.serve(Arc::clone(capture), enrollment.cookie);
        Self { proxy, netns }
    }

    fn is_served(&self, bed: &Bed) {
        let mut stream = connect(bed.tcp(&self.netns, Group::App, false), OUTSIDE, PATIENCE).expect("connect");
        assert_eq!(read_line(&mut stream).expect("an answer"), format!("out {OUTSIDE}"));
        assert_eq!(self.proxy.without_destination(), 0);
    }
}

fn raise_descriptor_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    assert!(hard > 10_000, "the test needs descriptors: {hard}");
}

/// A socket under repair is connected without the proxy's ever hearing of it; as many of those as one has descriptors.
#[test]
fn notes_that_nobody_takes_use_up_their_own_workloads_room() {
    const MORE: usize = 100;
    raise_descriptor_limit();
    let mesh = Mesh::new();
    let other = Other::enroll(&mesh.bed, &mesh.capture);
    let room = usize::try_from(maps::MAX_CAPTURED_PER_WORKLOAD).unwrap();
    let held = mesh.bed.many_tcp(&mesh.bed.pod, Group::App, room + MORE);
    for socket in &held {
        repair(socket.as_fd()).expect("TCP_REPAIR");
        begin_connect(socket.as_fd(), OUTSIDE).expect("connect");
    }
    let counted = || [Reason::Noted, Reason::NotesFull].map(|reason| mesh.count(Hook::SockOps, reason));
    assert_eq!(counted(), [room, MORE].map(|n| u64::try_from(n).unwrap()), "{}", counts(&mesh.capture));
    other.is_served(&mesh.bed);
    drop(held);
    let mut stream = mesh.dial(OUTSIDE).expect("connect");
    assert_eq!(read_line(&mut stream).unwrap(), format!("out {OUTSIDE}"), "there is room again");
}
