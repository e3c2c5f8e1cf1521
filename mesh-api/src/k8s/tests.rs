//! Objects as files have them.

use mesh_core::config::objects::{MtlsMode, PodPhase, TargetPort};

use super::*;
use crate::yaml::documents;

fn read_all(text: &str) -> Vec<Item> {
    let file = Arc::from("f.yaml");
    documents(text).into_iter().flat_map(|d| items(&d.expect("YAML"), &file)).collect()
}

fn read_one(text: &str) -> Object {
    match read_all(text).remove(0) {
        Item::Object(object) => *object,
        other => panic!("{other:?}"),
    }
}

/// `object | line:field: message [hint]` of a document that must not be used.
fn rejected(text: &str) -> String {
    match read_all(text).remove(0) {
        Item::Rejected(f) => {
            format!("{} | {}:{}: {} [{}]", f.object, f.error.line, f.error.path, f.error.message, f.error.hint)
        }
        other => panic!("{other:?}"),
    }
}

fn check(text: &str, expected: &str) {
    assert_eq!(rejected(text), expected, "\n{text}");
}

#[test]
fn a_pod_with_all_that_is_read() {
    let text = r#"
apiVersion: v1
kind: Pod
metadata:
  name: web-1
  namespace: shop
  labels: {app: web}
  annotations: {note: "x"}
  creationTimestamp: 2026-01-31T12:00:00Z
  deletionTimestamp: 2026-01-31T13:00:00Z
  uid: 1-2-3
  ownerReferences:
  - {apiVersion: apps/v1, kind: ReplicaSet, name: web-5d, uid: u, controller: true}
spec:
  serviceAccountName: web
  nodeName: node-a
  containers:
  - name: web
    image: x
    ports: [{name: http, containerPort: 8080}, {containerPort: 53, protocol: UDP}]
  initContainers:
  - {name: once, ports: [{containerPort: 1}]}
  - {name: side, restartPolicy: Always, ports: [{name: admin, containerPort: 9}]}
status:
  phase: Running
  podIP: 10.0.0.1
  podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]
  conditions: [{type: Initialized, status: "True"}, {type: Ready, status: "False", reason: x}]
"#;
    let Object::Pod(pod) = read_one(text) else { panic!() };
    assert_eq!((&*pod.meta.namespace, &*pod.meta.name), ("shop", "web-1"));
    assert_eq!((&*pod.meta.origin.file, pod.meta.origin.line), ("f.yaml", 2));
    assert_eq!(pod.meta.created_secs, 1_769_860_800);
    assert_eq!((&*pod.service_account, &*pod.node), ("web", "node-a"));
    assert_eq!(pod.ips, ["10.0.0.1", "fd00::1"].map(|ip| ip.parse::<std::net::IpAddr>().unwrap()));
    assert_eq!((pod.phase, pod.ready, pod.deleting), (PodPhase::Running, Some(false), true));
    assert_eq!(pod.ports.iter().map(|p| p.port).collect::<Vec<_>>(), [8080, 53, 9]);
    assert_eq!(pod.owner.map(|o| o.name.to_string()), Some("web-5d".into()));
}

#[test]
fn a_pod_with_nothing() {
    let Object::Pod(pod) = read_one("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\nstatus: {}\n") else {
        panic!()
    };
    assert_eq!((&*pod.meta.namespace, pod.phase, pod.ready), ("default", PodPhase::Running, None));
}

#[test]
fn a_service() {
    let text = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  selector: {app: web}\n  clusterIP: 10.96.0.1\n  \
                ports: [{name: http, port: 80, targetPort: http}, {port: 81, targetPort: 8081}, {port: 82}]\n  \
                internalTrafficPolicy: Local\n  trafficDistribution: PreferClose\n  sessionAffinity: None\n";
    let Object::Service(service) = read_one(text) else { panic!() };
    let targets: Vec<_> = service.ports.into_iter().map(|p| p.target).collect();
    assert_eq!(targets, [TargetPort::Name("http".into()), TargetPort::Number(8081), TargetPort::Number(82)]);
    assert!(service.local_only && service.traffic_distribution.as_deref() == Some("PreferClose"));
    let Object::Service(headless) =
        read_one("apiVersion: v1\nkind: Service\nmetadata: {name: db}\nspec: {clusterIP: None, clusterIPs: [None]}\n")
    else {
        panic!()
    };
    assert!(headless.cluster_ips.is_empty());
}

