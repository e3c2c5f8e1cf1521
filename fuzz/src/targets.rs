//! What is fed, and the real samples that inputs are made from.

use std::str;
use std::sync::Arc;

use mesh_api::proto::workload::zds;
use mesh_api::proto::{security, workload, xds};
use mesh_api::wds;
use mesh_controller::kubernetes::admission;
use mesh_core::config::Settings;
use mesh_core::flow::RESERVED_PORTS;
use mesh_core::identity::SpiffeId;
use mesh_core::inbound::inbound_target;
use mesh_core::snapshot::Change;
use mesh_node::enrol::protocol;
use prost::Message;

use crate::input::Format;

/// A function that reads bytes from outside.
pub struct Target {
    /// As it is named on the command line.
    pub name: &'static str,
    /// How its input is built.
    pub format: Format,
    /// Real inputs.
    pub samples: fn() -> Vec<Vec<u8>>,
    /// Must not panic, hang or use much memory, whatever the bytes are.
    pub run: fn(&[u8]),
}

/// Every target.
pub fn all() -> Vec<Target> {
    vec![
        Target { name: "spiffe-id", format: Format::Text, samples: identities, run: spiffe_id },
        Target { name: "xds-response", format: Format::Protobuf, samples: responses, run: xds_response },
        Target { name: "xds-address", format: Format::Protobuf, samples: addresses, run: xds_address },
        Target { name: "xds-policy", format: Format::Protobuf, samples: policies, run: xds_policy },
        Target { name: "hbone-authority", format: Format::Text, samples: authorities, run: hbone_authority },
        Target { name: "yaml", format: Format::Text, samples: manifests, run: yaml },
        Target { name: "enrolment", format: Format::Protobuf, samples: enrolments, run: enrolment },
        Target { name: "admission-review", format: Format::Text, samples: reviews, run: admission_review },
    ]
}

fn identities() -> Vec<Vec<u8>> {
    ["spiffe://cluster.local/ns/default/sa/web", "spiffe://td.example/ns/a-b/sa/x.y_z"].map(Into::into).to_vec()
}

/// A SPIFFE id that parses prints as what was parsed.
fn spiffe_id(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.to_string(), text, "an identity changes when it is printed");
    }
}

