//! The webhook's server on a real port: questions, what is none, and strangers who take their time.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod common;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use common::{DEADLINE, tls_config};
use mesh_controller::ca::authority::{Authority, SignerPem, make_root};
use mesh_controller::kubernetes::webhook::{ADMISSION, Webhook};
use mesh_controller::metrics::Metrics;
use mesh_controller::server::{ServerCertificate, incoming, tls_acceptor};
use mesh_core::config::Settings;
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const NAME: &str = "mesh-controller.istio-system.svc";
/// How long an API server waits for an answer, by the chart.
const API_SERVER_WAITS: Duration = Duration::from_secs(5);

/// A webhook that answers, and what an API server knows of it.
struct Bed {
    address: SocketAddr,
    roots: String,
    authority: Authority,
    certificate: Arc<ServerCertificate>,
    metrics: Arc<Metrics>,
}

impl Bed {
    async fn up() -> Self {
        let now = OffsetDateTime::now_utc();
        let (cert, key) = make_root("cluster.local", now, &mut rand::rng()).unwrap();
        let pem = SignerPem { roots: cert.clone(), cert, key, chain: String::new() };
        let authority = Authority::from_pem(&pem, now).unwrap();
        let (certificate, metrics) = (Arc::<ServerCertificate>::default(), Arc::<Metrics>::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = tls_acceptor(certificate.clone(), ADMISSION).unwrap();
        let connections = incoming(listener, acceptor, ADMISSION, metrics.clone());
        tokio::spawn(Webhook::new(Settings::default(), metrics.clone()).serve(connections));
        let bed = Self { address, roots: authority.bundle_pem(), authority, certificate, metrics };
        bed.renew();
        bed
    }

    fn renew(&self) {
        let (names, ttl) = ([NAME.to_owned()], time::Duration::HOUR);
        let (issued, key) =
            self.authority.issue_server(&names, ttl, OffsetDateTime::now_utc(), &mut rand::rng()).unwrap();
        self.certificate.replace(issued, &key).unwrap();
    }

    async fn connect(&self) -> std::io::Result<TlsStream<TcpStream>> {
        self.connect_from(1).await
    }

    /// From a loopback address of its own.
    async fn connect_from(&self, host: u8) -> std::io::Result<TlsStream<TcpStream>> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((Ipv4Addr::new(127, 0, 0, host), 0).into())?;
        let mut config = tls_config(&self.roots);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let name = ServerName::try_from(NAME).unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, socket.connect(self.address).await?).await
    }

    /// The answer to a request, to the end of the connection.
    async fn exchange(&self, request: &[u8]) -> String {
        let mut tls = self.connect().await.unwrap();
        // The server may have heard enough before all is sent.
        let _ = tls.write_all(request).await;
        read_to_end(&mut tls).await
    }

    async fn ask(&self, review: &Value) -> Value {
        let answer = self.exchange(&post(&review.to_string())).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    }
}

async fn read_to_end(tls: &mut TlsStream<TcpStream>) -> String {
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(DEADLINE, tls.read_to_end(&mut answer)).await.expect("the connection ends");
    String::from_utf8(answer).unwrap()
}

