//! The workloads of this node: what each request of the agent does to them.
//!
//! The served ones are in the shared view; here are those that could not be served and what the agent has announced.
//! A workload that cannot be served stays captured in the kernel, closed, until the agent says that it is gone.

mod leaving;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use mesh_api::admin::EnrolledWorkload;
use mesh_core::workload::WorkloadUid;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, info, warn};

use self::leaving::Leaving;
use super::protocol::{Add, Request, WorkloadInfo};
use super::{Captured, EnrolMetrics, Host, MAX_WORKLOADS, NotCaptured, kept};
use crate::runtime::{Enrolled, Shared};
use crate::supervisor::client::{Kept, StoreChange};

/// Longest time from a request to its answer. The agent waits longer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// All workloads of the agent's announcements.
pub struct Roster {
    host: Arc<dyn Host>,
    shared: Arc<Shared>,
    trust_domain: Arc<str>,
    /// Captured but not served.
    closed: BTreeMap<WorkloadUid, Closed>,
    /// Served, but without a certificate; why.
    incomplete: BTreeMap<WorkloadUid, String>,
    /// Served no more, but for connections that they had.
    leaving: Vec<Leaving>,
    /// When they were looked at last.
    looked: Instant,
    /// Adopted and not captured again yet.
    unsettled: BTreeSet<WorkloadUid>,
    /// Descriptors that a predecessor put, of enrolments that are not complete yet.
    handed_over: Kept,
    /// The agent has announced everything, and proxies of the past are to be retired.
    all_announced: bool,
    /// Announced since the agent connected.
    announced: BTreeSet<WorkloadUid>,
    /// While the agent announces what there is: when waiting for certificates ends, for all together.
    announcing_until: Option<Instant>,
    metrics: EnrolMetrics,
    answer_within: Duration,
}

/// A workload that could not be enrolled.
#[derive(Debug)]
struct Closed {
    info: WorkloadInfo,
    netns: OwnedFd,
    /// `None`: the kernel does not know it.
    cookie: Option<u64>,
    reason: String,
}

impl Roster {
    /// Serves what a predecessor served, at once, and keeps the rest of the node as it is until the agent speaks.
    pub fn new(
        host: Arc<dyn Host>,
        shared: Arc<Shared>,
        trust_domain: Arc<str>,
        adopted: Vec<Enrolled>,
        metrics: EnrolMetrics,
    ) -> Self {
        let adopted: BTreeMap<_, _> = adopted.into_iter().map(|w| (w.uid.clone(), Arc::new(w))).collect();
        shared.update(|view| {
            let mut enrolled = view.enrolled.clone();
            enrolled.extend(adopted.iter().map(|(uid, workload)| (uid.clone(), Arc::clone(workload))));
            view.with_enrolled(enrolled)
        });
        for workload in adopted.values() {
            host.serve(Arc::clone(workload));
            metrics.started.inc();
        }
        let roster = Self {
            host,
            shared,
            trust_domain,
            closed: BTreeMap::new(),
            incomplete: BTreeMap::new(),
            leaving: Vec::new(),
            looked: Instant::now(),
            unsettled: adopted.into_keys().collect(),
            handed_over: Kept::new(),
            all_announced: false,
            announced: BTreeSet::new(),
            announcing_until: None,
            metrics,
            answer_within: ANSWER_WITHIN,
        };
        roster.count();
        roster
    }

    /// Asks for certificates of adopted workloads, so that they are renewed.
    pub fn certify_adopted(&self) {
        for workload in self.shared.view.load().enrolled.values() {
            // The schedule of certificates goes on asking; nobody waits for this answer.
            drop(self.host.certificate(kept::info(workload).identity(&self.trust_domain)));
        }
    }

