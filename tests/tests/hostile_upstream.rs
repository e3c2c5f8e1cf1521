//! A server of tunnels with a certificate of the mesh that does what it likes with the node proxies that dial it: their
//! clients get an error in time, nobody else notices, and it costs little.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::net::SocketAddr;
use std::time::Duration;

use mesh_ctl::sandbox::Workload;
use mesh_ctl::sandbox::manifests::pod_file;
use mesh_node::hbone::RESPONSE_HEADER_BYTES;
use mesh_tests::hostile::frames::{
    END_HEADERS, END_STREAM, Frame, Kind, MAX_CONCURRENT_STREAMS, MAX_WINDOW, NEWEST_FIELD, REFUSED_STREAM, STATUS_200,
    block, remembered,
};
use mesh_tests::hostile::scene::{HBONE, Scene};
use mesh_tests::hostile::upstream::{Client, Script, Stand, Upstream};
use mesh_tests::hostile::{Claim, many};
use mesh_tests::mesh_bed::{Attempt, PATIENCE, eventually, two_nodes};

const EVIL: &str = "spiffe://cluster.local/ns/default/sa/evil";
/// By how much one deed may make a node proxy grow, bytes.
const MAX_GROWTH_BYTES: u64 = 16 << 20;
/// How long a deed goes on.
const DEED: Duration = Duration::from_millis(700);
/// Tunnels that may be dialled for one connection.
const MAX_TUNNELS: usize = 3;

/// A workload that everybody believes to be in the mesh, and that serves tunnels itself.
struct Evil {
    scene: Scene,
    address: SocketAddr,
}

impl Evil {
    fn new(name: &str) -> Self {
        let topology = two_nodes().workload(Workload::new("evil", "node-b").outside_mesh());
        let scene = Scene::with_node_args(name, topology, &["--workers", "1"]);
        let workload = scene.bed.sandbox.workload("evil").unwrap();
        let file = scene.bed.sandbox.layout.config().join(pod_file(workload));
        let pod = std::fs::read_to_string(&file).unwrap();
        assert!(pod.contains("dataplane-mode: none"), "{pod}");
        let fresh = scene.bed.sandbox.layout.run.join("evil.yaml");
        std::fs::write(&fresh, pod.replace("dataplane-mode: none", "dataplane-mode: ambient")).unwrap();
        std::fs::rename(&fresh, &file).unwrap();
        let address = scene.bed.address("evil");
        Self { scene, address }
    }

    /// Serves its tunnels with a certificate of this identity.
    fn serve(&self, identity: &str, early: &[Frame], script: Script) -> Upstream {
        let stand = Stand {
            netns: &self.scene.bed.sandbox.layout.netns("evil"),
            address: SocketAddr::new(self.address.ip(), HBONE),
            identity: self.scene.ca().issue(&Claim { client: false, ..Claim::of(identity) }),
            early: early.iter().flat_map(Frame::bytes).collect(),
        };
        Upstream::start(&self.scene.runtime, stand, script)
    }

    /// Connections of `client` to it while others are served: none may go through, and none may make the proxy dial on and
    /// on.
    fn meet(&self, what: &str, upstream: Upstream) {
        let begin = || self.scene.bed.stream("client", self.address);
        let deed = async { tokio::time::sleep(DEED).await };
        let (mut stream, (), cost) = self.scene.endured_with("node-a", what, begin, deed);
        let (tunnels, attempts) = (upstream.met(), stream.so_far());
        assert!(attempts.iter().all(|attempt| !attempt.is_ok()), "{what}: {attempts:?}");
        // One more is under way, and dials of the last that its client has given up.
        let most = (attempts.len() + 2) * MAX_TUNNELS;
        assert!(tunnels > 0 && tunnels <= most, "{what}: {tunnels} tunnels for {} attempts", attempts.len());
        assert!(cost.memory_bytes < MAX_GROWTH_BYTES, "{what}: {cost:?}");
        drop((stream, upstream));
        eventually("the end of its connections", || {
            (self.scene.count_on("node-a", "istio_tcp_sockets_open") == 0).then_some(())
        });
    }
}

/// Says its settings; the first stream that the client asks for.
async fn asked(client: &mut Client, settings: &[(u16, u32)]) -> u32 {
    // A client that is gone already shows in what is waited for.
    let _sent = client.listen().send(&Frame::settings(settings)).await;
    let seen = client.wait(PATIENCE, |seen| seen.ended.is_some() || !seen.heads.is_empty()).await;
    seen.and_then(|seen| seen.heads.into_keys().next()).unwrap_or(1)
}

