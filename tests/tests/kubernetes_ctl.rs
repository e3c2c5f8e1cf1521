//! `mesh-ctl` against a mesh on a real cluster, through the API server alone.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::ensure;
use mesh_tests::kubernetes_bed::{KubernetesBed, SHOP, SHOP_IN_THE_MESH, strict};
use mesh_tests::sandbox_bed::{Ran, finish, mesh_ctl};
use serde_json::Value;

/// Somebody who may do nothing.
const VIEWER: &str = r"
apiVersion: v1
kind: ServiceAccount
metadata: {name: viewer, namespace: default}
";

/// The documented rights, for the viewer.
const BINDINGS: &str = r"
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: mesh-ctl, namespace: istio-system}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: mesh-ctl}
subjects: [{kind: ServiceAccount, name: viewer, namespace: default}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: mesh-ctl}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: mesh-ctl}
subjects: [{kind: ServiceAccount, name: viewer, namespace: default}]
";

/// Verbs that list something of every node.
const OF_ALL_NODES: [&[&str]; 9] = [
    &["status"],
    &["proxy-status"],
    &["node-config", "service"],
    &["node-config", "policy"],
    &["node-config", "certificate"],
    &["node-config", "log"],
    &["node-config", "all"],
    &["bpf", "status"],
    &["bpf", "map"],
];

/// `mesh-ctl` as somebody, with neither kubectl nor a sandbox at hand.
fn run_as(kubeconfig: &Path, arguments: &[&str]) -> Ran {
    let mut command = Command::new(mesh_ctl());
    command.arg("--kubeconfig").arg(kubeconfig).args(arguments).stdin(Stdio::null());
    command.env_remove("MESH_SANDBOX").env_remove("KUBECONFIG").env("PATH", "/nowhere");
    finish(command)
}

fn run(bed: &KubernetesBed, arguments: &[&str]) -> Ran {
    run_as(&bed.cluster().kubeconfig(), arguments)
}

fn items(ran: &Ran) -> Vec<Value> {
    ran.json()["items"].as_array().unwrap_or_else(|| panic!("no list: {}", ran.all())).clone()
}

/// Runs it until it ends and prints as wanted.
fn until(bed: &KubernetesBed, arguments: &[&str], wanted: (i32, &str)) -> Ran {
    let (code, text) = wanted;
    let ran = bed.cluster().until(&format!("{arguments:?} says {text}"), || {
        let ran = run(bed, arguments);
        ensure!(ran.code == Some(code) && ran.stdout.contains(text), "{}", ran.all());
        Ok(Some(ran))
    });
    ran.unwrap_or_else(|error| panic!("{error:#}\n{}", bed.logs()))
}

fn asks_web(bed: &KubernetesBed, (namespace, pod): (&str, &str)) -> anyhow::Result<String> {
    bed.exec(namespace, pod, &["timeout", "3", "wget", "-q", "-O", "-", "http://web.shop.svc.cluster.local/name"])
}

#[test]
fn mesh_ctl_says_what_the_mesh_of_a_cluster_is_and_does_through_the_api_server_alone() {
    let bed = &KubernetesBed::up(&[], |cluster| {
        cluster.apply(&format!("{SHOP}---{SHOP_IN_THE_MESH}")).unwrap();
        cluster.wait(&["--for=condition=Ready", "pod/stranger"]).unwrap();
        cluster.wait(&["-n", "shop", "--for=condition=Ready", "pod/client", "pod/web"]).unwrap();
    });
    both_nodes_are_in_sync_and_know_the_pods(bed);
    every_verb_asks_every_node(bed);
    what_traffic_does_is_said(bed);
    configuration_is_analyzed(bed);
    namespaces_come_and_go(bed);
    rights_are_needed_and_those_that_are_documented_suffice(bed);
    who_does_not_answer_is_named(bed);
}