    /// Captures one adopted workload again: the kernel may have forgotten it, interfaces may have come while no proxy ran,
    /// and clsact filters are still those of the last version. When there is none left and the agent has said what there
    /// is, proxies of the past are retired. Neither is needed for serving. False when there is nothing to do.
    pub async fn settle_one(&mut self) -> bool {
        let Some(uid) = self.unsettled.pop_first() else { return self.retire_proxies().await };
        if let Some(workload) = self.enrolled(&uid)
            && let Err(error) = self.renew(Arc::clone(&workload)).await
        {
            warn!(workload = &*workload.name, %error, "adopted workload is not captured as it should be");
        }
        true
    }

    /// Whether [`Self::settle_one`] has nothing to do.
    pub fn is_settled(&self) -> bool {
        self.unsettled.is_empty() && !self.all_announced
    }

    async fn retire_proxies(&mut self) -> bool {
        if !std::mem::take(&mut self.all_announced) {
            return false;
        }
        let host = Arc::clone(&self.host);
        if let Err(error) = blocking(move || host.retire_proxies()).await {
            // They count as proxies until the next time.
            warn!(%error, "proxies of the past are not retired");
        }
        true
    }

    /// What a predecessor that we take over from did after this process was given its workloads.
    pub fn follow(&mut self, change: StoreChange) {
        match change {
            StoreChange::Put(name, fd) if kept::is_ours(&name) => {
                let complete = kept::completes(&name).is_some();
                self.handed_over.insert(name, fd);
                if complete {
                    kept::adopt(&mut self.handed_over).workloads.into_iter().for_each(|workload| self.adopt(workload));
                }
            }
            StoreChange::Del(name) => {
                self.handed_over.remove(&name);
                if let Some(workload) = kept::completes(&name).and_then(|uid| self.enrolled(&uid)) {
                    self.leave(&workload);
                    self.give_up_certificate_of(&workload);
                }
            }
            // Certificates and ports: this process asks for the certificates of what it adopts, and has the ports.
            StoreChange::Put(..) => {}
        }
        self.count();
    }

    /// Serves a workload that a predecessor has enrolled.
    fn adopt(&mut self, workload: Enrolled) {
        let known = self.enrolled(&workload.uid);
        if let Some(known) = &known {
            if same_file(known.listeners.outbound4.as_fd(), workload.listeners.outbound4.as_fd()) {
                return;
            }
            self.leave(known);
        }
        let workload = Arc::new(workload);
        self.closed.remove(&workload.uid);
        self.serve(&workload);
        self.unsettled.insert(workload.uid.clone());
        drop(self.host.certificate(kept::info(&workload).identity(&self.trust_domain)));
        known.iter().for_each(|known| self.give_up_certificate_of(known));
    }

    fn serve(&self, workload: &Arc<Enrolled>) {
        self.shared.update(|view| {
            let mut enrolled = view.enrolled.clone();
            enrolled.insert(workload.uid.clone(), Arc::clone(workload));
            view.with_enrolled(enrolled)
        });
        self.host.serve(Arc::clone(workload));
        self.metrics.started.inc();
    }

    /// Serves a workload no more. Its certificate stays: what takes its place may need the same one.
    fn leave(&mut self, workload: &Enrolled) {
        self.incomplete.remove(&workload.uid);
        self.shared.update(|view| {
            let mut enrolled = view.enrolled.clone();
            enrolled.remove(&workload.uid);
            view.with_enrolled(enrolled)
        });
        self.host.stop(&workload.uid);
        self.metrics.stopped.inc();
        info!(workload = &*workload.name, namespace = &*workload.namespace, "workload left");
    }

    /// A new connection to the agent, which announces everything again.
    pub fn agent_connected(&mut self) {
        self.announced.clear();
        self.announcing_until = Some(Instant::now() + self.answer_within);
    }

    /// Carries a request out. An error is for the agent.
    pub async fn handle(&mut self, request: Request) -> Result<(), String> {
        let deadline = Instant::now() + self.answer_within;
        let outcome = match request {
            Request::Add(add) => self.add(add, deadline).await,
            Request::Keep(uid) => self.keep(uid),
            Request::Del(uid) => self.remove(&uid).await,
            Request::LetGo(uid) => self.let_go(&uid).await,
            Request::SnapshotSent => {
                self.announcing_until = None;
                self.sweep().await
            }
        };
        self.count();
        outcome
    }

