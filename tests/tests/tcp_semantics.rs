//! TCP through the mesh is TCP: ends, resets, back-pressure and addresses pass as they are, on every way that a
//! connection can take and from both of its ends.
//!
//! Connections that end because a policy changes: `live_policy`.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_api::admin::NodeStatus;
use mesh_ebpf_common::INNER_MARK;
use mesh_node::dial::{KEEPALIVE_IDLE, Namespaces, Source, connect_application};
use mesh_tests::capture_bed::tcp::{connect, mapped};
use mesh_tests::ends::{
    Ends, Family, Pattern, ROUTES, Route, connections_of, every_route, is_reset, is_reset_without_reading, reset,
};
use mesh_tests::mesh_bed::{MeshBed, PATIENCE, eventually};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Pid;

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// Many round trips of every buffer on the way, and little enough for a debug build.
const SOME_BYTES: u64 = 8 << 20;
/// What a connection that nobody reads may have taken: the buffers of up to six sockets, 10 MiB each where the kernel
/// sizes them by itself, and a stream's window.
const BUFFERED_AT_MOST: u64 = 64 << 20;
/// What it may cost a node proxy: a stream's window, and what the allocator makes of it.
const HELD_AT_MOST: u64 = 8 << 20;
/// Anything that waited for the client's first bytes, to tell protocols apart, would wait longer.
const AT_ONCE: Duration = Duration::from_secs(2);

/// Runs a case on a fresh connection of every route, each with either end as the one that acts.
fn from_each_end(bed: &MeshBed, families: &[Family], case: impl Fn(&str, TcpStream, TcpStream)) {
    for route in ROUTES {
        for family in families.iter().copied() {
            let Ends { client, server } = bed.ends_by(route, family);
            case(&format!("{} by {family:?}, the client acts", route.name), client, server);
            let Ends { client, server } = bed.ends_by(route, family);
            case(&format!("{} by {family:?}, the server acts", route.name), server, client);
        }
    }
    none_is_left(bed);
}

/// Both node proxies have forgotten all connections.
fn none_is_left(bed: &MeshBed) {
    for node in ["node-a", "node-b"] {
        eventually(&format!("the end of all connections on {node}"), || {
            (bed.status(node)?.connections == 0).then_some(())
        });
    }
}

fn say(mut to: &TcpStream, words: &[u8], what: &str) {
    to.write_all(words).unwrap_or_else(|e| panic!("{what}: send {words:?}: {e}"));
}

/// Reads exactly these words.
fn hear(mut from: &TcpStream, words: &[u8], what: &str) {
    let mut heard = vec![0; words.len()];
    from.read_exact(&mut heard).unwrap_or_else(|e| panic!("{what}: expected {words:?}: {e}"));
    assert_eq!(heard, words, "{what}");
}

/// Both ends are known to be connected with each other.
fn talk(one: &TcpStream, other: &TcpStream, what: &str) {
    say(one, b"ping", what);
    hear(other, b"ping", what);
    say(other, b"pong", what);
    hear(one, b"pong", what);
}

/// Reads until the other end's orderly end.
fn rest(mut from: &TcpStream, what: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).unwrap_or_else(|e| panic!("{what}: after {} bytes: {e}", bytes.len()));
    bytes
}

/// Reads until the reset that must come.
fn until_reset(mut from: &TcpStream, what: &str) {
    let mut bytes = [0; 4096];
    loop {
        match from.read(&mut bytes) {
            Ok(0) => panic!("{what}: an orderly end where a reset belongs"),
            Ok(_) => {}
            Err(error) if is_reset(&error) => return,
            Err(error) => panic!("{what}: {error} where a reset belongs"),
        }
    }
}

/// The client's own node proxy answers a dial before the application does, so a refusal may be a reset that follows.
fn refused(dialled: io::Result<TcpStream>, what: &str) {
    match dialled {
        Ok(stream) => until_reset(&stream, what),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused || is_reset(&error) => {}
        Err(error) => panic!("{what}: {error} where a refusal belongs"),
    }
}

#[test]
fn an_end_that_has_said_all_still_hears_the_other() {
    let bed = MeshBed::up("half", every_route());
    from_each_end(&bed, &FAMILIES, |what, one, other| {
        say(&one, b"last words", what);
        one.shutdown(Shutdown::Write).unwrap();
        assert_eq!(rest(&other, what), b"last words", "{what}");
        let heard = std::thread::scope(|scope| {
            scope.spawn(move || {
                Pattern::number(1).write(&other, 0, SOME_BYTES).unwrap_or_else(|e| panic!("{what}: {e}"));
            });
            Pattern::number(1).read_to_end(&one, what)
        });
        assert_eq!(heard, SOME_BYTES, "{what}");
    });
}