/// Says the same again and again, until the client has had enough.
async fn repeat(mut client: Client, frame: Frame) {
    client.flood(many(), |_, out| frame.put(out)).await;
    stay(client).await;
}

/// Keeps the connection until the client ends it.
async fn stay(mut client: Client) {
    client.wait(Duration::from_secs(120), |seen| seen.ended.is_some()).await;
}

fn answer(stream: u32) -> Frame {
    Frame::headers(stream, [STATUS_200])
}

#[test]
fn a_server_that_behaves_is_believed() {
    let evil = Evil::new("behaves");
    let _upstream = evil.serve(EVIL, &[], |mut client| {
        Box::pin(async move {
            let stream = asked(&mut client, &[]).await;
            client.send(&answer(stream)).await.unwrap();
            // The marker of the client, which is sent back.
            client.send(&Frame::new(Kind::Data, END_STREAM, stream, mesh_tests::wire::MARKER)).await.unwrap();
            stay(client).await;
        })
    });
    evil.scene.bed.stream("client", evil.address).wait("an answer", Attempt::is_ok);
}

/// What a peer's identity is for: another one is refused before anything is said, on whatever address it is met.
#[test]
fn a_server_with_the_certificate_of_another_workload_gets_nothing() {
    let evil = Evil::new("other");
    let failures = evil.scene.count_on("node-a", "mesh_tunnel_failures_total");
    for (what, identity) in [
        ("another workload", "spiffe://cluster.local/ns/default/sa/far"),
        ("another namespace", "spiffe://cluster.local/ns/other/sa/evil"),
        ("another trust domain", "spiffe://other.example/ns/default/sa/evil"),
    ] {
        let upstream = evil.serve(identity, &[], |_| Box::pin(async { panic!("the client talks to somebody else") }));
        evil.meet(what, upstream);
    }
    assert!(evil.scene.count_on("node-a", "mesh_tunnel_failures_total") >= failures + 3);
}

/// CVE-2021-32780: GOAWAY, and SETTINGS that allow no stream, in every order.
#[test]
fn a_server_that_takes_no_streams_is_not_dialled_on_and_on() {
    let evil = Evil::new("none");
    let scripts: [(&str, Script); 5] = [
        ("no streams allowed", |mut client| {
            Box::pin(async move {
                let _sent = client.send(&Frame::settings(&[(MAX_CONCURRENT_STREAMS, 0)])).await;
                stay(client).await;
            })
        }),
        ("GOAWAY at once", |mut client| {
            Box::pin(async move {
                let _sent = client.send(&Frame::settings(&[])).await;
                let _sent = client.send(&Frame::go_away(0, 0)).await;
                stay(client).await;
            })
        }),
        ("GOAWAY, then no streams allowed", |mut client| {
            Box::pin(async move {
                let stream = asked(&mut client, &[]).await;
                let _sent = client.send(&Frame::go_away(stream, 0)).await;
                let _sent = client.send(&Frame::settings(&[(MAX_CONCURRENT_STREAMS, 0)])).await;
                stay(client).await;
            })
        }),
        ("no streams allowed, then GOAWAY", |mut client| {
            Box::pin(async move {
                let _asked = asked(&mut client, &[(MAX_CONCURRENT_STREAMS, 0)]).await;
                let _sent = client.send(&Frame::go_away(0, 0)).await;
                stay(client).await;
            })
        }),
        ("every stream refused", |mut client| {
            Box::pin(async move {
                let stream = asked(&mut client, &[]).await;
                let _sent = client.send(&Frame::reset(stream, REFUSED_STREAM)).await;
                stay(client).await;
            })
        }),
    ];
    for (what, script) in scripts {
        evil.meet(what, evil.serve(EVIL, &[], script));
    }
    for (what, early) in [
        ("no streams allowed, with the certificate", vec![Frame::settings(&[(MAX_CONCURRENT_STREAMS, 0)])]),
        ("GOAWAY with the certificate", vec![Frame::settings(&[]), Frame::go_away(0, 0)]),
    ] {
        evil.meet(what, evil.serve(EVIL, &early, |client| Box::pin(stay(client))));
    }
}