/// As an API server asks.
fn post(body: &str) -> Vec<u8> {
    let head = format!("POST /validate?timeout=5s HTTP/1.1\r\nhost: {NAME}\r\ncontent-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body.as_bytes()].concat()
}

fn review(block: &str) -> Value {
    json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": "u-1", "operation": "CREATE",
            "kind": {"group": "security.istio.io", "version": "v1", "kind": "AuthorizationPolicy"},
            "object": {
                "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": {"name": "p", "namespace": "shop"},
                "spec": {"rules": [{"from": [{"source": {"ipBlocks": [block]}}]}]},
            },
        },
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_is_answered_and_counted() {
    let bed = Bed::up().await;
    let good = bed.ask(&review("10.0.0.0/8")).await;
    assert_eq!(good["response"], json!({"uid": "u-1", "allowed": true}));
    let bad = bed.ask(&review("not-an-address")).await;
    assert_eq!((&bad["response"]["uid"], &bad["response"]["allowed"]), (&json!("u-1"), &json!(false)));
    let message = bad["response"]["status"]["message"].as_str().unwrap();
    assert!(message.contains("spec.rules[0].from[0].source.ipBlocks[0]: `not-an-address` is neither"), "{message}");
    assert_eq!((bed.metrics.objects_taken.get(), bed.metrics.objects_refused.get()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_needs_no_new_server() {
    let bed = Bed::up().await;
    let shown = async || {
        let tls = bed.connect().await.unwrap();
        tls.get_ref().1.peer_certificates().unwrap()[0].to_vec()
    };
    let first = shown().await;
    assert_eq!(shown().await, first);
    bed.renew();
    assert_ne!(shown().await, first);
    bed.ask(&review("10.0.0.0/8")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_question_is_said_so_and_disturbs_nobody() {
    let bed = Bed::up().await;
    let chunked = "POST /validate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
    let cases: [(Vec<u8>, &str); 8] = [
        (b"GET /validate HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(), "HTTP/1.1 405 "),
        (b"POST /inject HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".to_vec(), "HTTP/1.1 404 "),
        (b"POST /validate HTTP/1.1\r\nhost: x\r\ncontent-length: 6291457\r\n\r\n".to_vec(), "HTTP/1.1 413 "),
        (post(""), "HTTP/1.1 400 "),
        (post(r#"{"apiVersion": "admission.k8s.io/v1"}"#), "HTTP/1.1 400 "),
        (post(&"[".repeat(1 << 20)), "HTTP/1.1 400 "),
        (format!("{chunked}3\r\nabc\r\n0\r\n\r\n").into_bytes(), "HTTP/1.1 400 "),
        (format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(100_000)).into_bytes(), "HTTP/1.1 4"),
    ];
    for (request, begin) in cases {
        let answer = bed.exchange(&request).await;
        let shown = String::from_utf8_lossy(&request[..request.len().min(80)]).into_owned();
        assert!(answer.starts_with(begin), "{shown}: {answer}");
    }
    assert_eq!(bed.ask(&review("10.0.0.0/8")).await["response"]["allowed"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_take_neither_the_room_of_connections_nor_that_of_bodies() {
    let bed = Bed::up().await;
    let mut crowd = Vec::new();
    for _ in 0..ADMISSION.per_peer {
        crowd.push(bed.connect_from(2).await.unwrap());
    }
    assert!(bed.connect_from(2).await.is_err(), "one address has its share");
    // Large bodies that never come, announced or in chunks.
    for (i, tls) in crowd.iter_mut().enumerate() {
        let length = if i % 2 == 0 { "content-length: 6291456" } else { "transfer-encoding: chunked" };
        let head = format!("POST /validate HTTP/1.1\r\nhost: x\r\n{length}\r\n\r\n");
        tls.write_all(head.as_bytes()).await.unwrap();
        tls.flush().await.unwrap();
    }
    // Those of another are answered while it waits, small ones and large ones.
    let mut large = review("10.0.0.0/8");
    large["request"]["object"]["metadata"]["annotations"] = json!({"large": "x".repeat(5 << 20)});
    for question in [review("10.0.0.0/8"), large] {
        let answer = tokio::time::timeout(API_SERVER_WAITS, bed.ask(&question)).await.expect("an answer in time");
        assert_eq!(answer["response"]["allowed"], true);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_too_long_is_cut_off() {
    let bed = Bed::up().await;
    let begun = [&b""[..], b"POST /valid", b"POST /validate HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"];
    let mut slow = Vec::new();
    for begun in begun {
        let mut tls = bed.connect().await.unwrap();
        tls.write_all(begun).await.unwrap();
        tls.flush().await.unwrap();
        slow.push(tls);
    }
    // All of them have begun; nobody gets an answer to half a question.
    for tls in &mut slow {
        let rest = read_to_end(tls).await;
        assert!(!rest.contains("uid"), "{rest}");
    }
    assert_eq!(bed.ask(&review("10.0.0.0/8")).await["response"]["allowed"], true);
}
