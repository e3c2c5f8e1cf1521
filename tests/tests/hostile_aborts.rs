//! Peers that stop half-way, or take what they asked for slowly or not at all: everything that was held for them is given
//! back, and until then it is bounded.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Instant;

use mesh_ctl::sandbox::Part;
use mesh_node::hbone::{CONNECTION_WINDOW, SEND_BUFFER_BYTES};
use mesh_node::relay::reset_on_close;
use mesh_tests::hostile::application::endless;
use mesh_tests::hostile::frames::{CANCEL, END_STREAM, Frame, INITIAL_WINDOW_SIZE, Kind, MAX_WINDOW, PREFACE, connect};
use mesh_tests::hostile::raw::{Raw, RawTunnel};
use mesh_tests::hostile::scene::Scene;
use mesh_tests::hostile::{Approach, dial, shake_hands};
use mesh_tests::mesh_bed::{Attempt, PATIENCE, eventually};
use mesh_tests::usage::descriptors;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// How far a peer goes before it stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Connected,
    InItsHello,
    ShookHands,
    SaidThePreface,
    InItsHead,
    Asked,
    Answered,
    Sending,
    Ended,
    Reset,
}

impl Stage {
    const ALL: [Self; 10] = [
        Self::Connected,
        Self::InItsHello,
        Self::ShookHands,
        Self::SaidThePreface,
        Self::InItsHead,
        Self::Asked,
        Self::Answered,
        Self::Sending,
        Self::Ended,
        Self::Reset,
    ];
}

/// What an aborting peer needs.
struct Peer {
    place: PathBuf,
    to: SocketAddr,
    approach: Approach,
    authority: String,
}

impl Peer {
    /// Goes as far as `stage`, then closes, or resets.
    async fn abort_at(self, stage: Stage, reset: bool) {
        let end = |tcp: &TcpStream| {
            if reset {
                reset_on_close(tcp);
            }
        };
        if let Stage::Connected | Stage::InItsHello = stage {
            let mut tcp = dial(&self.place, self.to).await.unwrap();
            if stage == Stage::InItsHello {
                tcp.write_all(&[0x16, 3, 1, 1, 0, 1]).await.unwrap();
            }
            return end(&tcp);
        }
        let tls = shake_hands(&self.place, self.to, self.approach).await.unwrap();
        end(tls.get_ref().0);
        if stage == Stage::ShookHands {
            return;
        }
        let mut tunnel = Raw::new(tls);
        tunnel.say(&[PREFACE, &Frame::settings(&[]).bytes()].concat()).await.unwrap();
        let head = connect(&self.authority);
        match stage {
            Stage::SaidThePreface => return,
            Stage::InItsHead => return tunnel.send(&Frame::new(Kind::Headers, 0, 1, head)).await.unwrap(),
            Stage::Asked => return tunnel.send(&Frame::headers(1, head)).await.unwrap(),
            _further => tunnel.send(&Frame::headers(1, head)).await.unwrap(),
        }
        tunnel.until("the answer", |seen| seen.heads.get(&1) == Some(&true)).await;
        let data = |flags| Frame::new(Kind::Data, flags, 1, [7; 1000]);
        match stage {
            Stage::Sending => tunnel.send(&data(0)).await.unwrap(),
            Stage::Ended => tunnel.send(&data(END_STREAM)).await.unwrap(),
            Stage::Reset => tunnel.send(&Frame::reset(1, CANCEL)).await.unwrap(),
            _no_further => {}
        }
    }
}

fn peer(scene: &Scene) -> Peer {
    Peer { place: scene.place.clone(), to: scene.far, approach: scene.good(), authority: scene.good_request() }
}

/// Streams, and descriptors of node-b's proxy and of the application.
fn held(scene: &Scene) -> (u64, usize, usize) {
    let application = scene.bed.sandbox.running(&Part::Workload("far".into())).unwrap().pid;
    (scene.count("istio_tcp_sockets_open"), descriptors(scene.bed.proxy("node-b")), descriptors(application))
}

