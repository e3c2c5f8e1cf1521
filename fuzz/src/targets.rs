//! What is fed, and the real samples that inputs are made from.

use std::str;

use mesh_api::proto::workload::zds;
use mesh_api::proto::{security, workload, xds};
use mesh_core::identity::SpiffeId;
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
        Target { name: "enrolment", format: Format::Protobuf, samples: enrolments, run: enrolment },
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
    for resource in response.resources.iter().filter_map(|resource| resource.resource.as_ref()) {
        drop(workload::Address::decode(&*resource.value));
        drop(security::Authorization::decode(&*resource.value));
    }
}

fn enrolments() -> Vec<Vec<u8>> {
    use zds::workload_request::Payload;
    let info = zds::WorkloadInfo { name: "web-1".into(), namespace: "default".into(), service_account: "web".into() };
    let uid = "1c9e4a6e-0000-4000-8000-000000000001".to_owned();
    let add = Payload::Add(zds::AddWorkload { uid: uid.clone(), workload_info: Some(info) });
    [add, Payload::Del(zds::DelWorkload { uid })]
        .map(|payload| zds::WorkloadRequest { payload: Some(payload) }.encode_to_vec())
        .to_vec()
}

fn enrolment(input: &[u8]) {
    drop(zds::WorkloadRequest::decode(input));
}
