//! A restart takes nothing out of force that the files do not clearly take out.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod common;

use std::fs;
use std::future::Future;
use std::path::Path;
use std::time::Duration;

use common::{ADDRESS, AUTHORIZATION, Ads, DEADLINE, DENY_ALL, Mesh, TempDir, names, options, pod, versions};
use mesh_controller::app;

const POLICY: &str = "default/deny-all";
const STATIC: &str = "istio-system/istio_converted_static_strict";

/// What a node that has been connected for a while is told when it comes back.
struct Node {
    held: std::collections::BTreeMap<String, String>,
}

impl Node {
    async fn connect(mesh: &Mesh) -> Self {
        let mut stream = mesh.stream("node-a").await;
        stream.subscribe(AUTHORIZATION).await;
        Self { held: versions(&stream.next().await) }
    }

    /// Policies that it is told to remove, and names of those that change.
    async fn reconnect(&self, mesh: &Mesh) -> (Vec<String>, Vec<String>) {
        let mut stream: Ads = mesh.stream("node-a").await;
        stream.subscribe_having(AUTHORIZATION, self.held.clone()).await;
        let response = stream.next().await;
        (response.removed_resources.clone(), names(&response).into_iter().map(str::to_owned).collect())
    }
}

impl Node {
    /// Policies that it is told to remove when it has been told its workloads, which may have named them.
    async fn removals(&self, mesh: &Mesh) -> Vec<String> {
        let mut stream: Ads = mesh.stream("node-a").await;
        stream.subscribe_having(AUTHORIZATION, self.held.clone()).await;
        assert!(stream.next().await.removed_resources.is_empty(), "before the workloads");
        stream.subscribe(ADDRESS).await;
        loop {
            let response = stream.next().await;
            if response.type_url == AUTHORIZATION {
                return response.removed_resources;
            }
        }
    }
}

async fn mesh_with_policy() -> (Mesh, Node) {
    let web = pod("web", "node-a", "web", "10.0.0.1");
    let mesh = Mesh::start(&[("web.yaml", &web)]).await;
    fs::create_dir(mesh.temp.path().join("config/policies")).unwrap();
    fs::write(mesh.temp.path().join("config/policies/deny.yaml"), DENY_ALL).unwrap();
    mesh.until("the policy is published", |s| s.resources[AUTHORIZATION] == 2).await;
    let node = Node::connect(&mesh).await;
    assert!(node.held.contains_key(POLICY) && node.held.contains_key(STATIC), "{:?}", node.held);
    (mesh, node)
}

