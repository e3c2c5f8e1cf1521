//! The data path's threads, and the handle that the rest of the process holds.
//!
//! Each worker is a thread with an event loop, connections and tunnels of its own: on the way of a byte there is no
//! lock that another thread holds. What the workers are to serve is one value that they all watch and reconcile with,
//! so that no order of calls and no missed message can leave one behind.

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::admin::ConnectionRow;
use mesh_core::workload::WorkloadUid;
use prometheus_client::registry::Registry;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep};

use crate::accept;
use crate::access_log::AccessLog;
use crate::connections::{CloseReason, Connections};
use crate::dial::{CapturedAddresses, Namespaces};
use crate::handshakes::Handshakes;
use crate::hbone::client::Tunnels;
use crate::hbone::server::Phase;
use crate::limits::{MAX_CONNECTIONS_PER_WORKLOAD, TunnelsPerSource};
use crate::metrics::{LoggedPeers, Metrics};
use crate::runtime::{DataPathConfig, Enrolled, OriginalDst, Shared};

/// How often idle tunnels are looked for.
const EXPIRE_EVERY: Duration = Duration::from_secs(10);
/// How often a drain looks whether it is done.
const DRAIN_POLL: Duration = Duration::from_millis(20);
/// Time for the last lines of the access log, after a drain.
const LOGGED_WITHIN: Duration = Duration::from_secs(1);
/// Time for the workers to send resets.
const RESET_WITHIN: Duration = Duration::from_secs(1);

/// A workload that is being served, by all workers.
#[derive(Debug)]
pub struct Serving {
    /// Which.
    pub enrolled: Arc<Enrolled>,
    /// How far along.
    pub phase: watch::Sender<Phase>,
    /// Connections that it may still have.
    pub permits: Arc<Semaphore>,
    /// Its connections from outside the mesh.
    pub captured: Arc<CapturedAddresses>,
}

impl Serving {
    fn new(enrolled: Arc<Enrolled>) -> Self {
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS_PER_WORKLOAD));
        Self { enrolled, phase: watch::Sender::new(Phase::Serving), permits, captured: Arc::default() }
    }

    /// Whether it has connections, tunnels, or some that are being set up.
    fn is_busy(&self) -> bool {
        self.taken() > 0
    }

    fn taken(&self) -> usize {
        MAX_CONNECTIONS_PER_WORKLOAD - self.permits.available_permits()
    }

    /// Whether connections that are being set up must be given up.
    pub fn is_stopped(&self) -> bool {
        *self.phase.borrow() == Phase::Stopped
    }
}

/// What a worker's tasks share.
pub struct Worker {
    /// Settings.
    pub config: Arc<DataPathConfig>,
    /// The view.
    pub shared: Arc<Shared>,
    /// Where captured connections wanted to go.
    pub original_dst: OriginalDst,
    /// Live connections.
    pub connections: Arc<Connections>,
    /// Tunnels.
    pub tunnels: Arc<Tunnels>,
    /// Where sockets are made.
    pub namespaces: Arc<Namespaces>,
    /// Metrics of the process.
    pub metrics: Arc<Metrics>,
    /// Handshakes that are under way here.
    pub handshakes: Arc<Handshakes>,
    /// Tunnels that each peer has, in all workers.
    pub tunnels_per_source: Arc<TunnelsPerSource>,
    /// Peers that were complained about, by any worker.
    pub logged: Arc<LoggedPeers>,
    /// When the workers began; the clock of `logged`.
    pub started: Instant,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("node", &self.config.node).finish_non_exhaustive()
    }
}

/// What the workers are to do.
#[derive(Debug, Clone, Default)]
struct Desired {
    serving: Arc<BTreeMap<WorkloadUid, Arc<Serving>>>,
    /// Accepted from no more; what they have goes on.
    leaving: Arc<Vec<Arc<Serving>>>,
    /// Grows when the view has changed.
    view: u64,
}

