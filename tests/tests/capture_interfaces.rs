//! Interfaces of a workload that come, go and move after its enrolment.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;

use mesh_ebpf_common::outcome::{Hook, Reason};
use mesh_node::interfaces::follow;
use mesh_tests::capture_bed::proxy::{Mesh, application};
use mesh_tests::capture_bed::tcp::connect;
use mesh_tests::capture_bed::{
    Bed, Group, LATE_POD_V4, LATE_POD_V6, PATIENCE, POD_V4, POD_V6, counts, eventually, read_line,
};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

const PORT: u16 = 8090;
/// The workload's application on the late link.
const APP: SocketAddr = SocketAddr::new(IpAddr::V4(LATE_POD_V4), PORT);

/// Follows changes as the node proxy does, until dropped.
struct Follower {
    cancel: CancellationToken,
    runtime: Option<Runtime>,
}

impl Follower {
    fn of(mesh: &Mesh) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let cancel = CancellationToken::new();
        runtime.spawn(follow(Arc::clone(&mesh.capture), Arc::default(), cancel.clone()));
        Self { cancel, runtime: Some(runtime) }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.cancel.cancel();
        self.runtime.take().into_iter().for_each(|runtime| runtime.shutdown_timeout(PATIENCE));
    }
}

/// What the proxy asks for when something changed.
fn renew(mesh: &Mesh) {
    let listeners = mesh.proxy().listeners();
    mesh.bed.enroll(&mesh.capture, &listeners.iter().map(AsFd::as_fd).collect::<Vec<_>>());
}

/// A link that is attached somewhere is not attached here.
#[test]
fn an_interface_with_the_index_of_one_that_moved_away_is_guarded() {
    for open in [Bed::capture, Bed::capture_by_clsact] {
        let mesh = Mesh::with(open);
        let elsewhere = mesh.bed.another("else");
        let index = mesh.bed.pod.index("eth0");
        mesh.bed.pod.ip(&["link", "set", "eth0", "netns", elsewhere.name()]);
        mesh.bed.add_link(index);
        let app = application(&mesh.bed, &mesh.bed.pod, Group::App, &[APP]);
        renew(&mesh);
        let mut stream = mesh.call(APP).expect("a connection by the other interface");
        let line = read_line(&mut stream).unwrap();
        assert!(line.starts_with("in 15006 "), "{line}: {}", counts(&mesh.capture));
        assert_eq!(app.accepted(), 0);
    }
}

/// Root of a workload renames its interfaces all the time; each is taken for what it is.
#[test]
fn an_interface_that_is_renamed_while_it_is_looked_at_is_guarded() {
    for open in [Bed::capture, Bed::capture_by_clsact] {
        let mesh = Mesh::with(open);
        let index = 77;
        mesh.bed.add_link(index);
        // Before Linux 6.2 one that is up has to keep its name.
        mesh.bed.pod.ip(&["link", "set", "late0", "down"]);
        let renames = "link set late0 name other0\nlink set other0 name late0\n".repeat(500);
        std::thread::scope(|scope| {
            let renaming = scope.spawn(|| mesh.bed.pod.ip_batch(&renames));
            let mut looks = 0;
            while looks < 20 || !renaming.is_finished() {
                let listeners = mesh.proxy().listeners();
                let listeners: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
                let guarded = mesh.bed.enroll(&mesh.capture, &listeners).interfaces;
                let found = guarded.iter().any(|interface| interface.index == index);
                assert!(found, "look {looks}: {guarded:?}");
                looks += 1;
            }
        });
    }
}

#[test]
fn pins_of_interfaces_that_are_gone_do_not_pile_up() {
    for open in [Bed::capture, Bed::capture_by_clsact] {
        let mesh = Mesh::with(open);
        let before = mesh.capture.programs_attached().unwrap().len();
        for index in 100..110 {
            mesh.bed.add_link(index);
            renew(&mesh);
            mesh.bed.pod.ip(&["link", "del", "late0"]);
        }
        renew(&mesh);
        assert_eq!(mesh.capture.programs_attached().unwrap().len(), before);
    }
}

