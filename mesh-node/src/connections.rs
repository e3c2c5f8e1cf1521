//! Live connections of one worker: what they are, how many bytes they carried, and how to end them.
//!
//! A connection is registered before it is judged, so that a change between judgement and registration cannot be
//! missed: whoever swaps the view afterwards finds the connection here and judges it again. Dropping a [`Registered`]
//! writes the one record of the connection's end.

mod description;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::Context;
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use mesh_api::admin::ConnectionRow;
use mesh_core::workload::WorkloadUid;

pub use self::description::{Carrier, CloseReason, Description, Direction};
use crate::access_log::{AccessLog, Record};
use crate::metrics::{Metrics, ResponseFlags, Series, count};
use crate::runtime::{Enrolled, View};
use crate::view_change::ViewChange;

/// A live connection.
#[derive(Debug)]
pub struct Live {
    /// What it is.
    pub description: Description,
    opened: Instant,
    /// Client to server, and back. Only the connection's own task adds.
    bytes: [AtomicU64; 2],
    flushed: [AtomicU64; 2],
    series: OnceLock<Box<[Arc<Series>]>>,
    closing: OnceLock<CloseReason>,
    waker: AtomicWaker,
    /// Generation of the view that it was judged by last, or [`NEVER`].
    judged_by: AtomicU64,
}

/// No view's generation.
const NEVER: u64 = u64::MAX;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the end that started the connection.
    ToServer = 0,
    /// Back to it.
    ToClient = 1,
}

impl Live {
    /// Counts carried bytes. One writer, hence no read-modify-write.
    pub fn carried(&self, way: Way, bytes: usize) {
        let counter = &self.bytes[way as usize];
        counter.store(counter.load(Ordering::Relaxed) + bytes as u64, Ordering::Relaxed);
    }

    /// Why this connection must end, if it must; otherwise the task is woken when it must.
    pub fn closing(&self, cx: &mut Context<'_>) -> Option<&CloseReason> {
        if let Some(reason) = self.closing.get() {
            return Some(reason);
        }
        self.waker.register(cx.waker());
        self.closing.get()
    }

    /// Why this connection must end, if it must.
    pub fn must_close(&self) -> Option<&CloseReason> {
        self.closing.get()
    }

    /// Ends it; the first reason stays.
    pub fn close(&self, reason: CloseReason) -> bool {
        let first = self.closing.set(reason).is_ok();
        self.waker.wake();
        first
    }

    /// Bytes to the server and to the client.
    pub fn bytes(&self) -> (u64, u64) {
        (self.bytes[0].load(Ordering::Relaxed), self.bytes[1].load(Ordering::Relaxed))
    }

    fn flush_bytes(&self) {
        let Some(series) = self.series.get() else { return };
        let delta = |way: usize| {
            let now = self.bytes[way].load(Ordering::Relaxed);
            now.saturating_sub(self.flushed[way].fetch_max(now, Ordering::Relaxed))
        };
        let (received, sent) = (delta(0), delta(1));
        for one in series {
            one.received.fetch_add(received, Ordering::Relaxed);
            one.sent.fetch_add(sent, Ordering::Relaxed);
        }
    }

    fn concerns(&self, uid: &WorkloadUid) -> bool {
        let d = &self.description;
        d.enrolled.uid == *uid || d.local_destination.as_ref().is_some_and(|e| e.uid == *uid)
    }

    fn is_of(&self, enrolled: &Arc<Enrolled>) -> bool {
        let d = &self.description;
        Arc::ptr_eq(&d.enrolled, enrolled) || d.local_destination.as_ref().is_some_and(|e| Arc::ptr_eq(e, enrolled))
    }

    /// Judges it by `view`: why it must not go on, if so.
    pub fn verdict(&self, view: &View) -> Option<CloseReason> {
        self.judged_by.store(view.generation, Ordering::Relaxed);
        self.description.verdict(view)
    }

    /// Whether it must be judged by the newer of two views. If not, it counts as judged by it.
    fn is_open_question(&self, change: &mut ViewChange<'_>) -> bool {
        match self.judged_by.load(Ordering::Relaxed) {
            NEVER => true,
            judged_by if judged_by >= change.new.generation => false,
            judged_by if judged_by == change.old.generation && !change.concerns(&self.description) => {
                self.judged_by.store(change.new.generation, Ordering::Relaxed);
                false
            }
            // It came between the two views, and what was the same in both may have been different then.
            _another_view => true,
        }
    }

