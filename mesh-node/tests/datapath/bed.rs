//! A node proxy's data path with workloads on loopback addresses, the CAs that it believes, and peers that dial it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::{Method, Request, StatusCode};
use mesh_core::flow::HBONE_PORT;
use mesh_core::identity::SpiffeId;
use mesh_core::snapshot::Change;
use mesh_core::workload::{Health, NetworkMode, Tunnel, Workload, WorkloadType, WorkloadUid};
use mesh_node::ca_client;
use mesh_node::hbone::CONNECTION_WINDOW;
use mesh_node::runtime::{
    AccessLogConfig, AccessLogFormat, CertifiedIdentity, DataPathConfig, Enrolled, Listeners, OriginalDst, RootStore,
    Shared, View,
};
use mesh_node::tls::{self, ExpectedServer};
use mesh_node::workers::DataPath;
use prometheus_client::registry::Registry;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;

/// Everything here takes milliseconds; this is when a test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// Trust domain of all.
const TRUST_DOMAIN: &str = "cluster.local";
/// The node that all workloads are on.
const NODE: &str = "node-a";

/// Looks until there is something.
pub(crate) async fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "gave up waiting for {what}");
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What must happen, within [`PATIENCE`].
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("gave up waiting for {what}"))
}

pub(crate) fn identity(service_account: &str) -> SpiffeId {
    SpiffeId::new(TRUST_DOMAIN, "default", service_account)
}

/// A loopback address that no other test of this machine has.
pub(crate) fn address() -> IpAddr {
    let [a, b, c] = rand::random::<[u8; 3]>();
    Ipv4Addr::new(127, a.max(1), b, c.clamp(1, 254)).into()
}

/// A root that signs.
pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
}

impl Ca {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().clone();
        Self { issuer: Issuer::new(params, key), root }
    }

    /// A certificate of an identity, with its key.
    pub(crate) fn issue(&self, id: &SpiffeId) -> Arc<CertifiedIdentity> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into().unwrap())];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let pem = format!("{}{}", certificate.pem(), key.serialize_pem());
        Arc::new(ca_client::read_identity(id, &pem).unwrap())
    }
}

pub(crate) fn roots(cas: &[&Ca]) -> Arc<RootStore> {
    Arc::new(RootStore::new(cas.iter().map(|ca| ca.root.clone()).collect()).unwrap())
}

/// The configuration's workload of a name, on [`NODE`].
pub(crate) fn workload(name: &str, ip: IpAddr) -> Workload {
    let empty: Arc<str> = "".into();
    Workload {
        uid: WorkloadUid(format!("Kubernetes//Pod/default/{name}").into()),
        name: name.into(),
        identity: identity(name),
        addresses: vec![ip],
        hostname: Arc::clone(&empty),
        network: Arc::clone(&empty),
        cluster: Arc::clone(&empty),
        node: NODE.into(),
        tunnel: Tunnel::Hbone,
        native_tunnel: false,
        network_mode: NetworkMode::Standard,
        canonical_name: name.into(),
        canonical_revision: Arc::clone(&empty),
        workload_type: WorkloadType::Pod,
        workload_name: name.into(),
        locality: mesh_core::workload::Locality::default(),
        capacity: 1,
        health: Health::Healthy,
        waypoint: None,
        network_gateway: None,
        policies: Vec::new(),
        services: BTreeMap::new(),
    }
}

/// A workload that is served here.
pub(crate) struct Served {
    pub(crate) hbone: SocketAddr,
    /// Where captured connections are accepted.
    pub(crate) outbound: SocketAddr,
    /// What answers with every byte that it gets.
    pub(crate) application: SocketAddr,
}

/// The data path. Ends with the value.
pub(crate) struct Bed {
    pub(crate) shared: Arc<Shared>,
    pub(crate) path: DataPath,
}

impl Bed {
    /// With no captured connections.
    pub(crate) fn new(workers: usize) -> Self {
        Self::capturing(workers, Arc::new(|_, _| None))
    }

    /// Where captured connections wanted to go is what `original_dst` says.
    pub(crate) fn capturing(workers: usize, original_dst: OriginalDst) -> Self {
        Self::start(workers, original_dst, None)
    }