/// From its first moment, and whoever is there to notice it.
#[test]
fn no_connection_comes_by_an_interface_that_nobody_guards() {
    for open in [Bed::capture, Bed::capture_by_clsact] {
        let mesh = Mesh::with(open);
        let addresses: [IpAddr; 4] = [POD_V4.into(), POD_V6.into(), LATE_POD_V4.into(), LATE_POD_V6.into()];
        let everywhere = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)];
        let app = application(&mesh.bed, &mesh.bed.pod, Group::App, &everywhere.map(|ip| SocketAddr::new(ip, PORT)));
        mesh.bed.add_link(100);
        // The workload's other addresses can be reached by this link, too.
        mesh.bed.peer.ip(&["route", "add", &format!("{POD_V4}/32"), "via", &LATE_POD_V4.to_string()]);
        mesh.bed.peer.ip(&["-6", "route", "add", &format!("{POD_V6}/128"), "via", &LATE_POD_V6.to_string()]);
        for cookies in ["1", "2"] {
            mesh.bed.pod.sysctl("ipv4/tcp_syncookies", cookies);
            for ip in addresses {
                let before = mesh.count(Hook::Lookup, Reason::UnguardedInterface);
                let error = mesh.call(SocketAddr::new(ip, PORT)).expect_err("a connection around the mesh");
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{ip}: {error}");
                assert!(mesh.count(Hook::Lookup, Reason::UnguardedInterface) > before, "{}", counts(&mesh.capture));
            }
        }
        assert_eq!(app.accepted(), 0);
        renew(&mesh);
        for ip in addresses {
            let mut stream = mesh.call(SocketAddr::new(ip, PORT)).expect("a connection by the mesh");
            let line = read_line(&mut stream).unwrap();
            assert!(line.starts_with("in 15006 "), "{ip}: {line}");
        }
        assert_eq!(app.accepted(), 0);
    }
}

/// What the proxy and the workload itself connect to inside, at any address that a guarded interface or loopback has.
#[test]
fn the_gate_is_open_inside() {
    let mesh = Mesh::new();
    let inside: [IpAddr; 4] = [POD_V4.into(), POD_V6.into(), Ipv4Addr::LOCALHOST.into(), "::1".parse().unwrap()];
    let addresses = inside.map(|ip| SocketAddr::new(ip, PORT));
    let app = application(&mesh.bed, &mesh.bed.pod, Group::App, &addresses);
    mesh.bed.add_link(100);
    for (done, address) in (1..).zip(addresses) {
        let socket = mesh.bed.tcp(&mesh.bed.pod, Group::Proxy, address.is_ipv6());
        let mut stream = connect(socket, address, PATIENCE).unwrap_or_else(|e| panic!("{address}: {e}"));
        assert_eq!(read_line(&mut stream).unwrap(), "app", "{address}");
        eventually("it is accepted", || app.accepted() == done);
    }
    assert_eq!(mesh.count(Hook::Lookup, Reason::UnguardedInterface), 0, "{}", counts(&mesh.capture));
}

/// One interface that cannot be guarded leaves the others guarded, and is closed.
#[test]
fn an_interface_that_cannot_be_guarded_is_shut() {
    let mesh = Mesh::with(Bed::capture_by_clsact);
    let everywhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), PORT);
    let app = application(&mesh.bed, &mesh.bed.pod, Group::App, &[everywhere]);
    mesh.bed.add_link(100);
    // Something else in the place of clsact, without a hook for what leaves.
    mesh.bed.pod.tc(&["qdisc", "add", "dev", "late0", "ingress"]);
    let listeners = mesh.proxy().listeners();
    let fds: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
    mesh.capture.enroll(&mesh.bed.request(&fds)).expect_err("late0 cannot be guarded");
    let error = mesh.call(APP).expect_err("a connection around the mesh");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    let mut stream = mesh.call(SocketAddr::new(POD_V4.into(), PORT)).expect("by eth0");
    assert!(read_line(&mut stream).unwrap().starts_with("in 15006 "));
    assert_eq!(app.accepted(), 0);
}

#[test]
fn a_new_interface_is_noticed_and_guarded_and_nothing_gets_by_until_then() {
    for open in [Bed::capture, Bed::capture_by_clsact] {
        let mesh = Mesh::with(open);
        let everywhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), PORT);
        let app = application(&mesh.bed, &mesh.bed.pod, Group::App, &[everywhere]);
        let _follower = Follower::of(&mesh);
        for index in [100, 101] {
            mesh.bed.add_link(index);
            eventually("a connection by the mesh", || match mesh.call(APP) {
                Ok(mut stream) => read_line(&mut stream).is_ok_and(|line| line.starts_with("in 15006 ")),
                Err(_) => false,
            });
            assert_eq!(app.accepted(), 0);
            mesh.bed.pod.ip(&["link", "del", "late0"]);
        }
    }
}

