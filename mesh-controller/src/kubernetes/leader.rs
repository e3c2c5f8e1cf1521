//! Which of several replicas writes status: the holder of a Lease.
//!
//! Clocks of replicas are not compared. A holder is gone when its lease has not changed for [`LEASE_FOR`] by the clock of
//! whoever looks, and a holder that cannot renew stops writing well before that, after [`RENEW_WITHIN`]: both are counted from
//! the renewal, the one from before it was asked for, the other from after it was seen.

use std::pin::Pin;
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
/// How long after its last renewal a leader counts itself as one; also the time for a look at the lease.
const RENEW_WITHIN: Duration = Duration::from_secs(10);
/// Pause between two looks at the lease.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Time for the lease to be given back at the end.
const RELEASE_WITHIN: Duration = Duration::from_secs(2);
/// Attempts to give the lease back: a renewal that was not waited for may come in between once.
const RELEASE_ATTEMPTS: usize = 2;

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
        let (mut lead, mut complained) = (Lead { leads, renewed: None }, None);
        let is_down = async move { drop(down.wait_for(|down| *down).await) };
        tokio::pin!(is_down);
        let mut may_hold = false;
        loop {
            let asked = Instant::now();
            let look = tokio::time::timeout(RENEW_WITHIN, self.look());
            let Some(looked) = lead.while_up(is_down.as_mut(), look).await else {
                // What was asked for last may be granted all the same.
                may_hold = true;
                break;
            };
            let complaint = match looked {
                Ok(Ok(is_ours)) => {
                    lead.renewed = is_ours.then_some(asked);
                    may_hold = is_ours;
                    None
                }
                Ok(Err(error)) => Some(error.to_string()),
                Err(_) => Some("the API server does not answer".to_owned()),
            };
            may_hold |= complaint.is_some();
            if let Some(error) = complaint.as_ref().filter(|_| complained != complaint) {
                tracing::warn!(error, lease = LEASE, "the lease is not kept; trying again");
            }
            complained = complaint;
            lead.say();
            if lead.while_up(is_down.as_mut(), tokio::time::sleep(LOOK_EVERY)).await.is_none() {
                break;
            }
        }
        lead.leads.send_replace(false);
        if may_hold {
            let released = tokio::time::timeout(RELEASE_WITHIN, self.release()).await;
            if !matches!(released, Ok(Ok(true))) {
                tracing::warn!(lease = LEASE, "the lease was not given back: the next leader waits for its end");
            }
        }
    }

    /// Looks at the lease, and takes or renews it if that is due; whether it is ours.
    async fn look(&mut self) -> kube::Result<bool> {
        let Some(lease) = self.leases.get_opt(LEASE).await? else {
            let meta = ObjectMeta { name: Some(LEASE.to_owned()), ..ObjectMeta::default() };
            let lease = Lease { metadata: meta, spec: Some(held(&self.me, None)) };
            return lost_if_overtaken(self.leases.create(&PostParams::default(), &lease).await);
        };
        // Not when it was asked for: what was written meanwhile is younger than that.
        let now = Instant::now();
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

    /// Whether the lease is not ours any more.
    async fn release(&self) -> kube::Result<bool> {
        for _ in 0..RELEASE_ATTEMPTS {
            let Some(lease) = self.leases.get_opt(LEASE).await? else { return Ok(true) };
            let spec = lease.spec.clone().unwrap_or_default();
            if spec.holder_identity.as_deref() != Some(&self.me) {
                return Ok(true);
            }
            if self.replace(lease, LeaseSpec { holder_identity: Some(String::new()), ..spec }).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// In the version that was seen: of two that write at once, one is refused.
    async fn replace(&self, lease: Lease, spec: LeaseSpec) -> kube::Result<bool> {
        let lease = Lease { spec: Some(spec), ..lease };
        lost_if_overtaken(self.leases.replace(LEASE, &PostParams::default(), &lease).await)
    }
}

/// What is said of a candidate.
struct Lead {
    leads: watch::Sender<bool>,
    /// When the renewal was asked for that was granted last; none if the lease is not ours.
    renewed: Option<Instant>,
}

impl Lead {
    /// Says how it is now.
    fn say(&self) {
        let leads_now = self.renewed.is_some_and(|at| at.elapsed() < RENEW_WITHIN);
        if self.leads.send_if_modified(|leads| std::mem::replace(leads, leads_now) != leads_now) {
            tracing::info!(
                leads = leads_now,
                "this replica {} status",
                if leads_now { "writes" } else { "does not write" }
            );
        }
    }

    /// The end of the lead if nothing renews it; never if there is none.
    async fn lapse(&self) {
        match self.renewed {
            Some(renewed) if *self.leads.borrow() => tokio::time::sleep_until(renewed + RENEW_WITHIN).await,
            Some(_) | None => std::future::pending().await,
        }
    }

    /// Does something that may hang; none if `down` comes before its end. A lead that lapses meanwhile is over.
    async fn while_up<T>(
        &self,
        mut down: Pin<&mut impl Future<Output = ()>>,
        work: impl Future<Output = T>,
    ) -> Option<T> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                () = &mut down => return None,
                () = self.lapse() => self.say(),
                done = &mut work => return Some(done),
            }
        }
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
        lease_transitions: Some(before.lease_transitions.unwrap_or_default().saturating_add(i32::from(!is_renewal))),
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
    use std::sync::{Arc, Mutex, MutexGuard};

    use bytes::Bytes;
    use http::{Method, Request, Response};
    use http_body_util::Full;
    use serde_json::{Value, json};
    use tokio::sync::Notify;

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
        // Whoever takes it has seen it unchanged for that long after the renewal; a holder lapses at the instant.
        assert!(RENEW_WITHIN < LEASE_FOR, "who cannot renew stops before another may take it");
    }

    #[test]
    fn a_lease_says_since_when_it_is_whose() {
        let first = held("a", None);
        assert_eq!((first.holder_identity.as_deref(), first.lease_transitions), (Some("a"), Some(1)));
        let renewed = held("a", Some(first.clone()));
        assert_eq!((&renewed.acquire_time, renewed.lease_transitions), (&first.acquire_time, Some(1)));
        let next = held("b", Some(renewed));
        assert_eq!((next.holder_identity.as_deref(), next.lease_transitions), (Some("b"), Some(2)));
        let last = held("a", Some(LeaseSpec { lease_transitions: Some(i32::MAX), ..next }));
        assert_eq!(last.lease_transitions, Some(i32::MAX), "anybody who may write leases may have written it");
    }

    /// An API server that has one lease, and for which some requests do not go well.
    #[derive(Clone, Default)]
    struct Server {
        stored: Arc<Mutex<Stored>>,
        /// A request is not answered.
        hung: Arc<Notify>,
    }

    #[derive(Default)]
    struct Stored {
        lease: Option<Value>,
        version: u64,
        /// Writes that another comes before.
        overtaken: usize,
        /// No request is answered.
        hangs: bool,
    }

    impl Server {
        fn client(&self) -> Client {
            let this = self.clone();
            let service = tower::service_fn(move |request: Request<kube::client::Body>| {
                let this = this.clone();
                async move {
                    let (head, body) = request.into_parts();
                    let body = body.collect_bytes().await?;
                    if this.lock().hangs {
                        this.hung.notify_one();
                        std::future::pending::<()>().await;
                    }
                    let (status, answer) = this.lock().answer(&head.method, &body);
                    let response = Response::builder().status(status);
                    Ok::<_, tower::BoxError>(response.body(Full::new(Bytes::from(answer.to_string())))?)
                }
            });
            Client::new(service, "istio-system")
        }

        fn lock(&self) -> MutexGuard<'_, Stored> {
            self.stored.lock().unwrap()
        }

        fn holder(&self) -> Option<String> {
            let holder = self.lock().lease.as_ref()?["spec"]["holderIdentity"].clone();
            holder.as_str().map(str::to_owned)
        }
    }

    impl Stored {
        fn answer(&mut self, method: &Method, body: &[u8]) -> (u16, Value) {
            let failure = |code: u16, reason: &str| {
                let status = json!({
                    "apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": reason, "code": code,
                });
                (code, status)
            };
            if *method == Method::GET {
                return self.lease.clone().map_or_else(|| failure(404, "NotFound"), |lease| (200, lease));
            }
            let mut lease: Value = serde_json::from_slice(body).unwrap();
            if self.overtaken > 0 {
                self.overtaken -= 1;
                return failure(409, "Conflict");
            }
            self.version += 1;
            lease["metadata"]["resourceVersion"] = json!(self.version.to_string());
            self.lease = Some(lease.clone());
            (200, lease)
        }
    }

    /// Less than the time of a look, which would end it anyway.
    const DEADLINE: Duration = Duration::from_secs(RENEW_WITHIN.as_secs() / 2);

    async fn in_time<T>(what: impl Future<Output = T>) -> T {
        tokio::time::timeout(DEADLINE, what).await.expect("in time")
    }

    #[tokio::test]
    async fn a_leader_gives_the_lease_back_though_a_look_hangs() {
        let server = Server::default();
        let (leads, mut is_leader) = watch::channel(false);
        let (down, is_down) = watch::channel(false);
        let candidate = Candidate::new(server.client(), "istio-system", "a".into());
        let run = tokio::spawn(candidate.run(leads, is_down));
        in_time(is_leader.wait_for(|leads| *leads)).await.unwrap();
        assert_eq!(server.holder().as_deref(), Some("a"));
        server.lock().hangs = true;
        in_time(server.hung.notified()).await;
        // The next request is answered, that one never.
        server.lock().hangs = false;
        down.send_replace(true);
        in_time(run).await.unwrap();
        assert!(!*is_leader.borrow());
        assert_eq!(server.holder().as_deref(), Some(""));
    }

    #[tokio::test]
    async fn a_lead_lapses_and_the_end_is_heard_while_a_look_hangs() {
        let server = Server::default();
        server.lock().hangs = true;
        let lead = Lead { leads: watch::Sender::new(true), renewed: Some(Instant::now() - RENEW_WITHIN) };
        let mut leads = lead.leads.subscribe();
        let (down, mut is_down) = watch::channel(false);
        let mut candidate = Candidate::new(server.client(), "istio-system", "a".into());
        let look = tokio::spawn(async move {
            let is_down = async move { drop(is_down.wait_for(|down| *down).await) };
            tokio::pin!(is_down);
            lead.while_up(is_down, candidate.look()).await.is_none()
        });
        // It has lapsed already, and nothing else comes.
        in_time(leads.wait_for(|leads| !leads)).await.unwrap();
        assert!(!look.is_finished());
        down.send_replace(true);
        assert!(in_time(look).await.unwrap(), "the look was given up");
    }

    #[tokio::test]
    async fn a_lease_is_given_back_though_something_came_in_between() {
        let server = Server::default();
        let mut candidate = Candidate::new(server.client(), "istio-system", "a".into());
        assert!(in_time(candidate.look()).await.unwrap());
        server.lock().overtaken = 1;
        assert!(in_time(candidate.release()).await.unwrap());
        assert_eq!(server.holder().as_deref(), Some(""));
        // And it is not said to be when it is not.
        assert!(in_time(candidate.look()).await.unwrap());
        server.lock().overtaken = RELEASE_ATTEMPTS;
        assert!(!in_time(candidate.release()).await.unwrap());
        assert_eq!(server.holder().as_deref(), Some("a"));
    }
}
