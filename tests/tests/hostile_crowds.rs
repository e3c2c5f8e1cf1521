//! More connections than a node proxy can have: of one peer, of a node with many addresses, and more than descriptors.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use mesh_ctl::sandbox::Workload;
use mesh_tests::hostile::scene::Scene;
use mesh_tests::hostile::{dial, dial_from};
use mesh_tests::mesh_bed::{Attempt, eventually, two_nodes};
use mesh_tests::usage::{descriptor_limit, descriptors, limit_descriptors};

/// Descriptors that are left to a proxy that is short of them.
const LEFT: usize = 8;
/// Connections that would need more: fewer than one address may have under way.
const MORE: usize = 60;
/// Pause of an accept loop that has no descriptor, as the proxy has it.
const PAUSE: Duration = Duration::from_millis(50);

/// CVE-2020-8663; EMFILE of the failure modes: who has no descriptor for a connection waits, and does not try again and
/// again at full speed; who is connected is served; with descriptors again, everybody is.
#[test]
fn without_descriptors_accepting_pauses_and_goes_on_when_there_are_some() {
    let scene = Scene::with_one_worker("emfile");
    let (pid, place, far) = (scene.bed.proxy("node-b"), scene.place.clone(), scene.far);
    let (before, failures) = (descriptor_limit(pid).0, scene.count("mesh_accept_failures_total"));
    let deed = async move {
        limit_descriptors(pid, u64::try_from(descriptors(pid) + LEFT).unwrap());
        let mut silent = Vec::with_capacity(MORE);
        for _ in 0..MORE {
            silent.push(dial(&place, far).await.unwrap());
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
    };
    let ((), cost) = scene.endured("node-b", "no descriptors", deed);
    limit_descriptors(pid, before);
    let failures = scene.count("mesh_accept_failures_total") - failures;
    let tries = cost.took.as_millis() / PAUSE.as_millis();
    assert!(failures > 0 && u128::from(failures) <= tries + 1, "{failures} accepts failed in {:?}", cost.took);
    assert!(cost.cpu < cost.took / 2, "{cost:?}");
    let log = scene.bed.sandbox.layout.log(&mesh_ctl::sandbox::Part::Node("node-b".into()));
    let said = std::fs::read_to_string(log).unwrap();
    assert_eq!(said.lines().filter(|line| line.contains("accept failed")).count(), 1, "once a minute");
    eventually("the end of its connections", || (scene.count("istio_tcp_sockets_open") == 0).then_some(()));
}

/// Addresses of a node that went bad: all of its pods'.
const ADDRESSES: u8 = 24;
/// Silent connections of each.
const SILENT: usize = 64;
/// What a first connection may take meanwhile.
const SERVED_WITHIN: Duration = Duration::from_secs(4);

/// A node has as many addresses as it says it has pods, so a bound for each address does not bound a node.
#[test]
fn silent_connections_from_many_addresses_keep_nobody_else_out() {
    let topology = two_nodes().workload(Workload::new("other", "node-a"));
    let scene = Scene::with_node_args("crowd", topology, &["--workers", "1"]);
    let addresses: Vec<Ipv4Addr> = (0..ADDRESSES).map(|number| Ipv4Addr::new(10, 244, 1, 200 + number)).collect();
    for address in &addresses {
        let mut command = scene.bed.sandbox.host_command("node-a", "ip").unwrap();
        let status = command.args(["address", "add", &format!("{address}/32"), "dev", "lo"]).status().unwrap();
        assert!(status.success(), "{command:?}");
    }
    let silent: Vec<_> = addresses
        .iter()
        .flat_map(|address| std::iter::repeat_n(*address, SILENT))
        .map(|address| {
            let (place, far) = (scene.place.clone(), scene.far);
            scene.runtime.spawn(async move {
                loop {
                    // Again as soon as the server has had enough.
                    if let Ok(tcp) = dial_from(&place, IpAddr::V4(address), far).await {
                        let _ended = tcp.readable().await;
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            })
        })
        .collect();
    // Whoever has a place keeps it until its deadline: by then all places have been taken, and are taken again.
    eventually("a crowd", || (scene.count("mesh_handshake_failures_total") > 0).then_some(()));
    for from in ["client", "other"] {
        let started = Instant::now();
        scene.bed.stream(from, scene.bed.address("far")).wait("traffic", Attempt::is_ok);
        println!("{from}: {:?}", started.elapsed());
        assert!(started.elapsed() < SERVED_WITHIN, "{from} waits {:?} behind the crowd", started.elapsed());
    }
    silent.iter().for_each(tokio::task::JoinHandle::abort);
}
