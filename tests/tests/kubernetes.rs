//! The mesh on a real cluster, installed by its chart: pods enter it and leave it by a label, and policies hold.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use anyhow::ensure;
use mesh_tests::cluster::Cluster;
use mesh_tests::kubernetes_bed::{KubernetesBed, SHOP, strict};

const NODE: &str = "daemonset/mesh-node";

const NOBODY: &str = r"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: shop}
spec: {}
";

/// So many refusals are no accident.
const REFUSALS: usize = 3;

fn asks(bed: &KubernetesBed, pod: &str, namespace: &str) -> anyhow::Result<String> {
    let url = "http://web.shop.svc.cluster.local/name";
    bed.exec(namespace, pod, &["timeout", "5", "wget", "-q", "-O", "-", url])
}

/// Asks until the answer comes, or until it is refused and goes on being refused.
fn until_answered(bed: &KubernetesBed, pod: &str, namespace: &str, wanted: bool) {
    let times = if wanted { 1 } else { REFUSALS };
    let asked = bed.cluster().until(&format!("{namespace}/{pod} is answered: {wanted}"), || {
        for _ in 0..times {
            let answer = asks(bed, pod, namespace);
            let is_as_wanted = match &answer {
                Ok(said) => wanted && said.trim() == "web",
                Err(error) => !wanted && error.to_string().contains("Connection reset"),
            };
            ensure!(is_as_wanted, "it got {answer:?}");
        }
        Ok(Some(()))
    });
    asked.unwrap_or_else(|error| panic!("{error:#}\n{}", bed.logs()));
}

/// The newest inbound record of the server's node.
fn last_record(bed: &KubernetesBed) -> String {
    let log = bed.proxy_log("n2").unwrap();
    let inbound =
        log.lines().rfind(|line| line.contains("connection complete") && line.contains("direction=\"inbound\""));
    inbound.unwrap_or_default().to_owned()
}

