//! A controller in this process, with real TLS on an ephemeral port, and clients for it.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hyper_util::rt::TokioIo;
use mesh_api::admin::{ControllerStatus, Problem};
use mesh_api::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use mesh_api::proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use mesh_api::proto::xds::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_api::proto::xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Status as RpcStatus};
use mesh_controller::app::{self, Options, Running};
use mesh_controller::ca::authority::certificates;
use mesh_controller::state_dir::StateDir;
use mesh_controller::token::TokenKey;
use mesh_core::config::Settings;
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls::RootCertStore;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

/// How long anything that must happen may take on a loaded machine.
pub const DEADLINE: Duration = Duration::from_secs(20);

pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("mesh-controller-it-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).expect("a fresh name");
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A running controller, in this process or in one of its own.
pub struct Mesh {
    pub temp: TempDir,
    pub address: SocketAddr,
    pub server: Server,
}

pub enum Server {
    InProcess(Box<Running>),
    Process(Process),
    /// Starts or stops by itself.
    None,
}

/// The binary as a child process; it ends with the value.
pub struct Process {
    pub child: Child,
    /// What it wrote to stderr so far.
    pub log: Arc<Mutex<String>>,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Mesh {
    pub async fn start(files: &[(&str, &str)]) -> Self {
        Self::start_with(files, |_| {}).await
    }

    pub async fn start_with(files: &[(&str, &str)], change: impl FnOnce(&mut Options)) -> Self {
        let temp = TempDir::new();
        fs::create_dir(temp.path().join("config")).unwrap();
        for (name, text) in files {
            fs::write(temp.path().join("config").join(name), text).unwrap();
        }
        let mut options = options(temp.path());
        change(&mut options);
        let running = app::start(options).await.expect("starts");
        Self { temp, address: running.address, server: Server::InProcess(Box::new(running)) }
    }

    /// Ends the controller in this process and starts another on the same directories, after a change of them.
    pub async fn restart_after(self, change: impl FnOnce(&Path)) -> Self {
        let Self { temp, server: Server::InProcess(running), .. } = self else { panic!("not in this process") };
        running.stop().await;
        change(temp.path());
        Self::resume(temp).await
    }

    /// Starts a controller on directories that are there.
    pub async fn resume(temp: TempDir) -> Self {
        let running = app::start(options(temp.path())).await.expect("starts");
        Self { temp, address: running.address, server: Server::InProcess(Box::new(running)) }
    }

    /// Starts the binary, by a shell line in which `$0` is the command.
    pub async fn start_process(files: &[(&str, &str)], shell: &str) -> Self {
        let temp = TempDir::new();
        fs::create_dir(temp.path().join("config")).unwrap();
        for (name, text) in files {
            fs::write(temp.path().join("config").join(name), text).unwrap();
        }
        let mut child = Command::new("sh")
            .args(["-c", shell, env!("CARGO_BIN_EXE_mesh-controller")])
            .args(["run", "--listen", "127.0.0.1:0", "--log-format", "json", "--config-dir"])
            .arg(temp.path().join("config"))
            .arg("--state-dir")
            .arg(temp.path().join("state"))
            .arg("--admin-socket")
            .arg(temp.path().join("admin.sock"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log: Arc<Mutex<String>> = Arc::default();
        let (ready, address) = tokio::sync::oneshot::channel();
        let (stderr, sink) = (child.stderr.take().unwrap(), log.clone());
        std::thread::spawn(move || {
            let mut ready = Some(ready);
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let event: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
                if event["message"] == "ready"
                    && let Some(ready) = ready.take()
                {
                    let _ = ready.send(event["address"].as_str().unwrap_or_default().to_owned());
                }
                sink.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        let process = Process { child, log };
        let address = tokio::time::timeout(DEADLINE, address).await.expect("ready in time");
        let address = address.unwrap_or_else(|_| panic!("it ended:\n{}", process.log.lock().unwrap()));
        Self { temp, address: address.parse().unwrap(), server: Server::Process(process) }
    }

    pub fn process(&mut self) -> &mut Process {
        match &mut self.server {
            Server::Process(process) => process,
            Server::InProcess(_) | Server::None => panic!("not a process of its own"),
        }
    }

    pub fn state_dir(&self) -> PathBuf {
        self.temp.path().join("state")
    }

    pub fn write(&self, name: &str, text: &str) {
        let dir = self.temp.path().join("config");
        fs::write(dir.join(".new"), text).unwrap();
        fs::rename(dir.join(".new"), dir.join(name)).unwrap();
    }

    pub fn remove(&self, name: &str) {
        fs::remove_file(self.temp.path().join("config").join(name)).unwrap();
    }

    pub fn token(&self, node: &str) -> String {
        self.token_key().issue(node, unix_now(), 3600).unwrap()
    }

    pub fn token_key(&self) -> TokenKey {
        TokenKey::open(&StateDir::open(&self.state_dir()).unwrap()).unwrap()
    }

    pub fn roots(&self) -> String {
        fs::read_to_string(self.state_dir().join("root-cert.pem")).unwrap()
    }

    /// A gRPC channel whose server is verified by the given roots.
    pub async fn channel_trusting(&self, roots: &str) -> Result<Channel, String> {
        let address = self.address;
        let connector = TlsConnector::from(Arc::new(tls_config(roots)));
        let connect = tower::service_fn(move |_| {
            let connector = connector.clone();
            async move {
                let tcp = TcpStream::connect(address).await?;
                tcp.set_nodelay(true)?;
                let name = ServerName::try_from("istiod.istio-system.svc").expect("a DNS name");
                Ok::<_, std::io::Error>(TokioIo::new(connector.connect(name, tcp).await?))
            }
        });
        let endpoint = Endpoint::from_static("https://istiod.istio-system.svc:15012");
        endpoint.connect_with_connector(connect).await.map_err(|e| format!("{e:?}"))
    }

    pub async fn channel(&self) -> Channel {
        self.channel_trusting(&self.roots()).await.expect("connects")
    }

    pub async fn sign(
        &self,
        token: &str,
        identity: Option<&str>,
        csr: &str,
    ) -> Result<IstioCertificateResponse, Status> {
        let client = IstioCertificateServiceClient::new(self.channel().await);
        client
            .max_decoding_message_size(1 << 20)
            .create_certificate(csr_request(token, identity, csr))
            .await
            .map(tonic::Response::into_inner)
    }

    pub async fn stream(&self, node: &str) -> Ads {
        self.stream_with(vec![format!("Bearer {}", self.token(node))]).await.expect("admitted")
    }

    pub async fn stream_with(&self, authorization: Vec<String>) -> Result<Ads, Status> {
        let (requests, receiver) = mpsc::channel(16);
        let mut request = Request::new(ReceiverStream::new(receiver));
        for value in authorization {
            request.metadata_mut().append("authorization", value.parse().unwrap());
        }
        let mut client =
            AggregatedDiscoveryServiceClient::new(self.channel().await).max_decoding_message_size(64 << 20);
        let responses = client.delta_aggregated_resources(request).await?.into_inner();
        Ok(Ads { requests, responses })
    }

    /// `GET path` on the admin socket.
    pub async fn admin(&self, path: &str) -> (u16, String) {
        let mut socket = UnixStream::connect(self.temp.path().join("admin.sock")).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).await.unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    pub async fn status(&self) -> ControllerStatus {
        serde_json::from_str(&self.admin("/status").await.1).unwrap()
    }

    pub async fn problems(&self) -> Vec<Problem> {
        serde_json::from_str(&self.admin("/problems").await.1).unwrap()
    }

    /// The same of one whose admin socket may not be there yet.
    pub async fn try_problems(&self) -> Option<Vec<Problem>> {
        UnixStream::connect(self.temp.path().join("admin.sock")).await.ok()?;
        Some(self.problems().await)
    }

    /// Polls the status until it is as wanted.
    pub async fn until(&self, what: &str, is_so: impl Fn(&ControllerStatus) -> bool) -> ControllerStatus {
        let start = Instant::now();
        loop {
            let status = self.status().await;
            if is_so(&status) {
                return status;
            }
            assert!(start.elapsed() < DEADLINE, "not within the deadline: {what}\n{status:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

pub fn options(root: &Path) -> Options {
    Options {
        origin: mesh_controller::app::Origin::Directories(vec![root.join("config")]),
        state_dir: root.join("state"),
        listen: "127.0.0.1:0".parse().unwrap(),
        admin_socket: root.join("admin.sock"),
        monitoring: None,
        settings: Settings::default(),
        leaf_ttl: Duration::from_secs(24 * 3600),
        cacerts: None,
        server_names: Vec::new(),
    }
}

pub fn tls_config(roots: &str) -> rustls::ClientConfig {
    let mut store = RootCertStore::empty();
    for root in certificates(roots) {
        store.add(root).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(store)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

/// A delta stream from the client's side.
#[derive(Debug)]
pub struct Ads {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

pub const ADDRESS: &str = mesh_api::ADDRESS_TYPE_URL;
pub const AUTHORIZATION: &str = mesh_api::AUTHORIZATION_TYPE_URL;

impl Ads {
    pub async fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.expect("the stream is open");
    }

    pub async fn subscribe(&self, type_url: &str) {
        self.send(DeltaDiscoveryRequest { type_url: type_url.into(), ..Default::default() }).await;
    }

    pub async fn subscribe_having(&self, type_url: &str, versions: BTreeMap<String, String>) {
        let initial_resource_versions = versions.into_iter().collect();
        self.send(DeltaDiscoveryRequest { type_url: type_url.into(), initial_resource_versions, ..Default::default() })
            .await;
    }

    pub async fn receive(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let received = tokio::time::timeout(DEADLINE, self.responses.message()).await.expect("a response in time");
        received.map(|response| response.expect("the stream goes on"))
    }

    /// The next response, acknowledged.
    pub async fn next(&mut self) -> DeltaDiscoveryResponse {
        let response = self.receive().await.expect("a response");
        self.answer(&response, None).await;
        response
    }

    pub async fn answer(&self, response: &DeltaDiscoveryResponse, error: Option<&str>) {
        let error_detail = error.map(|text| RpcStatus { code: 3, message: text.into(), details: vec![] });
        let (type_url, response_nonce) = (response.type_url.clone(), response.nonce.clone());
        self.send(DeltaDiscoveryRequest { type_url, response_nonce, error_detail, ..Default::default() }).await;
    }

    /// Whether nothing comes for a while. Only for what must not happen.
    pub async fn is_silent_for(&mut self, time: Duration) -> bool {
        tokio::time::timeout(time, self.responses.message()).await.is_err()
    }
}

pub fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|r| r.name.as_str()).collect()
}

pub fn versions(response: &DeltaDiscoveryResponse) -> BTreeMap<String, String> {
    response.resources.iter().map(|r| (r.name.clone(), r.version.clone())).collect()
}

pub fn csr_request(token: &str, identity: Option<&str>, csr: &str) -> Request<IstioCertificateRequest> {
    let value = |text: &str| prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(text.into())) };
    let fields = identity.map(|id| ("ImpersonatedIdentity".to_owned(), value(id)));
    let metadata = Some(prost_types::Struct { fields: fields.into_iter().collect() });
    let mut request = Request::new(IstioCertificateRequest { csr: csr.into(), validity_duration: 0, metadata });
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

pub fn csr(key: &KeyPair, uris: &[&str]) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    params.serialize_request(key).unwrap().pem().unwrap()
}

pub fn p256() -> KeyPair {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap()
}

pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// A pod of namespace `default` in the mesh.
pub fn pod(name: &str, node: &str, account: &str, ip: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  labels: {{app: {name}, istio.io/dataplane-mode: ambient}}\n\
         spec: {{nodeName: {node}, serviceAccountName: {account}}}\nstatus: {{phase: Running, podIP: {ip}}}\n"
    )
}

pub const DENY_ALL: &str =
    "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny-all}\nspec: {}\n";
