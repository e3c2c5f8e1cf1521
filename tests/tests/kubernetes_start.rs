//! Pods that start while the mesh is there, or is not there yet: none of them is ever outside of it.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::kubernetes_bed::{KubernetesBed, SHOP, SHOP_IN_THE_MESH, strict};

/// How long the probed pod is looked at: its kubelet has asked it a dozen times meanwhile.
const PROBED_FOR: Duration = Duration::from_secs(6);

fn prepare(cluster: &Cluster) {
    cluster.apply(&format!("{SHOP}---{SHOP_IN_THE_MESH}")).unwrap();
    cluster.wait(&["--for=condition=Ready", "pod/stranger"]).unwrap();
    cluster.wait(&["-n", "shop", "--for=condition=Ready", "pod/client", "pod/web"]).unwrap();
}

fn asks_web(bed: &KubernetesBed, namespace: &str, pod: &str) -> anyhow::Result<String> {
    bed.exec(namespace, pod, &["timeout", "3", "wget", "-q", "-O", "-", "http://web.shop.svc.cluster.local/name"])
}

/// Until a member gets through and a stranger does not.
fn until_strict(bed: &KubernetesBed) {
    let strict = bed.cluster().until("members alone get in", || {
        asks_web(bed, "shop", "client")?;
        let stranger = asks_web(bed, "default", "stranger");
        ensure!(stranger.is_err(), "a stranger gets in: {stranger:?}");
        Ok(Some(()))
    });
    strict.unwrap_or_else(|error| panic!("{error:#}\n{}", bed.logs()));
}

#[test]
fn pods_are_in_the_mesh_from_their_first_instruction_and_kubelets_probes_reach_them_under_any_policy() {
    let bed = &KubernetesBed::up(&[], prepare);
    bed.cluster().apply(&strict("shop")).unwrap();
    until_strict(bed);
    first_requests(bed);
    probes(bed);
    probes_of_others(bed);
}

