//! What one workload can do to others on its node: the kernel's tables are shared.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;

use mesh_ebpf_common::maps;
use mesh_ebpf_common::outcome::{Hook, Reason};
use mesh_node::capture::{Capture, CaptureConfig, EnrollRequest};
use mesh_tests::capture_bed::proxy::{Listeners, Mesh, Proxy, application};
use mesh_tests::capture_bed::tcp::{begin_connect, bind, connect, repair};
use mesh_tests::capture_bed::{
    Bed, Group, Netns, PATIENCE, PEER_V4, POD_V4, POD_V6, chain, count, counts, eventually, read_line,
};
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

/// A workload's connections of before enrolment are its own, whatever addresses others have in their namespaces.
#[test]
fn an_old_connection_outlives_one_of_the_same_addresses_elsewhere() {
    let bed = Bed::new();
    let capture = Arc::new(bed.capture());
    let (client, server) = (SocketAddr::from((POD_V4, 45300)), SocketAddr::from((PEER_V4, 8085)));
    let open = |netns| {
        let socket = bed.tcp(netns, Group::App, false);
        bind(socket.as_fd(), client).expect("bind");
        let mut stream = connect(socket, server, PATIENCE).expect("connect before enrolment");
        assert_eq!(read_line(&mut stream).unwrap(), "app");
        stream
    };
    let _outside = application(&bed, &bed.peer, Group::Outside, &[server]);
    let mut old = open(&bed.pod);
    let listeners = Listeners::open(&bed, &bed.pod);
    assert_eq!(bed.enroll(&capture, &listeners.fds()).preexisting, 1);
    let impostor = bed.another("impostor");
    for address in [POD_V4, PEER_V4] {
        impostor.ip(&["addr", "add", &format!("{address}/32"), "dev", "lo"]);
    }
    let _inside = application(&bed, &impostor, Group::App, &[server]);
    let _same = open(&impostor);
    let request = EnrollRequest { uid: "test/impostor", netns: impostor.fd(), ..bed.request(&[]) };
    let enrollment = capture.enroll(&request).unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_eq!(enrollment.preexisting, 2, "both ends are the impostor's own");
    let mut still_works = |when: &str| {
        old.write_all(b"still here\n").unwrap();
        assert_eq!(read_line(&mut old).unwrap(), "still here", "{when}: {}", counts(&capture));
    };
    still_works("the other is enrolled");
    capture.unenroll(enrollment.cookie, Some(impostor.fd())).unwrap();
    still_works("the other has left");
}

#[test]
fn old_connections_that_find_no_room_end_and_nothing_else() {
    const ROOM: u32 = 8;
    let bed = Bed::new();
    let config = CaptureConfig { map_entries: vec![(maps::PREEXISTING, ROOM)], ..bed.config() };
    let capture = Arc::new(bed.capture_with(&config));
    let server = SocketAddr::from((PEER_V4, 8085));
    let _outside = application(&bed, &bed.peer, Group::Outside, &[server]);
    let mut old: Vec<TcpStream> = (0..2 * ROOM)
        .map(|_| connect(bed.tcp(&bed.pod, Group::App, false), server, PATIENCE).expect("before enrolment"))
        .collect();
    for stream in &mut old {
        assert_eq!(read_line(stream).unwrap(), "app");
    }
    let listeners = Listeners::open(&bed, &bed.pod);
    let noted = bed.enroll(&capture, &listeners.fds()).preexisting;
    assert_eq!(noted, usize::try_from(ROOM).unwrap());
    for stream in &mut old {
        stream.write_all(b"still here\n").unwrap();
        stream.set_nonblocking(true).unwrap();
    }
    let mut heard = BTreeSet::new();
    eventually("those that were noted go on", || {
        for (at, stream) in old.iter_mut().enumerate() {
            if stream.read(&mut [0; 64]).is_ok_and(|length| length > 0) {
                heard.insert(at);
            }
        }
        heard.len() >= noted
    });
    eventually("the others are dropped", || count(&capture, Hook::Egress, Reason::OutsideCgroup) >= u64::from(ROOM));
    assert_eq!(heard.len(), noted);
    Other::enroll(&bed, &capture).is_served(&bed);
}

/// By its addresses a workload is told apart from others, and at each renewal they are read where its root can set them.
#[test]
fn an_enrolled_workload_keeps_its_addresses() {
    let bed = Bed::new();
    let capture = bed.capture();
    let listeners = Listeners::open(&bed, &bed.pod);
    let fds = listeners.fds();
    bed.enroll(&capture, &fds);
    let request = EnrollRequest { v4: Some(OTHER_V4), v6: None, ..bed.request(&fds) };
    capture.enroll(&request).unwrap_or_else(|e| panic!("{}", chain(&e)));
    let enrolled = capture.adopt().unwrap();
    assert_eq!((enrolled[0].v4, enrolled[0].v6), (Some(POD_V4), Some(POD_V6)));
}
