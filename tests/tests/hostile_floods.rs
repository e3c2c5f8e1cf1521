//! Floods of HTTP/2 frames from a peer with a certificate of the mesh: what each may cost, and how it ends. All node
//! proxies have one worker here, so that the good client shares a thread with the flood.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::net::SocketAddr;
use std::time::Duration;

use mesh_node::hbone::{FRAME_OVERHEAD_BYTES, REQUEST_HEADER_BYTES, STREAM_WINDOW};
use mesh_tests::hostile::application::deaf;
use mesh_tests::hostile::frames::{
    ACK, CANCEL, ENHANCE_YOUR_CALM, Frame, Kind, MAX_WINDOW, NEWEST_FIELD, PROTOCOL_ERROR, block, connect, remembered,
};
use mesh_tests::hostile::many;
use mesh_tests::hostile::raw::{Flooded, RawTunnel, Seen};
use mesh_tests::hostile::scene::{Cost, Scene};
use mesh_tests::mesh_bed::eventually;

/// By how much one flood may make a node proxy grow, bytes.
const MAX_GROWTH_BYTES: u64 = 16 << 20;
/// Streams that a peer could be reset on before it is sent away (h2's bound on resets for errors).
const MAX_ERROR_RESETS: usize = 1024;

/// What a proxy may run for a flood that it ends.
const MAX_CPU: Duration = Duration::from_secs(2);

/// The stream of a client's request with this number.
fn stream(number: u32) -> u32 {
    2 * number + 1
}

/// How a flood ended, and what it cost node-b's proxy.
struct End {
    what: String,
    flooded: Flooded,
    seen: Seen,
    cost: Cost,
}

impl End {
    #[track_caller]
    fn cheap(self) -> Self {
        assert!(self.cost.memory_bytes < MAX_GROWTH_BYTES, "{} took {} KiB", self.what, self.cost.memory_bytes / 1024);
        self
    }

    #[track_caller]
    fn was_sent_away_with(self, code: u32) -> Self {
        assert_eq!(self.seen.go_away_code(), Some(code), "{}: {:?}, {:?}", self.what, self.flooded, self.seen);
        self
    }
}

/// Does something on a tunnel to node-b's proxy.
fn tell(scene: &Scene, what: &str, deed: impl Future<Output = (Flooded, Seen)> + Send + 'static) -> End {
    let ((flooded, seen), cost) = scene.endured("node-b", what, deed);
    End { what: what.to_owned(), flooded, seen, cost }
}

/// Floods node-b's proxy on a fresh tunnel, and waits for the end of the connection.
fn flood(scene: &Scene, what: &str, put: impl FnMut(u32, &mut Vec<u8>) + Send + 'static) -> End {
    let mut tunnel = scene.raw(&[]);
    let deed = async move {
        let flooded = tunnel.listen().flood(many(), put).await;
        (flooded, tunnel.until("the end", |seen| seen.ended.is_some()).await)
    };
    tell(scene, what, deed).cheap()
}

/// CVE-2023-44487 (rapid reset), RUSTSEC-2023-0034: streams that are opened and reset at once.
#[test]
fn streams_that_are_reset_as_soon_as_they_are_opened_end_the_tunnel() {
    let scene = Scene::with_one_worker("rapid");
    let head = connect(&scene.good_request());
    let put = move |number, out: &mut Vec<u8>| {
        Frame::headers(stream(number), head.clone()).put(out);
        Frame::reset(stream(number), CANCEL).put(out);
    };
    flood(&scene, "rapid reset", put).was_sent_away_with(ENHANCE_YOUR_CALM);
}

/// CVE-2023-44487, as a patient peer does it: it waits until each stream is served, so that no queue of unserved ones
/// gives it away. RUSTSEC-2023-0034.
#[test]
fn streams_that_are_reset_one_by_one_before_they_carry_a_byte_end_the_tunnel() {
    const PATIENT: u32 = 400;
    let scene = Scene::with_one_worker("patient");
    let (head, mut tunnel) = (connect(&scene.good_request()), scene.raw(&[]));
    let floods = scene.count("mesh_reset_floods_total");
    let deed = async move {
        tunnel.listen();
        for number in 0..PATIENT {
            let stream = stream(number);
            if tunnel.send(&Frame::headers(stream, head.clone())).await.is_err() {
                break;
            }
            let seen = tunnel.until("an answer", |seen| seen.heads.contains_key(&stream) || seen.ended.is_some());
            if seen.await.ended.is_some() || tunnel.send(&Frame::reset(stream, CANCEL)).await.is_err() {
                break;
            }
        }
        (Flooded::Whole, tunnel.until("the end", |seen| seen.ended.is_some()).await)
    };
    let end = tell(&scene, "patient reset", deed).cheap().was_sent_away_with(ENHANCE_YOUR_CALM);
    assert!(end.seen.heads.len() < PATIENT as usize, "{} streams were served", end.seen.heads.len());
    assert_eq!(scene.count("mesh_reset_floods_total"), floods + 1);
}