/// Each pod's first instruction is a request to a strict server.
fn first_requests(bed: &KubernetesBed) {
    let cluster = bed.cluster();
    let address = cluster.kubectl(&["-n", "shop", "get", "pod", "web", "-o", "jsonpath={.status.podIP}"]).unwrap();
    let mut late = "
apiVersion: v1
kind: Namespace
metadata: {name: late, labels: {istio.io/dataplane-mode: ambient}}
"
    .to_owned();
    for number in 0..10 {
        let node = 1 + number % 2;
        write!(
            late,
            r#"---
apiVersion: v1
kind: Pod
metadata: {{name: late-{number}, namespace: late}}
spec:
  nodeName: n{node}
  restartPolicy: Never
  containers: [{{name: c, image: "localhost/busybox:1", command: [timeout, "5", wget, -q, -O, "-", "http://{address}:8080/name"]}}]
"#
        )
        .unwrap();
    }
    cluster.apply(&late).unwrap();
    let phases = ["-n", "late", "get", "pods", "-o", "jsonpath={range .items[*]}{.status.phase} {end}"];
    let ended = cluster.until("ten pods have ended", || {
        let phases = cluster.kubectl(&phases)?;
        ensure!(phases.matches("Succeeded").count() + phases.matches("Failed").count() == 10, "they are {phases}");
        Ok(Some(phases))
    });
    let phases = ended.unwrap_or_else(|error| panic!("{error:#}\n{}", bed.logs()));
    let said = || (0..10).map(|n| cluster.kubectl(&["-n", "late", "logs", &format!("late-{n}")]));
    assert!(!phases.contains("Failed"), "{phases}: {:?}\n{}", said().collect::<Vec<_>>(), bed.logs());
    let log = bed.proxy_log("n2").unwrap();
    let inbound = log.lines().filter(|line| line.contains(r#"direction="inbound""#));
    let from_late = inbound.filter(|line| line.contains(r#"src.identity="spiffe://cluster.local/ns/late/sa/default""#));
    assert!(from_late.count() >= 10, "ten by mutual TLS:\n{log}");
}

/// Nobody may have a kubelet call somebody else's pod.
fn probes_of_others(bed: &KubernetesBed) {
    for handler in ["livenessProbe", "readinessProbe", "startupProbe", "lifecycle: {postStart", "lifecycle: {preStop"] {
        for (how, host, is_fine) in
            [("httpGet", "10.1.1.1", false), ("tcpSocket", "web.shop", false), ("httpGet", "127.0.0.1", true)]
        {
            let close = if handler.contains('{') { "}" } else { "" };
            let pod = format!(
                r#"
apiVersion: v1
kind: Pod
metadata: {{name: asks, namespace: shop}}
spec:
  containers:
  - name: c
    image: localhost/busybox:1
    {handler}: {{{how}: {{host: "{host}", port: 8080}}}}{close}
"#
            );
            let taken = bed.cluster().kubectl_with(&["apply", "--dry-run=server", "-f", "-"], &pod);
            assert_eq!(taken.is_ok(), is_fine, "{handler} {how} {host}: {taken:?}");
            assert!(taken.is_ok() || format!("{taken:?}").contains("Leave host out"), "{taken:?}");
        }
    }
}

/// A pod that nobody may call, and its kubelet does.
fn probes(bed: &KubernetesBed) {
    let cluster = bed.cluster();
    let closed = r#"
apiVersion: v1
kind: Namespace
metadata: {name: closed, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: closed}
spec: {}
---
apiVersion: v1
kind: Pod
metadata: {name: probed, namespace: closed}
spec:
  nodeName: n2
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: localhost/busybox:1
    command: [sh, -c, "mkdir -p /w && hostname >/w/name && httpd -f -p 8080 -h /w"]
    startupProbe: {httpGet: {path: /name, port: 8080}, periodSeconds: 1, failureThreshold: 20}
    readinessProbe: {httpGet: {path: /name, port: 8080}, periodSeconds: 1, failureThreshold: 1}
    livenessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, failureThreshold: 1}
"#;
    cluster.apply(&format!("{closed}---{}", strict("closed"))).unwrap();
    cluster
        .wait(&["-n", "closed", "--for=condition=Ready", "pod/probed"])
        .unwrap_or_else(|error| panic!("{error:#}\n{}", bed.logs()));
    let status =
        "jsonpath={.status.podIP} {.status.containerStatuses[0].ready} {.status.containerStatuses[0].restartCount}";
    let until = Instant::now() + PROBED_FOR;
    while Instant::now() < until {
        let status = cluster.kubectl(&["-n", "closed", "get", "pod", "probed", "-o", status]).unwrap();
        let [address, ready, restarts] = status.split(' ').collect::<Vec<_>>()[..] else { panic!("{status}") };
        assert_eq!((ready, restarts), ("true", "0"), "{}", bed.logs());
        for (namespace, pod) in [("default", "stranger"), ("shop", "client")] {
            let url = format!("http://{address}:8080/name");
            let got = bed.exec(namespace, pod, &["timeout", "5", "wget", "-q", "-O", "-", &url]);
            let refused = got.as_ref().is_err_and(|error| error.to_string().contains("Connection reset"));
            assert!(refused, "{pod} is not refused: {got:?}");
        }
    }
}

#[test]
fn a_node_that_loses_power_lets_nobody_in_when_it_is_back() {
    let bed = &KubernetesBed::up(&[], prepare);
    let cluster = bed.cluster();
    cluster.apply(&strict("shop")).unwrap();
    until_strict(bed);
    let node = cluster.node("n2").unwrap();
    node.stop().unwrap();
    // By the service and so at whatever address the pod has.
    let lurk = "while :; do timeout 1 wget -q -O - http://web.shop.svc.cluster.local/name >>/tmp/got 2>/dev/null; echo . >>/tmp/tries; usleep 100000; done";
    bed.exec("default", "stranger", &["sh", "-c", &format!("({lurk}) >/dev/null 2>&1 &")]).unwrap();
    node.start().unwrap();
    let back = cluster.until("a member gets through again", || {
        asks_web(bed, "shop", "client").context("not yet")?;
        Ok(Some(()))
    });
    back.unwrap_or_else(|error| panic!("{error:#}\n{}", bed.logs()));
    let tries = bed.exec("default", "stranger", &["cat", "/tmp/tries"]).unwrap().lines().count();
    let got = bed.exec("default", "stranger", &["cat", "/tmp/got"]).unwrap();
    assert_eq!(got, "", "a stranger got in, of {tries} tries\n{}", bed.logs());
    assert!(tries >= 5, "{tries} tries");
}
