//! Objects with wrong values on a real cluster: through the webhook, around it, and with nobody who could be asked.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::path::{Path, PathBuf};

use anyhow::ensure;
use mesh_ctl::sandbox::binaries_beside;
use mesh_tests::cluster::{Cluster, Dns, Image};
use mesh_tests::cluster_bed::ClusterBed;

const POLICY: &str = "security.istio.io/v1 AuthorizationPolicy";
const OLD_POLICY: &str = "security.istio.io/v1beta1 AuthorizationPolicy";
const PEER: &str = "security.istio.io/v1 PeerAuthentication";
const ENTRY: &str = "networking.istio.io/v1 WorkloadEntry";

/// Specs that the schema takes and the mesh cannot mean, and where the fault is.
const WRONG: &[(&str, &str, &str)] = &[
    (
        POLICY,
        "{rules: [{from: [{source: {ipBlocks: [not-an-address]}}]}]}",
        "MESH101 spec.rules[0].from[0].source.ipBlocks[0]: `not-an-address` is neither an address nor a CIDR",
    ),
    (
        OLD_POLICY,
        "{rules: [{from: [{source: {notIpBlocks: [10.0.0.0/8, 10.0.0.0/33]}}]}]}",
        "MESH101 spec.rules[0].from[0].source.notIpBlocks[1]: `10.0.0.0/33`",
    ),
    (
        POLICY,
        "{action: DENY, rules: [{}, {to: [{operation: {ports: ['80', '99999']}}]}]}",
        "MESH101 spec.rules[1].to[0].operation.ports[1]: `99999` is not a port",
    ),
    (
        POLICY,
        "{rules: [{when: [{key: source.ip, notValues: [10.0.0]}]}]}",
        "MESH101 spec.rules[0].when[0].notValues[0]: `10.0.0`",
    ),
    (
        POLICY,
        "{rules: [{when: [{key: destination.port, values: [http]}]}]}",
        "MESH101 spec.rules[0].when[0].values[0]: `http` is not a port",
    ),
    (
        POLICY,
        "{rules: [{from: [{source: {trustDomains: [a.b]}}]}]}",
        "MESH003 spec.rules[0].from[0].source.trustDomains:",
    ),
];

const GOOD: &[(&str, &str)] = &[
    (POLICY, "{}"),
    (OLD_POLICY, "{rules: [{from: [{source: {ipBlocks: [10.0.0.0/8, 'fd00::1']}}]}]}"),
    (PEER, "{mtls: {mode: STRICT}}"),
    (ENTRY, "{address: 10.0.0.1, serviceAccount: vm}"),
];

/// What must be possible whatever the mesh does.
const OTHERS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: elsewhere}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: it}
data: {a: b}
---
apiVersion: v1
kind: Service
metadata: {name: it}
spec:
  selector: {app: it}
  ports: [{port: 80}]
---
apiVersion: v1
kind: Pod
metadata: {name: it}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: c, image: "localhost/busybox:1", command: [sleep, infinity]}]
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: it}
spec: {jwtRules: [{issuer: a}]}
"#;

const CONTROLLER: &str = "deployment/mesh-controller";
const CONFIGURATION: &str = "validatingwebhookconfiguration/mesh-controller";
const BUNDLE: &str = "jsonpath={.webhooks[0].clientConfig.caBundle}";

fn tree() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn object(kind: &str, name: &str, spec: &str) -> String {
    let (version, kind) = kind.split_once(' ').unwrap();
    format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n")
}

/// Everything that is said to who applies an object.
fn said(cluster: &Cluster, arguments: &[&str], yaml: &str) -> Result<String, String> {
    let path = cluster_file(yaml);
    let mut command = cluster.kubectl_command();
    let output = command.args(arguments).arg("-f").arg(&path).output().unwrap();
    std::fs::remove_file(path).unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    if output.status.success() { Ok(text) } else { Err(text) }
}

fn cluster_file(yaml: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("mesh-admission-{}.yaml", std::process::id()));
    std::fs::write(&path, yaml).unwrap();
    path
}

fn judge(cluster: &Cluster, kind: &str, spec: &str) -> Result<String, String> {
    said(cluster, &["apply", "--dry-run=server"], &object(kind, "case", spec))
}

fn system(cluster: &Cluster, arguments: &[&str]) -> String {
    let all = [&["-n", "istio-system"], arguments].concat();
    cluster.kubectl(&all).unwrap_or_else(|error| panic!("{error:#}\n{}", log(cluster)))
}

