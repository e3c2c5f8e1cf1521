//! Loading, replacing, adopting and removing the programs.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use mesh_ebpf_common::maps;
use mesh_ebpf_common::outcome::{Hook, Reason};
use mesh_node::capture::{Capture, CaptureConfig, CaptureError, EnrollRequest, in_netns};
use mesh_tests::capture_bed::proxy::{Listeners, Mesh, application};
use mesh_tests::capture_bed::tcp::{connect, local_name};
use mesh_tests::capture_bed::{
    Bed, Group, PATIENCE, PEER_V4, POD_V4, POD_V6, chain, count, counts, eventually, nameless_netns, peer_ip, pod_ip,
    program_exists, read_line,
};

/// Where a connection goes if capture has a gap.
const OUTSIDE: SocketAddr = SocketAddr::new(IpAddr::V4(PEER_V4), 8086);
const REPLACEMENTS: usize = 100;

fn program_ids(capture: &Capture) -> Vec<u32> {
    capture.programs_attached().unwrap().iter().map(|row| row.id).collect()
}

#[test]
fn a_hundred_replacements_under_load_lose_no_connection() {
    replace_under_load(&Mesh::new(), Bed::capture);
}

#[test]
fn a_hundred_replacements_by_clsact_lose_no_connection() {
    replace_under_load(&Mesh::with(Bed::capture_by_clsact), Bed::capture_by_clsact);
}

fn replace_under_load(mesh: &Mesh, open: fn(&Bed) -> Capture) {
    let outside = application(&mesh.bed, &mesh.bed.peer, Group::Outside, &[OUTSIDE]);
    let inside_address = SocketAddr::new(pod_ip(false), 8087);
    let inside = application(&mesh.bed, &mesh.bed.pod, Group::App, &[inside_address]);
    let before = program_ids(&mesh.capture);
    let done = AtomicBool::new(false);
    let (out, inward) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                let mut stream = mesh.dial(OUTSIDE).expect("dial out");
                assert_eq!(read_line(&mut stream).expect("an answer"), format!("out {OUTSIDE}"));
                out.fetch_add(1, Ordering::SeqCst);
            }
        });
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                let mut stream = mesh.call(inside_address).expect("call in");
                assert!(read_line(&mut stream).expect("an answer").starts_with("in 15006 "));
                inward.fetch_add(1, Ordering::SeqCst);
            }
        });
        let listeners = mesh.proxy().listeners();
        let fds: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
        for _ in 0..REPLACEMENTS {
            // A clsact filter is replaced when the namespace is at hand, at the renewal that every restart brings.
            let next = open(&mesh.bed);
            mesh.bed.enroll(&next, &fds);
        }
        done.store(true, Ordering::SeqCst);
    });
    assert_eq!(outside.accepted(), 0, "uncaptured connections out, of {out:?}");
    assert_eq!(inside.accepted(), 0, "uncaptured connections in, of {inward:?}");
    assert!(out.into_inner() > 100 && inward.into_inner() > 100, "there was load");
    let after = program_ids(&mesh.capture);
    assert_eq!(before.len(), after.len());
    assert!(before.iter().all(|id| !after.contains(id)), "every program is a new one: {before:?} {after:?}");
}

#[test]
fn a_second_loader_adopts_what_the_first_left() {
    let mesh = Mesh::new();
    let cookie = mesh.bed.pod.cookie();
    let listeners = mesh.proxy().listeners();
    let Mesh { proxy, capture, bed } = mesh;
    proxy.expect("runs").crash();
    drop(Arc::into_inner(capture).expect("the last reference"));
    // The first loader is gone; what it pinned still captures: the connection waits in the backlog.
    let waiting = connect(bed.tcp(&bed.pod, Group::App, false), OUTSIDE, PATIENCE).expect("in the backlog");
    let second = bed.capture();
    let adopted = second.adopt().unwrap();
    assert_eq!(adopted.len(), 1);
    assert_eq!((adopted[0].cookie, adopted[0].v4, adopted[0].v6), (cookie, Some(POD_V4), Some(POD_V6)));
    assert_eq!(count(&second, Hook::Connect4, Reason::Captured), 1, "counted while nobody was there");
    let port = local_name(waiting.as_fd()).unwrap().port();
    let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    assert_eq!(second.original_dst(cookie, peer).unwrap(), Some(OUTSIDE), "the note survived");
    assert_eq!(second.original_dst(cookie, peer).unwrap(), None, "a note is taken once");
    let fds: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
    assert_eq!(bed.enroll(&second, &fds).preexisting, 0, "a renewal looks for no old connections");
}

