//! The Kubernetes test cluster itself: what later tests rely on.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use mesh_tests::cluster::tools::{CACHE_VARIABLE, HELM};
use mesh_tests::cluster::{Cluster, Dns, Footprint, Image, Options, PATIENCE};
use mesh_tests::cluster_bed::ClusterBed;
use rcgen::{CertificateParams, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use serde_json::json;

/// Pause between looks.
const POLL: Duration = Duration::from_millis(10);

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
        let ran = Command::new("curl").args(["-gsS", "--max-time", "5", url]).output()?;
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
    cluster.wait_for_kubelet("n2").unwrap_or_else(|error| panic!("{error:#}"));
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
    let machine = settings();
    let bed = ClusterBed::up(1, Dns::Nobody);
    let id = bed.cluster.id();
    let print = Footprint::of(&bed.cluster).unwrap();
    assert!(print.processes.len() >= 8, "control plane and node: {print:?}");
    assert_eq!(print.links().len(), 2, "bridge and one node: {print:?}");
    assert_eq!(settings(), machine, "a node changed the machine");
    // A second one of the same id is refused, and does no harm to the first.
    let options = Options { id, nodes: 1, dns: Dns::Nobody };
    let refused = Cluster::up(&options, &mut |_| {}).unwrap_err().to_string();
    assert!(refused.contains("mesh-cluster down"), "{refused}");
    // Another process ends it, which knows the id alone.
    let ctl = env!("CARGO_BIN_EXE_mesh-cluster");
    let ran = Command::new(ctl).args(["down", "--id", &id.to_string()]).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    assert_eq!(print.left(), Vec::<String>::new());
    assert!(!Cluster::down(id).unwrap(), "there was still a cluster");
}

/// What kubelet and CNI plugins would like to set for the whole machine.
fn settings() -> Vec<String> {
    let files =
        ["vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "net/ipv4/ip_forward"];
    let read = |file: &str| std::fs::read_to_string(Path::new("/proc/sys").join(file)).unwrap();
    files.into_iter().chain(["net/ipv6/conf/all/forwarding"]).map(read).collect()
}

#[test]
fn a_cluster_whose_builder_was_killed_can_be_ended() {
    let bed = ClusterBed::up(1, Dns::Nobody);
    let id = bed.cluster.id();
    assert!(Cluster::down(id).unwrap());
    let prefix = bed.cluster.addresses().prefix();
    // What is another's is left alone.
    let ip = |arguments: &str| assert!(Command::new("ip").args(arguments.split(' ')).status().unwrap().success());
    ip(&format!("link add {prefix} type bridge"));
    let refused = Cluster::up(&Options { id, nodes: 1, dns: Dns::Nobody }, &mut |_| {}).unwrap_err().to_string();
    ip(&format!("link del {prefix}"));
    assert!(refused.contains(&prefix) && !Cluster::exists(id), "{refused}");
    let parts = ["etcd", "n1"];
    // The builder dies when the first process is there, and when the last one is.
    for part in parts {
        let ctl = env!("CARGO_BIN_EXE_mesh-cluster");
        let mut up = Command::new(ctl);
        up.args(["up", "--id", &id.to_string(), "--nodes", "1", "--without-dns"]).stderr(Stdio::null());
        let mut up = up.spawn().unwrap();
        let print = within(&format!("{part} is recorded"), || {
            let cluster = Cluster::open(id).ok()?;
            cluster.processes().ok()?.iter().any(|(name, _, _)| name == part).then(|| Footprint::of(&cluster).unwrap())
        });
        up.kill().unwrap();
        up.wait().unwrap();
        assert!(!print.processes.is_empty() && print.links().contains(&prefix), "{print:?}");
        assert!(Cluster::down(id).unwrap());
        assert_eq!(print.left(), Vec::<String>::new());
    }
}

#[test]
fn certificates_are_signed_charts_installed_and_images_of_our_programs_run() {
    let bed = ClusterBed::up(1, Dns::Nobody);
    let cluster = &bed.cluster;
    signed_certificate_is_a_user(cluster);
    chart_is_installed(cluster);
    own_programs_run(cluster);
}

fn signed_certificate_is_a_user(cluster: &Cluster) {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "tester");
    params.distinguished_name.push(DnType::OrganizationName, "testers");
    let request = params.serialize_request(&key).unwrap().pem().unwrap();
    let object = json!({
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {"name": "tester"},
        "spec": {
            "request": base64(request.as_bytes()),
            "signerName": "kubernetes.io/kube-apiserver-client",
            "usages": ["client auth"],
        },
    });
    cluster.apply(&object.to_string()).unwrap();
    cluster.kubectl(&["certificate", "approve", "tester"]).unwrap();
    let signed = cluster.until("the request is signed", || {
        let signed = "go-template={{with .status.certificate}}{{. | base64decode}}{{end}}";
        let said = cluster.kubectl(&["get", "csr", "tester", "-o", signed])?;
        Ok((!said.is_empty()).then_some(said))
    });
    let (certificate, key_file) = (cluster.directory().join("tester.crt"), cluster.directory().join("tester.key"));
    std::fs::write(&certificate, signed.unwrap_or_else(|error| panic!("{error:#}"))).unwrap();
    std::fs::write(&key_file, key.serialize_pem()).unwrap();
    let flag = |name: &str, value: &Path| format!("--{name}={}", value.display());
    let mut whoami = cluster.kubectl_command();
    whoami.env_remove("KUBECONFIG").args(["auth", "whoami", "--kubeconfig=/dev/null", "-o", "json"]);
    whoami.args([&format!("--server={}", cluster.addresses().api()), &flag("client-certificate", &certificate)]);
    let authority = cluster.directory().join("pki/ca.crt");
    whoami.args([flag("client-key", &key_file), flag("certificate-authority", &authority)]);
    let said = whoami.output().unwrap();
    let user: serde_json::Value =
        serde_json::from_slice(&said.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&said.stderr)));
    assert_eq!(user["status"]["userInfo"]["username"], "tester");
    assert_eq!(user["status"]["userInfo"]["groups"][0], "testers");
}

