//! Bytes from strangers, too many of them, and the life of the process.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod common;

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use common::{ADDRESS, DEADLINE, Mesh, names, pod, tls_config};
use mesh_controller::server::MAX_PER_PEER;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tonic::Code;

const WEB: &str = "Kubernetes//Pod/default/web";

fn web() -> String {
    pod("web", "node-a", "web", "10.0.0.1")
}

async fn is_well(mesh: &Mesh) {
    let mut stream = mesh.stream("node-a").await;
    stream.subscribe(ADDRESS).await;
    assert_eq!(names(&stream.next().await), [WEB]);
}

/// A connection from a loopback address of its own.
async fn connect_from(host: u8, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((Ipv4Addr::new(127, 0, 0, host), 0).into())?;
    socket.connect(to).await
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_before_tls_disturbs_nobody() {
    let mesh = Mesh::start(&[("web.yaml", &web())]).await;
    let mut hello = vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    hello.resize(517, 7);
    let bytes: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[0; 4096],
        &[0xff; 70_000],
        &[0x16, 3, 1, 0xff, 0xff],
        &hello,
    ];
    for garbage in bytes {
        let mut tcp = TcpStream::connect(mesh.address).await.unwrap();
        // The server may close before it has read all.
        let _ = tcp.write_all(garbage).await;
        let _ = tcp.shutdown().await;
        let mut rest = Vec::new();
        let _ = tcp.read_to_end(&mut rest).await;
    }
    is_well(&mesh).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hello_may_come_byte_by_byte() {
    let mesh = Mesh::start(&[("web.yaml", &web())]).await;
    let connector = TlsConnector::from(Arc::new(tls_config(&mesh.roots())));
    let (mut near, far) = tokio::io::duplex(64 * 1024);
    let address = mesh.address;
    let relay = tokio::spawn(async move {
        let tcp = TcpStream::connect(address).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        let (mut from_server, mut to_server) = tcp.into_split();
        let (mut from_client, mut to_client) = tokio::io::split(far);
        let up = async {
            let mut byte = [0];
            while from_client.read_exact(&mut byte).await.is_ok() && to_server.write_all(&byte).await.is_ok() {}
        };
        tokio::select! {
            () = up => {}
            _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
        }
    });
    let name = ServerName::try_from("localhost").unwrap();
    let tls = tokio::time::timeout(DEADLINE, connector.connect(name, &mut near)).await.unwrap();
    tls.expect("the handshake succeeds");
    relay.abort();
    is_well(&mesh).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_within_tls_disturbs_nobody() {
    let mesh = Mesh::start(&[("web.yaml", &web())]).await;
    let connector = TlsConnector::from(Arc::new(tls_config(&mesh.roots())));
    let preface: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let large_frame = [preface, &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]].concat();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 10_000], &large_frame, preface] {
        let tcp = TcpStream::connect(mesh.address).await.unwrap();
        let mut tls = connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap();
        let _ = tls.write_all(garbage).await;
        let _ = tls.shutdown().await;
        let mut rest = Vec::new();
        let _ = tokio::time::timeout(DEADLINE, tls.read_to_end(&mut rest)).await.expect("the server ends it");
    }
    is_well(&mesh).await;
}