/// The running data path. Dropping it ends the workers and resets what they carry.
#[derive(Debug)]
pub struct DataPath {
    desired: watch::Sender<Desired>,
    connections: Vec<Arc<Connections>>,
    log: Option<AccessLog>,
}

impl DataPath {
    /// Starts the workers, which serve nothing yet. Metrics are encoded with `registry`.
    #[allow(clippy::needless_pass_by_value, reason = "it keeps what it is given")]
    pub fn start(
        config: DataPathConfig,
        shared: Arc<Shared>,
        original_dst: OriginalDst,
        registry: &mut Registry,
    ) -> io::Result<Self> {
        let metrics = Metrics::registered(registry);
        let log = config.access_log.as_ref().map(AccessLog::open).transpose()?;
        let workers = config.workers.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get);
        let config = Arc::new(config);
        let desired = watch::Sender::new(Desired::default());
        let (tunnels_per_source, logged) = (Arc::new(TunnelsPerSource::default()), Arc::new(LoggedPeers::default()));
        let started = Instant::now();
        let mut all_connections = Vec::with_capacity(workers);
        for index in 0..workers {
            let connections = Connections::new(Arc::clone(&metrics), log.clone(), Arc::clone(&config.cluster));
            all_connections.push(Arc::clone(&connections));
            let make = WorkerParts {
                config: Arc::clone(&config),
                shared: Arc::clone(&shared),
                original_dst: Arc::clone(&original_dst),
                connections,
                metrics: Arc::clone(&metrics),
                tunnels_per_source: Arc::clone(&tunnels_per_source),
                logged: Arc::clone(&logged),
                started,
            };
            let watch = desired.subscribe();
            let (started, result) = std::sync::mpsc::sync_channel(1);
            std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || run_thread(make, watch, &started))?;
            result.recv().unwrap_or_else(|_| Err(io::Error::other("worker ended at once")))?;
        }
        Ok(Self { desired, connections: all_connections, log })
    }

    /// Accepts a workload's connections from now on, or as soon as there is a configuration. A second call with the same UID
    /// replaces the first.
    pub fn serve(&self, enrolled: Arc<Enrolled>) {
        self.desired.send_modify(|desired| {
            let mut serving = (*desired.serving).clone();
            if let Some(old) = serving.insert(enrolled.uid.clone(), Arc::new(Serving::new(enrolled))) {
                old.phase.send_replace(Phase::Stopped);
            }
            desired.serving = Arc::new(serving);
        });
    }

    /// Accepts no more connections of a workload, and resets those that it has.
    pub fn stop(&self, uid: &WorkloadUid) {
        self.desired.send_modify(|desired| {
            let mut serving = (*desired.serving).clone();
            if let Some(old) = serving.remove(uid) {
                old.phase.send_replace(Phase::Stopped);
            }
            desired.serving = Arc::new(serving);
        });
        for connections in &self.connections {
            connections.close_workload(uid);
        }
    }

    /// Accepts no more connections of a workload, and closes its listeners; the connections that it has go on, until they
    /// end or [`Self::cut`] ends them.
    pub fn stop_listening(&self, enrolled: &Arc<Enrolled>) {
        self.desired.send_modify(|desired| {
            if !desired.serving.get(&enrolled.uid).is_some_and(|serving| Arc::ptr_eq(&serving.enrolled, enrolled)) {
                return;
            }
            let mut serving = (*desired.serving).clone();
            let mut leaving = (*desired.leaving).clone();
            if let Some(old) = serving.remove(&enrolled.uid) {
                old.phase.send_replace(Phase::Draining);
                leaving.push(old);
            }
            // Its tunnels take no further connections, because the view does not have it.
            *desired = Desired { serving: Arc::new(serving), leaving: Arc::new(leaving), view: desired.view + 1 };
        });
        enrolled.listeners.shut();
    }

    /// Connections of a workload, those that are being set up and tunnels among them.
    pub fn carries(&self, enrolled: &Arc<Enrolled>) -> usize {
        let live: usize = self.connections.iter().map(|connections| connections.concerning(enrolled)).sum();
        let desired = self.desired.borrow();
        let mut all = desired.serving.values().chain(desired.leaving.iter());
        let serving = all.find(|serving| Arc::ptr_eq(&serving.enrolled, enrolled));
        live.max(serving.map_or(0, |serving| serving.taken()))
    }

    /// Ends what is left of a workload that listens no more.
    pub fn cut(&self, enrolled: &Arc<Enrolled>) {
        self.desired.send_modify(|desired| {
            let (gone, leaving) =
                desired.leaving.iter().cloned().partition(|serving| Arc::ptr_eq(&serving.enrolled, enrolled));
            desired.leaving = Arc::new(leaving);
            let gone: Vec<Arc<Serving>> = gone;
            for serving in gone {
                serving.phase.send_replace(Phase::Stopped);
            }
        });
        for connections in &self.connections {
            connections.close_enrolment(enrolled);
        }
    }

    /// The view has changed: live connections are judged again, tunnels that it does not cover any more are dropped.
    pub fn config_changed(&self) {
        self.desired.send_modify(|desired| desired.view += 1);
    }

    /// Stops accepting, tells peers to go elsewhere, waits up to `deadline` for connections to end, resets the rest.
    pub async fn drain(&self, deadline: Duration) {
        self.all_enter(Phase::Draining);
        self.wait_for_connections(deadline).await;
        // First, while there are tunnels that can carry the resets and their reason; and again, because what registers
        // in between asks for the phase only after that.
        let close_all = || self.connections.iter().for_each(|all| all.close_all(&CloseReason::Drained));
        close_all();
        self.all_enter(Phase::Stopped);
        close_all();
        // Resets are sent by the workers' tasks; those are as quick as the event loops.
        self.wait_for_connections(RESET_WITHIN).await;
        if let Some(log) = self.log.clone() {
            let flushed = tokio::task::spawn_blocking(move || log.flush(LOGGED_WITHIN)).await;
            if !flushed.unwrap_or(false) {
                tracing::warn!("the last lines of the access log are not written");
            }
        }
    }

    /// Waits until nobody holds a permit: those that are accepted and not connected yet count too.
    async fn wait_for_connections(&self, at_most: Duration) {
        let end = Instant::now() + at_most;
        let Desired { serving, leaving, .. } = self.desired.borrow().clone();
        let is_busy = || serving.values().chain(leaving.iter()).any(|serving| serving.is_busy());
        while is_busy() && Instant::now() < end {
            sleep(DRAIN_POLL).await;
        }
    }

    /// Live connections, for the admin interface.
    pub fn connections(&self) -> Vec<ConnectionRow> {
        let mut rows: Vec<_> = self.connections.iter().flat_map(|connections| connections.rows()).collect();
        rows.sort_by(|a, b| (&a.workload, &a.direction, &a.remote).cmp(&(&b.workload, &b.direction, &b.remote)));
        rows
    }

    /// Number of live connections.
    pub fn connection_count(&self) -> u64 {
        self.connections.iter().map(|connections| connections.len() as u64).sum()
    }

    fn all_enter(&self, phase: Phase) {
        let desired = self.desired.borrow();
        for serving in desired.serving.values().chain(desired.leaving.iter()) {
            serving.phase.send_replace(phase);
        }
    }
}