    /// As [`Self::capturing`], with an access log.
    pub(crate) fn logging(original_dst: OriginalDst, log: PathBuf) -> Self {
        Self::start(1, original_dst, Some(AccessLogConfig { path: Some(log), format: AccessLogFormat::Text }))
    }

    fn start(workers: usize, original_dst: OriginalDst, access_log: Option<AccessLogConfig>) -> Self {
        let config = DataPathConfig {
            node: NODE.into(),
            cluster: "Kubernetes".into(),
            trust_domain: TRUST_DOMAIN.into(),
            workers: NonZeroUsize::new(workers),
            force_tunnel: false,
            access_log,
        };
        let shared = Arc::new(Shared::default());
        let path = DataPath::start(config, Arc::clone(&shared), original_dst, &mut Registry::default()).unwrap();
        Self { shared, path }
    }

    /// Changes the view as the rest of the process does.
    pub(crate) fn change(&self, next: impl Fn(&View) -> View) {
        self.shared.update(next);
        self.path.config_changed();
    }

    pub(crate) fn trust(&self, cas: &[&Ca]) {
        let roots = roots(cas);
        self.change(|view| view.with_certs(view.certs.clone(), Arc::clone(&roots)));
    }

    pub(crate) fn certify(&self, certificate: &Arc<CertifiedIdentity>) {
        self.change(|view| {
            let mut certs = view.certs.clone();
            certs.insert(certificate.id.clone(), Arc::clone(certificate));
            view.with_certs(certs, Arc::clone(&view.roots))
        });
    }

    pub(crate) fn configure(&self, changes: &[Change]) {
        self.change(|view| view.with_snapshot(Arc::new(view.snapshot.apply(changes)), true));
    }

    /// Enrols a workload that the configuration knows, with an application that answers with every byte.
    pub(crate) async fn serve(&self, name: &str) -> Served {
        self.serve_at(name, HBONE_PORT).await
    }

    /// As [`Self::serve`], with another HBONE port; 0: any.
    pub(crate) async fn serve_at(&self, name: &str, hbone_port: u16) -> Served {
        let ip = address();
        let listen = |port| {
            let listener = std::net::TcpListener::bind((ip, port)).unwrap();
            listener.set_nonblocking(true).unwrap();
            (listener.local_addr().unwrap(), OwnedFd::from(listener))
        };
        let ((outbound, outbound4), (_, inbound4), (hbone, hbone4)) = (listen(0), listen(0), listen(hbone_port));
        let enrolled = Arc::new(Enrolled {
            uid: WorkloadUid(format!("uid-of-{name}").into()),
            name: name.into(),
            namespace: "default".into(),
            service_account: name.into(),
            netns: std::fs::File::open("/proc/thread-self/ns/net").unwrap().into(),
            cookie: 1,
            listeners: Listeners { outbound4, outbound6: None, inbound4, inbound6: None, hbone4, hbone6: None },
        });
        self.configure(&[Change::UpsertWorkload(Arc::new(workload(name, ip)))]);
        self.change(|view| {
            let mut all = view.enrolled.clone();
            all.insert(enrolled.uid.clone(), Arc::clone(&enrolled));
            view.with_enrolled(all)
        });
        self.path.serve(enrolled);
        let application = TcpListener::bind((ip, 0)).await.unwrap();
        let address = application.local_addr().unwrap();
        tokio::spawn(echo(application));
        Served { hbone, outbound, application: address }
    }

    /// Learns of a workload that another node proxy serves.
    pub(crate) fn know(&self, name: &str, served: &Served) {
        let elsewhere = Workload { node: "node-b".into(), ..workload(name, served.hbone.ip()) };
        self.configure(&[Change::UpsertWorkload(Arc::new(elsewhere))]);
    }
}

/// Stands between whoever dials an HBONE port and the node proxy that serves it, and lets through what it is told to.
pub(crate) struct Gate {
    /// Connections that came so far.
    pub(crate) came: Arc<AtomicUsize>,
    passes: Arc<Semaphore>,
}