/// Restarts after the change and expects that nothing is told to the node and the finding to be there.
async fn keeps_its_policy(change: impl FnOnce(&Path), finding: &str) {
    let (mesh, node) = mesh_with_policy().await;
    let mesh = mesh.restart_after(change).await;
    assert_eq!(node.reconnect(&mesh).await, (vec![], vec![]), "{finding}: removed, changed");
    assert_eq!(mesh.status().await.resources[AUTHORIZATION], 2, "{finding}: published");
    let problems = mesh.problems().await;
    assert!(problems.iter().any(|p| p.code == finding), "{problems:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_whose_file_broke_while_nobody_looked_stays_in_force() {
    let broken = |root: &Path| fs::write(root.join("config/policies/deny.yaml"), "kind: [\n").unwrap();
    keeps_its_policy(broken, "MESH002").await;
    let unknown_field = DENY_ALL.replace("spec: {}", "spec: {rulse: []}");
    let misspelt = |root: &Path| fs::write(root.join("config/policies/deny.yaml"), unknown_field).unwrap();
    keeps_its_policy(misspelt, "MESH003").await;
    let bad_port = DENY_ALL.replace("spec: {}", "spec: {rules: [{to: [{operation: {ports: ['99999']}}]}]}");
    let refused = |root: &Path| fs::write(root.join("config/policies/deny.yaml"), bad_port).unwrap();
    keeps_its_policy(refused, "MESH101").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_whose_directory_cannot_be_found_stays_in_force() {
    let renamed = |root: &Path| fs::rename(root.join("config"), root.join("config.old")).unwrap();
    keeps_its_policy(renamed, "MESH001").await;
    let unmounted = |root: &Path| {
        fs::rename(root.join("config/policies"), root.join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(root.join("not-there"), root.join("config/policies")).unwrap();
    };
    keeps_its_policy(unmounted, "MESH001").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changed_while_nobody_looked_is_told() {
    let (mesh, node) = mesh_with_policy().await;
    let mesh = mesh
        .restart_after(|root| {
            fs::rename(root.join("config/policies/deny.yaml"), root.join("config/moved.yaml")).unwrap();
        })
        .await;
    assert_eq!(node.reconnect(&mesh).await, (vec![], vec![]), "moved is not changed");
    let mesh = mesh.restart_after(|root| fs::remove_file(root.join("config/moved.yaml")).unwrap()).await;
    assert_eq!(node.removals(&mesh).await, [POLICY], "deleted");
    assert!(mesh.problems().await.is_empty());
    // And it stays deleted.
    let mesh = mesh.restart_after(|_| {}).await;
    assert_eq!(node.removals(&mesh).await, [POLICY]);
}

/// Lets a controller wait that may not publish yet, and looks at it through its admin socket.
async fn while_it_waits(temp: TempDir, look: impl AsyncFnOnce(&Mesh), mend: impl FnOnce(&Path)) -> Mesh {
    // Only its admin socket is used: there is nothing else to connect to.
    let mesh = Mesh { temp, address: "127.0.0.1:1".parse().unwrap(), server: common::Server::None };
    let mut start = Box::pin(app::start(options(mesh.temp.path())));
    let looked = async {
        let is_waiting =
            || async { mesh.try_problems().await.is_some_and(|all| all.iter().any(|p| p.code == "MESH008")) };
        wait_until(is_waiting).await;
        look(&mesh).await;
    };
    tokio::select! {
        _ = &mut start => panic!("it does not wait"),
        () = looked => {}
    }
    mend(mesh.temp.path());
    let running = tokio::time::timeout(DEADLINE, start).await.expect("it goes on by itself").expect("starts");
    Mesh { address: running.address, server: common::Server::InProcess(Box::new(running)), ..mesh }
}

async fn wait_until<F: Future<Output = bool>>(mut is_so: impl FnMut() -> F) {
    let end = std::time::Instant::now() + DEADLINE;
    while !is_so().await {
        assert!(std::time::Instant::now() < end, "not within the deadline");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_memory_nothing_is_published_before_every_file_is_understood() {
    let (mesh, node) = mesh_with_policy().await;
    let common::Server::InProcess(running) = mesh.server else { panic!() };
    running.stop().await;
    fs::remove_file(mesh.temp.path().join("state/configuration")).unwrap();
    let policy = mesh.temp.path().join("config/policies/deny.yaml");
    fs::write(&policy, format!("{DENY_ALL}---\nkind: [\n")).unwrap();
    let mesh = while_it_waits(
        mesh.temp,
        async |mesh| {
            let (code, text) = mesh.admin("/ready").await;
            assert_eq!(code, 503, "{text}");
            assert_eq!(mesh.status().await.resources[ADDRESS], 0, "nothing of it is published");
        },
        |_| fs::write(&policy, DENY_ALL).unwrap(),
    )
    .await;
    assert_eq!(node.reconnect(&mesh).await, (vec![], vec![]));
    mesh.until("no problem is left", |s| s.problems.is_empty()).await;
    // From now on it remembers.
    let mesh = mesh.restart_after(|_| fs::write(&policy, "kind: [\n").unwrap()).await;
    assert_eq!(node.reconnect(&mesh).await, (vec![], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_damaged_memory_no_error_may_be_left() {
    let (mesh, node) = mesh_with_policy().await;
    let common::Server::InProcess(running) = mesh.server else { panic!() };
    running.stop().await;
    let stored = mesh.temp.path().join("state/configuration");
    let text = fs::read_to_string(&stored).unwrap();
    fs::write(&stored, text.replace("deny-all", "deny-none")).unwrap();
    let policy = mesh.temp.path().join("config/policies/deny.yaml");
    let bad_port = DENY_ALL.replace("spec: {}", "spec: {rules: [{to: [{operation: {ports: ['99999']}}]}]}");
    fs::write(&policy, bad_port).unwrap();
    let mesh = while_it_waits(
        mesh.temp,
        async |mesh| {
            let problems = mesh.problems().await;
            let withheld = problems.iter().find(|p| p.code == "MESH008").unwrap();
            assert!(withheld.message.contains("does not match its checksum"), "{withheld:?}");
        },
        |_| fs::write(&policy, DENY_ALL).unwrap(),
    )
    .await;
    assert_eq!(node.reconnect(&mesh).await, (vec![], vec![]));
}