fn log(cluster: &Cluster) -> String {
    let arguments = ["-n", "istio-system", "logs", "-l", "app=mesh-controller", "--prefix", "--tail=-1"];
    cluster.kubectl(&arguments).unwrap_or_else(|error| error.to_string())
}

fn until(cluster: &Cluster, what: &str, look: impl FnMut() -> anyhow::Result<Option<()>>) {
    cluster.until(what, look).unwrap_or_else(|error| panic!("{error:#}\n{}", log(cluster)));
}

/// Everything but a controller.
fn install(cluster: &Cluster) {
    let path = binaries_beside().unwrap().join("mesh-controller");
    let image = Image::new("localhost/mesh-controller:dev").program("bin/mesh-controller", &path).unwrap();
    cluster.load(&image).unwrap();
    let crds = tree().join("crds");
    cluster.kubectl(&["apply", "--server-side", "-f", crds.to_str().unwrap()]).unwrap();
    cluster.wait(&["--for=condition=Established", "crd", "--all"]).unwrap();
    cluster.kubectl(&["create", "namespace", "shop"]).unwrap();
    let chart = tree().join("deploy/helm/mesh");
    let arguments = ["install", "mesh", chart.to_str().unwrap(), "--namespace=istio-system", "--create-namespace"];
    cluster.helm(&[&arguments[..], &["--set", "controller.replicas=0"]].concat()).unwrap();
}

fn scale(cluster: &Cluster, replicas: u8) {
    system(cluster, &["scale", CONTROLLER, &format!("--replicas={replicas}")]);
    if replicas == 0 {
        system(cluster, &["wait", "--for=delete", "pod", "-l", "app=mesh-controller", "--timeout=60s"]);
    } else {
        system(cluster, &["rollout", "status", CONTROLLER, "--timeout=60s"]);
    }
}

#[test]
fn wrong_objects_are_refused_and_a_controller_that_is_away_is_in_nobodys_way() {
    let bed = ClusterBed::up(1, Dns::Nobody);
    let cluster = &bed.cluster;
    install(cluster);
    nobody_can_be_asked(cluster);
    assert_eq!(cluster.kubectl(&["get", CONFIGURATION, "-o", BUNDLE]).unwrap(), "");
    scale(cluster, 1);
    // Ready means that the API server can ask; its own view of configuration and endpoints may be a moment behind.
    until(cluster, "a good object is taken", || {
        ensure!(judge(cluster, POLICY, "{}").is_ok(), "{:?}", judge(cluster, POLICY, "{}"));
        Ok(Some(()))
    });
    objects_are_judged(cluster);
    authors_are_told(cluster);
    a_change_is_judged(cluster);
    the_bundle_is_repaired(cluster);
    rights_are_no_more_than_needed(cluster);
    scale(cluster, 2);
    objects_are_judged(cluster);
    one_of_two_writes_status(cluster);
    scale(cluster, 0);
    cluster
        .kubectl(&["delete", "--ignore-not-found", "namespace/elsewhere", "pod/it", "service/it", "configmap/it"])
        .unwrap();
    nobody_can_be_asked(cluster);
    // Nobody needs to be asked to take one away.
    cluster.kubectl(&["-n", "shop", "delete", "authorizationpolicy", "changed"]).unwrap();
    scale(cluster, 1);
    around_the_webhook(cluster);
}

fn nobody_can_be_asked(cluster: &Cluster) {
    until(cluster, "a policy is refused", || {
        let refused = judge(cluster, POLICY, "{}");
        let is_clear =
            refused.as_ref().is_err_and(|e| e.contains("failed calling webhook \"validation.mesh-controller"));
        ensure!(is_clear, "{refused:?}");
        Ok(Some(()))
    });
    cluster.apply(OTHERS).unwrap();
}

fn objects_are_judged(cluster: &Cluster) {
    let mut faults = Vec::new();
    for (kind, spec, fault) in WRONG {
        match judge(cluster, kind, spec) {
            Err(error) if error.contains(fault) && error.contains("denied the request") => {}
            other => faults.push(format!("{kind} {spec}: {other:?}")),
        }
    }
    for (kind, spec) in GOOD {
        match judge(cluster, kind, spec) {
            Ok(said) if !said.contains("Warning") => {}
            other => faults.push(format!("{kind} {spec}: {other:?}")),
        }
    }
    assert!(faults.is_empty(), "{}\n{}", faults.join("\n"), log(cluster));
    let warned = judge(cluster, POLICY, "{rules: [{to: [{operation: {paths: [/a]}}]}]}").unwrap();
    assert!(warned.contains("Warning: MESH102 spec.rules[0]: node proxies do not see paths"), "{warned}");
}