/// CVE-2025-8671 (MadeYouReset), RUSTSEC-2024-0003: frames for which the server must reset the stream itself.
#[test]
fn streams_that_the_peer_makes_the_server_reset_end_the_tunnel() {
    let scene = Scene::with_one_worker("made");
    let broken: [(&str, u32, fn(u32) -> Frame); 4] = [
        ("a window beyond its limit", ENHANCE_YOUR_CALM, |stream| Frame::window_update(stream, MAX_WINDOW)),
        ("a stream that depends on itself", ENHANCE_YOUR_CALM, |stream| {
            Frame::new(Kind::Priority, 0, stream, [&stream.to_be_bytes()[..], &[16]].concat())
        }),
        ("trailers that are not the end", PROTOCOL_ERROR, |stream| Frame::headers(stream, block(&[("a", "b")]))),
        ("malformed requests between good ones", ENHANCE_YOUR_CALM, |stream| {
            Frame::headers(stream + 2, block(&[(":method", "CONNECT"), (":path", "/")]))
        }),
    ];
    for (what, code, frame) in broken {
        let head = Frame::headers(1, connect(&scene.good_request()));
        let put = move |number, out: &mut Vec<u8>| {
            let stream = stream(2 * number);
            Frame { stream, ..head.clone() }.put(out);
            frame(stream).put(out);
        };
        let resets = flood(&scene, what, put).was_sent_away_with(code).seen.resets.len();
        assert!(resets <= MAX_ERROR_RESETS, "{what}: {resets} resets");
    }
}

/// RUSTSEC-2024-0332, CVE-2024-27919, CVE-2024-30255, CVE-2023-45288: a header block without an end.
#[test]
fn a_header_block_without_an_end_ends_the_tunnel() {
    let scene = Scene::with_one_worker("continue");
    let blocks =
        [("empty", Vec::new()), ("small", block(&[("a", "b")])), ("large", block(&[("a", &"b".repeat(8192))]))];
    for (what, fields) in blocks {
        let head = connect(&scene.good_request());
        let put = move |number, out: &mut Vec<u8>| {
            let (kind, payload) = if number == 0 { (Kind::Headers, &head) } else { (Kind::Continuation, &fields) };
            Frame::new(kind, 0, 1, payload.clone()).put(out);
        };
        let what = format!("{what} CONTINUATION");
        let end = flood(&scene, &what, put).was_sent_away_with(ENHANCE_YOUR_CALM);
        assert!(matches!(end.flooded, Flooded::Ended(_)), "{what}: {:?}", end.flooded);
        assert!(end.cost.cpu < MAX_CPU, "{what}: {:?}", end.cost);
    }
}

/// RUSTSEC-2026-0258: empty DATA frames, which no window holds back.
#[test]
fn empty_data_frames_end_the_tunnel() {
    let scene = Scene::with_one_worker("empty");
    let head = connect(&scene.good_request());
    let put = move |number, out: &mut Vec<u8>| match number {
        0 => Frame::headers(1, head.clone()).put(out),
        1.. => Frame::new(Kind::Data, 0, 1, []).put(out),
    };
    flood(&scene, "empty DATA", put).was_sent_away_with(ENHANCE_YOUR_CALM);
}

/// Sent before the crumbs, bytes: more than the kernel takes for an application that does not read.
const FILLING_BYTES: u32 = 3_500_000;
/// Bytes of each frame of the filling.
const FILLING_FRAME_BYTES: u32 = 16 * 1024;

/// RUSTSEC-2026-0258, its other half: DATA frames of one byte towards an application that does not read. Each costs far
/// more memory than its byte of the window.
#[test]
fn data_frames_of_one_byte_that_nobody_takes_are_bounded_in_memory() {
    let scene = Scene::with_one_worker("crumbs");
    let application = SocketAddr::new(scene.far.ip(), 7001);
    deaf(&scene.bed.sandbox.layout.netns("far"), application);
    let (head, mut tunnel) = (connect(&application.to_string()), scene.raw(&[]));
    let deed = async move {
        tunnel.listen();
        tunnel.send(&Frame::headers(1, head)).await.unwrap();
        tunnel.until("the answer", |seen| seen.heads.contains_key(&1)).await;
        let filling = Frame::new(Kind::Data, 0, 1, [7; FILLING_FRAME_BYTES as usize]);
        tunnel.flood(FILLING_BYTES / FILLING_FRAME_BYTES, |_, out| filling.put(out)).await;
        let crumbs = STREAM_WINDOW - FILLING_BYTES;
        let flooded = tunnel.flood(crumbs, |_, out| Frame::new(Kind::Data, 0, 1, [0]).put(out)).await;
        (flooded, tunnel.until("the end", |seen| seen.ended.is_some()).await)
    };
    let cost = tell(&scene, "DATA of one byte", deed).was_sent_away_with(ENHANCE_YOUR_CALM).cost;
    assert!(cost.memory_bytes < FRAME_OVERHEAD_BYTES as u64 + MAX_GROWTH_BYTES, "{cost:?}");
}