#[test]
fn a_slice_belongs_to_its_label_and_is_ready_unless_it_says_no() {
    let text = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: web-x\n  labels: \
                {kubernetes.io/service-name: web}\naddressType: IPv4\nports: [{name: http, port: 80}, {name: any}]\nendpoints:\n\
                - {addresses: [10.0.0.1], targetRef: {kind: Pod, name: web-1, namespace: default}}\n\
                - {addresses: [10.0.0.2], conditions: {ready: false, serving: true}, nodeName: b}\n";
    let Object::EndpointSlice(slice) = read_one(text) else { panic!() };
    assert_eq!((&*slice.service, slice.ports.len()), ("web", 1));
    assert_eq!(
        slice.endpoints.iter().map(|e| (e.ready, e.pod.is_some())).collect::<Vec<_>>(),
        [(true, true), (false, false)]
    );
}

#[test]
fn policies_keep_absent_and_empty_apart() {
    let head = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\n";
    let policy = |spec: &str| match read_one(&format!("{head}{spec}")) {
        Object::AuthorizationPolicy(policy) => policy,
        other => panic!("{other:?}"),
    };
    assert!(policy("spec: {}\n").rules.is_empty());
    assert_eq!(policy("spec: {rules: [{}]}\n").rules.len(), 1);
    let full = policy(
        "spec:\n  action: DENY\n  rules:\n  - from: [{source: {notPrincipals: ['*']}}]\n    to: [{operation: {ports: ['80']}}]\n",
    );
    assert_eq!(full.rules[0].from.as_ref().unwrap()[0].principals.not, ["*".into()]);
    check(
        &format!("{head}spec:\n  rules:\n  - from:\n    - source:\n        principals: []\n"),
        "AuthorizationPolicy default/p | 8:spec.rules[0].from[0].source.principals: the list is empty \
         [remove the field, or give it a value]",
    );
    check(
        &format!("{head}spec:\n  rules:\n  - from:\n    - source:\n"),
        "AuthorizationPolicy default/p | 7:spec.rules[0].from[0]: the required field `source` is missing [add `source`]",
    );
    check(
        &format!("{head}spec:\n  rules: [{{to: [{{operation: {{notPorts: []}}}}]}}]\n"),
        "AuthorizationPolicy default/p | 5:spec.rules[0].to[0].operation.notPorts: the list is empty \
         [remove the field, or give it a value]",
    );
    check(
        &format!("{head}spec:\n  rules:\n  - to:\n    - operation:\n        ports: [8080]\n"),
        "AuthorizationPolicy default/p | 8:spec.rules[0].to[0].operation.ports[0]: invalid type: integer `8080`, \
         expected a string [put the value in quotes]",
    );
    check(
        &format!("{head}spec:\n  action: REFUSE\n"),
        "AuthorizationPolicy default/p | 5:spec.action: unknown variant `REFUSE`, expected one of `ALLOW`, `DENY`, \
         `AUDIT`, `CUSTOM` []",
    );
}

#[test]
fn peer_authentication_by_port() {
    let head =
        "apiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\nmetadata: {name: p, namespace: shop}\n";
    let Object::PeerAuthentication(object) = read_one(&format!(
        "{head}spec:\n  selector: {{matchLabels: {{app: x}}}}\n  mtls: {{mode: STRICT}}\n  portLevelMtls: {{8080: {{mode: DISABLE}}}}\n"
    )) else {
        panic!()
    };
    assert_eq!((object.mode, object.port_modes.get(&8080)), (MtlsMode::Strict, Some(&MtlsMode::Disable)));
    check(
        &format!("{head}spec:\n  portLevelMtls:\n    80: {{mode: STRICT}}\n    70000: {{mode: STRICT}}\n"),
        "PeerAuthentication shop/p | 7:spec.portLevelMtls.70000: 70000 is not a port [a port is a number from 1 to 65535]",
    );
    check(
        &format!("{head}spec:\n  mtsl: {{mode: STRICT}}\n"),
        "PeerAuthentication shop/p | 5:spec.mtsl: unknown field `mtsl` [did you mean `mtls`?]",
    );
}

