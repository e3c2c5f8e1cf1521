//! The proxy process: puts its parts together, starts them, ends them. Parts that outlive a connection are spawned here;
//! what belongs to one connection or tunnel, by the workers.
//!
//! Start, in this order, so that a connection waits as briefly as possible after a crash: descriptors from the
//! supervisor, kernel programs, workers, stored configuration and certificates, then the adopted workloads are served.
//! Only then does anything speak to the controller or the agent.

mod host;
mod listen;
mod ready;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use prometheus_client::registry::Registry;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use self::host::NodeHost;
use crate::admin::metrics::{self, KernelCounts, PartCounts, ReadKernel};
use crate::admin::{self, AdminState, events};
use crate::capture::{Capture, CaptureConfig, CaptureError, kubernetes_cgroup, own_cgroup};
use crate::certificates::{Certificates, CertificatesHandle};
use crate::config::{AUTO, Config};
use crate::controller::{ControllerConfig, Pod};
use crate::enrol::{self, EnrolMetrics, EnrolmentStatus, Host, Roster, Session};
use crate::logging::LogHandle;
use crate::readiness::{self, Readiness};
use crate::runtime::{OriginalDst, Shared};
use crate::supervisor::client::{Kept, StoreClient};
use crate::supervisor::{EXIT_CONFIG, process};
use crate::workers::DataPath;
use crate::xds::{XdsClient, XdsMetrics, XdsStatus};
use crate::{interfaces, logging};

/// Threads of everything but the data path.
const CONTROL_THREADS: usize = 2;
/// Time for tasks to end after they were told to; they hold nothing that is worth more.
const END_WITHIN: Duration = Duration::from_secs(1);

/// Runs the proxy until SIGTERM.
pub fn main(config: &Config) -> ExitCode {
    let log = logging::init(config.log_format);
    match run_to_the_end(config, log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(error = format!("{error:#}"), "node proxy ends");
            match error.downcast_ref::<CaptureError>() {
                Some(error) if is_configuration(error) => ExitCode::from(EXIT_CONFIG),
                Some(_) | None => ExitCode::FAILURE,
            }
        }
    }
}

fn run_to_the_end(config: &Config, log: LogHandle) -> anyhow::Result<()> {
    process::unblock().context("signals")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .thread_name("control")
        .enable_all()
        .build()
        .context("start the runtime")?;
    let ended = runtime.block_on(run(config, log));
    runtime.shutdown_timeout(END_WITHIN);
    ended
}

async fn run(config: &Config, log: LogHandle) -> anyhow::Result<()> {
    let started = Instant::now();
    // Before anything can be told to end: without a handler SIGTERM would end us without draining.
    let mut signals = [SignalKind::terminate(), SignalKind::interrupt()].map(signal).into_iter();
    let (mut terminate, mut interrupt) = match (signals.next(), signals.next()) {
        (Some(terminate), Some(interrupt)) => (terminate.context("signals")?, interrupt.context("signals")?),
        (Some(_) | None, _) => anyhow::bail!("signals"),
    };
    let (store, kept) = StoreClient::from_stdin()?;
    let store = Arc::new(store);
    // Open until the process is gone, with its exit status: a proxy that closes it is killed, because it could not be
    // told from one that is stuck.
    std::mem::forget(Arc::clone(&store));
    let mut app = App::start(config, log, store, kept, started)?;
    let ended = app.serve(&mut terminate, &mut interrupt).await;
    app.end(config.drain).await;
    ended
}

/// The running parts.
struct App {
    datapath: Arc<DataPath>,
    tasks: JoinSet<&'static str>,
    /// Ends what must not meet the next proxy: enrolment, and accepting on ports that the next one has too.
    hand_on: CancellationToken,
    /// Ends the rest.
    end: CancellationToken,
    store: Arc<StoreClient>,
}