/// CVE-2026-47774, CVE-2026-73550: header lists that are small on the wire and large when they are read: crumbs of
/// cookies, duplicates, and references to one large field (HPACK bomb).
#[test]
fn header_lists_that_unfold_beyond_the_limit_are_refused_without_being_stored() {
    let scene = Scene::with_one_worker("unfold");
    let fields = |count: usize| {
        [connect(&scene.good_request()), remembered("cookie", &"c".repeat(3000)), vec![NEWEST_FIELD; count]].concat()
    };
    let crumbs = |count: usize| {
        [connect(&scene.good_request()), remembered("cookie", "a=b"), vec![NEWEST_FIELD; count]].concat()
    };
    let duplicates = |count: usize| {
        [connect(&scene.good_request()), remembered("host", "example.org"), vec![NEWEST_FIELD; count]].concat()
    };
    let limit = REQUEST_HEADER_BYTES as usize;
    for (what, head) in [
        ("one large field", [connect(&scene.good_request()), block(&[("x", &"x".repeat(limit))])].concat()),
        ("30 references", fields(30)),
        ("2000 crumbs", crumbs(2000)),
        ("2000 duplicates", duplicates(2000)),
    ] {
        let mut tunnel = scene.raw(&[]);
        let good = connect(&scene.good_request());
        let deed = async move {
            tunnel.listen().send(&Frame::headers(1, head)).await.unwrap();
            tunnel.send(&Frame::headers(3, good)).await.unwrap();
            (Flooded::Whole, tunnel.until("the good request's answer", |seen| seen.heads.contains_key(&3)).await)
        };
        let seen = tell(&scene, what, deed).cheap().seen;
        assert_eq!((seen.heads.get(&1), seen.heads.get(&3)), (Some(&false), Some(&true)), "{what}: {seen:?}");
    }
    for (what, head) in [("900,000 references", fields(900_000)), ("900,000 crumbs", crumbs(900_000))] {
        let mut tunnel = scene.raw(&[]);
        let deed = async move {
            // The server may have had enough before all is written.
            let _sent = tunnel.listen().send(&Frame::headers(1, head)).await;
            (Flooded::Whole, tunnel.until("the end", |seen| seen.ended.is_some()).await)
        };
        tell(&scene, what, deed).cheap().was_sent_away_with(ENHANCE_YOUR_CALM);
    }
}

/// A frame of a flood that is legal for ever.
type Legal = fn(u32) -> Frame;

/// CVE-2019-9512 (PING), CVE-2019-9515, CVE-2020-11080 (SETTINGS), CVE-2019-9513 (PRIORITY), CVE-2019-9518 (frames that
/// say nothing).
const LEGAL: [(&str, Legal); 6] = [
    ("PING", |number| Frame::new(Kind::Ping, 0, 0, u64::from(number).to_be_bytes())),
    ("answers to no PING", |number| Frame::new(Kind::Ping, ACK, 0, u64::from(number).to_be_bytes())),
    ("SETTINGS", |number| Frame::settings(&[(0x4, number), (0xfff0, number)])),
    ("PRIORITY", |number| Frame::new(Kind::Priority, 0, stream(number), [0, 0, 0, 0, 1])),
    ("WINDOW_UPDATE", |number| Frame::window_update(0, 1 + number % 8)),
    ("frames of no known type", |_| Frame::new(Kind::Other(0xee), 0, 0, [])),
];

/// See [`LEGAL`]: such a flood may go on, and costs no more than its bytes.
#[test]
fn control_frames_without_end_cost_no_memory_and_deprive_nobody() {
    let scene = Scene::with_one_worker("control");
    for (what, frame) in LEGAL {
        let mut tunnel = scene.raw(&[]);
        let deed = async move {
            let flooded = tunnel.listen().flood(many(), |number, out| frame(number).put(out)).await;
            if flooded == Flooded::Whole {
                // The last one is answered when all before it are read.
                let asked = tunnel.seen().pongs;
                tunnel.send(&Frame::new(Kind::Ping, 0, 0, [7; 8])).await.unwrap();
                tunnel.until("an answer", |seen| seen.pongs > asked || seen.ended.is_some()).await;
            }
            (flooded, tunnel.seen())
        };
        tell(&scene, what, deed).cheap();
    }
}

/// CVE-2019-9512, CVE-2019-9515: the same towards a server whose answers are not read: it stops reading, too.
#[test]
fn control_frames_whose_answers_nobody_reads_stop_being_read() {
    let scene = Scene::with_one_worker("unread");
    for (what, frame) in [LEGAL[0], LEGAL[2]] {
        let mut tunnel: RawTunnel = scene.raw(&[]);
        let deed = async move { (tunnel.flood(10_000_000, |number, out| frame(number).put(out)).await, tunnel.seen()) };
        let flooded = tell(&scene, what, deed).cheap().flooded;
        assert!(matches!(flooded, Flooded::Blocked(_)), "{what}: {flooded:?}");
    }
    eventually("the end of its tunnels", || (scene.count("istio_tcp_sockets_open") == 0).then_some(()));
}
