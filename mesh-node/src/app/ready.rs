//! When this proxy is ready, and whom it tells.
//!
//! Two answers, because two ask: the supervisor wants to know when adopted workloads are served by a configuration, so
//! that a predecessor may go and connections no longer wait; the outside (port 15021) also waits for the agent.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::enrol::EnrolmentStatus;
use crate::readiness::Readiness;
use crate::supervisor::client::StoreClient;
use crate::xds::XdsStatus;

/// How long readiness waits for an agent that cannot be reached, and the agent for a configuration. A node without an
/// agent has no workloads to serve and is not unready for that.
const AGENT_GRACE: Duration = Duration::from_secs(1);

/// Follows the parts and tells.
pub(super) struct Watcher {
    pub(super) xds: watch::Receiver<XdsStatus>,
    pub(super) enrolment: watch::Receiver<EnrolmentStatus>,
    pub(super) sender: watch::Sender<Readiness>,
    pub(super) store: Arc<StoreClient>,
    pub(super) started: Instant,
}

impl Watcher {
    /// Ends when the agent may be spoken to: while a predecessor still runs it would enrol the same workloads, so not
    /// before the supervisor was told, unless nothing was adopted or no configuration comes.
    pub(super) fn reported(&self) -> impl Future<Output = ()> + Send + use<> {
        let (mut xds, adopted) = (self.xds.clone(), self.enrolment.borrow().adopted);
        async move {
            if adopted > 0 {
                let synced = xds.wait_for(|status| status.synced);
                // Too late or never: enrolment does not need a configuration.
                drop(tokio::time::timeout(AGENT_GRACE, synced).await);
            }
        }
    }

    /// Runs until cancelled.
    pub(super) async fn run(mut self, cancel: CancellationToken) {
        let grace = tokio::time::sleep(AGENT_GRACE);
        tokio::pin!(grace);
        let (mut reported, mut announced) = (false, false);
        loop {
            let (synced, enrolment) = (self.xds.borrow_and_update().synced, self.enrolment.borrow_and_update().clone());
            if synced && !reported {
                reported = true;
                if let Err(error) = self.store.ready() {
                    error!(%error, "supervisor does not hear that this proxy serves");
                }
            }
            let waiting_for = waiting_for(synced, &enrolment, grace.is_elapsed());
            if waiting_for.is_empty() && !announced {
                announced = true;
                info!(workloads = enrolment.workloads.len(), elapsed = ?self.started.elapsed(), "ready");
            }
            self.sender.send_replace(Readiness { waiting_for });
            let changed = async {
                tokio::select! {
                    changed = self.xds.changed() => changed,
                    changed = self.enrolment.changed() => changed,
                }
            };
            tokio::select! {
                () = cancel.cancelled() => return,
                () = &mut grace, if !grace.is_elapsed() => {}
                // The senders live as long as their tasks; without them nothing changes any more.
                changed = changed => if changed.is_err() { cancel.cancelled().await; return },
            }
        }
    }
}

/// What readiness waits for.
fn waiting_for(synced: bool, enrolment: &EnrolmentStatus, grace_over: bool) -> Vec<String> {
    let mut waiting = Vec::new();
    if !synced {
        waiting.push("configuration".to_owned());
    }
    let agent_is_gone = grace_over && !enrolment.agent_connected;
    if !enrolment.announced && enrolment.adopted == 0 && !agent_is_gone {
        waiting.push("enrolment of the node's workloads".to_owned());
    }
    waiting
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_waits_for_a_configuration_and_for_workloads_that_somebody_will_announce() {
        let status = |adopted, agent_connected, announced| EnrolmentStatus {
            adopted,
            agent_connected,
            announced,
            ..EnrolmentStatus::default()
        };
        let check = |synced, enrolment: EnrolmentStatus, grace_over, expected: &str| {
            let waiting = waiting_for(synced, &enrolment, grace_over).join(", ");
            assert_eq!(waiting, expected, "synced {synced}, {enrolment:?}, grace over {grace_over}");
        };
        let workloads = "enrolment of the node's workloads";
        check(false, status(0, false, false), false, "configuration, enrolment of the node's workloads");
        check(false, status(0, true, true), false, "configuration");
        check(false, status(3, false, false), false, "configuration");
        check(true, status(0, false, false), false, workloads);
        check(true, status(0, true, false), true, workloads);
        check(true, status(0, false, false), true, "");
        check(true, status(0, true, true), false, "");
        check(true, status(3, false, false), false, "");
    }
}
