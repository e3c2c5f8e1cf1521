//! The certificates of this node's workloads: asked for, renewed, kept over restarts, put in force.
//!
//! When is decided by [`CertSchedule`]; here its decisions are carried out. Keys are in this process's memory and in
//! sealed memory that the supervisor holds, nowhere else.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use mesh_api::admin::CertificateRow;
use mesh_core::certs::{Adoption, CertSchedule, REQUEST_TIMEOUT_SECS};
use mesh_core::identity::SpiffeId;
use rustls_pki_types::CertificateDer;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::ca_client::{self, CaError, Issued};
use crate::controller::{ControllerConfig, parse_certificates};
use crate::enrol::MAX_WORKLOADS;
use crate::runtime::{CertifiedIdentity, Shared};
use crate::supervisor::client::StoreClient;
use crate::supervisor::memfd;
use crate::xds::Changed;

mod roots;
mod rows;

use self::roots::{RequestNumber, Roots};

/// Commands that wait: what all workloads of a node want at once when they are adopted, and what they give up.
const COMMAND_QUEUE: usize = 2 * MAX_WORKLOADS;
/// Callers that wait for one identity's first certificate.
const MAX_WAITERS: usize = 1024;
/// Requests under way at once; more wait.
const MAX_REQUESTS: usize = 16;
/// How often the file of roots is looked at.
const LOOK_AT_ROOTS_EVERY: Duration = Duration::from_secs(1);
/// When the roots have changed, all certificates are renewed within this time, seconds.
const RENEW_WITHIN_SECS: u64 = 10;
/// A schedule counts in seconds; waking later than this is never right.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);
/// Name of the roots among the kept descriptors.
const ROOTS: &str = "roots";
/// Prefix of certificates among the kept descriptors.
const CERT: &str = "cert/";

const STOPPED: &str = "certificates are not managed any more: the proxy stops";

enum Command {
    Want(SpiffeId, oneshot::Sender<Result<(), String>>),
    Release(SpiffeId),
}

/// What others may ask for.
#[derive(Debug, Clone)]
pub struct CertificatesHandle {
    commands: mpsc::Sender<Command>,
    rows: watch::Receiver<rows::Source>,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Want(id, _) => write!(f, "Want({id})"),
            Self::Release(id) => write!(f, "Release({id})"),
        }
    }
}

impl CertificatesHandle {
    /// Needs a certificate for the identity from now on, whether or not the answer is waited for. It comes when there is
    /// a valid one, or when the first request for it failed; the schedule tries again by itself.
    ///
    /// # Errors
    /// Why there is none yet.
    pub fn want(&self, id: SpiffeId) -> impl Future<Output = Result<(), String>> + Send + use<> {
        let (reply, answer) = oneshot::channel();
        let sent = self.commands.try_send(Command::Want(id, reply)).map_err(|error| match error {
            TrySendError::Full(_) => "too many certificates are asked for at once",
            TrySendError::Closed(_) => STOPPED,
        });
        async move {
            sent?;
            answer.await.unwrap_or_else(|_| Err(STOPPED.to_owned()))
        }
    }

    /// No workload of this node has the identity any more.
    pub fn release(&self, id: &SpiffeId) {
        if let Err(error) = self.commands.try_send(Command::Release(id.clone())) {
            // It is renewed for nothing until the controller refuses to, and goes with the next restart.
            tracing::debug!(%id, %error, "certificate not released");
        }
    }

    /// All, for the admin interface.
    pub fn rows(&self) -> Vec<CertificateRow> {
        self.rows.borrow().rows(now_secs())
    }
}

type Answer = (SpiffeId, RequestNumber, Result<Issued, CaError>);

/// The driver of the schedule.
pub struct Certificates {
    controller: ControllerConfig,
    store: Arc<StoreClient>,
    shared: Arc<Shared>,
    changed: Changed,
    commands: mpsc::Receiver<Command>,
    rows: watch::Sender<rows::Source>,
    schedule: CertSchedule,
    held: BTreeMap<SpiffeId, Arc<CertifiedIdentity>>,
    errors: BTreeMap<SpiffeId, String>,
    waiters: HashMap<SpiffeId, Vec<oneshot::Sender<Result<(), String>>>>,
    roots: Roots,
    /// What the file of roots said last. A change there says that the CA's answers will be others.
    file: Vec<CertificateDer<'static>>,
    /// The last request that was sent.
    asked: RequestNumber,
    /// The last one that was sent before the file of roots changed.
    outdated: RequestNumber,
}

impl std::fmt::Debug for Certificates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificates").field("held", &self.held.keys()).finish_non_exhaustive()
    }
}