fn both_nodes_are_in_sync_and_know_the_pods(bed: &KubernetesBed) {
    let in_sync = bed.cluster().until("both nodes serve their pod and are in sync", || {
        let ran = run(bed, &["proxy-status", "-o", "json"]);
        ensure!(ran.code == Some(0), "{}", ran.all());
        let rows = items(&ran);
        ensure!(rows.len() == 2 && rows.iter().all(|row| row["enrolled"] == "1/1"), "{}", ran.all());
        Ok(Some(rows))
    });
    for (row, node) in in_sync.unwrap_or_else(|error| panic!("{error:#}\n{}", bed.logs())).iter().zip(["n1", "n2"]) {
        let pod = bed.cluster().kubectl(&[
            "-n=istio-system",
            "get",
            "pod",
            "-l=app=mesh-node",
            &format!("--field-selector=spec.nodeName={node}"),
            "-o=jsonpath={.items[0].metadata.name}",
        ]);
        assert_eq!((&row["node"], &row["name"]), (&node.into(), &pod.unwrap().into()));
        assert_eq!((&row["controller"], &row["sync"]), (&"connected".into(), &"SYNCED".into()));
        let types = serde_json::json!({"Address": "SYNCED", "Authorization": "SYNCED"});
        assert_eq!(row["types"], types);
    }
    run(bed, &["status"]).succeeds().prints("n1").prints("n2").prints("connected");
    let known = items(run(bed, &["node-config", "workload", "-n", "shop", "-o", "json"]).succeeds());
    let mut known: Vec<String> = known
        .iter()
        .map(|row| ["node", "name", "runsOn", "protocol"].map(|key| row[key].as_str().unwrap().to_owned()).join(" "))
        .collect();
    known.sort();
    assert_eq!(known, ["n1 client n1 HBONE", "n1 web n2 HBONE", "n2 client n1 HBONE", "n2 web n2 HBONE"]);
}

fn every_verb_asks_every_node(bed: &KubernetesBed) {
    for verb in OF_ALL_NODES {
        let ran = run(bed, &[verb, &["-o", "json"]].concat());
        let mut nodes: Vec<Value> = items(ran.succeeds()).iter().map(|item| item["node"].clone()).collect();
        nodes.dedup();
        assert_eq!(nodes, ["n1", "n2"], "{}", ran.all());
        let of_one = run(bed, &[verb, &["-o", "json", "--node", "n2"]].concat());
        assert!(items(of_one.succeeds()).iter().all(|item| item["node"] == "n2"), "{}", of_one.all());
    }
    run(bed, &["node-config", "connections"]).succeeds();
    run(bed, &["bpf", "events"]).succeeds();
    run(bed, &["status", "--node", "n9"]).exits(64).complains("there are n1, n2");
    run(bed, &["status", "-i", "nowhere"]).exits(69).complains("no mesh in namespace nowhere");
    run(bed, &["status", "--context", "nobody"]).exits(65).complains("nobody");
    let versions = items(run(bed, &["version", "-o", "json"]).succeeds());
    let counts: Vec<_> =
        versions.iter().map(|row| (row["component"].as_str().unwrap(), row["count"].as_u64())).collect();
    assert_eq!(counts, [("mesh-ctl", Some(1)), ("mesh-controller", Some(1)), ("mesh-node", Some(2))]);
}

