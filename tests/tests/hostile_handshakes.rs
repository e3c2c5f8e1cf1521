//! Handshakes that are cut, end half-way or never end. Every wait of the server has a deadline, and no order of bytes
//! harms anybody else.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_node::hbone::{FIRST_REQUEST_TIMEOUT, HANDSHAKE_TIMEOUT, PING_EVERY, PING_TIMEOUT};
use mesh_node::relay::reset_on_close;
use mesh_tests::hostile::frames::{Frame, Kind, PREFACE, connect};
use mesh_tests::hostile::raw::RawTunnel;
use mesh_tests::hostile::scene::Scene;
use mesh_tests::hostile::{Approach, client_config, dial, shake_hands};
use mesh_tests::mesh_bed::{PATIENCE, eventually};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Content type of TLS records that carry the handshake.
const HANDSHAKE: u8 = 0x16;
/// A record with the alert `close_notify`, as it is before there are keys.
const CLOSE_NOTIFY: [u8; 7] = [0x15, 3, 3, 0, 2, 1, 0];
/// Bytes before a record's payload.
const RECORD_HEAD_BYTES: usize = 5;
/// Connections at once: fewer than one address may have under way.
const AT_ONCE: usize = 16;
/// How much later than its deadline a connection may end on a loaded machine.
const LATE: Duration = Duration::from_secs(4);

/// A whole ClientHello in one record.
fn hello(approach: Approach, to: SocketAddr) -> Vec<u8> {
    let mut client = rustls::ClientConnection::new(client_config(approach), ServerName::from(to.ip())).unwrap();
    let mut bytes = Vec::new();
    while client.wants_write() {
        client.write_tls(&mut bytes).unwrap();
    }
    let length = usize::from(u16::from_be_bytes([bytes[3], bytes[4]]));
    assert_eq!((bytes[0], bytes.len()), (HANDSHAKE, RECORD_HEAD_BYTES + length), "one record");
    bytes
}

fn record(payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    [&[HANDSHAKE, 3, 1], &length[..], payload].concat()
}

/// Sends parts one after the other; the content type of the first record that comes back.
async fn answered(netns: &std::path::Path, to: SocketAddr, parts: &[&[u8]]) -> Option<u8> {
    let mut tcp = dial(netns, to).await.unwrap();
    for part in parts {
        tcp.write_all(part).await.unwrap();
        tcp.flush().await.unwrap();
        // The server is on this machine: let it read this part before the next one comes.
        tokio::task::yield_now().await;
    }
    let mut head = [0];
    timeout(PATIENCE, tcp.read_exact(&mut head)).await.unwrap().ok().map(|_| head[0])
}

/// RUSTSEC-2024-0399: a ClientHello in two records and in two segments, cut at every byte.
#[test]
fn a_client_hello_may_be_cut_anywhere() {
    let scene = Scene::new("cut");
    let (hello, place, far) = (Arc::new(hello(scene.good(), scene.far)), scene.place.clone(), scene.far);
    let deed = async move {
        let mut cuts = JoinSet::new();
        for at in 1..hello.len() {
            let (hello, place) = (Arc::clone(&hello), place.clone());
            cuts.spawn(async move {
                let segments = answered(&place, far, &[&hello[..at], &hello[at..]]).await;
                assert_eq!(segments, Some(HANDSHAKE), "segments cut at {at}");
                if at > RECORD_HEAD_BYTES {
                    let (first, second) = (record(&hello[RECORD_HEAD_BYTES..at]), record(&hello[at..]));
                    assert_eq!(answered(&place, far, &[&first, &second]).await, Some(HANDSHAKE), "records cut at {at}");
                }
            });
            if cuts.len() >= AT_ONCE {
                cuts.join_next().await.unwrap().unwrap();
            }
        }
        cuts.join_all().await.len()
    };
    scene.endured("node-b", "a hello in two parts", deed);
}

/// RUSTSEC-2024-0336: `close_notify` before and in the middle of the handshake must not keep the server busy.
#[test]
fn a_close_in_the_middle_of_a_handshake_ends_the_connection_and_keeps_nobody_busy() {
    let scene = Scene::with_one_worker("close");
    let hello = hello(scene.good(), scene.far);
    let half = record(&hello[RECORD_HEAD_BYTES..hello.len() / 2]);
    let cases = [
        ("at once", CLOSE_NOTIFY.to_vec()),
        ("after the hello", [&hello[..], &CLOSE_NOTIFY].concat()),
        ("in the hello", [&half[..], &CLOSE_NOTIFY].concat()),
        ("a thousand times", CLOSE_NOTIFY.repeat(1000)),
    ];
    let failures = scene.count("mesh_handshake_failures_total");
    let count = u64::try_from(cases.len()).unwrap();
    let (place, far) = (scene.place.clone(), scene.far);
    let deed = async move {
        let mut all = JoinSet::new();
        for (what, bytes) in cases {
            let tcp = dial(&place, far).await.unwrap();
            all.spawn(async move {
                let started = Instant::now();
                // Our end stays open: the server has to end it on its own.
                ended(tcp, &bytes).await;
                assert!(started.elapsed() < HANDSHAKE_TIMEOUT + LATE, "close_notify {what}: {:?}", started.elapsed());
            });
        }
        all.join_all().await;
    };
    let ((), cost) = scene.endured("node-b", "close_notify", deed);
    assert!(cost.cpu < cost.took / 4 + Duration::from_millis(500), "{cost:?}");
    eventually("the count", || (scene.count("mesh_handshake_failures_total") >= failures + count).then_some(()));
}