/// Waits until nothing more is held than before.
fn given_back(scene: &Scene, before: (u64, usize, usize), what: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = held(scene);
        if now.0 <= before.0 && now.1 <= before.1 && now.2 <= before.2 {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {now:?} are held, {before:?} were before");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

/// Istio's issue 60074, ztunnel's 864, 1630, 1747, 2044: an abort at any stage leaves no stream and no descriptor.
#[test]
fn an_abort_at_any_stage_leaves_no_stream_and_no_descriptor() {
    const EACH: usize = 20;
    let scene = Scene::new("abort");
    // A tunnel and its connection that live on, with all that a first connection brings about.
    let mut good = scene.bed.hold("client", scene.bed.address("far"));
    assert_eq!(good.say("before"), "before");
    let before = held(&scene);
    for stage in Stage::ALL {
        for reset in [false, true] {
            let peers: Vec<_> = (0..EACH).map(|_| peer(&scene)).collect();
            scene.runtime.block_on(async {
                for peer in peers {
                    peer.abort_at(stage, reset).await;
                }
            });
            given_back(&scene, before, &format!("{stage:?}, reset: {reset}"));
        }
    }
    assert_eq!(good.say("after"), "after");
}

/// The same for streams of a tunnel that lives on.
#[test]
fn streams_that_are_reset_give_back_their_places_while_the_tunnel_lives() {
    const ROUNDS: u32 = 5;
    // As many as a tunnel may have, so that one that is not given back is missed.
    const STREAMS: u32 = mesh_node::hbone::SERVER_STREAMS;
    let scene = Scene::new("places");
    let mut tunnel = scene.raw(&[]);
    let before = held(&scene);
    for round in 0..ROUNDS {
        let streams = || (round * STREAMS..(round + 1) * STREAMS).map(|number| 2 * number + 1);
        scene.runtime.block_on(async {
            for stream in streams() {
                tunnel.listen().send(&Frame::headers(stream, connect(&scene.good_request()))).await.unwrap();
                tunnel.send(&Frame::new(Kind::Data, 0, stream, [7; 100])).await.unwrap();
            }
            let all = u64::from((round + 1) * STREAMS);
            let seen = tunnel.until("answers", |seen| seen.heads.len() as u64 == all).await;
            assert!(seen.heads.values().all(|carried| *carried), "round {round}: not all were carried");
            for stream in streams() {
                tunnel.send(&Frame::reset(stream, CANCEL)).await.unwrap();
            }
        });
        given_back(&scene, before, &format!("round {round}"));
    }
}

/// Slack for what is not counted by windows, bytes.
const SLACK_BYTES: u64 = 16 << 20;
/// Streams of one slow tunnel.
const SLOW_STREAMS: u32 = 64;

async fn ask_all(tunnel: &mut RawTunnel, authority: &str) {
    for number in 0..SLOW_STREAMS {
        tunnel.send(&Frame::headers(2 * number + 1, connect(authority))).await.unwrap();
    }
}

/// A peer that gives its streams no window: what it sends is kept up to the connection's window, what it should get is
/// left with the application.
#[test]
fn a_peer_without_a_window_is_kept_no_more_than_the_connections_window() {
    let scene = Scene::with_one_worker("window");
    // The good client's tunnel stays.
    scene.bed.stream("client", scene.bed.address("far")).wait("traffic", Attempt::is_ok);
    let before = held(&scene);
    let mut tunnel = scene.raw(&[(INITIAL_WINDOW_SIZE, 0)]);
    let authority = scene.good_request();
    let deed = async move {
        tunnel.listen();
        ask_all(&mut tunnel, &authority).await;
        let all = SLOW_STREAMS as usize;
        tunnel.until("answers", |seen| seen.heads.len() == all).await;
        let each = CONNECTION_WINDOW / SLOW_STREAMS / 1024;
        tunnel
            .flood(each * SLOW_STREAMS, |number, out| {
                Frame::new(Kind::Data, 0, 2 * (number % SLOW_STREAMS) + 1, [7; 1024]).put(out);
            })
            .await;
        tunnel.send(&Frame::new(Kind::Ping, 0, 0, [7; 8])).await.unwrap();
        let seen = tunnel.until("an answer behind all of it", |seen| seen.pongs > 0 || seen.ended.is_some()).await;
        assert_eq!((seen.data, seen.go_away), (0, None), "nothing comes without a window");
    };
    let ((), cost) = scene.endured("node-b", "no window", deed);
    assert!(cost.memory_bytes < u64::from(CONNECTION_WINDOW) + SLACK_BYTES, "{cost:?}");
    given_back(&scene, before, "no window");
}

/// A peer that opens all windows and then reads nothing: what waits for it is bounded for each of its streams.
#[test]
fn a_peer_that_reads_nothing_is_kept_no_more_than_the_buffers_of_its_streams() {
    let scene = Scene::with_one_worker("slow");
    let source = SocketAddr::new(scene.far.ip(), 7001);
    endless(&scene.bed.sandbox.layout.netns("far"), source);
    let before = held(&scene);
    let mut tunnel = scene.raw(&[(INITIAL_WINDOW_SIZE, MAX_WINDOW)]);
    let pid = scene.bed.proxy("node-b");
    let deed = async move {
        tunnel.send(&Frame::window_update(0, MAX_WINDOW - 65_535)).await.unwrap();
        ask_all(&mut tunnel, &source.to_string()).await;
        // Until it grows no more.
        let mut last = 0;
        loop {
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            let now = mesh_tests::usage::resident_bytes(pid);
            if now <= last {
                return tunnel;
            }
            last = now;
        }
    };
    let (tunnel, cost) = scene.endured("node-b", "a peer that does not read", deed);
    let bound = u64::from(SLOW_STREAMS) * SEND_BUFFER_BYTES as u64;
    assert!(cost.memory_bytes < bound + SLACK_BYTES, "{cost:?}");
    drop(tunnel);
    eventually("the end of its streams", || (scene.count("istio_tcp_sockets_open") <= before.0).then_some(()));
}