#[test]
fn impossible_values_point_to_their_line() {
    check(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\nspec:\n  ports:\n  - port: 80\n    targetPort: 0\n  - port: 70000\n",
        "Service default/web | 8:spec.ports[0].targetPort: 0 is not a port [a port is a number from 1 to 65535]",
    );
    check(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus:\n  podIP: 10.0.0.256\n",
        "Pod default/a | 5:status.podIP: `10.0.0.256` is not an IP address [write one IPv4 or IPv6 address]",
    );
    check(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  serviceAccountName: ../admin\n",
        "Pod default/a | 5:spec.serviceAccountName: `../admin` is not an object name \
         [use lower case letters, digits, `-` and `.`, at most 253]",
    );
    check(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: A/b}\n",
        "Pod default/A/b | 3:metadata.name: `A/b` is not an object name \
         [use lower case letters, digits, `-` and `.`, at most 253]",
    );
    check(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n  labels:\n    version: 1\n",
        "Pod default/a | 6:metadata.labels.version: invalid type: integer `1`, expected a string [put the value in quotes]",
    );
}

#[test]
fn kinds_are_known_inert_or_refused() {
    let deployment = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: app}\nspec: {anything: 1}\n";
    let Item::Inert(finding) = read_all(deployment).remove(0) else { panic!() };
    assert!(finding.error.message.contains("runs no controllers") && finding.object == "Deployment app");
    check(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: v, namespace: ns}\n",
        "VirtualService ns/v | 2:kind: VirtualService (networking.istio.io) is not implemented: it has no effect \
         [remove it, or expect nothing of it]",
    );
    check(
        "apiVersion: v1\nkind: Prod\n",
        "Prod | 2:kind: the kind `Prod` of group `` is not known [check apiVersion and kind for spelling]",
    );
    check(
        "apiVersion: v2\nkind: Pod\nmetadata: {name: a}\n",
        "Pod a | 1:apiVersion: `v2` is not a version of Pod that is read [use one of: v1]",
    );
    check("just text\n", " | 1:: the document is not an object [write apiVersion, kind, metadata and spec]");
    check(
        "kind: Pod\n",
        "Pod | 1:apiVersion: `apiVersion` is missing or is not text [every object says its apiVersion and kind]",
    );
}

#[test]
fn lists_are_opened_and_a_bad_item_is_one_item() {
    let text = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n\
                - {apiVersion: v1, kind: Namespace, metadata: {nam: b}}\n- {apiVersion: v1, kind: Pod, metadata: {name: c}}\n";
    let all = read_all(text);
    assert!(matches!((&all[0], &all[2]), (Item::Object(_), Item::Object(_))));
    let Item::Rejected(finding) = &all[1] else { panic!() };
    assert_eq!((finding.error.line, finding.error.path.as_str()), (5, "items[1].metadata.nam"));
    let nested = format!("{}[]{}", "{kind: List, items: [".repeat(6), "]}".repeat(6));
    assert!(read_all(&nested).iter().any(|i| matches!(i, Item::Rejected(_))));
}

#[test]
fn an_api_server_may_know_more_of_kubernetes_but_not_of_what_a_rule_says() {
    let pod = serde_json::json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web", "namespace": "shop", "managedFields": [{"manager": "x"}], "ofTomorrow": 1},
        "spec": {"nodeName": "a", "ofTomorrow": {"deep": [1.5, null]}},
        "status": {"podIPs": [{"ip": "10.0.0.1"}], "phase": "Running"},
    });
    assert!(matches!(super::from_api_server(pod), Item::Object(object) if object.key().to_string() == "Pod shop/web"));
    let policy = serde_json::json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "a", "namespace": "shop"},
        "spec": {"rules": [{"from": [{"source": {"ofTomorrow": ["x"]}}]}]},
    });
    match super::from_api_server(policy) {
        Item::Rejected(finding) => {
            assert_eq!(finding.error.path, "spec.rules[0].from[0].source.ofTomorrow");
            assert_eq!(finding.object, "AuthorizationPolicy shop/a");
        }
        other => panic!("{other:?}"),
    }
}
