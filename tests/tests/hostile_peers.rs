//! Peers that are not who they should be, or say what they should not: refused, counted, and nobody else is disturbed.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::io::ErrorKind;
use std::net::SocketAddr;

use http::{Method, StatusCode};
use mesh_tests::hostile::scene::{CLIENT, HBONE, Scene};
use mesh_tests::hostile::{Approach, Ca, Claim, ask, dial, tunnel};
use mesh_tests::mesh_bed::{Attempt, ECHO, eventually, two_nodes};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[test]
fn peers_that_cannot_prove_an_identity_of_the_mesh_are_refused_and_counted() {
    let scene = Scene::new("proof");
    let mut held = scene.bed.hold("client", scene.bed.address("far"));
    assert_eq!(held.say("before"), "before");
    let (ours, theirs) = (scene.ca(), Ca::foreign());
    assert_eq!(scene.attempt(Approach::with(ours.issue(&Claim::of(CLIENT)))), Ok(StatusCode::OK), "a good one");
    let good = Claim::of(CLIENT);
    let uris = |uris: &[&str]| Claim { uris: uris.iter().map(ToString::to_string).collect(), ..good.clone() };
    let hours = time::Duration::hours;
    let cases = [
        ("another CA", theirs.issue(&good)),
        ("another trust domain", ours.issue(&uris(&["spiffe://other.example/ns/default/sa/client"]))),
        ("a trust domain in upper case", ours.issue(&uris(&["spiffe://CLUSTER.LOCAL/ns/default/sa/client"]))),
        ("no SPIFFE ID", ours.issue(&uris(&["https://cluster.local/ns/default/sa/client"]))),
        ("a SPIFFE ID of another shape", ours.issue(&uris(&["spiffe://cluster.local/ns/default/sa/client/x"]))),
        ("two URIs", ours.issue(&uris(&[CLIENT, "spiffe://cluster.local/ns/default/sa/near"]))),
        ("no name at all", ours.issue(&uris(&[]))),
        ("a DNS name only", ours.issue(&Claim { names: vec!["client".into()], ..uris(&[]) })),
        ("expired", ours.issue(&Claim { from: hours(-3), until: hours(-2), ..good.clone() })),
        ("not valid yet", ours.issue(&Claim { from: hours(2), until: hours(3), ..good.clone() })),
        ("not for clients", ours.issue(&Claim { client: false, ..good.clone() })),
    ];
    let before = scene.count("mesh_handshake_failures_total");
    let refused = u64::try_from(cases.len()).unwrap() + 2;
    for (what, identity) in cases {
        let outcome = scene.attempt(Approach::with(identity));
        assert!(outcome.is_err(), "{what}: {outcome:?}");
        assert_eq!(held.say(what), what);
    }
    let none = Approach { identity: None, ..Approach::with(ours.issue(&good)) };
    let outcome = scene.attempt(none);
    assert!(outcome.is_err(), "no certificate: {outcome:?}");
    let other_protocol = Approach { alpn: b"http/1.1", ..Approach::with(ours.issue(&good)) };
    let outcome = scene.attempt(other_protocol);
    assert!(outcome.is_err(), "another protocol: {outcome:?}");
    eventually("the count", || (scene.count("mesh_handshake_failures_total") >= before + refused).then_some(()));
    assert_eq!(held.say("after"), "after");
    scene.bed.stream("client", scene.bed.address("far")).wait("traffic", Attempt::is_ok);
}

#[test]
fn requests_for_what_is_not_this_workload_are_answered_400_and_the_tunnel_goes_on() {
    let scene = Scene::new("head");
    let mut held = scene.bed.hold("client", scene.bed.address("far"));
    assert_eq!(held.say("before"), "before");
    let identity = scene.ca().issue(&Claim::of(CLIENT));
    let send = scene.runtime.block_on(tunnel(&scene.place, scene.far, Approach::with(identity))).unwrap();
    let request = |method, authority: &str| scene.runtime.block_on(ask(&send, method, authority));
    let (ip, near) = (scene.far.ip(), scene.bed.address("near").ip());
    let before = scene.count("mesh_bad_requests_total");
    let bad: Vec<(Method, String)> = vec![
        (Method::CONNECT, format!("{near}:{ECHO}")),
        (Method::CONNECT, format!("127.0.0.1:{ECHO}")),
        (Method::CONNECT, format!("169.254.169.254:{ECHO}")),
        (Method::CONNECT, format!("{ip}:0")),
        (Method::CONNECT, format!("{ip}:15001")),
        (Method::CONNECT, format!("{ip}:15006")),
        (Method::CONNECT, format!("{ip}:15008")),
        (Method::CONNECT, "far.default.svc.cluster.local:7000".to_owned()),
        (Method::CONNECT, "localhost:7000".to_owned()),
        (Method::CONNECT, format!("{}:7000", "x".repeat(4000))),
        (Method::GET, format!("http://{ip}:{ECHO}/")),
        (Method::POST, format!("http://{ip}:{ECHO}/")),
    ];
    let count = u64::try_from(bad.len()).unwrap();
    for (method, authority) in bad {
        let shown: String = format!("{method} {authority}").chars().take(60).collect();
        assert_eq!(request(method, &authority), Ok(StatusCode::BAD_REQUEST), "{shown}");
        assert_eq!(request(Method::CONNECT, &scene.good_request()), Ok(StatusCode::OK), "after {shown}");
    }
    assert_eq!(scene.count("mesh_bad_requests_total"), before + count);
    assert_eq!(held.say("after"), "after");
}

