//! The CSR service over real TLS: who gets which certificate.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod common;

use std::fs;
use std::time::Duration;

use common::{DEADLINE, Mesh, TempDir, csr, csr_request, p256, pod};
use mesh_api::proto::ca::IstioCertificateResponse;
use mesh_api::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use mesh_controller::ca::authority::{MAX_LEAF_TTL, certificates, make_root};
use mesh_controller::ca::service::BURST;
use mesh_controller::ca::store::{RotationStage, rotate};
use mesh_controller::state_dir::StateDir;
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;
use tonic::Code;
use x509_parser::prelude::{FromDer, X509Certificate};

const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";
const DB: &str = "spiffe://cluster.local/ns/default/sa/db";

async fn mesh() -> Mesh {
    let web = pod("web", "node-a", "web", "10.0.0.1");
    let db = pod("db", "node-b", "db", "10.0.0.2");
    let done = pod("done", "node-a", "done", "10.0.0.3").replace("Running", "Succeeded");
    Mesh::start(&[("web.yaml", &web), ("db.yaml", &db), ("done.yaml", &done)]).await
}

/// Whether a peer that trusts these roots would accept the chain.
fn verifies(response: &IstioCertificateResponse, roots: &str) -> Result<(), webpki::Error> {
    let chain: Vec<CertificateDer<'_>> =
        response.cert_chain.split_last().unwrap().1.iter().flat_map(|pem| certificates(pem)).collect();
    let roots = certificates(roots);
    let anchors: Vec<_> = roots.iter().map(|root| webpki::anchor_from_trusted_cert(root).unwrap()).collect();
    let leaf = webpki::EndEntityCert::try_from(&chain[0])?;
    for usage in [webpki::KeyUsage::client_auth(), webpki::KeyUsage::server_auth()] {
        leaf.verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &anchors,
            &chain[1..],
            UnixTime::now(),
            usage,
            None,
            None,
        )?;
    }
    Ok(())
}

fn not_after(response: &IstioCertificateResponse) -> OffsetDateTime {
    let leaf = certificates(&response.cert_chain[0]).remove(0);
    X509Certificate::from_der(&leaf).unwrap().1.validity().not_after.to_datetime()
}