/// With TLS, and then nothing, or answers to pings at most.
#[tokio::test(flavor = "multi_thread")]
async fn who_shows_no_token_may_not_stay() {
    let mesh = Mesh::start(&[("web.yaml", &web())]).await;
    let mut node = mesh.stream("node-a").await;
    node.subscribe(ADDRESS).await;
    assert_eq!(names(&node.next().await), [WEB]);
    let mut config = tls_config(&mesh.roots());
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let began = Instant::now();
    let stay = async |hello: &[u8]| {
        let tcp = TcpStream::connect(mesh.address).await.unwrap();
        let mut tls = connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap();
        tls.write_all(hello).await.unwrap();
        let mut rest = Vec::new();
        // An error is an end, too.
        let _ = tokio::time::timeout(DEADLINE, tls.read_to_end(&mut rest)).await.expect("it is ended");
    };
    // The preface, and SETTINGS without any.
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    // Pings whose answers nobody reads fill the way back, and no more of them is read.
    let pings: Vec<u8> = [&preface[..], &b"\0\0\x08\x06\0\0\0\0\0pingping".repeat(1 << 20)].concat();
    let deaf = async {
        let tcp = connect_from(78, mesh.address).await.unwrap();
        let mut tls = connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap();
        let written = tokio::time::timeout(DEADLINE, tls.write_all(&pings)).await.expect("it is ended");
        written.expect_err("it was not to be read to its end");
    };
    tokio::join!(stay(b""), stay(preface), deaf);
    assert!(began.elapsed() >= std::time::Duration::from_secs(9), "{:?}", began.elapsed());
    mesh.write("db.yaml", &pod("db", "node-b", "db", "10.0.0.2"));
    assert_eq!(names(&node.next().await), ["Kubernetes//Pod/default/db"], "who has shown one stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_cannot_take_all_the_room() {
    let mesh = Mesh::start(&[("web.yaml", &web())]).await;
    let mut held = Vec::new();
    for _ in 0..MAX_PER_PEER {
        held.push(connect_from(77, mesh.address).await.unwrap());
    }
    let mut refused = connect_from(77, mesh.address).await.unwrap();
    let start = Instant::now();
    let read = tokio::time::timeout(DEADLINE, refused.read(&mut [0; 1])).await.expect("closed at once");
    assert!(matches!(read, Ok(0) | Err(_)) && start.elapsed().as_secs() < 4, "not by the handshake's timeout");
    is_well(&mesh).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_survives_running_out_of_descriptors() {
    let mut mesh = Mesh::start_process(&[("web.yaml", &web())], "ulimit -n 48; exec \"$0\" \"$@\"").await;
    let mut held = Vec::new();
    for host in 1..=64 {
        held.push(connect_from(host, mesh.address).await.unwrap());
    }
    let start = Instant::now();
    while !mesh.process().log.lock().unwrap().contains("connection refused") {
        assert!(start.elapsed() < DEADLINE, "the limit was not reached");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    drop(held);
    is_well(&mesh).await;
    let log = mesh.process().log.lock().unwrap().clone();
    let refusal = |line: &&str| line.contains("connection refused") && line.contains("Too many open files");
    assert_eq!(log.lines().filter(refusal).count(), 1, "one line a minute:\n{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_streams_and_the_process_in_order() {
    let mut mesh = Mesh::start_process(&[("web.yaml", &web())], "exec \"$0\" \"$@\"").await;
    assert_eq!(mesh.admin("/ready").await, (200, "ready\n".into()));
    let mut stream = mesh.stream("node-a").await;
    stream.subscribe(ADDRESS).await;
    stream.next().await;
    let pid = Pid::from_raw(mesh.process().child.id().try_into().unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    assert_eq!(stream.receive().await.unwrap_err().code(), Code::Unavailable);
    drop(stream);
    let start = Instant::now();
    let status = loop {
        if let Some(status) = mesh.process().child.try_wait().unwrap() {
            break status;
        }
        assert!(start.elapsed() < DEADLINE);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    assert_eq!(status.code(), Some(0));
    assert!(!mesh.temp.path().join("admin.sock").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_on_the_state_directory_says_who_has_it() {
    let mut mesh = Mesh::start_process(&[("web.yaml", &web())], "exec \"$0\" \"$@\"").await;
    let state = mesh.state_dir();
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_mesh-controller"))
            .args(args)
            .arg("--state-dir")
            .arg(&state)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let config = mesh.temp.path().join("config");
    let (code, _, stderr) = run(&["run", "--listen", "127.0.0.1:0", "--config-dir", config.to_str().unwrap()]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains(&format!("in use by pid {}", mesh.process().child.id())), "{stderr}");
    is_well(&mesh).await;

    // `token` needs no lock, and its tokens are good.
    let (code, token, stderr) = run(&["token", "node-z"]);
    assert_eq!(code, Some(0), "{stderr}");
    let mut stream = mesh.stream_with(vec![format!("Bearer {}", token.trim())]).await.unwrap();
    stream.subscribe(ADDRESS).await;
    stream.next().await;
    assert_eq!(mesh.status().await.nodes[0].node, "node-z");
    assert_eq!(run(&["token", "Not A Node"]).0, Some(1));
}

#[test]
fn errors_at_start_say_what_to_do() {
    let temp = common::TempDir::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let run = |name: &str, args: &[&str]| {
        let state = temp.path().join(name);
        let output = Command::new(env!("CARGO_BIN_EXE_mesh-controller"))
            .args(["run", "--config-dir", "/nonexistent", "--state-dir"])
            .arg(&state)
            .args(args)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let check = |(code, stderr): (Option<i32>, String), expected: &str| {
        assert!(code == Some(1) && stderr.contains(expected), "{code:?} {stderr}");
    };
    check(run("a", &["--listen", &address]), &format!("listen on {address} (--listen)"));
    check(run("b", &["--cacerts", "/nonexistent"]), "/nonexistent/root-cert.pem");
    check(run("c", &["--leaf-ttl", "91d"]), "longer than 90d");
    let (code, stderr) = run("d", &["--leaf-ttl", "soon"]);
    assert!(code == Some(2) && stderr.contains("is not a duration"), "{code:?} {stderr}");
}
