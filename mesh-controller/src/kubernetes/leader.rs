//! Which of several replicas writes status: the holder of a Lease.
//!
//! Clocks of replicas are not compared. A holder is gone when its lease has not changed for [`LEASE_FOR`] by the clock of
//! whoever looks, and a holder that cannot renew stops writing well before that, after [`RENEW_WITHIN`].

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::sync::watch;
use tokio::time::Instant;

/// Name of the Lease, in the root namespace.
pub const LEASE: &str = "mesh-controller";
/// How long a lease that does not change is another's.
const LEASE_FOR: Duration = Duration::from_secs(15);
/// How long after its last renewal a leader counts itself as one.
const RENEW_WITHIN: Duration = Duration::from_secs(10);
/// Pause between two looks at the lease.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Time for the lease to be given back at the end.
const RELEASE_WITHIN: Duration = Duration::from_secs(2);

/// A candidate.
pub struct Candidate {
    leases: Api<Lease>,
    /// Who this is: the pod's name.
    me: String,
    /// The version of the lease that was seen last, and when it was new.
    seen: Option<(String, Instant)>,
}

/// What to do about a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// It is ours.
    Renew,
    /// It is nobody's, or its holder is gone.
    Take,
    /// It is another's.
    Wait,
}

impl Candidate {
    /// For a lease in this namespace.
    pub fn new(client: Client, namespace: &str, me: String) -> Self {
        Self { leases: Api::namespaced(client, namespace), me, seen: None }
    }

    /// Says in `leads` whether this is the leader, until `down`; gives the lease back then.
    pub async fn run(mut self, leads: watch::Sender<bool>, mut down: watch::Receiver<bool>) {
        let (mut renewed, mut complained) = (None::<Instant>, None);
        let is_down = async move { drop(down.wait_for(|down| *down).await) };
        tokio::pin!(is_down);
        loop {
            let asked = Instant::now();
            let complaint = match tokio::time::timeout(RENEW_WITHIN, self.look(asked)).await {
                Ok(Ok(is_ours)) => {
                    renewed = is_ours.then_some(asked);
                    None
                }
                Ok(Err(error)) => Some(error.to_string()),
                Err(_) => Some("the API server does not answer".to_owned()),
            };
            if let Some(error) = complaint.as_ref().filter(|_| complained != complaint) {
                tracing::warn!(error, lease = LEASE, "the lease is not kept; trying again");
            }
            complained = complaint;
            let leads_now = renewed.is_some_and(|at| at.elapsed() < RENEW_WITHIN);
            if leads.send_if_modified(|leads| std::mem::replace(leads, leads_now) != leads_now) {
                tracing::info!(
                    leads = leads_now,
                    "this replica {} status",
                    if leads_now { "writes" } else { "does not write" }
                );
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = &mut is_down => break,
            }
        }
        leads.send_replace(false);
        if renewed.is_some() {
            let released = tokio::time::timeout(RELEASE_WITHIN, self.release()).await;
            if !matches!(released, Ok(Ok(()))) {
                tracing::warn!(lease = LEASE, "the lease was not given back: the next leader waits for its end");
            }
        }
    }

    /// Looks at the lease, and takes or renews it if that is due; whether it is ours.
    async fn look(&mut self, now: Instant) -> kube::Result<bool> {
        let Some(lease) = self.leases.get_opt(LEASE).await? else {
            let meta = ObjectMeta { name: Some(LEASE.to_owned()), ..ObjectMeta::default() };
            let lease = Lease { metadata: meta, spec: Some(held(&self.me, None)) };
            return lost_if_overtaken(self.leases.create(&PostParams::default(), &lease).await);
        };
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        let since = match &self.seen {
            Some((seen, since)) if *seen == version => *since,
            _ => self.seen.insert((version, now)).1,
        };
        let spec = lease.spec.clone().unwrap_or_default();
        if step(&spec, &self.me, now.duration_since(since)) == Step::Wait {
            return Ok(false);
        }
        self.replace(lease, held(&self.me, Some(spec))).await
    }

    async fn release(&self) -> kube::Result<()> {
        let Some(lease) = self.leases.get_opt(LEASE).await? else { return Ok(()) };
        let spec = lease.spec.clone().unwrap_or_default();
        if spec.holder_identity.as_deref() != Some(&self.me) {
            return Ok(());
        }
        self.replace(lease, LeaseSpec { holder_identity: Some(String::new()), ..spec }).await.map(drop)
    }

    /// In the version that was seen: of two that write at once, one is refused.
    async fn replace(&self, lease: Lease, spec: LeaseSpec) -> kube::Result<bool> {
        let lease = Lease { spec: Some(spec), ..lease };
        lost_if_overtaken(self.leases.replace(LEASE, &PostParams::default(), &lease).await)
    }
}

/// Our lease, after that of before.
fn held(me: &str, before: Option<LeaseSpec>) -> LeaseSpec {
    let now = Some(MicroTime(Timestamp::now()));
    let before = before.unwrap_or_default();
    let is_renewal = before.holder_identity.as_deref() == Some(me);
    LeaseSpec {
        holder_identity: Some(me.to_owned()),
        lease_duration_seconds: i32::try_from(LEASE_FOR.as_secs()).ok(),
        acquire_time: if is_renewal { before.acquire_time } else { now.clone() },
        renew_time: now,
        lease_transitions: Some(before.lease_transitions.unwrap_or_default() + i32::from(!is_renewal)),
        ..LeaseSpec::default()
    }
}

fn step(lease: &LeaseSpec, me: &str, unchanged_for: Duration) -> Step {
    match lease.holder_identity.as_deref() {
        Some(holder) if holder == me => Step::Renew,
        None | Some("") => Step::Take,
        Some(_) if unchanged_for >= LEASE_FOR => Step::Take,
        Some(_) => Step::Wait,
    }
}

fn lost_if_overtaken(written: kube::Result<Lease>) -> kube::Result<bool> {
    match written {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(holder: Option<&str>) -> LeaseSpec {
        LeaseSpec { holder_identity: holder.map(str::to_owned), ..LeaseSpec::default() }
    }

    #[test]
    fn a_lease_is_taken_from_nobody_and_from_a_holder_that_is_gone() {
        let check = |holder: Option<&str>, unchanged_for: Duration, expected: Step| {
            assert_eq!(step(&held_by(holder), "a", unchanged_for), expected, "{holder:?} for {unchanged_for:?}");
        };
        let second = Duration::from_secs(1);
        check(None, Duration::ZERO, Step::Take);
        check(Some(""), Duration::ZERO, Step::Take);
        check(Some("a"), Duration::ZERO, Step::Renew);
        check(Some("a"), LEASE_FOR * 2, Step::Renew);
        check(Some("b"), LEASE_FOR - second, Step::Wait);
        check(Some("b"), LEASE_FOR, Step::Take);
        assert!(RENEW_WITHIN + LOOK_EVERY < LEASE_FOR, "who cannot renew stops before another may take it");
    }

    #[test]
    fn a_lease_says_since_when_it_is_whose() {
        let first = held("a", None);
        assert_eq!((first.holder_identity.as_deref(), first.lease_transitions), (Some("a"), Some(1)));
        let renewed = held("a", Some(first.clone()));
        assert_eq!((&renewed.acquire_time, renewed.lease_transitions), (&first.acquire_time, Some(1)));
        let next = held("b", Some(renewed));
        assert_eq!((next.holder_identity.as_deref(), next.lease_transitions), (Some("b"), Some(2)));
    }
}
