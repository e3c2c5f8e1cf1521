//! Who may connect: node tokens over real TLS, towards both services.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod common;

use common::{ADDRESS, Mesh, TempDir, csr, p256, pod, unix_now};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use mesh_api::proto::xds::{DeltaDiscoveryRequest, Node};
use mesh_controller::state_dir::StateDir;
use mesh_controller::token::TokenKey;
use serde_json::json;
use tonic::Code;

const ID: &str = "spiffe://cluster.local/ns/default/sa/web";

async fn mesh() -> Mesh {
    Mesh::start(&[("web.yaml", &pod("web", "node-a", "web", "10.0.0.1"))]).await
}

/// Tokens that must not open anything, and why.
fn bad_tokens(mesh: &Mesh) -> Vec<(&'static str, String)> {
    let key = std::fs::read(mesh.state_dir().join("token/key.pem")).unwrap();
    let ec = EncodingKey::from_ec_pem(&key).unwrap();
    let now = unix_now();
    let claims = |field: &str, value: serde_json::Value| {
        let mut claims =
            json!({"iss": "mesh-controller", "sub": "node-a", "aud": "istio-ca", "iat": now, "exp": now + 600});
        claims[field] = value;
        claims
    };
    let es256 = |claims: &serde_json::Value| jsonwebtoken::encode(&Header::new(Algorithm::ES256), claims, &ec).unwrap();
    let temp = TempDir::new();
    let foreign = TokenKey::open(&StateDir::open(temp.path()).unwrap()).unwrap();
    let good = mesh.token("node-a");
    let body = good.split('.').nth(1).unwrap();
    let hs256 = |secret: &[u8]| {
        let header = Header::new(Algorithm::HS256);
        jsonwebtoken::encode(&header, &claims("sub", json!("node-a")), &EncodingKey::from_secret(secret)).unwrap()
    };
    vec![
        ("expired", mesh.token_key().issue("node-a", now - 3600, 60).unwrap()),
        ("not yet valid", mesh.token_key().issue("node-a", now + 3600, 60).unwrap()),
        ("foreign key", foreign.issue("node-a", now, 600).unwrap()),
        ("alg none", format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{body}.")),
        ("HS256 with the private key as secret", hs256(&key)),
        ("HS256 with an empty secret", hs256(b"")),
        ("other audience", es256(&claims("aud", json!("vault")))),
        ("other issuer", es256(&claims("iss", json!("kubernetes/serviceaccount")))),
        ("no node", es256(&claims("sub", json!("")))),
        ("a path as node", es256(&claims("sub", json!("../node-a")))),
        ("sub is a number", es256(&claims("sub", json!(1)))),
        ("garbage", "x".into()),
        ("large", "a".repeat(9000)),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_token_opens_both_services() {
    let mesh = mesh().await;
    let mut stream = mesh.stream("node-a").await;
    stream.subscribe(ADDRESS).await;
    assert!(!stream.next().await.resources.is_empty());
    mesh.sign(&mesh.token("node-a"), Some(ID), &csr(&p256(), &[ID])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_tokens_open_neither() {
    let mesh = mesh().await;
    for (what, token) in bad_tokens(&mesh) {
        let status = mesh.stream_with(vec![format!("Bearer {token}")]).await.expect_err(what);
        assert_eq!(status.code(), Code::Unauthenticated, "{what}: {status}");
        let status = mesh.sign(&token, Some(ID), &csr(&p256(), &[ID])).await.expect_err(what);
        assert_eq!(status.code(), Code::Unauthenticated, "{what}: {status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn exactly_one_bearer_token_is_needed() {
    let mesh = mesh().await;
    let good = mesh.token("node-a");
    let headers = [vec![], vec![good.clone()], vec![format!("Basic {good}")], vec![format!("Bearer {good}"); 2]];
    for header in headers {
        let status = mesh.stream_with(header.clone()).await.expect_err("refused");
        assert_eq!(status.code(), Code::Unauthenticated, "{header:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_cannot_call_itself_another_node() {
    let mesh = mesh().await;
    let node = |name: &str| {
        let value = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(name.into())) };
        let metadata = prost_types::Struct { fields: [("NODE_NAME".to_owned(), value)].into() };
        Some(Node { metadata: Some(metadata), ..Default::default() })
    };
    let mut stream = mesh.stream("node-a").await;
    stream.send(DeltaDiscoveryRequest { node: node("node-b"), type_url: ADDRESS.into(), ..Default::default() }).await;
    assert_eq!(stream.receive().await.unwrap_err().code(), Code::PermissionDenied);
    let mut stream = mesh.stream("node-a").await;
    stream.send(DeltaDiscoveryRequest { node: node("node-a"), type_url: ADDRESS.into(), ..Default::default() }).await;
    stream.next().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_its_token() {
    let mesh = mesh().await;
    // One second to live, with the minute of clock leeway behind it already.
    let token = mesh.token_key().issue("node-a", unix_now() - 61, 4).unwrap();
    let mut stream = mesh.stream_with(vec![format!("Bearer {token}")]).await.unwrap();
    stream.subscribe(ADDRESS).await;
    stream.next().await;
    let status = stream.receive().await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
}
