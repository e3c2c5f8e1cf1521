//! Interfaces of a workload that come, go and move after its enrolment.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::net::SocketAddr;
use std::os::fd::AsFd;

use mesh_tests::capture_bed::proxy::{Mesh, application};
use mesh_tests::capture_bed::{Bed, Group, LATE_POD_V4, counts, read_line};

/// The workload's application on the late link.
const APP: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(LATE_POD_V4), 8090);

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

/// An `ingress` discipline takes both filters, and runs them on what comes in.
#[test]
fn something_else_in_the_place_of_clsact_is_an_error() {
    let mesh = Mesh::with(Bed::capture_by_clsact);
    mesh.bed.add_link(100);
    mesh.bed.pod.tc(&["qdisc", "add", "dev", "late0", "ingress"]);
    let listeners = mesh.proxy().listeners();
    let fds: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
    mesh.capture.enroll(&mesh.bed.request(&fds)).expect_err("late0 cannot be guarded");
}