fn address() -> workload::Address {
    let pod = workload::Workload {
        uid: "Kubernetes//Pod/default/web-1".into(),
        name: "web-1".into(),
        namespace: "default".into(),
        addresses: vec![vec![10, 0, 0, 1]],
        trust_domain: "cluster.local".into(),
        service_account: "web".into(),
        node: "node-a".into(),
        ..Default::default()
    };
    workload::Address { r#type: Some(workload::address::Type::Workload(pod)) }
}

fn policy() -> security::Authorization {
    let from = security::StringMatch {
        match_type: Some(security::string_match::MatchType::Exact("cluster.local/ns/default/sa/client".into())),
    };
    let matches = vec![security::Match { principals: vec![from], destination_ports: vec![80], ..Default::default() }];
    security::Authorization {
        name: "allow-client".into(),
        namespace: "default".into(),
        rules: vec![security::Rule { clauses: vec![security::Clause { matches }] }],
        ..Default::default()
    }
}

fn responses() -> Vec<Vec<u8>> {
    let resource = |type_url: &str, name: &str, value: Vec<u8>| {
        let resource = xds::Resource {
            name: name.into(),
            version: "1".into(),
            resource: Some(prost_types::Any { type_url: type_url.into(), value }),
            ..Default::default()
        };
        let response = xds::DeltaDiscoveryResponse {
            type_url: type_url.into(),
            nonce: "1".into(),
            resources: vec![resource],
            removed_resources: vec!["gone".into()],
            ..Default::default()
        };
        response.encode_to_vec()
    };
    vec![
        resource(mesh_api::ADDRESS_TYPE_URL, "Kubernetes//Pod/default/web-1", address().encode_to_vec()),
        resource(mesh_api::AUTHORIZATION_TYPE_URL, "default/allow-client", policy().encode_to_vec()),
    ]
}

fn xds_response(input: &[u8]) {
    let Ok(response) = xds::DeltaDiscoveryResponse::decode(input) else { return };
    for resource in &response.resources {
        if let Some(body) = &resource.resource {
            resource_bytes(&body.type_url, &body.value);
        }
        drop(wds::removal(&response.type_url, &resource.name));
    }
    for name in &response.removed_resources {
        drop(wds::removal(&response.type_url, name));
    }
}

/// What is understood is understood the same after it was written again: a proxy that gives its state on loses nothing.
fn resource_bytes(type_url: &str, bytes: &[u8]) {
    let Ok(change) = wds::decode(type_url, bytes) else { return };
    let written = wds::encode(&change);
    let Some(content) = &written.content else { return };
    match wds::decode(written.type_url, &content.bytes) {
        Ok(again) => assert_eq!(wds::encode(&again), written, "a resource changes when it is written again"),
        Err(error) => panic!("a resource that was written cannot be read: {error}"),
    }
}

fn addresses() -> Vec<Vec<u8>> {
    vec![address().encode_to_vec()]
}

fn xds_address(input: &[u8]) {
    resource_bytes(mesh_api::ADDRESS_TYPE_URL, input);
}

fn policies() -> Vec<Vec<u8>> {
    vec![policy().encode_to_vec()]
}

fn xds_policy(input: &[u8]) {
    resource_bytes(mesh_api::AUTHORIZATION_TYPE_URL, input);
}

fn authorities() -> Vec<Vec<u8>> {
    ["10.0.0.1:80", "[2001:db8::1]:443", "[::ffff:10.0.0.1]:8080", "web.default.svc.cluster.local:80"]
        .map(Into::into)
        .to_vec()
}

/// An accepted authority leads to an address of the workload and to no port of the proxy.
fn hbone_authority(input: &[u8]) {
    let Ok(authority) = str::from_utf8(input) else { return };
    let Ok(Change::UpsertWorkload(pod)) = wds::decode(mesh_api::ADDRESS_TYPE_URL, &address().encode_to_vec()) else {
        panic!("the sample workload is one");
    };
    for ip in &pod.addresses {
        if let Ok(target) = inbound_target(&pod, *ip, authority) {
            assert!(pod.addresses.contains(&target.ip()), "{authority:?} leads to {target}");
            assert!(target.port() != 0 && !RESERVED_PORTS.contains(&target.port()), "{authority:?} leads to {target}");
        }
    }
}

fn manifests() -> Vec<Vec<u8>> {
    [
        POD,
        SERVICE,
        POLICY,
        "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: a}\n",
    ]
    .map(Into::into)
    .to_vec()
}

const POD: &str = "apiVersion: v1
kind: Pod
metadata:
  name: web-1
  namespace: default
  labels: {app: web, istio.io/dataplane-mode: ambient}
spec:
  nodeName: node-a
  serviceAccountName: web
  containers:
  - name: web
    ports: [{name: http, containerPort: 8080}]
status:
  phase: Running
  podIP: 10.0.0.1
  podIPs: [{ip: 10.0.0.1}]
  conditions:
  - {type: Ready, status: \"True\"}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: default}
";

const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  clusterIP: 10.96.0.1
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: http}
";

const POLICY: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow-client, namespace: default}
spec:
  selector: {matchLabels: {app: web}}
  action: ALLOW
  rules:
  - from:
    - source: {principals: [cluster.local/ns/default/sa/client], ipBlocks: [10.0.0.0/8]}
    to:
    - operation: {ports: [\"80\"]}
    when:
    - {key: source.namespace, notValues: [legacy]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: default}
spec:
  mtls: {mode: STRICT}
  portLevelMtls: {8080: {mode: PERMISSIVE}}
";

fn yaml(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    let file: Arc<str> = "fuzz.yaml".into();
    for document in mesh_api::yaml::documents(text).into_iter().flatten() {
        drop(mesh_api::k8s::items(&document, &file));
    }
}

fn enrolments() -> Vec<Vec<u8>> {
    use zds::workload_request::Payload;
    let info = zds::WorkloadInfo { name: "web-1".into(), namespace: "default".into(), service_account: "web".into() };
    let uid = "1c9e4a6e-0000-4000-8000-000000000001".to_owned();
    let add = Payload::Add(zds::AddWorkload { uid: uid.clone(), workload_info: Some(info) });
    [add, Payload::Del(zds::DelWorkload { uid, lives_on: true })]
        .map(|payload| zds::WorkloadRequest { payload: Some(payload) }.encode_to_vec())
        .to_vec()
}

/// What the agent sends, without and with a descriptor. What is accepted can be written to an answer.
fn enrolment(input: &[u8]) {
    let with_one = std::fs::File::open("/dev/null").map(|file| vec![file.into()]).unwrap_or_default();
    for descriptors in [Vec::new(), with_one] {
        if let Err(error) = protocol::parse(input, descriptors) {
            drop(protocol::answer(Err(&error.to_string())));
        }
    }
}

fn reviews() -> Vec<Vec<u8>> {
    vec![REVIEW.into()]
}

const REVIEW: &str = r#"{
  "apiVersion": "admission.k8s.io/v1",
  "kind": "AdmissionReview",
  "request": {
    "uid": "1c9e4a6e-0000-4000-8000-000000000001",
    "operation": "CREATE",
    "kind": {"group": "security.istio.io", "version": "v1", "kind": "AuthorizationPolicy"},
    "object": {
      "apiVersion": "security.istio.io/v1",
      "kind": "AuthorizationPolicy",
      "metadata": {"name": "allow", "namespace": "default", "labels": {"a": "b"}},
      "spec": {
        "selector": {"matchLabels": {"app": "web"}},
        "action": "DENY",
        "rules": [
          {
            "from": [{"source": {"ipBlocks": ["10.0.0.0/8", "fd00::1"], "notNamespaces": ["a*"]}}],
            "to": [{"operation": {"ports": ["80"], "notPaths": ["/x"]}}],
            "when": [{"key": "source.principal", "values": ["*"]}]
          }
        ]
      }
    }
  }
}
"#;

/// What the API server asks, or somebody who says so. An answer is bounded, whatever the question.
fn admission_review(input: &[u8]) {
    const MAX_ANSWER_BYTES: usize = 128 << 10;
    if let Ok(answer) = admission::review(input, &Settings::default()) {
        let spared = answer.uid.len() * "\\u0000".len();
        let bytes = answer.to_json().to_string().len();
        assert!(bytes < MAX_ANSWER_BYTES + spared, "an answer of {bytes} bytes");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_samples_get_past_the_outermost_parser() {
        wds::decode(mesh_api::ADDRESS_TYPE_URL, &addresses()[0]).expect("the sample workload");
        wds::decode(mesh_api::AUTHORIZATION_TYPE_URL, &policies()[0]).expect("the sample policy");
        let null = std::fs::File::open("/dev/null").unwrap();
        protocol::parse(&enrolments()[0], vec![null.into()]).expect("the sample workload to enrol");
        protocol::parse(&enrolments()[1], Vec::new()).expect("the sample deletion");
        let answer = admission::review(&reviews()[0], &Settings::default()).expect("the sample question");
        assert_eq!((answer.refusal, answer.warnings.len()), (None, 1), "the sample policy is judged");
        for text in manifests() {
            for document in mesh_api::yaml::documents(str::from_utf8(&text).unwrap()) {
                for item in mesh_api::k8s::items(&document.unwrap(), &"sample.yaml".into()) {
                    assert!(matches!(item, mesh_api::k8s::Item::Object(_)), "a sample is rejected: {item:?}");
                }
            }
        }
    }
}