impl Certificates {
    /// A driver that begins with what the supervisor kept, which is put in force at once.
    pub fn new(
        controller: ControllerConfig,
        kept: &BTreeMap<String, OwnedFd>,
        store: Arc<StoreClient>,
        shared: Arc<Shared>,
        changed: Changed,
    ) -> (Self, CertificatesHandle) {
        let (sender, commands) = mpsc::channel(COMMAND_QUEUE);
        let (rows, receiver) = watch::channel(rows::Source::default());
        let mut certificates = Self {
            controller,
            store,
            shared,
            changed,
            commands,
            rows,
            schedule: CertSchedule::default(),
            held: BTreeMap::new(),
            errors: BTreeMap::new(),
            waiters: HashMap::new(),
            roots: Roots::default(),
            file: Vec::new(),
            asked: 0,
            outdated: 0,
        };
        certificates.restore(kept);
        certificates.look_at_root_file();
        certificates.publish();
        (certificates, CertificatesHandle { commands: sender, rows: receiver })
    }

    fn restore(&mut self, kept: &BTreeMap<String, OwnedFd>) {
        for (name, fd) in kept {
            let id = name.strip_prefix(CERT);
            if id.is_none() && name != ROOTS {
                continue;
            }
            if let Err(reason) = self.restore_one(id, fd) {
                tracing::warn!(name, reason, "kept certificate is not used");
                self.forget(name);
            }
        }
        if self.roots.in_force().certificates.is_empty() {
            // They prove nothing to those whom we cannot believe.
            self.schedule.renew_all(now_secs(), 0, &mut rand::rng());
        }
    }

    /// `id`: of a certificate; none for the roots.
    fn restore_one(&mut self, id: Option<&str>, fd: &OwnedFd) -> Result<(), String> {
        let bytes = memfd::unseal(fd).map_err(|e| e.to_string())?;
        let pem = String::from_utf8(bytes).map_err(|e| e.to_string())?;
        let Some(id) = id else {
            self.roots.learn(self.asked, parse_certificates(&pem)?);
            return Ok(());
        };
        let id: SpiffeId = id.parse().map_err(|e: mesh_core::identity::InvalidSpiffeId| e.to_string())?;
        let identity = ca_client::read_identity(&id, &pem).map_err(|e| e.to_string())?;
        let validity = (identity.not_before_secs, identity.not_after_secs);
        self.schedule.want(id.clone(), now_secs());
        match self.schedule.restored(&id, validity, now_secs(), &mut rand::rng()) {
            Adoption::Use => {
                self.held.insert(id, Arc::new(identity));
                Ok(())
            }
            Adoption::Discard => {
                self.schedule.drop(&id);
                Err("it has expired".to_owned())
            }
        }
    }

    /// Carries the schedule out until cancelled.
    pub async fn run(mut self, cancel: CancellationToken) {
        let channel = match self.controller.channel() {
            Ok(channel) => channel,
            Err(error) => {
                // Only a server name that no URI can hold; the flag's own check comes before.
                tracing::error!(%error, "no certificates can be asked for");
                return;
            }
        };
        let mut under_way: FuturesUnordered<BoxFuture<'static, Answer>> = FuturesUnordered::new();
        let mut tick = interval(LOOK_AT_ROOTS_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // A request that has to wait here has not begun: its time runs from when it is sent.
            for id in self.schedule.due(now_secs(), MAX_REQUESTS - under_way.len(), &mut rand::rng()) {
                self.asked += 1;
                under_way.push(ask(self.controller.clone(), channel.clone(), id, self.asked));
            }
            // Without room only an answer makes a difference.
            let wake_at = if under_way.len() < MAX_REQUESTS { self.wake_at() } else { Instant::now() + LONGEST_SLEEP };
            tokio::select! {
                () = cancel.cancelled() => return,
                Some(command) = self.commands.recv() => self.obey(command),
                Some((id, request, answer)) = under_way.next() => self.answered(&id, request, answer),
                () = sleep_until(wake_at) => {}
                _ = tick.tick() => self.root_file_tick(),
            }
        }
    }

