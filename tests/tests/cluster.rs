//! The Kubernetes test cluster itself: what later tests rely on.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use mesh_tests::cluster::{Cluster, Dns, Footprint};
use mesh_tests::cluster_bed::ClusterBed;

/// A pod on each of two nodes that serves its own name, and a service of both families before the second.
const TWO_PODS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: a, labels: {app: a}}
spec:
  nodeName: n1
  terminationGracePeriodSeconds: 0
  containers: [{name: c, image: "localhost/busybox:1", command: [sh, -c, "mkdir -p /w && hostname >/w/name && httpd -f -p 8080 -h /w"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: b, labels: {app: b}}
spec:
  nodeName: n2
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: localhost/busybox:1
    command: [sh, -c, "mkdir -p /w && hostname >/w/name && httpd -f -p 8080 -h /w"]
    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: b}
spec:
  type: NodePort
  selector: {app: b}
  ipFamilyPolicy: RequireDualStack
  ports: [{port: 80, targetPort: 8080, nodePort: 30080}]
"#;

/// Asks from a pod until the answer is the expected one.
fn pod_gets(cluster: &Cluster, pod: &str, url: &str, answer: &str) {
    let asked = cluster.until(&format!("pod {pod} gets {answer} from {url}"), || {
        let said = cluster.kubectl(&["exec", pod, "--", "timeout", "5", "wget", "-q", "-O", "-", url])?;
        anyhow::ensure!(said.trim() == answer, "it got `{}`", said.trim());
        Ok(Some(()))
    });
    asked.unwrap_or_else(|error| panic!("{error:#}"));
}

/// As [`pod_gets`], from the machine.
fn machine_gets(cluster: &Cluster, url: &str, answer: &str) {
    let asked = cluster.until(&format!("the machine gets {answer} from {url}"), || {
        let ran = std::process::Command::new("curl").args(["-gsS", "--max-time", "5", url]).output()?;
        let said = String::from_utf8_lossy(&ran.stdout);
        anyhow::ensure!(said.trim() == answer, "it got `{}` {}", said.trim(), String::from_utf8_lossy(&ran.stderr));
        Ok(Some(()))
    });
    asked.unwrap_or_else(|error| panic!("{error:#}"));
}

/// The space-separated values of a JSON path.
fn values(cluster: &Cluster, object: &str, path: &str) -> Vec<String> {
    let said = cluster.kubectl(&["get", object, "-o", &format!("jsonpath={{{path}}}")]).unwrap();
    said.split_whitespace().map(str::to_owned).collect()
}

/// As part of a URL.
fn host(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

#[test]
fn pods_of_two_nodes_reach_each_other_by_address_service_and_name_and_survive_a_power_cut() {
    let bed = ClusterBed::up(2, Dns::CoreDns);
    let cluster = &bed.cluster;
    cluster.apply(TWO_PODS).unwrap();
    cluster.wait(&["--for=condition=Ready", "pod/a", "pod/b"]).unwrap();

    let pods = values(cluster, "pod/b", ".status.podIPs[*].ip");
    let services = values(cluster, "service/b", ".spec.clusterIPs[*]");
    assert_eq!((pods.len(), services.len()), (2, 2), "both families: {pods:?} {services:?}");
    for address in &pods {
        pod_gets(cluster, "a", &format!("http://{}:8080/name", host(address)), "b");
    }
    for service in &services {
        pod_gets(cluster, "a", &format!("http://{}/name", host(service)), "b");
    }
    pod_gets(cluster, "a", "http://b.default.svc.cluster.local/name", "b");
    pod_gets(cluster, "a", "http://b/name", "b");
    let resolved = cluster.kubectl(&["exec", "a", "--", "nslookup", "kubernetes.default.svc.cluster.local"]).unwrap();
    assert!(resolved.contains(&cluster.addresses().api_service().to_string()), "{resolved}");
    // By the other node's port as well: kube-proxy there sends it on.
    for node in cluster.nodes() {
        let (v4, v6) = node.addresses().unwrap();
        machine_gets(cluster, &format!("http://{v4}:30080/name"), "b");
        machine_gets(cluster, &format!("http://[{v6}]:30080/name"), "b");
    }

    let cut = cluster.node("n2").unwrap();
    let before = cut.first_process().unwrap();
    cut.stop().unwrap();
    assert_eq!(cut.first_process().unwrap(), None);
    assert!(cut.sh(&["true"]).is_err(), "a command ran in a node that is off");
    cut.start().unwrap();
    assert_ne!(cut.first_process().unwrap(), before);
    cluster
        .until("pod b runs again", || {
            let restarts = values(cluster, "pod/b", ".status.containerStatuses[0].restartCount");
            let ready = values(cluster, "pod/b", ".status.containerStatuses[0].ready");
            Ok((restarts == ["1"] && ready == ["true"]).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error:#}"));
    pod_gets(cluster, "a", "http://b/name", "b");
    assert_eq!(cut.sh(&["hostname"]).unwrap().trim(), "n2");
}

#[test]
fn down_leaves_nothing_and_needs_no_memory_of_up() {
    let bed = ClusterBed::up(1, Dns::Nobody);
    let id = bed.cluster.id();
    let print = Footprint::of(&bed.cluster).unwrap();
    assert!(print.processes.len() >= 8, "control plane and node: {print:?}");
    assert_eq!(print.links().len(), 2, "bridge and one node: {print:?}");
    // A second one of the same id is refused, and does no harm to the first.
    let options = mesh_tests::cluster::Options { id, nodes: 1, dns: Dns::Nobody };
    let refused = Cluster::up(&options, &mut |_| {}).unwrap_err().to_string();
    assert!(refused.contains("mesh-cluster down"), "{refused}");
    // Another process ends it, which knows the id alone.
    let ctl = env!("CARGO_BIN_EXE_mesh-cluster");
    let ran = std::process::Command::new(ctl).args(["down", "--id", &id.to_string()]).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    assert_eq!(print.left(), Vec::<String>::new());
    assert!(!Cluster::down(id).unwrap(), "there was still a cluster");
}
