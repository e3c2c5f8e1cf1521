//! Requests of a peer with a certificate of the mesh: heads that are not CONNECT to this workload as they should be, and
//! labels that a peer would like to make up.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use mesh_tests::hostile::frames::{END_HEADERS, END_STREAM, Frame, Kind, block, connect};
use mesh_tests::hostile::raw::RawTunnel;
use mesh_tests::hostile::scene::Scene;
use mesh_tests::mesh_bed::eventually;

/// What becomes of a request, and of its tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Carried,
    /// Answered with an error, or reset; the tunnel goes on.
    Refused,
    /// The tunnel is over: what was said cannot be a frame of a request.
    Over,
}

/// Sends one frame, then a good request behind it.
async fn fate(tunnel: &mut RawTunnel, frame: Frame, good: Frame) -> Fate {
    let (asked, behind) = (frame.stream, good.stream);
    tunnel.listen().send(&frame).await.unwrap();
    // The server may have ended it already.
    let _sent = tunnel.send(&good).await;
    let seen = tunnel
        .until("the fate of a request", |seen| {
            let decided = seen.heads.contains_key(&asked) || seen.resets.contains_key(&asked);
            seen.ended.is_some() || (decided && seen.heads.contains_key(&behind))
        })
        .await;
    match (seen.ended, seen.heads.get(&asked)) {
        (Some(_), _) => {
            assert!(seen.go_away.is_some(), "it ends without a reason");
            Fate::Over
        }
        (None, Some(true)) => Fate::Carried,
        (None, Some(false) | None) => {
            assert_eq!(seen.heads.get(&behind), Some(&true), "a good request on the same tunnel");
            Fate::Refused
        }
    }
}