impl Drop for DataPath {
    fn drop(&mut self) {
        self.all_enter(Phase::Stopped);
    }
}

struct WorkerParts {
    config: Arc<DataPathConfig>,
    shared: Arc<Shared>,
    original_dst: OriginalDst,
    connections: Arc<Connections>,
    metrics: Arc<Metrics>,
    tunnels_per_source: Arc<TunnelsPerSource>,
    logged: Arc<LoggedPeers>,
    started: Instant,
}

impl WorkerParts {
    /// On the worker's own thread.
    fn build(self) -> io::Result<Arc<Worker>> {
        let namespaces = Arc::new(Namespaces::of_this_thread()?);
        let tunnels = Tunnels::new(Arc::clone(&self.shared), Arc::clone(&namespaces), Arc::clone(&self.metrics));
        Ok(Arc::new(Worker {
            config: self.config,
            shared: self.shared,
            original_dst: self.original_dst,
            connections: self.connections,
            tunnels,
            namespaces,
            metrics: self.metrics,
            handshakes: Arc::default(),
            tunnels_per_source: self.tunnels_per_source,
            logged: self.logged,
            started: self.started,
        }))
    }
}

fn run_thread(
    parts: WorkerParts,
    desired: watch::Receiver<Desired>,
    started: &std::sync::mpsc::SyncSender<io::Result<()>>,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    runtime.block_on(async move {
        match parts.build() {
            Ok(worker) => {
                let _ = started.send(Ok(()));
                run(worker, desired).await;
            }
            Err(error) => {
                let _ = started.send(Err(error));
            }
        }
    });
}