async fn refused(mesh: &Mesh, node: &str, identity: Option<&str>, csr: &str) -> (Code, String) {
    let status = mesh.sign(&mesh.token(node), identity, csr).await.expect_err("refused");
    (status.code(), status.message().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_the_identities_of_its_own_pods() {
    let mesh = mesh().await;
    for uris in [&[WEB][..], &[]] {
        let response = mesh.sign(&mesh.token("node-a"), Some(WEB), &csr(&p256(), uris)).await.unwrap();
        assert_eq!(response.cert_chain.len(), 2, "leaf, bundle");
        assert_eq!(response.cert_chain[1], mesh.roots());
        verifies(&response, &mesh.roots()).unwrap();
    }
    mesh.sign(&mesh.token("node-b"), Some(DB), &csr(&p256(), &[DB])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_nothing_else() {
    let mesh = mesh().await;
    let cases = [
        ("node-a", Some(DB), "no pod with identity"),
        ("node-b", Some(WEB), "no pod with identity"),
        ("node-c", Some(WEB), "no pod with identity"),
        ("node-a", Some("spiffe://cluster.local/ns/default/sa/done"), "no pod with identity"),
        ("node-a", Some("spiffe://cluster.local/ns/istio-system/sa/web"), "no pod with identity"),
        ("node-a", Some("spiffe://other.mesh/ns/default/sa/web"), "not of trust domain cluster.local"),
        ("node-a", None, "ImpersonatedIdentity"),
    ];
    for (node, identity, reason) in cases {
        let request = csr(&p256(), identity.as_slice());
        let (code, message) = refused(&mesh, node, identity, &request).await;
        assert_eq!(code, Code::PermissionDenied, "{node} {identity:?}");
        assert!(message.contains(reason), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_must_be_sound() {
    let mesh = mesh().await;
    let good = csr(&p256(), &[WEB]);
    let rsa = csr(&KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap(), &[WEB]);
    let p384 = csr(&KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap(), &[WEB]);
    let mut dns = CertificateParams::new(vec!["istiod.istio-system.svc".to_owned()]).unwrap();
    dns.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let dns = dns.serialize_request(&p256()).unwrap().pem().unwrap();
    let cases = [
        (csr(&p256(), &[WEB, DB]), "names"),
        (csr(&p256(), &[DB]), "names"),
        (dns, "names"),
        (rsa, "not ECDSA P-256"),
        (p384, "not ECDSA P-256"),
        ("garbage".into(), "not one PEM block"),
        (good.replacen('M', "N", 1), "request"),
        (format!("{good}{good}"), "not one PEM block"),
        ("x".repeat(20_000), "more than"),
    ];
    for (request, reason) in cases {
        let (code, message) = refused(&mesh, "node-a", Some(WEB), &request).await;
        assert_eq!(code, Code::InvalidArgument, "{message}");
        assert!(message.contains(reason), "{message}, not {reason}");
    }
    let (code, _) = refused(&mesh, "node-a", Some(WEB), &"x".repeat(200_000)).await;
    assert_eq!(code, Code::OutOfRange, "larger than any message of the service");
    for bad in ["spiffe://cluster.local/ns/default/sa/*", "spiffe://cluster.local/ns/default", "web", ""] {
        let (code, _) = refused(&mesh, "node-a", Some(bad), &good).await;
        assert_eq!(code, Code::InvalidArgument, "{bad}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_and_extensions_of_a_request_are_not_copied() {
    let mesh = mesh().await;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "admin");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let request = params.serialize_request(&p256()).unwrap().pem().unwrap();
    let response = mesh.sign(&mesh.token("node-a"), Some(WEB), &request).await.unwrap();
    let leaf = certificates(&response.cert_chain[0]).remove(0);
    let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
    assert!(!leaf.is_ca() && leaf.subject().iter().count() == 0);
    assert!(!leaf.key_usage().unwrap().unwrap().value.key_cert_sign());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_pod_and_a_reused_name_lose_the_identity() {
    let mesh = mesh().await;
    let sign =
        async |identity: &str| mesh.sign(&mesh.token("node-a"), Some(identity), &csr(&p256(), &[identity])).await;
    sign(WEB).await.unwrap();

    // The same name again, with another account.
    let other = "spiffe://cluster.local/ns/default/sa/other";
    mesh.write("web.yaml", &pod("web", "node-a", "other", "10.0.0.1"));
    until(async || sign(other).await.is_ok()).await;
    assert_eq!(sign(WEB).await.unwrap_err().code(), Code::PermissionDenied);

    // Moved to another node.
    mesh.write("web.yaml", &pod("web", "node-b", "other", "10.0.0.1"));
    until(async || sign(other).await.is_err_and(|e| e.code() == Code::PermissionDenied)).await;

    mesh.remove("db.yaml");
    until(async || {
        let token = mesh.token("node-b");
        mesh.sign(&token, Some(DB), &csr(&p256(), &[DB])).await.is_err_and(|e| e.code() == Code::PermissionDenied)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_and_its_first_request_may_come_together() {
    let mesh = mesh().await;
    let new = "spiffe://cluster.local/ns/default/sa/new";
    mesh.write("new.yaml", &pod("new", "node-a", "new", "10.0.0.7"));
    mesh.sign(&mesh.token("node-a"), Some(new), &csr(&p256(), &[new])).await.expect("the request waits for the reader");
}

async fn until(mut is_so: impl AsyncFnMut() -> bool) {
    let start = std::time::Instant::now();
    while !is_so().await {
        assert!(start.elapsed() < DEADLINE, "not within the deadline");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lives_are_what_was_set_or_less() {
    let mesh = Mesh::start_with(&[("web.yaml", &pod("web", "node-a", "web", "10.0.0.1"))], |o| {
        o.leaf_ttl = Duration::from_secs(3600);
    })
    .await;
    let ask = async |secs: i64| {
        let mut request = csr_request(&mesh.token("node-a"), Some(WEB), &csr(&p256(), &[WEB]));
        request.get_mut().validity_duration = secs;
        let mut client = IstioCertificateServiceClient::new(mesh.channel().await);
        client
            .create_certificate(request)
            .await
            .map(|response| (not_after(response.get_ref()) - OffsetDateTime::now_utc()).whole_seconds())
    };
    let is_about = |expected: i64, got: i64| (expected - 60..=expected).contains(&got);
    assert!(is_about(3600, ask(0).await.unwrap()));
    assert!(is_about(600, ask(600).await.unwrap()));
    assert!(is_about(3600, ask(i64::MAX).await.unwrap()));
    assert_eq!(ask(-1).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaf_ends_with_its_plugged_signer() {
    let temp = TempDir::new();
    let now = OffsetDateTime::now_utc();
    // A root that was made almost ten years ago has half an hour left.
    let left = time::Duration::minutes(30);
    let made = now - mesh_controller::ca::authority::ROOT_TTL + left;
    let (cert, key) = make_root("cluster.local", made, &mut rand::rng()).unwrap();
    for (name, text) in
        [("ca-cert.pem", &cert), ("ca-key.pem", &key), ("root-cert.pem", &cert), ("cert-chain.pem", &cert)]
    {
        fs::write(temp.path().join(name), text).unwrap();
    }
    let dir = temp.path().to_owned();
    let mesh =
        Mesh::start_with(&[("web.yaml", &pod("web", "node-a", "web", "10.0.0.1"))], |o| o.cacerts = Some(dir)).await;
    let response = mesh.sign(&mesh.token("node-a"), Some(WEB), &csr(&p256(), &[WEB])).await.unwrap();
    verifies(&response, &cert).unwrap();
    assert!((not_after(&response) - (now + left)).abs() < time::Duration::seconds(2));
    assert!(MAX_LEAF_TTL == time::Duration::days(90));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signer_whose_files_are_away_for_a_while_stays_in_force() {
    let mesh = mesh().await;
    let (ca, away) = (mesh.state_dir().join("ca"), mesh.state_dir().join("away"));
    let old = mesh.roots();
    fs::rename(&ca, &away).unwrap();
    fs::create_dir(&ca).unwrap();
    // Longer than it takes to notice.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(fs::read_dir(&ca).unwrap().count(), 0, "another signer was made");
    let response = mesh.sign(&mesh.token("node-a"), Some(WEB), &csr(&p256(), &[WEB])).await.unwrap();
    verifies(&response, &old).unwrap();
    // As while a copy is under way: one file, and not the other.
    fs::copy(away.join("root-cert.pem"), ca.join("root-cert.pem")).unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(fs::read_dir(&ca).unwrap().count(), 1, "another signer was made");
    assert_eq!(mesh.roots(), old);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_is_rotated_under_a_running_mesh() {
    let mesh = mesh().await;
    let dir = StateDir::open(&mesh.state_dir()).unwrap();
    let step = |stage| rotate(&dir, stage, "cluster.local", OffsetDateTime::now_utc(), &mut rand::rng()).unwrap();
    let sign = async || mesh.sign(&mesh.token("node-a"), Some(WEB), &csr(&p256(), &[WEB])).await.unwrap();
    let old = mesh.roots();
    let before = sign().await;

    step(RotationStage::Prepare);
    mesh.until("two roots", |s| s.roots.len() == 2).await;
    let both = mesh.roots();
    assert!(both.starts_with(&old) && certificates(&both).len() == 2);
    let during = sign().await;
    assert_eq!(during.cert_chain.last(), Some(&both));
    verifies(&during, &old).expect("the old root signs still");

    step(RotationStage::Activate);
    until(async || verifies(&sign().await, &old).is_err()).await;
    let after = sign().await;
    verifies(&after, &both).unwrap();
    verifies(&before, &both).expect("what was signed before is trusted still");
    until(async || mesh.channel_trusting(&old).await.is_err()).await;
    mesh.channel_trusting(&both).await.expect("the server's own certificate went over to the new root");

    step(RotationStage::Finish);
    mesh.until("one root", |s| s.roots.len() == 1).await;
    let new = mesh.roots();
    assert!(!new.contains(&old) && verifies(&before, &new).is_err());
    verifies(&after, &new).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_signer_file_leaves_the_last_one_in_force() {
    let mesh = mesh().await;
    let path = mesh.state_dir().join("ca/signer.pem");
    let good = fs::read(&path).unwrap();
    fs::write(&path, "broken").unwrap();
    // Longer than the reader's interval, so that it has seen the broken file.
    let start = std::time::Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        mesh.sign(&mesh.token("node-a"), Some(WEB), &csr(&p256(), &[WEB])).await.expect("signs with the last good one");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    fs::write(&path, good).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_node_cannot_use_up_the_ca() {
    let mesh = mesh().await;
    let client = IstioCertificateServiceClient::new(mesh.channel().await);
    let token = mesh.token("node-a");
    // Requests without an identity cost no signature and count all the same.
    let asked = (0..4 * BURST).map(|_| {
        let (mut client, request) = (client.clone(), csr_request(&token, None, ""));
        async move { client.create_certificate(request).await.unwrap_err().code() }
    });
    let answers = futures_util::future::join_all(asked).await;
    let exhausted = answers.contains(&Code::ResourceExhausted);
    assert!(exhausted);
    mesh.sign(&mesh.token("node-b"), Some(DB), &csr(&p256(), &[DB])).await.expect("others are served");
}
