//! Workloads that have left the mesh while they live on: their connections go on, and what these need stays until the
//! last of them has ended.
//!
//! First the kernel captures nothing new, then the listeners close, then routes and certificate go.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::admin::EnrolledWorkload;
use mesh_core::workload::WorkloadUid;
use tokio::time::Instant;
use tracing::{info, warn};

use super::super::{MAX_WORKLOADS, kept};
use super::{Roster, blocking, row};
use crate::runtime::Enrolled;

/// How long the listeners of a workload stay open after it left. What was captured has been accepted by then, and its
/// peers have heard that it is reached without a tunnel.
const LISTENS_ON: Duration = Duration::from_secs(2);
/// Longest time that connections of a workload go on after it left.
pub(super) const GOES_ON: Duration = Duration::from_secs(3600);
/// How often one workload is on the list, having come and left again meanwhile; the first of them ends for the next.
const MAX_OF_ONE: usize = 4;
/// Between two looks at the workloads that left.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// A workload that has left.
#[derive(Debug)]
pub(super) struct Leaving {
    pub(super) workload: Arc<Enrolled>,
    since: Instant,
    /// Its listeners are open, and the view has it.
    listens: bool,
}

impl Leaving {
    fn is_of(&self, uid: &WorkloadUid) -> bool {
        self.workload.uid == *uid
    }
}

impl Roster {
    /// When [`Self::look_at_leaving`] may have something to do.
    pub fn next_look(&self) -> Option<Instant> {
        (!self.leaving.is_empty()).then(|| self.looked + LOOK_EVERY)
    }

    /// Captures no more of a workload that lives on, and lets its connections go on.
    pub(super) async fn let_go(&mut self, uid: &WorkloadUid) -> Result<(), String> {
        let served = self.enrolled(uid).filter(|_| self.leaving.len() < MAX_WORKLOADS);
        // One that is closed has no connections.
        let Some(workload) = served else { return self.remove(uid).await };
        if self.is_leaving(uid) {
            return Ok(());
        }
        self.announced.remove(uid);
        self.incomplete.remove(uid);
        // Or it would be captured again.
        self.unsettled.remove(uid);
        self.forget(uid);
        let (host, gone) = (Arc::clone(&self.host), Arc::clone(&workload));
        if let Err(error) = blocking(move || host.let_go(gone.cookie, gone.netns.as_fd())).await {
            warn!(workload = &*workload.name, %error, "its connections cannot go on");
            return self.remove(uid).await;
        }
        info!(workload = &*workload.name, namespace = &*workload.namespace, "workload left; its connections go on");
        let earlier: Vec<_> =
            self.leaving.iter().filter(|leaving| leaving.is_of(uid)).map(|l| Arc::clone(&l.workload)).collect();
        if let [oldest, rest @ ..] = &earlier[..]
            && rest.len() + 1 >= MAX_OF_ONE
        {
            self.end_those(&[Arc::clone(oldest)]).await;
        }
        self.looked = Instant::now();
        self.leaving.push(Leaving { workload, since: self.looked, listens: true });
        Ok(())
    }

    /// Whether the enrolment that the view has is one that ends.
    pub(super) fn is_leaving(&self, uid: &WorkloadUid) -> bool {
        self.leaving.iter().any(|leaving| leaving.listens && leaving.is_of(uid))
    }

    /// Ends what is over of the workloads that left.
    pub async fn look_at_leaving(&mut self, now: Instant) {
        let mut over = Vec::new();
        for leaving in std::mem::take(&mut self.leaving) {
            let leaving = if now >= leaving.since + LISTENS_ON { self.close(leaving) } else { leaving };
            let (host, workload) = (Arc::clone(&self.host), Arc::clone(&leaving.workload));
            let is_dead = blocking(move || Ok(host.is_gone(workload.netns.as_fd()))).await.unwrap_or(false);
            let is_late = now >= leaving.since + GOES_ON;
            if is_dead || is_late || (!leaving.listens && self.host.carries(&leaving.workload) == 0) {
                over.push(Arc::clone(&leaving.workload));
            }
            self.leaving.push(leaving);
        }
        self.end_those(&over).await;
        self.count();
        // From its end: looks that take long leave time for the agent.
        self.looked = now.max(Instant::now());
    }

    /// Ends all that is left of a workload that left.
    pub(super) async fn end_all_leaving(&mut self, uid: &WorkloadUid) {
        let gone =
            self.leaving.iter().filter(|leaving| leaving.is_of(uid)).map(|leaving| Arc::clone(&leaving.workload));
        self.end_those(&gone.collect::<Vec<_>>()).await;
    }

    /// Ends these, one after the other: what one of them needs as well as others stays for those.
    async fn end_those(&mut self, gone: &[Arc<Enrolled>]) {
        for workload in gone {
            let at = self.leaving.iter().position(|leaving| Arc::ptr_eq(&leaving.workload, workload));
            if let Some(at) = at {
                let leaving = self.leaving.remove(at);
                self.end_leaving(self.close(leaving).workload).await;
            }
        }
    }

    /// It enters again: its listeners make room for new ones, its connections go on.
    pub(super) fn close_listeners_of(&mut self, uid: &WorkloadUid) {
        for leaving in std::mem::take(&mut self.leaving) {
            let leaving = if leaving.is_of(uid) { self.close(leaving) } else { leaving };
            self.leaving.push(leaving);
        }
    }

    /// Rows of workloads that left.
    pub(super) fn leaving_rows(&self) -> impl Iterator<Item = EnrolledWorkload> {
        self.leaving.iter().map(|Leaving { workload, since, .. }| {
            let left = (*since + GOES_ON).saturating_duration_since(Instant::now()).as_secs().div_ceil(60);
            let connections = self.host.carries(workload);
            let state = format!("left the mesh; {connections} connections go on, at most {left} min");
            row(&workload.uid, &kept::info(workload), workload.cookie, &state)
        })
    }

    /// Serves no new connections of it.
    fn close(&self, leaving: Leaving) -> Leaving {
        if !leaving.listens {
            return leaving;
        }
        let workload = &leaving.workload;
        self.shared.update(|view| {
            let mut enrolled = view.enrolled.clone();
            if enrolled.get(&workload.uid).is_some_and(|now| Arc::ptr_eq(now, workload)) {
                enrolled.remove(&workload.uid);
            }
            view.with_enrolled(enrolled)
        });
        self.host.stop_listening(workload);
        self.metrics.stopped.inc();
        Leaving { listens: false, ..leaving }
    }

    /// Undoes what was left for its connections, and ends those that there are.
    async fn end_leaving(&mut self, workload: Arc<Enrolled>) {
        self.host.cut(&workload);
        let is_here = self.shared.view.load().enrolled.values().any(|now| now.cookie == workload.cookie)
            || self.leaving.iter().any(|other| other.workload.cookie == workload.cookie)
            || self.closed.values().any(|closed| closed.cookie == Some(workload.cookie));
        if !is_here {
            let (host, gone) = (Arc::clone(&self.host), Arc::clone(&workload));
            if let Err(error) = blocking(move || host.release(gone.cookie, Some(gone.netns.as_fd()))).await {
                warn!(workload = &*workload.name, %error, "something of its enrolment stays");
            }
        }
        info!(
            workload = &*workload.name,
            namespace = &*workload.namespace,
            "the last connections of a workload that left have ended"
        );
        self.give_up_certificate_of(&workload);
    }
}