/// A worker's life: reconciles what it serves with what is desired, until the [`DataPath`] is gone.
async fn run(worker: Arc<Worker>, mut desired: watch::Receiver<Desired>) {
    let mut serving: BTreeMap<WorkloadUid, Arc<Serving>> = BTreeMap::new();
    let mut seen_view = 0;
    let mut judged = worker.shared.view.load_full();
    let mut expire = expiry(EXPIRE_EVERY);
    loop {
        let now = desired.borrow_and_update().clone();
        // Those that are gone end by their phase; here they are only forgotten.
        serving.retain(|uid, old| now.serving.get(uid).is_some_and(|new| Arc::ptr_eq(new, old)));
        // Before there is a configuration everything would be refused. What arrives waits in the backlogs instead: for it,
        // for the proxy that this one takes over from, or until the supervisor finds that it has waited too long.
        let is_synced = worker.shared.view.load().synced;
        for (uid, new) in now.serving.iter().filter(|_| is_synced) {
            if !serving.contains_key(uid) {
                serving.insert(uid.clone(), Arc::clone(new));
                accept::serve(&worker, new);
            }
        }
        if now.view != seen_view {
            seen_view = now.view;
            let view = worker.shared.view.load_full();
            worker.tunnels.retain_valid(&view);
            worker.connections.judge_again(&judged, &view).await;
            judged = view;
        }
        match next_turn(&mut desired, &mut expire).await {
            Turn::Changed => {}
            Turn::Expire => worker.tunnels.expire(),
            Turn::End => return,
        }
    }
}

/// What a worker has to do next.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    Changed,
    Expire,
    End,
}

/// The clock of [`Turn::Expire`]. It runs on whatever else there is to do: changes come oftener than tunnels expire.
fn expiry(every: Duration) -> Interval {
    let mut interval = interval_at(Instant::now() + every, every);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

async fn next_turn(desired: &mut watch::Receiver<Desired>, expire: &mut Interval) -> Turn {
    tokio::select! {
        changed = desired.changed() => if changed.is_ok() { Turn::Changed } else { Turn::End },
        _ = expire.tick() => Turn::Expire,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn changes_without_end_do_not_keep_idle_tunnels_from_expiring() {
        let sender = watch::Sender::new(Desired::default());
        let mut desired = sender.subscribe();
        let mut expire = expiry(Duration::from_millis(5));
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            sender.send_modify(|desired| desired.view += 1);
            if next_turn(&mut desired, &mut expire).await == Turn::Expire {
                break;
            }
            assert!(Instant::now() < deadline, "nothing expires");
        }
        drop(sender);
        while next_turn(&mut desired, &mut expire).await != Turn::End {}
    }
}