impl Gate {
    /// At the HBONE port of the address that `to` has.
    pub(crate) async fn before(to: SocketAddr) -> Self {
        let listener = TcpListener::bind((to.ip(), HBONE_PORT)).await.unwrap();
        let gate = Self { came: Arc::default(), passes: Arc::new(Semaphore::new(0)) };
        let (came, passes) = (Arc::clone(&gate.came), Arc::clone(&gate.passes));
        tokio::spawn(async move {
            while let Ok((mut tcp, _)) = listener.accept().await {
                came.fetch_add(1, Ordering::Relaxed);
                let passes = Arc::clone(&passes);
                tokio::spawn(async move {
                    passes.acquire().await.unwrap().forget();
                    let mut server = TcpStream::connect(to).await.unwrap();
                    // Its end is their business.
                    let _ended = tokio::io::copy_bidirectional(&mut tcp, &mut server).await;
                });
            }
        });
        gate
    }

    /// Lets so many connections through, those that wait first.
    pub(crate) fn let_through(&self, connections: usize) {
        self.passes.add_permits(connections);
    }

    /// Waits until so many connections have come.
    pub(crate) async fn came(&self, connections: usize) {
        eventually("a dial", || (self.came.load(Ordering::Relaxed) >= connections).then_some(())).await;
    }
}

/// Answers with every byte, until the runtime ends.
pub(crate) async fn echo(listener: TcpListener) {
    while let Ok((mut tcp, _)) = listener.accept().await {
        tokio::spawn(async move {
            let (mut read, mut write) = tcp.split();
            // Its end is the other end's business.
            let _ended = tokio::io::copy(&mut read, &mut write).await;
        });
    }
}

/// A node proxy that is not ours.
pub(crate) struct Peer {
    pub(crate) identity: Arc<CertifiedIdentity>,
    pub(crate) roots: Arc<RootStore>,
}

impl Peer {
    /// Dials the HBONE port of `server`.
    pub(crate) async fn tunnel(&self, to: SocketAddr, server: &SpiffeId) -> SendRequest<Bytes> {
        let config = tls::client_config(&self.identity, &self.roots, ExpectedServer::exactly(server.clone())).unwrap();
        let tcp = TcpStream::connect(to).await.unwrap();
        let tls = TlsConnector::from(config).connect(ServerName::from(to.ip()), tcp).await.unwrap();
        let (send, driver) = h2::client::Builder::new()
            .max_send_buffer_size(CONNECTION_WINDOW as usize)
            .handshake::<_, Bytes>(tls)
            .await
            .unwrap();
        tokio::spawn(async move {
            // Its end shows in the streams.
            let _ended = driver.await;
        });
        send
    }
}

/// A carried connection.
#[derive(Debug)]
pub(crate) struct Carried {
    pub(crate) send: SendStream<Bytes>,
    pub(crate) recv: RecvStream,
}

/// Asks for a connection to `target`.
pub(crate) async fn open(tunnel: &SendRequest<Bytes>, target: SocketAddr) -> Result<(StatusCode, Carried), h2::Error> {
    let mut tunnel = tunnel.clone().ready().await?;
    let request = Request::builder().method(Method::CONNECT).uri(target.to_string()).body(()).unwrap();
    let (response, send) = tunnel.send_request(request, false)?;
    let (head, recv) = response.await?.into_parts();
    Ok((head.status, Carried { send, recv }))
}

impl Carried {
    /// Says something; what comes back.
    pub(crate) async fn say(&mut self, text: &'static str) -> Result<String, h2::Error> {
        self.send.send_data(Bytes::from_static(text.as_bytes()), false)?;
        let mut heard = Vec::new();
        while heard.len() < text.len() {
            match self.recv.data().await {
                Some(chunk) => heard.extend_from_slice(&chunk?),
                None => break,
            }
        }
        Ok(String::from_utf8(heard).unwrap())
    }
}

/// Says something on a plain connection; what comes back.
pub(crate) async fn say(tcp: &mut TcpStream, text: &str) -> std::io::Result<String> {
    tcp.write_all(text.as_bytes()).await?;
    let mut heard = vec![0; text.len()];
    tcp.read_exact(&mut heard).await?;
    Ok(String::from_utf8(heard).unwrap())
}