/// Which changes are worth a look.
#[test]
fn what_opens_nothing_is_not_looked_at() {
    let mesh = Mesh::with(Bed::capture_by_clsact);
    let cookie = mesh.bed.pod.cookie();
    let heard = || -> Vec<u64> {
        let mut heard = BTreeSet::new();
        while let Some(cookies) = mesh.capture.changed().unwrap() {
            heard.extend(cookies);
        }
        heard.into_iter().collect()
    };
    mesh.bed.pod.ip(&["link", "set", "eth0", "down"]);
    mesh.bed.pod.ip(&["link", "set", "eth0", "up"]);
    mesh.bed.pod.ip(&["addr", "add", "10.77.0.3/24", "dev", "eth0"]);
    heard();
    renew(&mesh);
    mesh.bed.pod.ip(&["link", "set", "eth0", "alias", "x"]);
    assert_eq!(heard(), [0; 0], "a renewal and a known link");
    mesh.bed.pod.ip(&["link", "add", "late0", "type", "veth", "peer", "name", "late1"]);
    assert_eq!(heard(), [cookie], "new links");
    let new = mesh.capture.guard_again(cookie).unwrap();
    assert_eq!(new.iter().map(|new| &*new.name).collect::<BTreeSet<_>>(), BTreeSet::from(["late0", "late1"]));
    assert_eq!(heard(), [0; 0], "guarding them");
    mesh.bed.pod.tc(&["qdisc", "del", "dev", "eth0", "clsact"]);
    assert_eq!(heard(), [cookie], "a guard is gone");
    mesh.bed.pod.ip(&["rule", "del", "priority", "1338"]);
    assert_eq!(heard(), [cookie], "a rule is gone");
    assert_eq!(mesh.capture.guard_again(cookie).unwrap(), []);
    mesh.bed.pod.ip(&["link", "set", "lo", "down"]);
    assert_eq!(heard(), [cookie], "loopback is down, and the route over it gone");
    assert_eq!(mesh.capture.guard_again(cookie).unwrap(), [], "there is nothing to route over");
    mesh.bed.pod.ip(&["link", "set", "lo", "up"]);
    assert_eq!(heard(), [cookie], "loopback is up");
    assert_eq!(mesh.capture.guard_again(cookie).unwrap(), []);
    assert!(mesh.bed.pod.ip(&["route", "show", "table", "1338"]).contains("local default dev lo"), "routed again");
    mesh.capture.unenroll(cookie, Some(mesh.bed.pod.fd())).unwrap();
    mesh.bed.pod.ip(&["link", "del", "late0"]);
    assert_eq!(heard(), [0; 0], "it has left");
    assert_eq!(mesh.capture.guard_again(cookie).unwrap(), []);
    assert_eq!(mesh.capture.programs_attached().unwrap().iter().filter(|row| row.name.contains("tc_")).count(), 0);
}

/// Root of the workload takes away what it can, before Linux 6.6.
#[test]
fn what_root_of_the_workload_takes_away_comes_back() {
    let mesh = Mesh::with(Bed::capture_by_clsact);
    let address = SocketAddr::new(POD_V4.into(), PORT);
    let _app = application(&mesh.bed, &mesh.bed.pod, Group::App, &[address]);
    let _follower = Follower::of(&mesh);
    let by_the_mesh = || match mesh.call(address) {
        Ok(mut stream) => read_line(&mut stream).is_ok_and(|line| line.starts_with("in 15006 ")),
        Err(_) => false,
    };
    assert!(by_the_mesh());
    mesh.bed.pod.tc(&["filter", "del", "dev", "eth0", "ingress"]);
    eventually("the filter is back", by_the_mesh);
    mesh.bed.pod.tc(&["qdisc", "del", "dev", "eth0", "clsact"]);
    eventually("the discipline is back", by_the_mesh);
    mesh.bed.pod.ip(&["rule", "del", "priority", "1338"]);
    eventually("the rule is back", || mesh.bed.pod.ip(&["rule"]).contains("0x53a"));
}