/// All cases, each on a tunnel of its own.
fn check(scene: &Scene, cases: Vec<(String, Frame, Fate)>) {
    let mut wrong = Vec::new();
    for (what, frame, expected) in cases {
        let mut tunnel = scene.raw(&[]);
        let good = Frame::headers((frame.stream | 1) + 2, connect(&scene.good_request()));
        let got = scene.runtime.block_on(fate(&mut tunnel, frame, good));
        wrong.extend((got != expected).then(|| format!("{what}: {got:?}, not {expected:?}")));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn request(what: &str, fields: &[(&str, &str)], fate: Fate) -> (String, Frame, Fate) {
    (what.to_owned(), Frame::headers(1, block(fields)), fate)
}

/// CVE-2026-73547, GHSA-8vc2, GHSA-47vj: CONNECT without what other requests have, and with what it must not have
/// (RFC 9113 8.3, 8.5).
#[test]
fn heads_that_are_not_those_of_a_connect_are_refused() {
    let scene = Scene::new("heads");
    let authority = scene.good_request();
    let good = [(":method", "CONNECT"), (":authority", authority.as_str())];
    let with = |more: &[(&'static str, &'static str)], what: &str, fate: Fate| {
        request(what, &[&good[..], more].concat(), fate)
    };
    let other = ("host", "169.254.169.254:80");
    let flagged = |flags: u8, stream: u32, what: &str, fate: Fate| {
        (what.to_owned(), Frame::new(Kind::Headers, flags, stream, block(&good)), fate)
    };
    let cases = vec![
        request("as it should be, without a path", &good, Fate::Carried),
        with(&[(":path", "/")], "with a path", Fate::Refused),
        with(&[(":path", "")], "with an empty path", Fate::Refused),
        with(&[(":scheme", "https")], "with a scheme", Fate::Refused),
        with(&[(":scheme", "https"), (":path", "/")], "as a GET has it", Fate::Refused),
        with(&[(":protocol", "websocket"), (":scheme", "https"), (":path", "/")], "extended CONNECT", Fate::Refused),
        with(&[(":protocol", "")], "a protocol without a name", Fate::Refused),
        with(&[(":status", "200")], "with a status", Fate::Refused),
        with(&[(":authority", "127.0.0.1:7000")], "two authorities", Fate::Refused),
        with(&[(":unknown", "x")], "an unknown pseudo field", Fate::Over),
        with(&[other], "a host that differs, which nobody follows", Fate::Carried),
        with(&[("connection", "keep-alive")], "a field of HTTP/1", Fate::Refused),
        with(&[("transfer-encoding", "chunked")], "an encoding of HTTP/1", Fate::Refused),
        with(&[("Upper", "case")], "a name in upper case", Fate::Over),
        with(&[("x", "a\r\nhost: b")], "lines in a value", Fate::Over),
        with(&[("x\0", "a")], "NUL in a name", Fate::Over),
        with(&[("", "a")], "no name", Fate::Over),
        request("no authority", &[(":method", "CONNECT")], Fate::Refused),
        request("no authority, a host", &[(":method", "CONNECT"), other], Fate::Refused),
        request("no method", &[(":authority", &authority)], Fate::Refused),
        request("in lower case", &[(":method", "connect"), (":authority", &authority)], Fate::Refused),
        request("two methods", &[(":method", "GET"), good[0], good[1]], Fate::Refused),
        request("an ordinary field first", &[("x", "y"), good[0], good[1]], Fate::Refused),
        request("nothing", &[], Fate::Refused),
        flagged(END_HEADERS | END_STREAM, 1, "that ends at once", Fate::Carried),
        flagged(END_HEADERS, 0, "on the connection", Fate::Over),
        flagged(END_HEADERS, 2, "on a stream of the server", Fate::Over),
        flagged(END_HEADERS | 0x8, 1, "padded beyond its end", Fate::Over),
        ("no HPACK".into(), Frame::headers(1, [0xff; 32]), Fate::Over),
        ("DATA before HEADERS".into(), Frame::new(Kind::Data, 0, 1, [0]), Fate::Over),
    ];
    check(&scene, cases);
}

/// CVE-2026-26310 (scoped addresses), CVE-2026-73547: authorities that are not the workload's address and a port.
#[test]
fn authorities_that_are_not_this_workload_are_refused() {
    let scene = Scene::new("authority");
    let ip = scene.far.ip().to_string();
    let number: u32 = ip.parse::<std::net::Ipv4Addr>().unwrap().into();
    let long = |length: usize| format!("{}:7000", "1".repeat(length));
    let bad = [
        "[fe80::1%eth0]:80".to_owned(),
        "[fe80::1%25eth0]:80".to_owned(),
        "fe80::1%eth0:80".to_owned(),
        format!("[::ffff:{ip}%eth0]:7000"),
        "[::1]:7000".to_owned(),
        "[::]:7000".to_owned(),
        "0.0.0.0:7000".to_owned(),
        "224.0.0.1:7000".to_owned(),
        "255.255.255.255:7000".to_owned(),
        String::new(),
        ":".to_owned(),
        ":7000".to_owned(),
        ip.clone(),
        format!("{ip}:"),
        format!("{ip}:0"),
        format!("{ip}:65536"),
        format!("{ip}:-1"),
        format!("{ip}:+7000"),
        format!("{ip}:0x1b58"),
        format!("{ip}:7000:7000"),
        format!("{ip}:7000/"),
        format!("{ip}:7000?x"),
        format!("{ip}:7000#x"),
        format!(" {ip}:7000"),
        format!("{ip}:7000 "),
        format!("user@{ip}:7000"),
        format!("{ip}.:7000"),
        format!("{number}:7000"),
        format!("{number:#x}:7000"),
        format!("0{ip}:7000"),
        format!("{ip}:7000\0"),
        format!("{ip}\0:7000"),
        format!("{ip}:7000\r\nx: y"),
        format!("{ip}:7000,{ip}:7001"),
        format!("\u{ff11}{ip}:7000"),
        long(4096),
        long(60_000),
        long(64 * 1024),
        long(200_000),
    ];
    let mut cases: Vec<_> = bad
        .iter()
        .map(|authority| {
            let shown: String = authority.chars().take(40).collect();
            (format!("{shown:?}"), Frame::headers(1, connect(authority)), Fate::Refused)
        })
        .collect();
    for good in [format!("{ip}:7000"), format!("[::ffff:{ip}]:7000")] {
        cases.push((good.clone(), Frame::headers(1, connect(&good)), Fate::Carried));
    }
    check(&scene, cases);
}

/// Requests of a flood of names, each with labels of its own.
fn names() -> u32 {
    if std::env::var_os("MESH_TEST_LONG").is_some() { 100_000 } else { 10_000 }
}

/// Requests at once on one tunnel: fewer than the server takes.
const AT_ONCE: u32 = 80;

/// GHSA-42mr-jpwh-m9rv (CVE-2025-43915): what a peer only says never becomes a label.
#[test]
fn names_that_a_peer_makes_up_make_no_series() {
    let scene = Scene::new("labels");
    // One of each kind, so that their own series are there.
    let told = |authority: String, number: u32| {
        let baggage = format!("k8s.namespace.name=n{number},k8s.pod.name=p{number},service.name=s{number}");
        let forwarded = format!("for=10.0.0.1;host=h{number}.example.org");
        let more = [("baggage", baggage.as_str()), ("forwarded", forwarded.as_str())];
        [connect(&authority), block(&more)].concat()
    };
    let (good, ip) = (scene.good_request(), scene.far.ip());
    let authority = move |number: u32| match number % 4 {
        0 => good.clone(),
        1 => format!("h{number}.example.org:80"),
        2 => format!("10.{}.{}.{}:80", number >> 16 & 0xff, number >> 8 & 0xff, number & 0xff),
        _rest => format!("{ip}:{}", 20_000 + number % 20_000),
    };
    let mut tunnel = scene.raw(&[]);
    let flood = async |tunnel: &mut RawTunnel, from: u32, to: u32| {
        tunnel.listen();
        for first in (from..to).step_by(AT_ONCE as usize) {
            let mut frames = Vec::new();
            let streams = first..to.min(first + AT_ONCE);
            for number in streams.clone() {
                Frame::headers(2 * number + 1, told(authority(number), number)).put(&mut frames);
            }
            tunnel.say(&frames).await.unwrap();
            let is_answered = |seen: &mesh_tests::hostile::raw::Seen| {
                seen.ended.is_some() || seen.heads.len() as u64 == u64::from(streams.end)
            };
            tunnel.until("answers", is_answered).await;
            tunnel.answer_ping().await.unwrap();
            for number in streams.filter(|number| number % 4 == 0) {
                // Ends the carried ones in order.
                tunnel.send(&Frame::new(Kind::Data, END_STREAM, 2 * number + 1, [0])).await.unwrap();
            }
            // Each gives its byte back. What has not ended yet would count against the next ones.
            let carried = u64::from(first + AT_ONCE).min(u64::from(to)).div_ceil(4);
            tunnel.until("bytes", |seen| seen.ended.is_some() || seen.data == carried).await;
        }
    };
    scene.runtime.block_on(flood(&mut tunnel, 0, AT_ONCE));
    let before = scene.count("mesh_metric_series");
    scene.runtime.block_on(flood(&mut tunnel, AT_ONCE, names()));
    assert_eq!(scene.count("mesh_metric_series"), before);
    assert_eq!(scene.count("mesh_series_overflow_total"), 0);
    drop(tunnel);
    eventually("the end of its streams", || (scene.count("istio_tcp_sockets_open") == 0).then_some(()));
}