impl App {
    fn start(
        config: &Config,
        log: LogHandle,
        store: Arc<StoreClient>,
        mut kept: Kept,
        started: Instant,
    ) -> anyhow::Result<Self> {
        let capture = Arc::new(open_capture(config)?);
        let shared = Arc::new(Shared::default());
        let mut registry = Registry::default();
        let data_path = DataPath::start(config.data_path(), Arc::clone(&shared), original_dst(&capture), &mut registry);
        let datapath = Arc::new(data_path.context("start the workers")?);
        let changed: Arc<dyn Fn() + Send + Sync> = {
            let datapath = Arc::downgrade(&datapath);
            Arc::new(move || datapath.upgrade().iter().for_each(|datapath| datapath.config_changed()))
        };
        let controller = controller(config);
        let hand_on = CancellationToken::new();
        let (xds, xds_status) = XdsClient::new(
            controller.clone(),
            config.state_dir.clone(),
            Arc::clone(&shared),
            Arc::clone(&changed),
            XdsMetrics::register(&mut registry),
        );
        let adopted = enrol::adopt(&mut kept);
        let metrics_socket = listen::tcp(&store, kept.remove(listen::METRICS), listen::METRICS, config.metrics_addr)?;
        let ready_socket = listen::tcp(&store, kept.remove(listen::READY), listen::READY, config.ready_addr)?;
        let (certificates, certificates_handle) =
            Certificates::new(controller, &kept, Arc::clone(&store), Arc::clone(&shared), changed);
        for name in &adopted.leftovers {
            store.del(name).context("supervisor")?;
        }
        let host: Arc<dyn Host> = Arc::new(NodeHost {
            capture: Arc::clone(&capture),
            store: Arc::clone(&store),
            datapath: Arc::clone(&datapath),
            certificates: certificates_handle.clone(),
        });
        let enrol_metrics = EnrolMetrics::register(&mut registry);
        let trust_domain: Arc<str> = config.trust_domain.as_str().into();
        let roster = Roster::new(host, Arc::clone(&shared), trust_domain, adopted.workloads, enrol_metrics.clone());
        let predecessor = store.changes().context("supervisor")?;
        let (session, enrolment) = Session::new(config.agent_socket.clone(), roster, predecessor, enrol_metrics);
        info!(adopted = enrolment.borrow().adopted, elapsed = ?started.elapsed(), "workloads are served");

        let app = Self { datapath, tasks: JoinSet::new(), hand_on, end: CancellationToken::new(), store };
        let parts = Parts { xds, xds_status, certificates, certificates_handle, session, enrolment };
        let outside = Outside { capture, shared, registry, log, metrics_socket, ready_socket, started };
        app.spawn_all(config, parts, outside)
    }

    fn spawn_all(mut self, config: &Config, parts: Parts, mut outside: Outside) -> anyhow::Result<Self> {
        let (readiness_sender, readiness) = watch::channel(Readiness::default());
        let events = Arc::new(events::EventLog::default());
        let ring = outside.capture.events().context("events of the kernel programs")?;
        let admin_socket = listen::unix(&config.admin_socket)?;
        let interfaces =
            interfaces::follow(Arc::clone(&outside.capture), Arc::clone(&outside.shared), self.hand_on.clone());
        metrics::build(&mut outside.registry);
        outside.registry.register_collector(Box::new(PartCounts {
            xds: parts.xds_status.clone(),
            kernel: read_kernel(&outside.capture),
        }));
        let state = Arc::new(AdminState {
            node: config.node.as_str().into(),
            controller: config.controller.clone(),
            cluster: config.cluster.as_str().into(),
            trust_domain: config.trust_domain.as_str().into(),
            shared: Arc::clone(&outside.shared),
            datapath: Arc::clone(&self.datapath),
            capture: outside.capture,
            xds: parts.xds_status.clone(),
            enrolment: parts.enrolment.clone(),
            readiness: readiness.clone(),
            certificates: parts.certificates_handle,
            events: Arc::clone(&events),
            log: outside.log,
            started: outside.started,
        });
        let (end, hand_on) = (self.end.clone(), self.hand_on.clone());
        let watcher = ready::Watcher {
            xds: parts.xds_status,
            enrolment: parts.enrolment,
            sender: readiness_sender,
            store: Arc::clone(&self.store),
            started: outside.started,
        };
        let agent_may_speak = watcher.reported();
        self.spawn("readiness", watcher.run(end.clone()));
        self.spawn("controller stream", parts.xds.run(end.clone()));
        self.spawn("certificates", parts.certificates.run(end.clone()));
        self.spawn("admin", admin::serve(admin_socket, state, end.clone()));
        // The next proxy guards with programs of its own version.
        self.spawn("interfaces", interfaces);
        self.spawn("kernel events", events::follow(ring, events, outside.shared, end));
        self.spawn("metrics port", metrics::serve(outside.metrics_socket, Arc::new(outside.registry), hand_on.clone()));
        let pod = config.pod.as_deref().unwrap_or(&config.node).into();
        self.spawn("readiness port", readiness::serve(outside.ready_socket, readiness, pod, hand_on.clone()));
        let session = parts.session;
        self.spawn("enrolment", session.run(agent_may_speak, hand_on));
        Ok(self)
    }

    fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(async move {
            task.await;
            name
        });
    }

    /// Until told to end. A task that ends before that is a fault that a restart mends.
    async fn serve(&mut self, terminate: &mut Signal, interrupt: &mut Signal) -> anyhow::Result<()> {
        tokio::select! {
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
            ended = self.tasks.join_next() => match ended {
                Some(Ok(name)) => anyhow::bail!("{name} ended by itself"),
                Some(Err(error)) => Err(error).context("a task failed"),
                None => anyhow::bail!("nothing runs"),
            },
        }
    }

    async fn end(mut self, drain: Duration) {
        let began = Instant::now();
        self.hand_on.cancel();
        // The ports are the supervisor's too: as long as it has them, they would answer nobody instead of refusing.
        for name in [listen::METRICS, listen::READY] {
            if let Err(error) = self.store.del(name) {
                warn!(%error, "supervisor keeps a port");
            }
        }
        info!(connections = self.datapath.connection_count(), ?drain, "draining");
        self.datapath.drain(drain).await;
        self.end.cancel();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(END_WITHIN, all).await.is_err() {
            warn!("tasks did not end in time");
        }
        info!(elapsed = ?began.elapsed(), "drained");
    }
}

/// What speaks to the controller and the agent.
struct Parts {
    xds: XdsClient,
    xds_status: watch::Receiver<XdsStatus>,
    certificates: Certificates,
    certificates_handle: CertificatesHandle,
    session: Session,
    enrolment: watch::Receiver<EnrolmentStatus>,
}

/// What the outside looks at.
struct Outside {
    capture: Arc<Capture>,
    shared: Arc<Shared>,
    registry: Registry,
    log: LogHandle,
    metrics_socket: tokio::net::TcpListener,
    ready_socket: tokio::net::TcpListener,
    started: Instant,
}

fn open_capture(config: &Config) -> anyhow::Result<Capture> {
    let own = own_cgroup().context("own cgroup")?;
    let pods = match config.cgroup.as_os_str() == AUTO {
        true => kubernetes_cgroup().context("--cgroup auto")?,
        false => config.cgroup.clone(),
    };
    Ok(Capture::open(&CaptureConfig::new(&config.bpffs, pods, own))?)
}

/// Errors that the next start would meet too.
fn is_configuration(error: &CaptureError) -> bool {
    match error {
        CaptureError::NoObject
        | CaptureError::NoProgram(_)
        | CaptureError::NotBpffs(_)
        | CaptureError::Layout { .. }
        | CaptureError::OtherCgroup { .. }
        | CaptureError::ProxyCgroup { .. } => true,
        CaptureError::Load(_)
        | CaptureError::Program { .. }
        | CaptureError::PortHeld { .. }
        | CaptureError::NetnsNotFound { .. }
        | CaptureError::MapFull { .. }
        | CaptureError::Io { .. } => false,
    }
}

fn read_kernel(capture: &Arc<Capture>) -> ReadKernel {
    let capture = Arc::clone(capture);
    Box::new(move || {
        Ok(KernelCounts { outcomes: capture.counters()?, suppressed_events: capture.suppressed_events()? })
    })
}

fn original_dst(capture: &Arc<Capture>) -> OriginalDst {
    let capture = Arc::clone(capture);
    Arc::new(move |cookie, peer| {
        capture.original_dst(cookie, peer).unwrap_or_else(|error| {
            warn!(%error, "captured connection refused");
            None
        })
    })
}

fn controller(config: &Config) -> ControllerConfig {
    ControllerConfig {
        address: config.controller.clone(),
        server_name: config.server_name.clone(),
        root_cert: config.root_cert.clone(),
        token_file: config.token_file.clone(),
        node: config.node.as_str().into(),
        cluster: config.cluster.as_str().into(),
        trust_domain: config.trust_domain.as_str().into(),
        network: config.network.as_str().into(),
        root_namespace: config.root_namespace.as_str().into(),
        pod: Pod {
            name: config.pod.as_deref().unwrap_or(&config.node).into(),
            namespace: config.pod_namespace.as_str().into(),
            ip: config.pod_ip,
        },
    }
}