    fn wake_at(&self) -> Instant {
        let now = now_secs();
        let wait = self.schedule.next_wakeup().map(|at| Duration::from_secs(at.saturating_sub(now)));
        Instant::now() + wait.unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP).max(Duration::from_millis(100))
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Want(id, reply) => {
                let valid = self.held.get(&id).is_some_and(|held| held.not_after_secs > now_secs());
                self.schedule.want(id.clone(), now_secs());
                if valid {
                    // A caller that is gone needs no answer.
                    let _ = reply.send(Ok(()));
                    return;
                }
                let waiters = self.waiters.entry(id).or_default();
                if waiters.len() < MAX_WAITERS {
                    waiters.push(reply);
                } else {
                    let _ = reply.send(Err("too many workloads wait for this identity".to_owned()));
                }
            }
            Command::Release(id) => {
                self.schedule.drop(&id);
                self.errors.remove(&id);
                if self.held.remove(&id).is_some() {
                    self.forget(&format!("{CERT}{id}"));
                    self.publish();
                }
            }
        }
    }

    fn answered(&mut self, id: &SpiffeId, request: RequestNumber, answer: Result<Issued, CaError>) {
        let result = answer.map_err(|error| error.to_string()).and_then(|issued| self.adopt(id, request, issued));
        if result.is_ok() && request <= self.outdated {
            self.renew_all();
        }
        match &result {
            Ok(()) => {
                self.errors.remove(id);
            }
            Err(error) => {
                self.schedule.failed(id, now_secs(), &mut rand::rng());
                // The first failure of a series; what follows is the same until it ends.
                if self.errors.insert(id.clone(), error.clone()).is_none() {
                    tracing::warn!(%id, error, "no certificate; trying again");
                }
            }
        }
        for waiter in self.waiters.remove(id).into_iter().flatten() {
            let _ = waiter.send(result.clone());
        }
        self.publish_rows();
    }

    fn adopt(&mut self, id: &SpiffeId, request: RequestNumber, issued: Issued) -> Result<(), String> {
        let Issued { identity, roots, pem } = issued;
        if self.roots.learn(request, roots) {
            tracing::info!(roots = self.roots.in_force().certificates.len(), "roots have changed");
            self.keep_roots();
            self.publish();
        }
        let validity = (identity.not_before_secs, identity.not_after_secs);
        match self.schedule.issued(id, validity, now_secs(), &mut rand::rng()) {
            Adoption::Use => {}
            // Released while the request was under way.
            Adoption::Discard if self.schedule.state(id, now_secs()).is_none() => return Ok(()),
            Adoption::Discard => return Err("the CA issued a certificate that is not valid now".to_owned()),
        }
        tracing::info!(%id, serial = identity.serial, not_after_secs = identity.not_after_secs, "certificate");
        self.held.insert(id.clone(), Arc::new(identity));
        self.keep(&format!("{CERT}{id}"), pem.as_bytes());
        self.publish();
        Ok(())
    }

    fn root_file_tick(&mut self) {
        if self.look_at_root_file() {
            self.outdated = self.asked;
            self.renew_all();
        }
    }

    fn renew_all(&mut self) {
        self.schedule.renew_all(now_secs(), RENEW_WITHIN_SECS, &mut rand::rng());
    }

    /// Reads the file of roots; true when it says something else than before. One that cannot be read changes nothing.
    fn look_at_root_file(&mut self) -> bool {
        match self.controller.roots() {
            Ok(roots) if roots != self.file => {
                self.file = roots;
                true
            }
            Ok(_) => false,
            Err(error) => {
                tracing::debug!(%error, "roots");
                false
            }
        }
    }

    fn publish(&self) {
        self.shared.update(|view| view.with_certs(self.held.clone(), Arc::clone(self.roots.in_force())));
        (self.changed)();
        self.publish_rows();
    }

    fn publish_rows(&self) {
        self.rows.send_replace(rows::Source {
            schedule: self.schedule.clone(),
            held: self.held.clone(),
            errors: self.errors.clone(),
            roots: Arc::clone(self.roots.in_force()),
        });
    }

    fn keep_roots(&self) {
        let pem: String = self.roots.in_force().certificates.iter().map(rows::pem).collect();
        self.keep(ROOTS, pem.as_bytes());
    }

    fn keep(&self, name: &str, bytes: &[u8]) {
        // The descriptor's own name shows in /proc, so it says nothing about whose it is.
        let kept = memfd::seal("mesh-certificate", bytes).and_then(|fd| self.store.put(name, &fd));
        if let Err(error) = kept {
            tracing::warn!(name, %error, "certificate not kept for the next process");
        }
    }

    fn forget(&self, name: &str) {
        if let Err(error) = self.store.del(name) {
            tracing::warn!(name, %error, "kept certificate not forgotten");
        }
    }
}

fn ask(
    controller: ControllerConfig,
    channel: Channel,
    id: SpiffeId,
    number: RequestNumber,
) -> BoxFuture<'static, Answer> {
    // Ends before the schedule counts it as lost.
    let limit = Duration::from_secs(REQUEST_TIMEOUT_SECS - 1);
    async move {
        let request = ca_client::request(&controller, channel, &id);
        let answer = timeout(limit, request).await.unwrap_or(Err(CaError::Slow));
        (id, number, answer)
    }
    .boxed()
}

fn now_secs() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As for adopted workloads, whose certificates nobody waits for.
    #[test]
    fn what_is_wanted_is_asked_for_though_nobody_waits_for_the_answer() {
        let (commands, mut asked) = mpsc::channel(1);
        let (_rows, rows) = watch::channel(rows::Source::default());
        let handle = CertificatesHandle { commands, rows };
        let id = SpiffeId::new("cluster.local", "default", "web");
        drop(handle.want(id.clone()));
        assert!(matches!(asked.try_recv(), Ok(Command::Want(wanted, _)) if wanted == id));
    }
}