/// Waits until the status of a policy says this and nothing else.
fn conditions_become(cluster: &Cluster, name: &str, wanted: &str) {
    let each = "{.type}={.status}/{.reason}@{.observedGeneration}";
    let path = format!("jsonpath={{range .status.conditions[*]}}{each} {{end}}");
    until(cluster, &format!("{name} is {wanted}"), || {
        let said = cluster.kubectl(&["-n", "shop", "get", "authorizationpolicy", name, "-o", &path])?;
        ensure!(said.trim() == wanted, "it is `{said}`");
        Ok(Some(()))
    });
}

/// The status of a policy says what became of it, for the generation that was judged, and is written when that changes.
fn authors_are_told(cluster: &Cluster) {
    let apply = |name: &str, spec: &str| cluster.apply(&object(POLICY, name, spec)).unwrap();
    let version = |name: &str| {
        let version = "jsonpath={.metadata.resourceVersion}";
        cluster.kubectl(&["-n", "shop", "get", "authorizationpolicy", name, "-o", version]).unwrap()
    };
    apply("told", "{action: DENY, rules: [{from: [{source: {namespaces: [a]}}]}]}");
    conditions_become(cluster, "told", "ZtunnelAccepted=True/Accepted@1");
    apply("told", "{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}");
    conditions_become(cluster, "told", "ZtunnelAccepted=True/UnsupportedValue@2");
    let message = "jsonpath={.status.conditions[0].message}";
    let message = cluster.kubectl(&["-n", "shop", "get", "authorizationpolicy", "told", "-o", message]).unwrap();
    assert!(message.contains("spec.rules[0]: node proxies do not see methods"), "{message}");
    apply("told", "{action: AUDIT, rules: [{}]}");
    conditions_become(cluster, "told", "ZtunnelAccepted=False/UnsupportedValue@3");
    apply("aimed", "{targetRefs: [{kind: Service, name: web}]}");
    conditions_become(cluster, "aimed", "WaypointAccepted=False/AncestorNotBound@1");
    // A new controller has nothing new to say of the old ones.
    let before = version("told");
    scale(cluster, 0);
    scale(cluster, 1);
    until(cluster, "a new policy is taken", || {
        cluster.apply(&object(POLICY, "new", "{}"))?;
        Ok(Some(()))
    });
    conditions_become(cluster, "new", "ZtunnelAccepted=True/Accepted@1");
    assert_eq!(version("told"), before);
    cluster.kubectl(&["-n", "shop", "delete", "authorizationpolicy", "told", "aimed", "new"]).unwrap();
}

/// The other one follows when the first has gone.
fn one_of_two_writes_status(cluster: &Cluster) {
    let holder = || system(cluster, &["get", "lease/mesh-controller", "-o", "jsonpath={.spec.holderIdentity}"]);
    let first = holder();
    let pods = system(cluster, &["get", "pods", "-l", "app=mesh-controller", "-o", "name"]);
    assert_eq!(pods.lines().filter(|pod| *pod == format!("pod/{first}")).count(), 1, "{first}: {pods}");
    system(cluster, &["delete", "pod", &first]);
    until(cluster, "another one leads", || {
        let next = holder();
        ensure!(!next.is_empty() && next != first, "it is `{next}`");
        Ok(Some(()))
    });
    // The API server may go on asking the one that is gone for a moment.
    until(cluster, "a policy is taken", || {
        cluster.apply(&object(POLICY, "led", "{}"))?;
        Ok(Some(()))
    });
    conditions_become(cluster, "led", "ZtunnelAccepted=True/Accepted@1");
    cluster.kubectl(&["-n", "shop", "delete", "authorizationpolicy", "led"]).unwrap();
}

fn a_change_is_judged(cluster: &Cluster) {
    let spec = |block: &str| format!("{{rules: [{{from: [{{source: {{ipBlocks: ['{block}']}}}}]}}]}}");
    cluster.apply(&object(POLICY, "changed", &spec("10.0.0.0/8"))).unwrap();
    let refused = said(cluster, &["apply"], &object(POLICY, "changed", &spec("10.0.0.0/80"))).unwrap_err();
    assert!(refused.contains("spec.rules[0].from[0].source.ipBlocks[0]"), "{refused}");
    let blocks = "jsonpath={.spec.rules[0].from[0].source.ipBlocks[0]}";
    assert_eq!(
        cluster.kubectl(&["-n", "shop", "get", "authorizationpolicy", "changed", "-o", blocks]).unwrap(),
        "10.0.0.0/8"
    );
}