#[test]
fn cleanup_leaves_nothing_and_says_what_it_removed() {
    for open in [Bed::capture, Bed::capture_by_clsact] {
        let mut mesh = Mesh::with(open);
        let outside = application(&mesh.bed, &mesh.bed.peer, Group::Outside, &[OUTSIDE]);
        assert_eq!(mesh.bed.pod.read_sysctl("ipv4/tcp_fwmark_accept"), "1");
        assert!(mesh.bed.pod.ip(&["rule"]).contains("0x53a") && mesh.bed.pod.ip(&["-6", "rule"]).contains("0x53a"));
        mesh.proxy.take().expect("runs").stop();
        let ids = program_ids(&mesh.capture);
        let removed = mesh.bed.cleanup().unwrap();
        for part in [
            "links/connect4",
            "maps/WORKLOADS",
            "lookup",
            "tc_ingress",
            "tc_egress",
            "tc_host_ingress",
            "tc_host_egress",
            "gate",
            "v3",
        ] {
            assert!(removed.iter().any(|line| line.contains(part)), "{part} is not in {removed:#?}");
        }
        // The kernel puts two files of its own into every such file system.
        let left = std::fs::read_dir(mesh.bed.bpffs()).unwrap().map(|entry| entry.unwrap().file_name());
        let left: Vec<_> = left.filter(|name| name != "maps.debug" && name != "progs.debug").collect();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(mesh.bed.pod.read_sysctl("ipv4/tcp_fwmark_accept"), "0");
        assert!(!mesh.bed.pod.ip(&["rule"]).contains("0x53a") && !mesh.bed.pod.ip(&["-6", "rule"]).contains("0x53a"));
        assert!(!mesh.bed.pod.ip(&["route", "show", "table", "all"]).contains("table 1338"));
        assert!(!mesh.bed.pod.ip(&["-6", "route", "show", "table", "all"]).contains("table 1338"));
        let mut stream = mesh.dial(OUTSIDE).expect("uncaptured");
        assert_eq!(read_line(&mut stream).unwrap(), "app");
        assert_eq!(outside.accepted(), 1);
        let Mesh { capture, bed, .. } = mesh;
        drop(capture);
        eventually("the programs are unloaded", || ids.iter().all(|id| !program_exists(*id)));
        assert_eq!(bed.cleanup().unwrap(), Vec::<String>::new(), "nothing is left to remove");
    }
}

#[test]
fn a_workload_that_leaves_is_free_again() {
    let mut mesh = Mesh::new();
    let outside = application(&mesh.bed, &mesh.bed.peer, Group::Outside, &[OUTSIDE]);
    mesh.proxy.take().expect("runs").stop();
    let cookie = mesh.bed.pod.cookie();
    mesh.capture.unenroll(cookie, Some(mesh.bed.pod.fd())).unwrap();
    assert_eq!(mesh.capture.adopt().unwrap(), Vec::new());
    let mut stream = mesh.dial(OUTSIDE).expect("uncaptured");
    assert_eq!(read_line(&mut stream).unwrap(), "app");
    assert_eq!(outside.accepted(), 1);
    let row = mesh.capture.maps().unwrap().into_iter().find(|row| row.name == maps::WORKLOADS).unwrap();
    assert_eq!((row.entries, row.kind), (Some(0), "hash"));
    // Again is fine, also for a namespace that was never enrolled.
    mesh.capture.unenroll(cookie, Some(mesh.bed.pod.fd())).unwrap();
    mesh.capture.unenroll(cookie + 1_000_000, None).unwrap();
    let listeners = Listeners::open(&mesh.bed, &mesh.bed.pod);
    mesh.bed.enroll(&mesh.capture, &listeners.fds());
    assert_eq!(mesh.capture.adopt().unwrap().len(), 1);
}