/// CVE-2019-9512 to -9518, CVE-2023-45288, CVE-2026-47774, RUSTSEC-2026-0258, from the server's side, and interim answers
/// without end.
const FLOODS: [(&str, Script); 10] = [
    ("interim answers", |mut client| {
        Box::pin(async move {
            let stream = asked(&mut client, &[]).await;
            repeat(client, Frame::headers(stream, block(&[(":status", "103")]))).await;
        })
    }),
    ("a header block without an end", |mut client| {
        Box::pin(async move {
            let stream = asked(&mut client, &[]).await;
            let _sent = client.send(&Frame::new(Kind::Headers, 0, stream, [STATUS_200])).await;
            repeat(client, Frame::new(Kind::Continuation, 0, stream, block(&[("a", "b")]))).await;
        })
    }),
    ("a header list over the limit", |mut client| {
        Box::pin(async move {
            let stream = asked(&mut client, &[]).await;
            let large = block(&[("x", &"x".repeat(RESPONSE_HEADER_BYTES as usize))]);
            let _sent = client.send(&Frame::headers(stream, [&[STATUS_200], &large[..]].concat())).await;
            stay(client).await;
        })
    }),
    ("a header list that unfolds", |mut client| {
        Box::pin(async move {
            let stream = asked(&mut client, &[]).await;
            let field = remembered("cookie", &"c".repeat(3000));
            let block = [&[STATUS_200], &field[..], &vec![NEWEST_FIELD; 500_000]].concat();
            let _sent = client.send(&Frame::headers(stream, block)).await;
            stay(client).await;
        })
    }),
    ("empty DATA", |mut client| {
        Box::pin(async move {
            let stream = asked(&mut client, &[]).await;
            let _sent = client.send(&answer(stream)).await;
            repeat(client, Frame::new(Kind::Data, 0, stream, [])).await;
        })
    }),
    ("PING", |client| Box::pin(settled(client, Frame::new(Kind::Ping, 0, 0, [7; 8])))),
    ("SETTINGS", |client| Box::pin(settled(client, Frame::settings(&[(0xfff0, 1)])))),
    ("PRIORITY", |client| Box::pin(settled(client, Frame::new(Kind::Priority, 0, 1, [0, 0, 0, 3, 1])))),
    ("WINDOW_UPDATE", |client| Box::pin(settled(client, Frame::window_update(0, 1)))),
    ("GOAWAY", |client| Box::pin(settled(client, Frame::go_away(MAX_WINDOW, 0)))),
];

async fn settled(mut client: Client, flood: Frame) {
    let _asked = asked(&mut client, &[]).await;
    repeat(client, flood).await;
}

/// See [`FLOODS`].
#[test]
fn a_server_that_floods_deprives_nobody_and_costs_no_memory() {
    let evil = Evil::new("floods");
    for (what, script) in FLOODS {
        evil.meet(what, evil.serve(EVIL, &[], script));
    }
}

/// Answers that no server may give (RFC 9113 5.1, 6, 8.4).
const BROKEN: [(&str, Script); 9] = [
    ("nothing", |_| Box::pin(async {})),
    ("no frames", |mut client| {
        Box::pin(async move {
            let _sent = client.say(&[0xff; 64 * 1024]).await;
            stay(client).await;
        })
    }),
    ("a promise", |mut client| {
        Box::pin(async move {
            let stream = asked(&mut client, &[]).await;
            let payload = [&2_u32.to_be_bytes()[..], &block(&[(":method", "GET")])].concat();
            let _sent = client.send(&Frame::new(Kind::PushPromise, END_HEADERS, stream, payload)).await;
            stay(client).await;
        })
    }),
    ("a stream of its own", |client| Box::pin(broken(client, Frame::headers(2, [STATUS_200])))),
    ("an answer that nobody asked for", |client| Box::pin(broken(client, Frame::headers(9999, [STATUS_200])))),
    ("DATA without an answer", |client| Box::pin(broken(client, Frame::new(Kind::Data, 0, 1, [7])))),
    ("an answer without a status", |client| Box::pin(broken(client, Frame::headers(1, block(&[("a", "b")]))))),
    ("a window beyond its limit", |client| Box::pin(broken(client, Frame::window_update(0, MAX_WINDOW)))),
    ("an end without an answer", |client| Box::pin(broken(client, Frame::new(Kind::Data, END_STREAM, 1, [])))),
];

async fn broken(mut client: Client, frame: Frame) {
    let _asked = asked(&mut client, &[]).await;
    let _sent = client.send(&frame).await;
    stay(client).await;
}

/// See [`BROKEN`].
#[test]
fn answers_that_no_server_may_give_fail_the_connection_and_nothing_else() {
    let evil = Evil::new("broken");
    for (what, script) in BROKEN {
        evil.meet(what, evil.serve(EVIL, &[], script));
    }
}