#[test]
fn a_reset_is_a_reset_at_the_other_end() {
    let bed = MeshBed::up("reset", every_route());
    from_each_end(&bed, &FAMILIES, |what, one, other| {
        talk(&one, &other, what);
        reset(one);
        until_reset(&other, what);
    });
    from_each_end(&bed, &FAMILIES, |what, one, other| {
        let what = &format!("{what} after the other end has said all");
        other.shutdown(Shutdown::Write).unwrap();
        assert_eq!(rest(&one, what), b"", "{what}");
        reset(one);
        until_reset(&other, what);
    });
    from_each_end(&bed, &FAMILIES, |what, one, other| {
        let what = &format!("{what} after it has said all");
        one.shutdown(Shutdown::Write).unwrap();
        assert_eq!(rest(&other, what), b"", "{what}");
        reset(one);
        assert!(is_reset_without_reading(&other), "{what}");
    });
}

#[test]
fn a_reset_reaches_an_end_that_does_not_read_and_one_that_cannot_write() {
    let bed = MeshBed::up("stuck", every_route());
    from_each_end(&bed, &[Family::V4], |what, one, other| {
        Pattern::number(2).write_until_stalled(&one);
        reset(one);
        assert!(is_reset_without_reading(&other), "{what}: the other end does not read");
    });
    from_each_end(&bed, &[Family::V4], |what, one, other| {
        Pattern::number(3).write_until_stalled(&other);
        reset(one);
        assert!(is_reset_without_reading(&other), "{what}: the other end cannot write");
    });
}