    fn row(&self) -> ConnectionRow {
        let d = &self.description;
        let (to_server, to_client) = self.bytes();
        let (local, remote, sent, received, peer) = match d.direction {
            Direction::Outbound => (d.source_addr, d.destination_addr, to_server, to_client, 1),
            Direction::Inbound => (d.destination_addr, d.source_addr, to_client, to_server, 0),
        };
        ConnectionRow {
            workload: format!("{}.{}", d.enrolled.name, d.enrolled.namespace),
            direction: match d.direction {
                Direction::Inbound => "inbound".to_owned(),
                Direction::Outbound => "outbound".to_owned(),
            },
            local: local.to_string(),
            remote: remote.to_string(),
            target: d.target.map(|t| t.to_string()).unwrap_or_default(),
            protocol: d.carrier.as_str().to_owned(),
            peer_identity: d
                .identities
                .as_ref()
                .map(|(client, server)| if peer == 1 { server.to_string() } else { client.to_string() })
                .unwrap_or_default(),
            age_secs: self.opened.elapsed().as_secs(),
            bytes_sent: sent,
            bytes_received: received,
        }
    }
}

/// How long connections are judged before others have their turn: some thousand verdicts.
const JUDGE_AT_MOST: Duration = Duration::from_millis(5);

/// Live connections of one worker.
#[derive(Debug)]
pub struct Connections {
    live: Mutex<Entries>,
    metrics: Arc<Metrics>,
    log: Option<AccessLog>,
    cluster: Arc<str>,
}

#[derive(Debug, Default)]
struct Entries {
    next: u64,
    by_id: HashMap<u64, Arc<Live>>,
}

impl Connections {
    /// None yet.
    #[allow(clippy::needless_pass_by_value, reason = "it keeps what it is given")]
    pub fn new(metrics: Arc<Metrics>, log: Option<AccessLog>, cluster: Arc<str>) -> Arc<Self> {
        let connections = Arc::new(Self { live: Mutex::default(), metrics: Arc::clone(&metrics), log, cluster });
        metrics.watch(&connections);
        connections
    }

    /// Enters a connection, before it is judged.
    pub fn register(self: &Arc<Self>, description: Description) -> Registered {
        let live = Arc::new(Live {
            description,
            opened: Instant::now(),
            bytes: Default::default(),
            flushed: Default::default(),
            series: OnceLock::new(),
            closing: OnceLock::new(),
            waker: AtomicWaker::new(),
            judged_by: AtomicU64::new(NEVER),
        });
        let mut entries = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let id = entries.next;
        entries.next += 1;
        entries.by_id.insert(id, Arc::clone(&live));
        Registered { connections: Arc::clone(self), id, live, outcome: Outcome::Pending }
    }

    /// Number of live connections.
    pub fn len(&self) -> usize {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).by_id.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All, for the admin interface.
    pub fn rows(&self) -> Vec<ConnectionRow> {
        self.all().iter().map(|live| live.row()).collect()
    }

    /// Judges by `new` those that the difference to `old`, by which all were judged, concerns, and ends those that are
    /// allowed no more. Returns how many were judged. Other tasks have their turn in between.
    pub async fn judge_again(&self, old: &View, new: &View) -> usize {
        let concerned = self.concerned(old, new);
        let mut turn_began = Instant::now();
        for live in &concerned {
            if let Some(reason) = live.verdict(new)
                && live.close(reason)
            {
                count(&self.metrics.counters.connections_closed_by_change);
            }
            if turn_began.elapsed() >= JUDGE_AT_MOST {
                tokio::task::yield_now().await;
                turn_began = Instant::now();
            }
        }
        concerned.len()
    }

    fn concerned(&self, old: &View, new: &View) -> Vec<Arc<Live>> {
        let mut change = ViewChange::between(old, new);
        let entries = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        entries.by_id.values().filter(|live| live.is_open_question(&mut change)).cloned().collect()
    }

    /// Ends those of a workload.
    pub fn close_workload(&self, uid: &WorkloadUid) {
        for live in self.all().iter().filter(|live| live.concerns(uid)) {
            live.close(CloseReason::WorkloadStopped);
        }
    }