    /// All workloads with their states, in order.
    pub fn rows(&self) -> Vec<EnrolledWorkload> {
        let view = self.shared.view.load();
        let served = view.enrolled.values().filter(|workload| !self.is_leaving(&workload.uid)).map(|workload| {
            let info = kept::info(workload);
            let missing = self.incomplete.get(&workload.uid);
            // The schedule of certificates has gone on asking.
            let missing = missing.filter(|_| !view.certs.contains_key(&info.identity(&self.trust_domain)));
            row(&workload.uid, &info, workload.cookie, missing.map_or("ready", String::as_str))
        });
        let closed = self.closed.iter().map(|(uid, c)| row(uid, &c.info, c.cookie.unwrap_or_default(), &c.reason));
        let mut rows: Vec<_> = served.chain(closed).chain(self.leaving_rows()).collect();
        rows.sort_by(|a, b| a.uid.cmp(&b.uid));
        rows
    }

    fn enrolled(&self, uid: &WorkloadUid) -> Option<Arc<Enrolled>> {
        self.shared.view.load().enrolled.get(uid).cloned()
    }

    async fn add(&mut self, add: Add, deadline: Instant) -> Result<(), String> {
        self.announced.insert(add.uid.clone());
        self.close_listeners_of(&add.uid);
        self.refuse_shared_namespace(&add)?;
        match self.enrolled(&add.uid) {
            Some(known) if kept::info(&known) == add.info && same_file(known.netns.as_fd(), add.netns.as_fd()) => {
                self.renew(Arc::clone(&known)).await?;
                // The first time it may not have worked.
                self.put(&known)?;
                self.certify(&add.uid, &add.info, deadline).await
            }
            Some(known) => {
                self.require_gone(&known).await?;
                let enrolled = match self.end(&known).await {
                    Ok(()) => self.enrol(&add.uid, add.info, add.netns, deadline).await,
                    Err(error) => Err(error),
                };
                self.give_up_certificate_of(&known);
                enrolled
            }
            None => self.enrol(&add.uid, add.info, add.netns, deadline).await,
        }
    }

    /// A pod's processes may enter other namespaces, and be taken for what the pod is now: while the last one has a link, it is
    /// the one to guard.
    async fn require_gone(&self, known: &Arc<Enrolled>) -> Result<(), String> {
        let (host, last) = (Arc::clone(&self.host), Arc::clone(known));
        if blocking(move || Ok(host.is_gone(last.netns.as_fd()))).await? {
            return Ok(());
        }
        Err(format!("{} has another network namespace, and its last one still has a link", known.uid.0))
    }

    /// One namespace is one workload: the programs know a workload by its namespace alone.
    fn refuse_shared_namespace(&self, add: &Add) -> Result<(), String> {
        let netns = add.netns.as_fd();
        let own =
            std::fs::File::open("/proc/self/ns/net").map_err(|error| format!("own network namespace: {error}"))?;
        if same_file(own.as_fd(), netns) {
            return Err("its network namespace is the node's own: it cannot be captured".to_owned());
        }
        let view = self.shared.view.load();
        let served = view.enrolled.values().map(|w| (&w.uid, &w.name, w.netns.as_fd()));
        let closed = self.closed.iter().map(|(uid, c)| (uid, &c.info.name, c.netns.as_fd()));
        let other = served.chain(closed).find(|(uid, _, theirs)| **uid != add.uid && same_file(*theirs, netns));
        match other {
            Some((uid, name, _)) => {
                Err(format!("its network namespace is that of {name} ({}), which is enrolled", uid.0))
            }
            None => Ok(()),
        }
    }

    async fn renew(&self, workload: Arc<Enrolled>) -> Result<(), String> {
        let host = Arc::clone(&self.host);
        blocking(move || host.renew(&workload)).await
    }

