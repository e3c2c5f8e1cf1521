//! What an HBONE request may ask for: an application's port at the address that the tunnel was made to.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::config::objects::{Meta, Pod};
use mesh_core::config::{Compiler, Delta, Object, Settings};
use mesh_core::inbound::{AUTHORITY_MAX_BYTES, InboundRefusal, inbound_target};
use mesh_core::snapshot::Snapshot;
use mesh_core::workload::Workload;
use proptest::prelude::*;

/// A pod with an address of each family.
fn workload() -> Arc<Workload> {
    let meta = Meta { namespace: "default".into(), name: "web".into(), ..Meta::default() };
    let ips = ["10.0.0.1", "fd00::1"].map(|ip| ip.parse().expect("address")).to_vec();
    let pod = Object::Pod(Pod { meta, ips, ..Pod::default() });
    let compiled = Compiler::new(Settings::default()).compile(&[Delta::Upsert(pod)]);
    Snapshot::default().apply(&compiled.changes).workloads().next().expect("compiled").clone()
}

/// The answer to a request on a connection to the address.
#[track_caller]
fn check(connection: &str, authority: &str, expected: &str) {
    let connection: IpAddr = connection.parse().expect("address");
    let answer = match inbound_target(&workload(), connection, authority) {
        Ok(target) => target.to_string(),
        Err(InboundRefusal::NotAnAddress) => "no address".to_owned(),
        Err(InboundRefusal::OtherDestination { .. }) => "other destination".to_owned(),
        Err(InboundRefusal::NotThisWorkload(_)) => "not this workload".to_owned(),
        Err(InboundRefusal::Port(port)) => format!("port {port}"),
    };
    assert_eq!(answer, expected, "{authority} on a connection to {connection}");
}

#[test]
fn the_address_of_the_connection_and_any_port_of_the_application() {
    check("10.0.0.1", "10.0.0.1:80", "10.0.0.1:80");
    check("10.0.0.1", "10.0.0.1:65535", "10.0.0.1:65535");
    check("fd00::1", "[fd00::1]:80", "[fd00::1]:80");
    check("fd00::1", "[FD00:0::0001]:80", "[fd00::1]:80");
    check("::ffff:10.0.0.1", "10.0.0.1:80", "10.0.0.1:80");
    check("10.0.0.1", "[::ffff:10.0.0.1]:80", "10.0.0.1:80");
}

#[test]
fn another_destination_than_the_connections_is_refused() {
    check("10.0.0.1", "10.0.0.2:80", "other destination");
    check("10.0.0.1", "127.0.0.1:80", "other destination");
    check("10.0.0.1", "[fd00::1]:80", "other destination");
    check("10.0.0.1", "0.0.0.0:80", "other destination");
}

#[test]
fn an_address_that_is_not_the_workloads_is_refused() {
    check("10.0.0.2", "10.0.0.2:80", "not this workload");
    check("127.0.0.1", "127.0.0.1:80", "not this workload");
    check("::1", "[::1]:80", "not this workload");
}

#[test]
fn ports_of_the_proxy_itself_and_none_at_all_are_refused() {
    for port in [0, 15001, 15006, 15008] {
        check("10.0.0.1", &format!("10.0.0.1:{port}"), &format!("port {port}"));
    }
}

/// CVE-2026-47778 and CVE-2026-26310: authorities that take parsers apart, and addresses with a scope.
#[test]
fn what_is_no_address_and_port_is_refused() {
    for authority in [
        "",
        ":",
        ":80",
        "10.0.0.1",
        "10.0.0.1:",
        "10.0.0.1:65536",
        "10.0.0.1:-1",
        "10.0.0.1:+80",
        "10.0.0.1:80:80",
        "10.0.0.1:80 ",
        " 10.0.0.1:80",
        "10.0.0.1:80\0",
        "010.0.0.1:80",
        "10.0.1:80",
        "0x0a000001:80",
        "167772161:80",
        "web.default.svc.cluster.local:80",
        "user@10.0.0.1:80",
        "http://10.0.0.1:80",
        "10.0.0.1:80/",
        "fd00::1:80",
        "[fd00::1]",
        "[fd00::1%eth0]:80",
        "[fd00::1%25eth0]:80",
        "[fe80::1%1]:80",
        "[10.0.0.1]:80",
        "１０.0.0.1:80",
    ] {
        check("10.0.0.1", authority, "no address");
    }
    check("10.0.0.1", &"1".repeat(AUTHORITY_MAX_BYTES + 1), "no address");
    check("10.0.0.1", &format!("10.0.0.1:{}80", "0".repeat(AUTHORITY_MAX_BYTES)), "no address");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is asked for, what is granted is the workload's own address, that of the connection, and a port of its.
    #[test]
    fn nothing_but_the_applications_own_ports_is_granted(
        connection in prop::sample::select(vec!["10.0.0.1", "fd00::1", "::ffff:10.0.0.1", "10.0.0.2", "::1"]),
        host in prop::sample::select(vec!["10.0.0.1", "[fd00::1]", "[::ffff:10.0.0.1]", "10.0.0.2", "127.0.0.1", "[::1]", "a"]),
        port in prop_oneof![any::<u32>(), 15_000_u32..15_010, 0_u32..100],
        noise in "[a-z:/ %.-]{0,2}",
    ) {
        let connection: IpAddr = connection.parse().expect("address");
        let workload = workload();
        if let Ok(target) = inbound_target(&workload, connection, &format!("{host}:{port}{noise}")) {
            prop_assert_eq!(target.ip(), connection.to_canonical());
            prop_assert!(workload.addresses.contains(&target.ip()));
            prop_assert!(u32::from(target.port()) == port && noise.is_empty());
            prop_assert!(![0, 15001, 15006, 15008].contains(&port));
        }
    }
}
