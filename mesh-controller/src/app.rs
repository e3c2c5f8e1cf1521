//! Puts the parts together and runs them. Only here are tasks spawned; each has a name and ends with the process.

mod origin;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use futures_util::Stream;
use mesh_api::MAX_DISCOVERY_REQUEST_BYTES;
use mesh_api::proto::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use mesh_api::proto::xds::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use mesh_core::config::{Compiler, Settings};
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinSet, spawn_blocking};
use tonic::transport::Server;

pub use self::origin::{Asked, Origin};
use crate::admin::{self, Listener};
use crate::ads::service::{self as ads, Ads};
use crate::ca::authority::{Authority, MAX_LEAF_TTL, SignerPem};
use crate::ca::service::{self as ca, CertificateService, Config, IssueSettings};
use crate::ca::store::SignerSource;
use crate::control::Control;
use crate::door::Door;
use crate::metrics::Metrics;
use crate::server::{Connection, NODES, ServerCertificate, incoming, tls_acceptor};
use crate::source::{Changed, Notices};
use crate::state_dir::{PUBLIC_MODE, StateDir, StateLock, write_atomically};
use crate::status::{MetricsPages, StatusPages};

/// Names that every server certificate has.
const SERVER_NAMES: [&str; 4] = ["istiod.istio-system.svc", "mesh-controller", "localhost", "127.0.0.1"];
/// How often the signer's files are looked at.
const SIGNER_POLL: Duration = Duration::from_secs(1);
/// HTTP/2 PING on idle connections, and how long its answer may take: a dead node is gone after half a minute.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// See [`KEEPALIVE_INTERVAL`].
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Calls at once on one connection: the stream and a burst of certificate requests.
const MAX_CALLS: u32 = 256;
/// Bytes of a call's headers, decoded; a token has 300.
const MAX_HEADER_BYTES: u32 = 32 << 10;
/// Time for streams to end after SIGTERM.
const DRAIN: Duration = Duration::from_secs(5);

/// What `run` is told.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where configuration comes from.
    pub origin: Origin,
    /// State directory.
    pub state_dir: PathBuf,
    /// gRPC port.
    pub listen: SocketAddr,
    /// Admin socket.
    pub admin_socket: PathBuf,
    /// Metrics port.
    pub monitoring: Option<SocketAddr>,
    /// Of the compiler.
    pub settings: Settings,
    /// Life of workload certificates.
    pub leaf_ttl: Duration,
    /// Plugged signer.
    pub cacerts: Option<PathBuf>,
    /// Further names of the server.
    pub server_names: Vec<String>,
}

/// A controller that serves.
#[derive(Debug)]
pub struct Running {
    /// Address of the gRPC port, with its real port.
    pub address: SocketAddr,
    shutdown: watch::Sender<bool>,
    /// Tasks that end by themselves when told to.
    orderly: usize,
    tasks: JoinSet<&'static str>,
    admin_socket: PathBuf,
    _lock: StateLock,
}

/// Runs until SIGTERM or SIGINT.
pub async fn run(options: Options) -> anyhow::Result<()> {
    // Before anything that takes time, so that a signal at start ends the process in order, too.
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut running = tokio::select! {
        // First, so that it has begun before anything ends it.
        biased;
        running = start(options) => running?,
        // It may wait for files to be mended.
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let ended = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        ended = running.tasks.join_next() => ended,
    };
    if let Some(ended) = ended {
        let name = ended.context("a task panicked")?;
        anyhow::bail!("the task `{name}` ended by itself");
    }
    tracing::info!("shutting down");
    running.stop().await;
    Ok(())
}