    /// Captures a workload, and serves it when it has its certificate, or when that does not come in time: until then its
    /// connections wait in the backlogs, because without one each would be refused.
    async fn enrol(
        &mut self,
        uid: &WorkloadUid,
        info: WorkloadInfo,
        netns: OwnedFd,
        deadline: Instant,
    ) -> Result<(), String> {
        let known = self.shared.view.load().enrolled.len() + self.closed.len();
        if known >= MAX_WORKLOADS && !self.closed.contains_key(uid) {
            return Err(format!("this node serves {MAX_WORKLOADS} workloads already"));
        }
        let (host, key) = (Arc::clone(&self.host), uid.clone());
        let captured = tokio::task::spawn_blocking(move || host.capture(&key, netns)).await;
        let Captured { netns, cookie, listeners } = match captured {
            Ok(Ok(captured)) => captured,
            Ok(Err(NotCaptured { reason, netns, cookie })) => {
                warn!(workload = &*info.name, namespace = &*info.namespace, %reason, "workload is not enrolled");
                self.closed.insert(uid.clone(), Closed { info, netns, cookie, reason: reason.clone() });
                return Err(reason);
            }
            Err(error) => return Err(format!("enrolment failed: {error}")),
        };
        self.closed.remove(uid);
        let WorkloadInfo { name, namespace, service_account } = info.clone();
        let workload =
            Arc::new(Enrolled { uid: uid.clone(), name, namespace, service_account, netns, cookie, listeners });
        let kept = self.put(&workload);
        let certified = self.certify(uid, &info, deadline).await;
        self.serve(&workload);
        info!(workload = &*workload.name, namespace = &*workload.namespace, cookie, "workload enrolled");
        kept.and(certified)
    }

    fn put(&self, workload: &Enrolled) -> Result<(), String> {
        let put = || kept::descriptors(workload)?.iter().try_for_each(|(name, fd)| self.host.keep(name, fd.as_fd()));
        put().map_err(|error| format!("listeners cannot be kept for a restart: {error}"))
    }

    async fn certify(&mut self, uid: &WorkloadUid, info: &WorkloadInfo, deadline: Instant) -> Result<(), String> {
        let id = info.identity(&self.trust_domain);
        // A CA that is silent must not hold up a node full of workloads one after the other.
        let deadline = self.announcing_until.map_or(deadline, |until| deadline.min(until));
        let answered = match timeout_at(deadline, self.host.certificate(id.clone())).await {
            Ok(answered) => answered,
            Err(_) => Err("no answer in time".to_owned()),
        };
        match answered {
            Ok(()) => {
                self.incomplete.remove(uid);
                Ok(())
            }
            Err(error) => {
                let reason = format!("no certificate for {id}: {error}");
                self.incomplete.insert(uid.clone(), reason.clone());
                Err(reason)
            }
        }
    }

    fn keep(&mut self, uid: WorkloadUid) -> Result<(), String> {
        if self.enrolled(&uid).is_none() {
            return Err(format!("{} is not enrolled here: add it with its network namespace", uid.0));
        }
        self.announced.insert(uid);
        Ok(())
    }

    /// Ends an enrolment; one that is not known is none.
    async fn remove(&mut self, uid: &WorkloadUid) -> Result<(), String> {
        self.announced.remove(uid);
        self.incomplete.remove(uid);
        self.end_all_leaving(uid).await;
        if let Some(closed) = self.closed.remove(uid) {
            return self.release_closed(uid, closed).await;
        }
        let Some(workload) = self.enrolled(uid) else {
            debug!(uid = &*uid.0, "told to end an enrolment that there is not");
            return Ok(());
        };
        let ended = self.end(&workload).await;
        self.give_up_certificate_of(&workload);
        ended
    }