#[test]
fn bytes_that_are_not_tls_end_the_connection_and_nothing_else() {
    let scene = Scene::new("bytes");
    let mut held = scene.bed.hold("client", scene.bed.address("far"));
    assert_eq!(held.say("before"), "before");
    for bytes in [
        &b"GET / HTTP/1.1\r\nhost: far\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\xff\xff\x01",
        &[0; 4096],
        &[0xff; 70_000],
    ] {
        let ended = scene.runtime.block_on(async {
            let mut tcp = dial(&scene.place, scene.far).await.unwrap();
            // The other end may have had enough before all is written.
            let _written = tcp.write_all(bytes).await;
            let _shut = tcp.shutdown().await;
            let mut answer = Vec::new();
            tokio::time::timeout(mesh_tests::mesh_bed::PATIENCE, tcp.read_to_end(&mut answer)).await.is_ok()
        });
        assert!(ended, "{:?} keeps the connection open", &bytes[..bytes.len().min(16)]);
        assert_eq!(held.say("meanwhile"), "meanwhile");
    }
    scene.bed.stream("client", scene.bed.address("far")).wait("traffic", Attempt::is_ok);
}

/// Connections that never say a word; a node proxy has room for 256 handshakes in each of its workers. In the long form as
/// many as one process may open.
fn silent_ones() -> usize {
    if std::env::var_os("MESH_TEST_LONG").is_some() { 19_000 } else { 1500 }
}

/// CVE-2020-8663, CVE-2020-12603 to -12605: many connections of one peer.
#[test]
fn silent_connections_of_one_peer_keep_nobody_else_out() {
    let mut topology = two_nodes();
    topology = topology.workload(mesh_ctl::sandbox::Workload::new("other", "node-a"));
    let scene = Scene::with("silent", topology);
    let before = scene.count("mesh_connections_shed_total");
    let many = silent_ones();
    let mut silent = Vec::with_capacity(many);
    for number in 0..many {
        match scene.runtime.block_on(dial(&scene.place, scene.far)) {
            Ok(tcp) => silent.push(tcp),
            // The node proxy has had enough of this peer, and says so before the dial is over.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => panic!("silent connection {number}: {error}"),
        }
    }
    // Two workloads that have no tunnel yet.
    for from in ["client", "other"] {
        let first = scene.bed.stream(from, scene.bed.address("far")).wait("an attempt", |_| true);
        assert!(first.is_ok(), "{from}: {first:?}");
        assert!(first.took < std::time::Duration::from_secs(2), "{from} waits behind the silent ones: {first:?}");
    }
    eventually("the count", || (scene.count("mesh_connections_shed_total") > before).then_some(()));
}

/// Workloads of one node: with two listeners each, more listeners than there are places for handshakes.
const MANY: usize = 150;

#[test]
fn a_node_with_many_workloads_serves_the_tunnels_of_all() {
    let mut topology = two_nodes();
    for number in 0..MANY {
        topology = topology.workload(mesh_ctl::sandbox::Workload::new(&format!("many-{number}"), "node-b"));
    }
    let scene = Scene::with("many", topology);
    let ca = scene.ca();
    for number in (0..MANY).rev() {
        let ip = scene.bed.address(&format!("many-{number}")).ip();
        let approach = Approach::with(ca.issue(&Claim::of(CLIENT)));
        let answer = scene.runtime.block_on(async {
            let send = tunnel(&scene.place, SocketAddr::new(ip, HBONE), approach).await?;
            ask(&send, Method::CONNECT, &SocketAddr::new(ip, ECHO).to_string()).await
        });
        assert_eq!(
            answer,
            Ok(StatusCode::SERVICE_UNAVAILABLE),
            "many-{number}: nothing listens there, but it is served"
        );
    }
}