fn base64(bytes: &[u8]) -> String {
    let mut encode = Command::new("base64");
    encode.arg("--wrap=0").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = encode.spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
}

const CHART: &str = "apiVersion: v2\nname: greeting\nversion: 1.0.0\n";
const TEMPLATE: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: "{{ .Release.Name }}", namespace: "{{ .Release.Namespace }}"}
data: {word: "{{ .Values.word }}", minor: "{{ .Capabilities.KubeVersion.Minor }}"}
"#;

fn chart_is_installed(cluster: &Cluster) {
    let chart = cluster.directory().join("chart");
    std::fs::create_dir_all(chart.join("templates")).unwrap();
    std::fs::write(chart.join("Chart.yaml"), CHART).unwrap();
    std::fs::write(chart.join("templates/map.yaml"), TEMPLATE).unwrap();
    std::fs::write(chart.join("values.yaml"), "word: hello\n").unwrap();
    let path = chart.to_string_lossy();
    cluster.helm(&["install", "first", &path, "--wait"]).unwrap();
    assert_eq!(values(cluster, "configmap/first", ".data.word"), ["hello"]);
    assert_eq!(values(cluster, "configmap/first", ".data.minor"), ["34"]);
    cluster.helm(&["upgrade", "first", &path, "--set", "word=bye"]).unwrap();
    assert_eq!(values(cluster, "configmap/first", ".data.word"), ["bye"]);
    cluster.helm(&["uninstall", "first"]).unwrap();
    assert!(cluster.kubectl(&["get", "configmap", "first"]).is_err());
}

/// Programs that are linked with shared libraries: one image from before a power cut, one that comes while the node starts.
fn own_programs_run(cluster: &Cluster) {
    let probe = Path::new(env!("CARGO_BIN_EXE_mesh-probe"));
    let image = |name: &str| {
        let image = Image::new(name).program("bin/probe", probe).unwrap();
        image.entrypoint(&["/bin/probe"]).command(&["serve", "7"])
    };
    let node = cluster.node("n1").unwrap();
    cluster.load(&image("localhost/early:1")).unwrap();
    node.stop().unwrap();
    node.start().unwrap();
    cluster.load(&image("localhost/late:1")).unwrap();
    for name in ["early", "late"] {
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {"terminationGracePeriodSeconds": 0, "containers": [{
                "name": "c",
                "image": format!("localhost/{name}:1"),
                "imagePullPolicy": "Never",
                "readinessProbe": {"tcpSocket": {"port": 7}, "periodSeconds": 1},
            }]},
        });
        cluster.apply(&pod.to_string()).unwrap();
    }
    cluster.wait(&["--for=condition=Ready", "pod/early", "pod/late"]).unwrap_or_else(|error| panic!("{error:#}"));
}

#[test]
fn programs_are_built_once_however_many_ask() {
    let cache = std::env::temp_dir().join(format!("mesh-cluster-cache-{}", std::process::id()));
    let helm = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-cluster"));
        command.args(["helm", "version", "--short"]).env(CACHE_VARIABLE, &cache);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let both = [helm().spawn().unwrap(), helm().spawn().unwrap()].map(|child| child.wait_with_output().unwrap());
    let third = helm().output().unwrap();
    std::fs::remove_dir_all(&cache).unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let version = HELM.version().unwrap();
    for ran in both.iter().chain([&third]) {
        assert!(text(&ran.stdout).starts_with(version), "{} {}", text(&ran.stdout), text(&ran.stderr));
    }
    let builds = both.iter().filter(|ran| text(&ran.stderr).contains("built helm")).count();
    assert_eq!(builds, 1, "{} {}", text(&both[0].stderr), text(&both[1].stderr));
    assert_eq!(text(&third.stderr), "", "nothing is left to do");
}

/// Looks until there is something.
fn within<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not in time");
        std::thread::sleep(POLL);
    }
}