/// Of a workload that a dead proxy enrolled and nobody announced, the next one knows the cookie only.
#[test]
fn a_workload_of_which_only_the_cookie_is_known_is_free_again() {
    for open in [Bed::capture, Bed::capture_by_clsact] {
        let mut mesh = Mesh::with(open);
        mesh.proxy.take().expect("runs").stop();
        let Mesh { capture, bed, .. } = mesh;
        drop(capture);
        let outside = application(&bed, &bed.peer, Group::Outside, &[OUTSIDE]);
        let next = open(&bed);
        next.unenroll(bed.pod.cookie(), None).unwrap();
        assert_eq!(next.adopt().unwrap(), Vec::new());
        assert!(!bed.pod.ip(&["rule"]).contains("0x53a"));
        let socket = bed.tcp(&bed.pod, Group::Outside, false);
        let mut stream = connect(socket, OUTSIDE, PATIENCE).expect("nothing drops it");
        assert_eq!(read_line(&mut stream).unwrap(), "app");
        assert_eq!(outside.accepted(), 1);
    }
}

/// Nobody is in it, and it has no name: whoever has its descriptor can end its enrolment, or its own end does.
#[test]
fn a_workload_that_cannot_be_found_keeps_its_record() {
    let bed = Bed::new();
    let nameless = nameless_netns();
    in_netns(nameless.as_fd(), || {
        let pair = &["link", "add", "eth0", "type", "veth", "peer", "name", "eth1"][..];
        for link in [pair, &["link", "set", "lo", "up"]] {
            assert!(Command::new("ip").args(link).status().expect("ip").success());
        }
    })
    .unwrap();
    let enrolled = bed.capture_by_clsact();
    let request = EnrollRequest { netns: nameless.as_fd(), ..bed.request(&[]) };
    let cookie = enrolled.enroll(&request).unwrap_or_else(|e| panic!("{}", chain(&e))).cookie;
    drop(enrolled);
    let next = bed.capture_by_clsact();
    let error = next.unenroll(cookie, None).expect_err("its filters cannot be removed");
    assert!(matches!(error, CaptureError::NetnsNotFound { cookie: of } if of == cookie), "{error:?}");
    assert_eq!(next.adopt().unwrap().len(), 1);
    let pins = next.programs_attached().unwrap().iter().filter(|row| row.name.ends_with("_clsact")).count();
    assert_eq!(pins, 4, "two programs on two interfaces");
    drop(nameless);
    eventually("it is gone, and with it its filters", || next.unenroll(cookie, None).is_ok());
    assert_eq!(next.adopt().unwrap(), Vec::new());
}

#[test]
fn an_application_that_holds_a_port_keeps_its_workload_closed() {
    for port in [15001, 15006, 15008] {
        let bed = Bed::new();
        let capture = bed.capture();
        let held = SocketAddr::new(pod_ip(false), port);
        let app = application(&bed, &bed.pod, Group::App, &[held]);
        let outside = application(&bed, &bed.peer, Group::Outside, &[OUTSIDE]);
        let error = capture.enroll(&bed.request(&[])).expect_err("the port is held");
        assert!(matches!(&error, CaptureError::PortHeld { address, .. } if *address == held), "{error:?}");
        let text = chain(&error);
        assert!(text.contains(&port.to_string()) && text.contains("test/pod"), "{text}");
        connect(bed.tcp(&bed.pod, Group::App, false), OUTSIDE, PATIENCE).expect_err("closed outward");
        let inward = bed.tcp(&bed.peer, Group::Neighbour, false);
        connect(inward, held, Duration::from_millis(400)).expect_err("closed inward");
        assert_eq!((app.accepted(), outside.accepted()), (0, 0), "{}", counts(&capture));
    }
}

#[test]
fn the_proxy_must_have_a_cgroup_of_its_own() {
    let bed = Bed::new();
    let base = bed.pods_cgroup().parent().expect("the test's own").to_owned();
    let root = base.parent().expect("the root").to_owned();
    for proxy in [bed.pods_cgroup(), base, root] {
        let config = CaptureConfig { proxy_cgroup: proxy.clone(), ..bed.config() };
        let error = Capture::open(&config).err().unwrap_or_else(|| panic!("{} was accepted", proxy.display()));
        assert!(matches!(error, CaptureError::ProxyCgroup { .. }), "{}: {error:?}", proxy.display());
    }
}