fn resident_bytes(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("resident memory");
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn a_reader_that_stops_stops_the_sender_costs_little_and_misses_nothing_when_it_goes_on() {
    let bed = MeshBed::up("slow", every_route());
    let proxies = ["node-a", "node-b"].map(|node| bed.proxy(node));
    from_each_end(&bed, &[Family::V4], |what, one, other| {
        talk(&one, &other, what);
        let before = proxies.map(resident_bytes);
        let stalled = Pattern::number(4).write_until_stalled(&one);
        assert!(stalled < BUFFERED_AT_MOST, "{what}: {stalled} bytes were taken that nobody reads");
        for (pid, before) in proxies.into_iter().zip(before) {
            let held = resident_bytes(pid).saturating_sub(before);
            assert!(held < HELD_AT_MOST, "{what}: a node proxy grew by {held} bytes of {stalled}");
        }
        let read = std::thread::scope(|scope| {
            scope.spawn(move || {
                Pattern::number(4).write(&one, stalled, SOME_BYTES).unwrap_or_else(|e| panic!("{what}: {e}"));
            });
            Pattern::number(4).read_to_end(&other, what)
        });
        assert_eq!(read, stalled + SOME_BYTES, "{what}");
    });
}

/// Each has filled every buffer on its way, so that together they could fill what connections have in common.
#[test]
fn readers_that_stop_do_not_stop_others() {
    const STALLED: usize = 12;
    let bed = MeshBed::up("others", every_route());
    for route in ROUTES {
        let stalled: Vec<Ends> = (0..2 * STALLED).map(|_| bed.ends(route)).collect();
        let pattern = Pattern::number(5);
        std::thread::scope(|scope| {
            for (number, ends) in stalled.iter().enumerate() {
                let (pattern, from) = (&pattern, if number < STALLED { &ends.client } else { &ends.server });
                scope.spawn(|| pattern.write_until_stalled(from));
            }
        });
        for number in 0..8 {
            let Ends { client, server } = bed.ends(route);
            talk(&client, &server, &format!("{}, connection {number} beside those that stall", route.name));
        }
    }
}

#[test]
fn much_goes_both_ways_at_once() {
    let bed = MeshBed::up("both", every_route());
    for route in ROUTES {
        for family in FAMILIES {
            let what = &format!("{} by {family:?}", route.name);
            let Ends { client, server } = bed.ends_by(route, family);
            std::thread::scope(|scope| {
                for (number, from, to) in [(6, &client, &server), (7, &server, &client)] {
                    let pattern = Arc::new(Pattern::number(number));
                    let writer = Arc::clone(&pattern);
                    scope.spawn(move || {
                        writer.write(from, 0, SOME_BYTES).unwrap_or_else(|e| panic!("{what}: {e}"));
                        from.shutdown(Shutdown::Write).unwrap();
                    });
                    scope.spawn(move || assert_eq!(pattern.read_to_end(to, what), SOME_BYTES, "{what}"));
                }
            });
        }
    }
    none_is_left(&bed);
}

#[test]
fn small_writes_are_not_held_back_and_a_peer_that_vanishes_is_noticed() {
    let bed = MeshBed::up("options", every_route());
    let open: Vec<Ends> = ROUTES.into_iter().flat_map(|r| FAMILIES.map(|family| bed.ends_by(r, family))).collect();
    open.iter().for_each(|ends| talk(&ends.client, &ends.server, "options"));
    // node-a: 3 captured, 1 tunnel, 1 to the application, 1 out in clear. node-b: 1 tunnel, 1 in clear, 2 to the
    // application. By each family.
    for (node, applications, others) in [("node-a", 2, 10), ("node-b", 4, 4)] {
        let sockets = connections_of(bed.proxy(node));
        let carries = |socket: &&TcpStream| socket.peer_addr().is_ok_and(|peer| peer.port() != 15012);
        let mut seen = (0, 0);
        for socket in sockets.iter().filter(carries) {
            let what = format!("{node}: {:?} to {:?}", socket.local_addr(), socket.peer_addr());
            assert!(socket.nodelay().unwrap(), "{what}: TCP_NODELAY");
            if getsockopt(socket, sockopt::Mark).unwrap() == INNER_MARK {
                // Both ends are in this kernel: the application cannot vanish without a word.
                seen.0 += 1;
                continue;
            }
            seen.1 += 1;
            assert!(getsockopt(socket, sockopt::KeepAlive).unwrap(), "{what}: SO_KEEPALIVE");
            let idle = getsockopt(socket, sockopt::TcpKeepIdle).unwrap();
            assert_eq!(u64::from(idle), KEEPALIVE_IDLE.as_secs(), "{what}: TCP_KEEPIDLE");
        }
        assert!(seen.0 >= applications && seen.1 >= others, "{node}: {seen:?} of {sockets:?}");
    }
}

#[test]
fn a_server_that_speaks_first_is_heard_at_once() {
    let bed = MeshBed::up("first", every_route());
    for route in ROUTES {
        for family in FAMILIES {
            let what = &format!("{} by {family:?}", route.name);
            let started = Instant::now();
            let Ends { client, server } = bed.ends_by(route, family);
            say(&server, b"220 ready\r\n", what);
            hear(&client, b"220 ready\r\n", what);
            assert!(started.elapsed() < AT_ONCE, "{what}: after {:?}", started.elapsed());
        }
    }
}

#[test]
fn a_client_that_leaves_without_a_byte_is_seen_to_come_and_go() {
    let bed = MeshBed::up("silent", every_route());
    for route in ROUTES {
        for family in FAMILIES {
            let what = &format!("{} by {family:?}", route.name);
            let listener = bed.listen(route.to, SocketAddr::new(bed.address_of(route.to, family), 0));
            for number in 0..10 {
                let what = &format!("{what}, connection {number}");
                drop(bed.dial(route.from, listener.address()).unwrap());
                assert_eq!(rest(&listener.accept(what), what), b"", "{what}");
            }
        }
    }
    none_is_left(&bed);
}

/// Half a file must not look like a whole one.
#[test]
fn a_killed_proxy_resets_what_it_carried() {
    let bed = MeshBed::up("killed", every_route());
    for route in ROUTES {
        let Ends { client, server } = bed.ends(route);
        talk(&client, &server, route.name);
        let proxies = ["node-a", "node-b"].map(|node| (node, bed.proxy(node)));
        for (_, proxy) in proxies {
            kill(Pid::from_raw(proxy), Signal::SIGKILL).unwrap();
        }
        for (end, stream) in [("client", &client), ("server", &server)] {
            assert!(is_reset_without_reading(stream), "{}: the {end} is not told of the loss", route.name);
        }
        for (node, proxy) in proxies {
            let is_new = |status: &NodeStatus| status.ready && i32::try_from(status.pid) != Ok(proxy);
            eventually("the next proxy", || bed.status(node).filter(is_new));
        }
    }
}

/// As log and metric shippers do it. The proxy is stopped, so that all has happened before it accepts.
#[test]
fn what_a_client_said_before_it_left_arrives() {
    let bed = MeshBed::up("said", every_route());
    let (node, route) = ("node-a", ROUTES[0]);
    let listener = bed.listen(route.to, SocketAddr::new(bed.address_of(route.to, Family::V4), 0));
    let proxy = Pid::from_raw(bed.proxy(node));
    kill(proxy, Signal::SIGSTOP).unwrap();
    for _ in 0..10 {
        say(&bed.dial(route.from, listener.address()).unwrap(), b"and nothing more", "dial");
    }
    kill(proxy, Signal::SIGCONT).unwrap();
    for number in 0..10 {
        let what = &format!("connection {number}");
        assert_eq!(rest(&listener.accept(what), what), b"and nothing more", "{what}");
    }
}

#[test]
fn a_port_that_nobody_listens_on_refuses() {
    let bed = MeshBed::up("refuse", every_route());
    for route in ROUTES {
        for family in FAMILIES {
            let what = &format!("{} by {family:?}", route.name);
            let listener = bed.listen(route.to, SocketAddr::new(bed.address_of(route.to, family), 0));
            let address = listener.address();
            drop(listener);
            refused(bed.dial(route.from, address), what);
        }
    }
    none_is_left(&bed);
}

#[test]
fn both_applications_see_the_addresses_that_they_would_see_without_a_mesh() {
    let bed = MeshBed::up("names", every_route());
    for Route { name, from, to } in ROUTES {
        for family in FAMILIES {
            let what = format!("{name} by {family:?}");
            let own = bed.address_of(from, family);
            let listener = bed.listen(to, SocketAddr::new(bed.address_of(to, family), 0));
            let client = bed.dial(from, listener.address()).unwrap();
            let server = listener.accept(&what);
            talk(&client, &server, &what);
            assert_eq!(client.peer_addr().unwrap(), listener.address(), "{what}: the client's getpeername");
            assert_eq!(client.local_addr().unwrap().ip(), own, "{what}: the client's getsockname");
            assert_eq!(server.local_addr().unwrap(), listener.address(), "{what}: the server's getsockname");
            assert_eq!(server.peer_addr().unwrap().ip(), own, "{what}: the server's getpeername");
        }
    }
}

/// As Java does it: one socket of IPv6 for both families.
#[test]
fn an_ipv6_socket_can_dial_ipv4() {
    let bed = MeshBed::up("mapped", every_route());
    for Route { name, from, to } in ROUTES {
        let listener = bed.listen(to, SocketAddr::new(bed.address_of(to, Family::V4), 0));
        let target = mapped(listener.address());
        let client = connect(bed.socket(from, target.ip()), target, PATIENCE).unwrap_or_else(|e| panic!("{name}: {e}"));
        let server = listener.accept(name);
        talk(&client, &server, name);
        let own = bed.address_of(from, Family::V4);
        assert_eq!(client.peer_addr().unwrap(), target, "{name}: the client's getpeername");
        assert_eq!(client.local_addr().unwrap().ip(), mapped(SocketAddr::new(own, 0)).ip(), "{name}: its getsockname");
        assert_eq!(server.peer_addr().unwrap().ip(), own, "{name}: the server's getpeername");
    }
}

/// More than one tunnel's streams, in each of the proxy's workers.
#[test]
fn hundreds_of_connections_at_once() {
    const CONNECTIONS: usize = 300;
    let bed = MeshBed::up("many", every_route());
    for route in ROUTES {
        let open: Vec<Ends> = (0..CONNECTIONS).map(|_| bed.ends(route)).collect();
        for (number, Ends { client, server }) in open.iter().enumerate() {
            talk(client, server, &format!("{}, connection {number} of {CONNECTIONS}", route.name));
        }
    }
    none_is_left(&bed);
}

/// From outside it refuses, as without a mesh: loopback is what an application chooses to be alone.
#[test]
fn an_application_on_loopback_is_there_for_its_own_workload_only() {
    let bed = MeshBed::up("loopback", every_route());
    for Route { name, from, to } in ROUTES {
        let listener = bed.listen(to, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0));
        let inside = bed.dial(to, listener.address()).unwrap();
        let server = listener.accept(name);
        talk(&inside, &server, name);
        assert_eq!(server.peer_addr().unwrap(), inside.local_addr().unwrap(), "{name}");
        refused(bed.dial(from, SocketAddr::new(bed.address_of(to, Family::V4), listener.address().port())), name);
        assert!(listener.accept_now().is_none(), "{name}: it came through to loopback");
    }
}

#[test]
fn a_clients_address_can_be_carried_to_loopback_too() {
    let bed = MeshBed::up("carried", every_route());
    let client: IpAddr = bed.address_of("client", Family::V4);
    let listener = bed.listen("far", SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0));
    let netns = File::open(bed.sandbox.layout.netns("far")).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let dialled = runtime.block_on(async {
        let namespaces = Namespaces::of_this_thread().unwrap();
        let stream = connect_application(&namespaces, netns.as_fd(), Source::Client(client), listener.address()).await;
        stream.unwrap().into_std().unwrap()
    });
    dialled.set_nonblocking(false).unwrap();
    let server = listener.accept("loopback");
    assert_eq!(server.peer_addr().unwrap().ip(), client);
    talk(&dialled, &server, "loopback");
}