fn what_traffic_does_is_said(bed: &KubernetesBed) {
    assert_eq!(asks_web(bed, ("shop", "client")).unwrap().trim(), "web");
    until(bed, &["mtls-check", "-n", "shop", "client", "svc/web"], (0, "mtls 1 / plain 0"));
    let logs = items(run(bed, &["logs", "pod/client", "-n", "shop", "-o", "json"]).succeeds());
    let by: Vec<_> = logs.iter().map(|record| (record["node"].as_str(), record["direction"].as_str())).collect();
    for end in [(Some("n1"), Some("outbound")), (Some("n2"), Some("inbound"))] {
        assert!(by.contains(&end), "{end:?} is missing: {logs:?}");
    }
    assert_eq!(asks_web(bed, ("default", "stranger")).unwrap().trim(), "web");
    until(bed, &["mtls-check", "stranger.default", "web.shop"], (79, "PLAINTEXT"));
    until(bed, &["authz", "why", "stranger.default", "web.shop", "8080"], (0, "allow: stranger.default"));
    bed.cluster().apply(&strict("shop")).unwrap();
    until(bed, &["mtls-check", "stranger.default", "web.shop"], (79, "REFUSED"));
    until(bed, &["authz", "why", "stranger.default", "web.shop", "8080"], (0, "deny: stranger.default"));
    run(bed, &["authz", "why", "client", "svc/web", "80", "-n", "shop"]).succeeds().prints("allow: client.shop");
    let refused = asks_web(bed, ("default", "stranger"));
    assert!(refused.is_err(), "{refused:?}\n{}", bed.logs());
    assert_eq!(asks_web(bed, ("shop", "client")).unwrap().trim(), "web");
}

/// `analyze` reads the cluster, and files on top of it.
fn configuration_is_analyzed(bed: &KubernetesBed) {
    run(bed, &["analyze", "-n", "shop"]).succeeds().prints("no issues found");
    let all = run(bed, &["analyze", "-A"]);
    all.succeeds().prints("Info [IST0102] (Namespace default) ");
    assert_eq!(all.stdout.lines().count(), 1, "{}", all.all());
    let selects = |label: &str| {
        let policy =
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\n";
        format!("{policy}spec: {{selector: {{matchLabels: {{app: {label}}}}}}}\n")
    };
    let file = bed.cluster().directory().join("policy.yaml");
    let analyze = |text: &str, flag: &str| {
        std::fs::write(&file, text).unwrap();
        run(bed, &["analyze", file.to_str().unwrap(), flag])
    };
    analyze(&selects("web"), "-nshop").succeeds().prints("no issues found");
    analyze(&selects("nobody"), "-nshop").succeeds().prints("Warning [IST0127] (AuthorizationPolicy shop/p ");
    analyze(&selects("web"), "--offline").succeeds().prints("Warning [IST0127]");
    let wrong = selects("web").replace("spec: {", "spec: {action: MAYBE, ");
    analyze(&wrong, "-nshop").exits(79).prints("Error [IST0106] (AuthorizationPolicy shop/p ");
}

/// The label helpers, with what becomes of the pods.
fn namespaces_come_and_go(bed: &KubernetesBed) {
    let reads = |protocol: &str| {
        let what = format!("the stranger is {protocol}");
        let seen = bed.cluster().until(&what, || {
            let known =
                items(run(bed, &["node-config", "workload", "-n", "default", "--node", "n1", "-o", "json"]).succeeds());
            let stranger = known.iter().find(|row| row["name"] == "stranger");
            ensure!(stranger.is_some_and(|row| row["protocol"] == protocol), "{known:?}");
            Ok(Some(()))
        });
        seen.unwrap_or_else(|error| panic!("{error:#}\n{}", bed.logs()));
    };
    reads("TCP");
    run(bed, &["enroll", "default"]).succeeds().prints("namespace default is enrolled");
    reads("HBONE");
    // Under STRICT, as a member.
    let asked = bed.cluster().until("the stranger gets in", || asks_web(bed, ("default", "stranger")).map(Some));
    assert_eq!(asked.unwrap_or_else(|error| panic!("{error:#}\n{}", bed.logs())).trim(), "web");
    run(bed, &["unenroll", "ns/default"]).succeeds().prints("leave the mesh");
    reads("TCP");
    run(bed, &["enroll", "nowhere"]).exits(64).complains("no namespace `nowhere`");
}