    /// Number of those of one enrolment.
    pub fn concerning(&self, enrolled: &Arc<Enrolled>) -> usize {
        self.live
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .by_id
            .values()
            .filter(|live| live.is_of(enrolled))
            .count()
    }

    /// Ends those of one enrolment.
    pub fn close_enrolment(&self, enrolled: &Arc<Enrolled>) {
        for live in self.all().iter().filter(|live| live.is_of(enrolled)) {
            live.close(CloseReason::WorkloadStopped);
        }
    }

    /// Ends all.
    pub fn close_all(&self, reason: &CloseReason) {
        for live in self.all() {
            live.close(reason.clone());
        }
    }

    pub(crate) fn flush_bytes(&self) {
        for live in self.all() {
            live.flush_bytes();
        }
    }

    fn all(&self) -> Vec<Arc<Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).by_id.values().cloned().collect()
    }

    /// Counts and logs a connection that did not come about.
    pub fn failed(&self, description: &Description, flags: ResponseFlags, error: &dyn std::fmt::Display) {
        for reporter in description.reporters() {
            count(&self.metrics.series(description.party_labels(*reporter, flags, &self.cluster)).failed);
        }
        self.write(description, None, Some(error.to_string()));
    }

    #[allow(clippy::needless_pass_by_value, reason = "the caller has no further use for it")]
    fn write(&self, description: &Description, ended: Option<(Instant, (u64, u64))>, error: Option<String>) {
        let Some(log) = &self.log else { return };
        for reporter in description.reporters() {
            let record = Record::new(description, *reporter, ended, error.clone(), &self.cluster);
            if !log.write(record) {
                count(&self.metrics.counters.log_records_dropped);
            }
        }
    }
}

#[derive(Debug)]
enum Outcome {
    /// Not judged or not dialled yet; dropping it in this state means that the attempt was abandoned.
    Pending,
    Open,
    Done,
}

/// A place in the registry. Dropping it takes the connection out and writes its record.
#[derive(Debug)]
pub struct Registered {
    connections: Arc<Connections>,
    id: u64,
    /// The connection.
    pub live: Arc<Live>,
    outcome: Outcome,
}

impl Registered {
    /// It is up: bytes flow from now on.
    pub fn opened(&mut self) {
        let d = &self.live.description;
        let series = d
            .reporters()
            .iter()
            .map(|reporter| {
                let labels = d.party_labels(*reporter, ResponseFlags::None, &self.connections.cluster);
                self.connections.metrics.series(labels)
            })
            .collect::<Box<[_]>>();
        for one in &series {
            count(&one.opened);
        }
        if self.live.series.set(series).is_ok() {
            self.outcome = Outcome::Open;
        }
    }

    /// It did not come about.
    pub fn failed(mut self, flags: ResponseFlags, error: &dyn std::fmt::Display) {
        self.outcome = Outcome::Done;
        self.connections.failed(&self.live.description, flags, error);
    }

    /// It was given up without a record: the caller writes it, or another attempt.
    pub fn superseded(mut self) {
        self.outcome = Outcome::Done;
    }

    /// It ended; `error` says how, if not in order.
    pub fn ended(mut self, error: Option<String>) {
        self.finish(error);
    }

    fn finish(&mut self, error: Option<String>) {
        self.outcome = Outcome::Done;
        let live = &self.live;
        live.flush_bytes();
        for one in live.series.get().into_iter().flatten() {
            count(&one.closed);
        }
        let reason = live.must_close();
        if let Some(flags) = reason.map(CloseReason::flags).filter(|flags| *flags != ResponseFlags::None) {
            for reporter in live.description.reporters() {
                let labels = live.description.party_labels(*reporter, flags, &self.connections.cluster);
                count(&self.connections.metrics.series(labels).failed);
            }
        }
        let error = reason.map(ToString::to_string).or(error);
        self.connections.write(&live.description, Some((live.opened, live.bytes())), error);
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.connections.live.lock().unwrap_or_else(PoisonError::into_inner).by_id.remove(&self.id);
        match self.outcome {
            Outcome::Done => {}
            Outcome::Open => self.finish(Some("closed: the proxy stops".to_owned())),
            Outcome::Pending => {
                self.connections.failed(&self.live.description, ResponseFlags::Connect, &"abandoned before it was up");
            }
        }
    }
}