#[test]
fn a_label_takes_running_pods_into_the_mesh_and_out_of_it_and_policies_hold() {
    let bed = &KubernetesBed::up(&[], |cluster| drop(cluster.apply(SHOP).unwrap()));
    let cluster = bed.cluster();
    cluster.wait(&["--for=condition=Ready", "pod/stranger"]).unwrap();
    cluster.wait(&["-n", "shop", "--for=condition=Ready", "pod/client", "pod/web"]).unwrap();
    until_answered(bed, "client", "shop", true);
    assert_eq!(last_record(bed), "", "nobody is in the mesh");

    cluster.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode=ambient"]).unwrap();
    let enrolled = cluster.until("client and server speak mutual TLS", || {
        asks(bed, "client", "shop")?;
        let record = last_record(bed);
        let is_mutual = record.contains(r#"src.identity="spiffe://cluster.local/ns/shop/sa/default""#)
            && record.contains(r#"dst.identity="spiffe://cluster.local/ns/shop/sa/default""#)
            && record.contains(":15008");
        ensure!(is_mutual, "the last record is `{record}`");
        Ok(Some(()))
    });
    enrolled.unwrap_or_else(|error| panic!("{error:#}\n{}", bed.logs()));
    // Permissive: others get in, in clear and as nobody.
    until_answered(bed, "stranger", "default", true);

    cluster.apply(&strict("shop")).unwrap();
    until_answered(bed, "stranger", "default", false);
    until_answered(bed, "client", "shop", true);

    cluster.apply(NOBODY).unwrap();
    until_answered(bed, "client", "shop", false);
    cluster.kubectl(&["-n", "shop", "delete", "authorizationpolicy", "nobody"]).unwrap();
    until_answered(bed, "client", "shop", true);

    // Decisions and connections need no controller.
    cluster.kubectl(&["-n", "istio-system", "scale", "deployment/mesh-controller", "--replicas=0"]).unwrap();
    cluster.kubectl(&["-n", "istio-system", "wait", "--for=delete", "pod", "-l", "app=mesh-controller"]).unwrap();
    until_answered(bed, "client", "shop", true);
    until_answered(bed, "stranger", "default", false);
    cluster.kubectl(&["-n", "istio-system", "scale", "deployment/mesh-controller", "--replicas=1"]).unwrap();

    cluster.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode-"]).unwrap();
    until_answered(bed, "stranger", "default", true);
    until_answered(bed, "client", "shop", true);

    cluster.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode=ambient"]).unwrap();
    until_answered(bed, "stranger", "default", false);
    uninstalled(bed);
}

/// The mesh goes with its pods still in it: they are let go, and pods start without waiting for it.
fn uninstalled(bed: &KubernetesBed) {
    let cluster = bed.cluster();
    cluster.helm(&["uninstall", "mesh", "--namespace=istio-system", "--wait"]).unwrap();
    until_answered(bed, "stranger", "default", true);
    until_answered(bed, "client", "shop", true);
    let late = ["run", "late", "--image=localhost/busybox:1", "--restart=Never", "-n", "shop", "--", "sleep", "1"];
    cluster.kubectl(&late).unwrap();
    let ended = ["-n", "shop", "--for=jsonpath={.status.phase}=Succeeded", "pod/late"];
    cluster.wait(&ended).unwrap_or_else(|error| panic!("{error:#}\n{}", bed.logs()));
}

/// Asks without a pause until it is told to stop; says how often, and how often in vain.
const ASK_ON: &str = "n=0; f=0; rm -f /tmp/stop; while [ ! -e /tmp/stop ]; do \
    timeout 5 wget -q -O - http://web.shop.svc.cluster.local/name >/dev/null || f=$((f+1)); n=$((n+1)); done; echo $n $f";

/// Restarts of containers of the node proxies, one number each.
fn restarts(cluster: &Cluster) -> String {
    let jsonpath = "jsonpath={.items[*].status.containerStatuses[*].restartCount}";
    cluster.kubectl(&["-n", "istio-system", "get", "pod", "-l", "app=mesh-node", "-o", jsonpath]).unwrap()
}

#[test]
fn a_rolling_update_of_the_node_proxies_loses_no_new_connection() {
    let bed = &KubernetesBed::up(&[], |cluster| drop(cluster.apply(SHOP).unwrap()));
    let cluster = bed.cluster();
    cluster.wait(&["-n", "shop", "--for=condition=Ready", "pod/client", "pod/web"]).unwrap();
    cluster.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode=ambient"]).unwrap();
    cluster.apply(&strict("shop")).unwrap();
    cluster.wait(&["--for=condition=Ready", "pod/stranger"]).unwrap();
    until_answered(bed, "stranger", "default", false);
    until_answered(bed, "client", "shop", true);
    let asked = std::thread::scope(|scope| {
        let asking = scope.spawn(|| cluster.kubectl(&["-n", "shop", "exec", "client", "--", "sh", "-c", ASK_ON]));
        let restarted = cluster.kubectl(&["-n", "istio-system", "rollout", "restart", NODE]);
        let rolled_out = cluster.kubectl(&["-n", "istio-system", "rollout", "status", NODE, "--timeout=60s"]);
        // First of all, or a failure would wait for it.
        let stopped = cluster.kubectl(&["-n", "shop", "exec", "client", "--", "sh", "-c", "touch /tmp/stop"]);
        restarted.and(stopped).unwrap();
        rolled_out.unwrap_or_else(|error| panic!("{error:#}\n{}", bed.logs()));
        asking.join().unwrap().unwrap()
    });
    let [all, failed] = asked.split_whitespace().map(|n| n.parse::<u32>().unwrap()).collect::<Vec<_>>()[..] else {
        panic!("it said `{asked}`")
    };
    assert!(all > 0 && failed == 0, "{failed} of {all} requests failed\n{}", bed.logs());
    until_answered(bed, "stranger", "default", false);
    let restarts = restarts(cluster);
    assert!(restarts.split_whitespace().all(|times| times == "0"), "restarts {restarts}\n{}", bed.logs());
}