/// A kubeconfig of the viewer's.
fn viewer(bed: &KubernetesBed) -> PathBuf {
    let cluster = bed.cluster();
    cluster.apply(VIEWER).unwrap();
    let token = cluster.kubectl(&["create", "token", "viewer"]).unwrap();
    let view = ["config", "view", "--raw", "--flatten", "-o", "json"];
    let mut config: Value = serde_json::from_str(&cluster.kubectl(&view).unwrap()).unwrap();
    for user in config["users"].as_array_mut().unwrap() {
        user["user"] = serde_json::json!({ "token": token.trim() });
    }
    let path = cluster.directory().join("viewer.conf");
    std::fs::write(&path, config.to_string()).unwrap();
    path
}

fn rights_are_needed_and_those_that_are_documented_suffice(bed: &KubernetesBed) {
    let viewer = viewer(bed);
    let refused = run_as(&viewer, &["status"]);
    refused.exits(77).complains("not permitted to list pods in namespace istio-system").complains("docs/kubernetes.md");
    let rights = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/rbac/mesh-ctl.yaml");
    bed.cluster().apply(&std::fs::read_to_string(rights).unwrap()).unwrap();
    bed.cluster().apply(BINDINGS).unwrap();
    let permitted = bed.cluster().until("the rights are there", || {
        let ran = run_as(&viewer, &["status"]);
        ensure!(ran.code == Some(0) && ran.stderr.is_empty(), "{}", ran.all());
        Ok(Some(()))
    });
    permitted.unwrap();
    for verb in OF_ALL_NODES {
        run_as(&viewer, verb).succeeds();
    }
    run_as(&viewer, &["logs", "client.shop"]).succeeds();
    run_as(&viewer, &["analyze"]).exits(77).complains("list namespaces");
    run_as(&viewer, &["enroll", "shop"]).exits(77).complains("patch namespaces");
    // May see the pods, and not ask them.
    let remove = r#"[{"op": "remove", "path": "/rules/2"}]"#;
    bed.cluster().kubectl(&["-n=istio-system", "patch", "role", "mesh-ctl", "--type=json", "-p", remove]).unwrap();
    let refused = bed.cluster().until("asking is refused", || {
        let ran = run_as(&viewer, &["status"]);
        ensure!(ran.code == Some(77), "{}", ran.all());
        Ok(Some(ran))
    });
    refused.unwrap().complains("create pods/exec");
}

fn who_does_not_answer_is_named(bed: &KubernetesBed) {
    let cluster = bed.cluster();
    let set = ["-n=istio-system", "patch", "daemonset", "mesh-node", "--type=strategic", "-p"];
    let broken = r#"{"spec": {"updateStrategy": {"type": "OnDelete", "rollingUpdate": null}, "template": {"spec": {"containers": [
        {"name": "node-proxy", "image": "localhost/nothing:1", "imagePullPolicy": "Never"}]}}}}"#;
    cluster.kubectl(&[&set[..], &[broken]].concat()).unwrap();
    let of_n2 = ["-n=istio-system", "delete", "pod", "-l=app=mesh-node", "--field-selector=spec.nodeName=n2"];
    cluster.kubectl(&of_n2).unwrap();
    let named = cluster.until("the proxy that cannot start is named", || {
        let ran = run(bed, &["node-config", "workload"]);
        let why = ran.stderr.contains("node n2") && ran.stderr.contains("ErrImageNeverPull");
        ensure!(ran.code == Some(69) && why, "{}", ran.all());
        Ok(Some(ran))
    });
    let ran = named.unwrap_or_else(|error| panic!("{error:#}\n{}", bed.logs()));
    assert!(ran.stdout.lines().any(|line| line.starts_with("n1 ")), "n1 is shown all the same: {}", ran.all());
    // A question that its node alone can answer.
    run(bed, &["authz", "why", "client.shop", "web.shop", "8080"]).exits(69).complains("n2");
    run(bed, &["status"]).exits(69).prints("n1").complains("n2");
    run(bed, &["status", "--node", "n1"]).succeeds();

    cluster.node("n1").unwrap().stop().unwrap();
    let ran = run(bed, &["node-config", "workload"]);
    ran.exits(69).complains("node n1").complains("node n2");
    assert_eq!(ran.stdout, "", "{}", ran.all());
}