/// On Kubernetes the node proxy is itself a pod.
#[test]
fn a_proxy_among_the_pods_is_not_captured_and_everybody_else_is() {
    let bed = Bed::new();
    let own = bed.pods_cgroup().join("proxy");
    std::fs::create_dir(&own).unwrap();
    let capture = bed.capture_with(&CaptureConfig { proxy_cgroup: own.clone(), ..bed.config() });
    bed.enroll(&capture, &[]);
    let server = application(&bed, &bed.peer, Group::Outside, &[SocketAddr::new(PEER_V4.into(), 8080)]);
    let dial = |cgroup: &Path| {
        let script = format!(
            "echo $$ > {}/cgroup.procs && exec busybox nsenter --net=/run/netns/{} busybox nc -w 3 {PEER_V4} 8080",
            cgroup.display(),
            bed.pod.name()
        );
        Command::new("busybox")
            .args(["sh", "-c", &script])
            .stdin(Stdio::null())
            .status()
            .expect("run busybox")
            .success()
    };
    let refused = count(&capture, Hook::Connect4, Reason::Captured);
    assert!(!dial(&bed.cgroup(Group::App)), "it was captured, and nobody listens");
    assert_eq!(count(&capture, Hook::Connect4, Reason::Captured), refused + 1, "{}", counts(&capture));
    dial(&own);
    assert_eq!(count(&capture, Hook::Connect4, Reason::ProxySocket), 1, "{}", counts(&capture));
    eventually("the proxy's connection", || server.accepted() == 1);
    drop(capture);
    bed.cleanup().unwrap();
    std::fs::remove_dir(own).unwrap();
}

#[test]
fn another_layout_version_is_refused() {
    let bed = Bed::new();
    std::fs::create_dir(bed.bpffs().join("v0")).unwrap();
    let error = Capture::open(&bed.config()).err().expect("another layout");
    assert!(matches!(&error, CaptureError::Layout { found, .. } if found == "v0"), "{error:?}");
    bed.cleanup().unwrap();
    drop(bed.capture());
}

#[test]
fn a_directory_that_is_no_bpffs_is_refused() {
    let bed = Bed::new();
    let config = CaptureConfig { bpffs: std::env::temp_dir(), ..bed.config() };
    let error = Capture::open(&config).err().expect("no bpffs");
    assert!(matches!(error, CaptureError::NotBpffs(_)), "{error:?}");
}

#[test]
fn pins_of_another_cgroup_are_refused() {
    let bed = Bed::new();
    drop(bed.capture());
    let config = CaptureConfig { pods_cgroup: bed.cgroup(Group::Outside), ..bed.config() };
    let error = Capture::open(&config).err().expect("another cgroup");
    assert!(matches!(error, CaptureError::OtherCgroup { .. }), "{error:?}");
}

#[test]
fn a_full_table_of_workloads_is_an_error() {
    let bed = Bed::new();
    let config = CaptureConfig { map_entries: vec![(maps::WORKLOADS, 1)], ..bed.config() };
    let capture = bed.capture_with(&config);
    bed.enroll(&capture, &[]);
    let second = EnrollRequest { netns: bed.peer.fd(), ..bed.request(&[]) };
    let error = capture.enroll(&second).expect_err("no room");
    assert!(matches!(error, CaptureError::MapFull { map: maps::WORKLOADS, entries: 1 }), "{error:?}");
}

#[test]
fn the_programs_can_be_inspected() {
    let mesh = Mesh::new();
    let rows = mesh.capture.programs_attached().unwrap();
    let cgroup = format!("cgroup {}", std::fs::metadata(mesh.bed.pods_cgroup()).unwrap().ino());
    for (name, target) in
        [("connect4", &*cgroup), ("connect6", &*cgroup), ("sock_ops", &*cgroup), ("lookup", "netns"), ("gate", "netns")]
    {
        let row = rows.iter().find(|row| row.name == name).unwrap_or_else(|| panic!("{name} is not in {rows:?}"));
        assert!(row.attached_to.starts_with(target) && row.id > 0 && row.tag.len() == 16, "{row:?}");
    }
    assert_eq!(mesh.capture.maps().unwrap().len(), maps::ALL.len());
}