/// Starts all parts. When it returns, the first configuration is published and the ports are open: that waits until it
/// is known what must be in force.
pub async fn start(options: Options) -> anyhow::Result<Running> {
    let leaf_ttl = time::Duration::try_from(options.leaf_ttl).ok().filter(|ttl| *ttl <= MAX_LEAF_TTL);
    let leaf_ttl = leaf_ttl.context("--leaf-ttl is longer than 90d")?;
    let dir = StateDir::open(&options.state_dir)?;
    let lock = dir.lock()?;
    let metrics = Arc::new(Metrics::default());
    let mut tasks = JoinSet::new();
    let opened = origin::open(&options.origin, &dir, &options.settings, &mut tasks).await?;
    let origin::Opened { source, mut notices, judge, cluster } = opened;
    let door = Arc::new(Door::new(judge, metrics.clone()));
    let stored = dir.configuration();
    let mut signer = Signer::open(&options, dir, leaf_ttl)?;
    let listener = listen(options.listen, "--listen").await?;
    let address = listener.local_addr().context("read the listener's address")?;

    let control = Control::new(source, Compiler::new(options.settings.clone()), metrics.clone());
    let shutdown = watch::Sender::new(false);
    let pages = StatusPages {
        trust_domain: options.settings.trust_domain.to_string(),
        sources: control.sources(),
        catalogue: control.catalogue(),
        nodes: Arc::default(),
        problems: control.problems(),
        authority: signer.authority.clone(),
        ready: Arc::default(),
    };
    let (nodes, ready) = (pages.nodes.clone(), pages.ready.clone());
    serve_pages(&options, pages, metrics.clone(), &mut tasks).await?;
    let services = Services {
        ads: ads::Shared {
            door: door.clone(),
            catalogue: control.catalogue(),
            generation: control.generation(),
            shutdown: shutdown.subscribe(),
            nodes,
            metrics: metrics.clone(),
        },
        certificates: CertificateService::new(
            door,
            signer.authority.clone(),
            Config { compiler: control.compiler(), steps: control.steps() },
            metrics.clone(),
            IssueSettings { trust_domain: options.settings.trust_domain.to_string(), leaf_ttl },
        ),
    };

    let control = blocking(control, |control| control.resume(stored)).await?;
    if let Some(cluster) = &cluster {
        cluster.write(signer.authority.clone(), control.verdicts(), shutdown.subscribe(), &mut tasks);
        cluster.complete(&mut notices, control.knows_the_past()).await;
    }
    let control = publish_first(control, &mut notices).await?;
    let judging = signer.judging(options.settings, metrics.clone());
    let connections = incoming(listener, tls_acceptor(signer.certificate.clone(), NODES)?, NODES, metrics);
    tasks.spawn(serve_grpc(services, connections, shutdown.subscribe()));
    tasks.spawn(async move {
        configure(control, notices).await;
        "configuration"
    });
    tasks.spawn(async move {
        signer.keep().await;
        "signer"
    });
    if let Some(cluster) = &cluster {
        cluster.answer(judging, &mut tasks).await?;
    }
    ready.store(true, Ordering::Release);
    tracing::info!(%address, admin = %options.admin_socket.display(), "ready");
    let orderly = 1 + usize::from(cluster.is_some());
    Ok(Running { address, shutdown, orderly, tasks, admin_socket: options.admin_socket, _lock: lock })
}

/// Looks at the source until something may be published, and publishes it.
async fn publish_first(mut control: Control, notices: &mut Notices) -> anyhow::Result<Control> {
    let mut changed = Changed::Anything;
    loop {
        control = blocking(control, move |control| control.step(&changed)).await?;
        if control.is_published() {
            return Ok(control);
        }
        changed = notices.changed().await;
    }
}

/// The admin socket, and the metrics port if there is to be one.
async fn serve_pages(
    options: &Options,
    pages: StatusPages,
    metrics: Arc<Metrics>,
    tasks: &mut JoinSet<&'static str>,
) -> anyhow::Result<()> {
    let ready = pages.ready.clone();
    let listener = admin::listen_unix(&options.admin_socket);
    let listener =
        listener.with_context(|| format!("listen on {} (--admin-socket)", options.admin_socket.display()))?;
    tasks.spawn(async move {
        admin::serve(listener, Arc::new(pages)).await;
        "admin"
    });
    let Some(address) = options.monitoring else { return Ok(()) };
    let listener = listen(address, "--monitoring").await?;
    tasks.spawn(async move {
        admin::serve(Listener::Tcp(listener), Arc::new(MetricsPages { metrics, ready })).await;
        "monitoring"
    });
    Ok(())
}

async fn listen(address: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("listen on {address} ({flag})"))
}

/// What the gRPC port offers.
struct Services {
    ads: ads::Shared,
    certificates: CertificateService,
}

async fn serve_grpc(
    services: Services,
    connections: impl Stream<Item = io::Result<Connection>>,
    mut down: watch::Receiver<bool>,
) -> &'static str {
    let ads = AggregatedDiscoveryServiceServer::new(Ads::new(Arc::new(services.ads)));
    let certificates = IstioCertificateServiceServer::new(services.certificates);
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(MAX_CALLS)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .add_service(ads.max_decoding_message_size(MAX_DISCOVERY_REQUEST_BYTES))
        .add_service(certificates.max_decoding_message_size(ca::MAX_REQUEST_BYTES))
        .serve_with_incoming_shutdown(connections, async move {
            let _ = down.wait_for(|down| *down).await;
        });
    if let Err(error) = server.await {
        tracing::error!(%error, "gRPC server");
    }
    GRPC_TASK
}

/// Ends when its streams have.
const GRPC_TASK: &str = "grpc";
/// Ends when it has given the lease back.
const LEADER_TASK: &str = "leader";

async fn configure(mut control: Control, mut notices: Notices) {
    loop {
        let changed = notices.changed().await;
        control = match blocking(control, move |control| control.step(&changed)).await {
            Ok(control) => control,
            Err(error) => {
                tracing::error!("{error:#}");
                return;
            }
        };
    }
}

async fn blocking(mut control: Control, act: impl FnOnce(&mut Control) + Send + 'static) -> anyhow::Result<Control> {
    let acted = spawn_blocking(move || {
        act(&mut control);
        control
    });
    acted.await.context("read the configuration")
}