fn the_bundle_is_repaired(cluster: &Cluster) {
    let bundle = || cluster.kubectl(&["get", CONFIGURATION, "-o", BUNDLE]).unwrap();
    let before = bundle();
    assert!(!before.is_empty());
    let remove = r#"[{"op": "remove", "path": "/webhooks/0/clientConfig/caBundle"}]"#;
    cluster.kubectl(&["patch", CONFIGURATION, "--type=json", "-p", remove]).unwrap();
    until(cluster, "the caBundle is back", || {
        ensure!(bundle() == before, "it is `{}`", bundle());
        Ok(Some(()))
    });
}

fn rights_are_no_more_than_needed(cluster: &Cluster) {
    let user = "--as=system:serviceaccount:istio-system:mesh-controller";
    let may = |verb: &str, what: &str| {
        // The exit code says it as well, and is of no use here.
        let output = cluster.kubectl_command().args(["auth", "can-i", verb, what, user]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim() == "yes"
    };
    let all = "validatingwebhookconfigurations";
    let own = format!("{all}/mesh-controller");
    assert!(may("get", &own) && may("patch", &own));
    for (verb, what) in
        [("patch", &*format!("{all}/other")), ("list", all), ("create", all), ("delete", &own), ("update", &own)]
    {
        assert!(!may(verb, what), "{verb} {what}");
    }
}

/// Wrong objects get in. They do no harm, and the controller says what is wrong with each.
fn around_the_webhook(cluster: &Cluster) {
    cluster.kubectl(&["delete", CONFIGURATION]).unwrap();
    for (i, (kind, spec, _)) in WRONG.iter().enumerate() {
        until(cluster, "a wrong object is taken", || {
            cluster.apply(&object(kind, &format!("wrong-{i}"), spec))?;
            Ok(Some(()))
        });
    }
    until(cluster, "the controller reports each", || {
        let log = log(cluster);
        for (i, (_, _, fault)) in WRONG.iter().enumerate() {
            let (code, fault) = fault.split_once(' ').unwrap();
            let line = format!("{code} AuthorizationPolicy shop/wrong-{i} {fault}");
            ensure!(log.contains(&line), "there is no `{line}`");
        }
        Ok(Some(()))
    });
    for i in 0..WRONG.len() {
        conditions_become(cluster, &format!("wrong-{i}"), "ZtunnelAccepted=False/Invalid@1");
    }
    // Others converge: the policy of plaintext, which is always there, and this one.
    cluster
        .apply("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: good}\nspec: {}\n")
        .unwrap();
    let name =
        system(cluster, &["get", "pod", "-l", "app=mesh-controller", "-o", "jsonpath={.items[*].metadata.name}"]);
    let metrics = format!("/api/v1/namespaces/istio-system/pods/{name}:15014/proxy/metrics");
    until(cluster, "a good object of another namespace is published", || {
        let metrics = cluster.kubectl(&["get", "--raw", &metrics])?;
        for line in ["mesh_config_resources{type=\"Authorization\"} 2", &format!("mesh_config_errors {}", WRONG.len())]
        {
            ensure!(metrics.contains(line), "there is no `{line}` in\n{metrics}");
        }
        Ok(Some(()))
    });
    let restarts = "jsonpath={.items[*].status.containerStatuses[*].restartCount}";
    assert_eq!(system(cluster, &["get", "pod", "-l", "app=mesh-controller", "-o", restarts]), "0");
    // They can be taken away when they are asked about again.
    let chart = tree().join("deploy/helm/mesh");
    cluster.helm(&["upgrade", "mesh", chart.to_str().unwrap(), "--namespace=istio-system", "--reset-values"]).unwrap();
    until(cluster, "the API server asks again", || {
        let (kind, spec, fault) = WRONG[0];
        let refused = judge(cluster, kind, spec);
        ensure!(refused.as_ref().is_err_and(|error| error.contains(fault)), "{refused:?}");
        Ok(Some(()))
    });
    cluster.kubectl(&["-n", "shop", "delete", "authorizationpolicy", "--all"]).unwrap();
    until(cluster, "the problems are gone", || {
        ensure!(cluster.kubectl(&["get", "--raw", &metrics])?.contains("mesh_config_errors 0"), "errors are left");
        Ok(Some(()))
    });
}