/// Every start of a proxy in a new cgroup, as the restarts of a service are.
#[test]
fn cgroups_of_proxies_that_are_gone_do_not_fill_the_table() {
    let bed = Bed::new();
    let base = bed.pods_cgroup().parent().expect("the test's own").to_owned();
    for start in 0..6 {
        let proxy = base.join(format!("proxy-{start}"));
        std::fs::create_dir(&proxy).unwrap();
        let id = std::fs::metadata(&proxy).unwrap().ino();
        let config =
            CaptureConfig { proxy_cgroup: proxy.clone(), map_entries: vec![(maps::PROXY_CGROUPS, 2)], ..bed.config() };
        let capture = Capture::open(&config).unwrap_or_else(|e| panic!("start {start}: {}", chain(&e)));
        bed.enroll(&capture, &[]);
        assert_eq!(capture.retire_proxies().unwrap().len(), usize::from(start > 0), "the last one's");
        assert!(!capture.retire_proxies().unwrap().contains(&id), "never its own");
        std::fs::remove_dir(&proxy).unwrap();
    }
}

/// A take-over: the next proxy has another cgroup and the same listeners.
#[test]
fn a_proxy_whose_listeners_live_on_is_not_retired() {
    let bed = Bed::new();
    let first = bed.pods_cgroup().parent().expect("the test's own").join("first");
    std::fs::create_dir(&first).unwrap();
    let first_id = std::fs::metadata(&first).unwrap().ino();
    let config = CaptureConfig { proxy_cgroup: first.clone(), ..bed.config() };
    let capture = Capture::open(&config).unwrap_or_else(|e| panic!("{}", chain(&e)));
    let listeners = Listeners::open_as(&first, &bed.pod);
    let cookie = bed.enroll(&capture, &listeners.fds()).cookie;
    drop(capture);
    std::fs::remove_dir(&first).unwrap();
    let capture = Arc::new(bed.capture());
    let nobody: [u64; 0] = [];
    assert_eq!(capture.retire_proxies().unwrap(), nobody, "a workload that was not looked into");
    bed.enroll(&capture, &listeners.fds());
    assert_eq!(capture.retire_proxies().unwrap(), nobody, "its listeners live");
    let proxy = listeners.serve(Arc::clone(&capture), cookie);
    let inside = SocketAddr::new(pod_ip(false), 8087);
    let client = bed.tcp(&bed.peer, Group::Neighbour, false);
    let mut stream = connect(client, inside, PATIENCE).expect("what its listeners accept is the proxy's");
    assert!(read_line(&mut stream).unwrap().starts_with("in 15006 "));
    drop(stream);
    proxy.stop();
    eventually("the last socket is gone", || capture.retire_proxies().unwrap() == [first_id]);
}

/// Whatever it was that failed, here the very first thing: nothing comes in, and nothing goes out around the proxy.
#[test]
fn a_failed_enrolment_leaves_the_workload_closed() {
    let bed = Bed::new();
    let capture = bed.capture();
    let app = application(&bed, &bed.pod, Group::App, &[SocketAddr::new(pod_ip(false), 8080)]);
    let outside = application(&bed, &bed.peer, Group::Outside, &[SocketAddr::new(peer_ip(false), 8084)]);
    let inward = || connect(bed.tcp(&bed.peer, Group::Outside, false), SocketAddr::new(pod_ip(false), 8080), PATIENCE);
    let outward = || connect(bed.tcp(&bed.pod, Group::App, false), SocketAddr::new(peer_ip(false), 8084), PATIENCE);
    let mut before = inward().expect("not in the mesh");
    assert_eq!(read_line(&mut before).unwrap(), "app");
    let nothing = std::fs::File::open("/dev/null").unwrap();
    capture.enroll(&bed.request(&[nothing.as_fd()])).expect_err("no listener");
    assert_eq!(inward().expect_err("closed inward").kind(), std::io::ErrorKind::ConnectionRefused);
    assert_eq!(outward().expect_err("closed outward").kind(), std::io::ErrorKind::ConnectionRefused);
    assert_eq!((app.accepted(), outside.accepted()), (1, 0));
    // The next try may work.
    let listeners = Listeners::open(&bed, &bed.pod);
    bed.enroll(&capture, &listeners.fds());
}