impl Running {
    /// Ends streams (GOAWAY) and tasks.
    pub async fn stop(mut self) {
        let _ = self.shutdown.send(true);
        let drained = tokio::time::timeout(DRAIN, async {
            while self.orderly > 0
                && let Some(ended) = self.tasks.join_next().await
            {
                self.orderly -= usize::from(matches!(ended, Ok(GRPC_TASK | LEADER_TASK)));
            }
        });
        if drained.await.is_err() {
            tracing::warn!("streams did not end within {} s", DRAIN.as_secs());
        }
        self.tasks.shutdown().await;
        let _ = std::fs::remove_file(&self.admin_socket);
    }
}

/// The signer's files, kept in force, and the server's own certificate.
struct Signer {
    source: SignerSource,
    dir: StateDir,
    names: Vec<String>,
    ttl: time::Duration,
    authority: Arc<ArcSwap<Authority>>,
    certificate: Arc<ServerCertificate>,
    renew_at: OffsetDateTime,
    /// What the files held from which the signer in force was made.
    in_force: SignerPem,
    /// What was last said about files that do not make a signer.
    complained: Option<String>,
}

impl Signer {
    fn open(options: &Options, dir: StateDir, ttl: time::Duration) -> anyhow::Result<Self> {
        let source = match &options.cacerts {
            Some(plugged) => SignerSource::Plugged(plugged.clone()),
            None => SignerSource::Own(dir.ca()),
        };
        let now = OffsetDateTime::now_utc();
        source.make_at_first_use(&options.settings.trust_domain, now, &mut rand::rng())?;
        let in_force = source.read()?;
        let authority = source.authority(&in_force, now)?;
        let mut names: Vec<String> = SERVER_NAMES.map(str::to_owned).into();
        names.push("::1".into());
        if !options.listen.ip().is_unspecified() {
            names.push(options.listen.ip().to_string());
        }
        names.extend(options.server_names.iter().cloned());
        names.sort();
        names.dedup();
        let mut signer = Self {
            in_force,
            complained: None,
            source,
            dir,
            names,
            ttl,
            authority: Arc::new(ArcSwap::from_pointee(authority)),
            certificate: Arc::default(),
            renew_at: now,
        };
        signer.publish_roots()?;
        signer.renew(now).context("issue the server's own certificate")?;
        Ok(signer)
    }

    /// What the webhook's server has of it: it shows the certificate that nodes are shown.
    fn judging(&self, settings: Settings, metrics: Arc<Metrics>) -> origin::Judging {
        let (authority, certificate) = (self.authority.clone(), self.certificate.clone());
        origin::Judging { settings, authority, certificate, metrics }
    }

    /// Takes up new files and renews the server's certificate, for ever.
    async fn keep(&mut self) {
        let mut failed = false;
        loop {
            tokio::time::sleep(SIGNER_POLL).await;
            let now = OffsetDateTime::now_utc();
            let changed = self.reload(now);
            if !changed && now < self.renew_at {
                continue;
            }
            match self.renew(now) {
                Ok(()) => failed = false,
                Err(error) if !failed => {
                    tracing::error!("the server's certificate cannot be renewed: {error:#}");
                    failed = true;
                }
                Err(_) => {}
            }
        }
    }

    /// Whether there is another signer now. Files that do not make one are tried again, because that may be a matter of
    /// time; what is wrong is said once.
    fn reload(&mut self, now: OffsetDateTime) -> bool {
        let found = self.source.read().and_then(|pem| match pem == self.in_force {
            true => Ok(None),
            false => Ok(Some((self.source.authority(&pem, now)?, pem))),
        });
        match found {
            Ok(None) => {
                self.complained = None;
                false
            }
            Ok(Some((authority, pem))) => {
                tracing::info!(roots = authority.roots().len(), not_after = %authority.not_after(), "signer replaced");
                self.authority.store(Arc::new(authority));
                (self.in_force, self.complained) = (pem, None);
                if let Err(error) = self.publish_roots() {
                    tracing::error!("{error:#}");
                }
                true
            }
            Err(error) => {
                let complaint = error.to_string();
                if self.complained.as_ref() != Some(&complaint) {
                    tracing::error!("the signer's files cannot be used, the last ones stay in force: {complaint}");
                    self.complained = Some(complaint);
                }
                false
            }
        }
    }

    fn publish_roots(&self) -> anyhow::Result<()> {
        let bundle = self.authority.load().bundle_pem();
        write_atomically(&self.dir.root_cert(), bundle.as_bytes(), PUBLIC_MODE)?;
        Ok(())
    }

    fn renew(&mut self, now: OffsetDateTime) -> anyhow::Result<()> {
        let authority = self.authority.load();
        let (issued, key) = authority.issue_server(&self.names, self.ttl, now, &mut rand::rng())?;
        let not_after = issued.not_after;
        self.certificate.replace(issued, &key)?;
        self.renew_at = now + (not_after - now) / 2;
        Ok(())
    }
}