    /// As [`Self::remove`], of a served one, but for its certificate.
    async fn end(&mut self, workload: &Arc<Enrolled>) -> Result<(), String> {
        self.forget(&workload.uid);
        self.leave(workload);
        let (host, gone) = (Arc::clone(&self.host), Arc::clone(workload));
        blocking(move || host.release(gone.cookie, Some(gone.netns.as_fd()))).await
    }

    async fn release_closed(&mut self, uid: &WorkloadUid, closed: Closed) -> Result<(), String> {
        info!(workload = &*closed.info.name, namespace = &*closed.info.namespace, "workload left");
        let Some(cookie) = closed.cookie else { return Ok(()) };
        let host = Arc::clone(&self.host);
        let netns = closed.netns.try_clone().map_err(|error| error.to_string())?;
        let released = blocking(move || host.release(cookie, Some(netns.as_fd()))).await;
        if let Err(error) = &released {
            warn!(uid = &*uid.0, %error, "namespace stays captured");
        }
        released
    }

    fn forget(&self, uid: &WorkloadUid) {
        for name in kept::names(uid) {
            if let Err(error) = self.host.forget(&name) {
                warn!(name, %error, "descriptor stays with the supervisor");
            }
        }
    }

    fn give_up_certificate_of(&self, gone: &Enrolled) {
        let id = kept::info(gone).identity(&self.trust_domain);
        let view = self.shared.view.load();
        let leaving = self.leaving.iter().map(|leaving| &leaving.workload);
        let mut others = view.enrolled.values().chain(leaving);
        if !others.any(|workload| kept::info(workload).identity(&self.trust_domain) == id) {
            self.host.give_up_certificate(&id);
        }
    }

    /// What the agent did not announce is gone.
    async fn sweep(&mut self) -> Result<(), String> {
        let enrolled: Vec<WorkloadUid> = self.shared.view.load().enrolled.keys().cloned().collect();
        let known = enrolled.into_iter().chain(self.closed.keys().cloned());
        let gone: Vec<_> = known.filter(|uid| !self.announced.contains(uid) && !self.is_leaving(uid)).collect();
        let mut failed = Vec::new();
        for uid in gone {
            failed.extend(self.remove(&uid).await.err());
        }
        failed.extend(self.release_unknown().await.err());
        self.all_announced = true;
        if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
    }

    /// Namespaces that an earlier proxy captured and nobody announced.
    async fn release_unknown(&self) -> Result<(), String> {
        let view = self.shared.view.load_full();
        let served = view.enrolled.values().map(|workload| workload.cookie);
        let leaving = self.leaving.iter().map(|leaving| leaving.workload.cookie);
        let closed = self.closed.values().filter_map(|closed| closed.cookie);
        let known: BTreeSet<u64> = served.chain(leaving).chain(closed).collect();
        let host = Arc::clone(&self.host);
        blocking(move || {
            let unknown = host.captured()?.into_iter().filter(|cookie| !known.contains(cookie));
            let failed: Vec<String> = unknown.filter_map(|cookie| host.release(cookie, None).err()).collect();
            if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
        })
        .await
    }

    fn count(&self) {
        let count = |length: usize| i64::try_from(length).unwrap_or(i64::MAX);
        self.metrics.active.set(count(self.shared.view.load().enrolled.len()));
        self.metrics.pending.set(count(self.closed.len()));
    }
}

fn row(uid: &WorkloadUid, info: &WorkloadInfo, netns_cookie: u64, state: &str) -> EnrolledWorkload {
    EnrolledWorkload {
        uid: uid.0.to_string(),
        name: info.name.to_string(),
        namespace: info.namespace.to_string(),
        service_account: info.service_account.to_string(),
        netns_cookie,
        state: state.to_owned(),
    }
}

/// Whether two descriptors are of one namespace (or any other file).
fn same_file(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    let identity = |fd| nix::sys::stat::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
    matches!((identity(a), identity(b)), (Ok(a), Ok(b)) if a == b)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, String> + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(error.to_string()))
}

#[cfg(test)]
mod tests;