/// Who never ends what it began, and after how long it is ended.
#[derive(Debug, Clone, Copy)]
enum Slow {
    SaysNothing,
    /// One byte a second, as slowloris does it.
    Trickles,
    StopsAfterHello,
    SaysNoPreface,
    StopsInThePreface,
    AsksForNothing,
    NeverEndsItsHead,
    AnswersNoPing,
}

impl Slow {
    const ALL: [Self; 8] = [
        Self::SaysNothing,
        Self::Trickles,
        Self::StopsAfterHello,
        Self::SaysNoPreface,
        Self::StopsInThePreface,
        Self::AsksForNothing,
        Self::NeverEndsItsHead,
        Self::AnswersNoPing,
    ];

    fn deadline(self) -> Duration {
        match self {
            Self::SaysNothing
            | Self::Trickles
            | Self::StopsAfterHello
            | Self::SaysNoPreface
            | Self::StopsInThePreface => HANDSHAKE_TIMEOUT,
            Self::AsksForNothing | Self::NeverEndsItsHead => FIRST_REQUEST_TIMEOUT,
            Self::AnswersNoPing => PING_EVERY + PING_TIMEOUT,
        }
    }
}

/// What a slow peer needs.
struct Peer {
    place: PathBuf,
    to: SocketAddr,
    approach: Approach,
    authority: String,
}

impl Peer {
    /// Until the server ends the connection.
    async fn until_ended(self, slow: Slow) {
        match slow {
            Slow::SaysNothing => ended(dial(&self.place, self.to).await.unwrap(), &[]).await,
            Slow::Trickles => self.trickle().await,
            Slow::StopsAfterHello => {
                let hello = hello(self.approach, self.to);
                ended(dial(&self.place, self.to).await.unwrap(), &hello).await;
            }
            Slow::SaysNoPreface => ended(shake_hands(&self.place, self.to, self.approach).await.unwrap(), &[]).await,
            Slow::StopsInThePreface => {
                ended(shake_hands(&self.place, self.to, self.approach).await.unwrap(), &PREFACE[..10]).await;
            }
            Slow::AsksForNothing => self.says(None).await,
            Slow::NeverEndsItsHead => {
                let head = connect(&self.authority);
                self.says(Some(Frame::new(Kind::Headers, 0, 1, head))).await;
            }
            Slow::AnswersNoPing => {
                let head = connect(&self.authority);
                self.says(Some(Frame::headers(1, head))).await;
            }
        }
    }

    async fn trickle(self) {
        let hello = hello(self.approach, self.to);
        let (mut read, mut write) = dial(&self.place, self.to).await.unwrap().into_split();
        let mut rest = Vec::new();
        tokio::select! {
            _end = read.read_to_end(&mut rest) => {}
            () = async {
                for byte in hello {
                    // Until the server has closed.
                    if write.write_all(&[byte]).await.is_err() {
                        break;
                    }
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                std::future::pending::<()>().await;
            } => {}
        }
    }

    async fn says(self, frame: Option<Frame>) {
        let mut tunnel = RawTunnel::open(&self.place, self.to, self.approach, &[]).await.unwrap();
        if let Some(frame) = frame {
            tunnel.send(&frame).await.unwrap();
        }
        tunnel.until_within(2 * PATIENCE, "the end", |seen| seen.ended.is_some()).await;
    }
}

async fn ended(mut io: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin, first: &[u8]) {
    io.write_all(first).await.unwrap();
    io.flush().await.unwrap();
    let mut rest = Vec::new();
    // An error is an end as well.
    let _end = timeout(2 * PATIENCE, io.read_to_end(&mut rest)).await.expect("the server ends it");
}

/// Slowloris and half-open peers (section 2 of the failure modes; ztunnel's issues 864, 1630, 1747, 2044): every wait ends.
#[test]
fn who_never_ends_what_it_began_is_ended_at_a_deadline() {
    let scene = Scene::with_one_worker("slow");
    let peer =
        |_| Peer { place: scene.place.clone(), to: scene.far, approach: scene.good(), authority: scene.good_request() };
    let peers: Vec<(Slow, Peer)> = Slow::ALL.into_iter().map(|slow| (slow, peer(slow))).collect();
    let deed = async move {
        let mut all = JoinSet::new();
        for (slow, peer) in peers {
            all.spawn(async move {
                let started = Instant::now();
                peer.until_ended(slow).await;
                (slow, started.elapsed())
            });
        }
        all.join_all().await
    };
    let (ends, _) = scene.endured("node-b", "peers that never end", deed);
    for (slow, took) in ends {
        let deadline = slow.deadline();
        assert!(took < deadline + LATE, "{slow:?} was ended after {took:?}, {deadline:?} is its deadline");
        assert!(took + LATE > deadline, "{slow:?} was ended after {took:?}, before its deadline {deadline:?}");
    }
}

/// A peer that is gone by the time it is accepted (ECONNABORTED where the kernel says so).
#[test]
fn connections_that_are_reset_before_they_are_accepted_leave_nothing() {
    const RESET: usize = 2000;
    let scene = Scene::with_one_worker("gone");
    let (place, far) = (scene.place.clone(), scene.far);
    let deed = async move {
        for _ in 0..RESET {
            match dial(&place, far).await {
                Ok(tcp) => reset_on_close(&tcp),
                // The node proxy has had enough of this peer, and says so before the dial is over.
                Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
            }
        }
    };
    scene.endured("node-b", "resets", deed);
}
