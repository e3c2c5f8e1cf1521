//! More connections than a node proxy can have: more than descriptors.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::time::Duration;

use mesh_tests::hostile::dial;
use mesh_tests::hostile::scene::Scene;
use mesh_tests::mesh_bed::eventually;
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
