//! A node's certificates over days: an authority that answers, refuses, is slow or away; answers that are lost, come
//! late, twice and out of order; restarts, workloads that come and go, roots that are replaced.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use mesh_core::certs::{Adoption, BACKOFF_MAX_SECS, CertSchedule, CertState, REQUEST_TIMEOUT_SECS};
use mesh_core::identity::SpiffeId;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SHORT: u64 = 120;
const LONG: u64 = 12_000;
/// In one life of a node.
const DISTURBANCES: u32 = 40;
const START: u64 = 1_800_000_000;
const IDENTITIES: usize = 5;
const RENEW_WITHIN: u64 = 10;
/// From the last good moment to a new request: the wait, its jitter, and a request that is lost.
const LONGEST_SILENCE: u64 = BACKOFF_MAX_SECS + BACKOFF_MAX_SECS / 5 + REQUEST_TIMEOUT_SECS;

#[test]
fn answers_within_their_time() {
    run(|rng| rng.random_range(0..REQUEST_TIMEOUT_SECS), Requests::OneAtATime);
}

/// A caller that does not give requests up: what the schedule says stays right, though two may be on their way.
#[test]
fn answers_at_any_time() {
    run(|rng| rng.random_range(0..20 * REQUEST_TIMEOUT_SECS), Requests::Overlapping);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Requests {
    OneAtATime,
    Overlapping,
}

fn run(delay: fn(&mut StdRng) -> u64, requests: Requests) {
    let is_long = std::env::var("MESH_TEST_LONG").is_ok_and(|value| value == "1");
    let (mut issued, mut refused, mut expired) = (0, 0, 0);
    for seed in 0..if is_long { LONG } else { SHORT } {
        let mut node = Node::new(seed, delay, requests);
        node.live();
        issued += node.used;
        refused += node.refused;
        expired += node.expired;
    }
    // A simulation in which nothing happens would hold whatever the schedule does.
    assert!(
        issued > 1_000 && refused > 1_000 && expired > 100,
        "{issued} issued, {refused} refused, {expired} expired"
    );
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Certificate {
    not_before: u64,
    not_after: u64,
}

#[derive(Debug)]
struct Answer {
    id: SpiffeId,
    certificate: Option<Certificate>,
}

/// Signs for `lifetime`, never past its own end; away in `outage`.
struct Authority {
    lifetime: u64,
    not_after: u64,
    outage: (u64, u64),
    loses: f64,
    refuses: f64,
}

struct Node {
    seed: u64,
    rng: StdRng,
    delay: fn(&mut StdRng) -> u64,
    requests: Requests,
    now: u64,
    schedule: CertSchedule,
    authority: Authority,
    /// Answers on their way, by when they arrive.
    wire: BTreeMap<(u64, u64), Answer>,
    sent: u64,
    /// As the supervisor keeps them.
    held: BTreeMap<SpiffeId, Certificate>,
    /// Since when each identity is wanted, and when it was asked for last and not answered since.
    wanted: BTreeMap<SpiffeId, u64>,
    asked: BTreeMap<SpiffeId, u64>,
    /// The last moment at which an identity was provided for: it had a certificate, or was asked for.
    provided: BTreeMap<SpiffeId, u64>,
    /// Failures in a row, and when the next request is due after the last of them.
    failures: BTreeMap<SpiffeId, u32>,
    due_after_failure: BTreeMap<SpiffeId, RangeInclusive<u64>>,
    /// The roots have changed: until when the next request must come.
    renewal_until: BTreeMap<SpiffeId, u64>,
    used: u64,
    refused: u64,
    expired: u64,
}

impl Node {
    fn new(seed: u64, delay: fn(&mut StdRng) -> u64, requests: Requests) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let lifetime = [60, 600, 3_600, 12 * 3_600][rng.random_range(0..4)];
        let outage = START + rng.random_range(0..4 * lifetime);
        let authority = Authority {
            lifetime,
            not_after: START + lifetime * rng.random_range(4..20),
            outage: (outage, outage + rng.random_range(0..lifetime)),
            loses: rng.random_range(0.0..0.5),
            refuses: rng.random_range(0.0..0.5),
        };
        Self {
            seed,
            rng,
            delay,
            requests,
            now: START,
            schedule: CertSchedule::default(),
            authority,
            wire: BTreeMap::new(),
            sent: 0,
            held: BTreeMap::new(),
            wanted: BTreeMap::new(),
            asked: BTreeMap::new(),
            provided: BTreeMap::new(),
            failures: BTreeMap::new(),
            due_after_failure: BTreeMap::new(),
            renewal_until: BTreeMap::new(),
            used: 0,
            refused: 0,
            expired: 0,
        }
    }

    /// A while with disturbances, then a while without.
    fn live(&mut self) {
        for _ in 0..DISTURBANCES {
            self.disturb();
            let until = self.now + self.rng.random_range(1..=self.authority.lifetime / 2);
            self.pass(until);
        }
        self.authority = Authority { lifetime: 3_600, not_after: u64::MAX, outage: (0, 0), loses: 0.0, refuses: 0.0 };
        self.delay = |_| 1;
        self.pass(self.now + LONGEST_SILENCE + 20 * REQUEST_TIMEOUT_SECS);
        for id in self.wanted.keys() {
            let state = self.schedule.state(id, self.now);
            assert!(
                matches!(state, Some(CertState::Available { .. })),
                "seed {}: {id} is {state:?} in the end",
                self.seed
            );
        }
    }

    fn disturb(&mut self) {
        let id = SpiffeId::new("cluster.local", "default", &format!("sa-{}", self.rng.random_range(0..IDENTITIES)));
        match self.rng.random_range(0..10) {
            0..=4 => {
                self.schedule.want(id.clone(), self.now);
                self.wanted.entry(id.clone()).or_insert(self.now);
                self.provided.entry(id).or_insert(self.now);
            }
            5 => {
                self.schedule.drop(&id);
                self.forget(&id);
                assert_eq!(self.schedule.state(&id, self.now), None);
            }
            6 => self.restart(),
            7 => {
                self.schedule.renew_all(self.now, RENEW_WITHIN, &mut self.rng);
                // One that is on its way has its own time first, and who has failed his own wait.
                let until = self.now + RENEW_WITHIN + REQUEST_TIMEOUT_SECS;
                let well = self.held.keys().filter(|id| !self.failures.contains_key(*id));
                self.renewal_until.extend(well.map(|id| (id.clone(), until)));
                // Who waits after a failure may be asked earlier, never later.
                for due in self.due_after_failure.values_mut() {
                    *due = self.now.min(*due.start())..=*due.end();
                }
            }
            8 => self.authority.lifetime = [60, 600, 3_600, 12 * 3_600][self.rng.random_range(0..4)],
            _ => {}
        }
    }

    fn forget(&mut self, id: &SpiffeId) {
        self.wanted.remove(id);
        self.provided.remove(id);
        self.held.remove(id);
        self.failures.remove(id);
        self.due_after_failure.remove(id);
        self.renewal_until.remove(id);
        // A request for a life that is over is not one of the next.
        self.asked.remove(id);
        self.wire.retain(|_, answer| answer.id != *id);
    }

    /// The process ends and another begins with what was kept; requests die with it.
    fn restart(&mut self) {
        self.schedule = CertSchedule::default();
        self.wire.clear();
        self.asked.clear();
        self.failures.clear();
        self.due_after_failure.clear();
        self.renewal_until.clear();
        for id in self.wanted.keys() {
            self.schedule.want(id.clone(), self.now);
        }
        let held = std::mem::take(&mut self.held);
        for (id, certificate) in held {
            let validity = (certificate.not_before, certificate.not_after);
            let adoption = self.schedule.restored(&id, validity, self.now, &mut self.rng);
            assert_eq!(adoption == Adoption::Use, certificate.not_after > self.now, "seed {}", self.seed);
            if adoption == Adoption::Use {
                self.held.insert(id, certificate);
            }
        }
    }

    fn pass(&mut self, end: u64) {
        loop {
            let arrival = self.wire.keys().next().map(|(at, _)| *at);
            let next = [arrival, self.schedule.next_wakeup()].into_iter().flatten().min().unwrap_or(end);
            self.now = next.clamp(self.now, end);
            while let Some(entry) = self.wire.first_entry().filter(|entry| entry.key().0 <= self.now) {
                let answer = entry.remove();
                self.hear(answer);
            }
            for id in self.schedule.due(self.now, IDENTITIES, &mut self.rng) {
                self.ask(&id);
            }
            self.look();
            if self.now == end {
                return;
            }
            assert!(
                self.schedule.next_wakeup().is_none_or(|at| at > self.now),
                "seed {}: nothing is left to do",
                self.seed
            );
        }
    }

    fn ask(&mut self, id: &SpiffeId) {
        let seed = self.seed;
        assert!(self.wanted.contains_key(id), "seed {seed}: nobody wants {id}");
        if let Some(since) = self.asked.insert(id.clone(), self.now) {
            assert!(self.now >= since + REQUEST_TIMEOUT_SECS, "seed {seed}: {id} twice within {}", self.now - since);
        }
        if let Some(expected) = self.due_after_failure.remove(id).filter(|_| self.requests == Requests::OneAtATime) {
            assert!(expected.contains(&self.now), "seed {seed}: {id} at {}, expected {expected:?}", self.now);
        }
        self.provided.insert(id.clone(), self.now);
        self.renewal_until.remove(id);
        if self.rng.random_bool(self.authority.loses) {
            self.fail(id, self.now + REQUEST_TIMEOUT_SECS);
            return;
        }
        let authority = &self.authority;
        let is_away = (authority.outage.0..authority.outage.1).contains(&self.now) || self.now >= authority.not_after;
        let certificate = (!is_away && !self.rng.random_bool(authority.refuses)).then(|| Certificate {
            not_before: self.now - 30,
            not_after: (self.now + authority.lifetime).min(authority.not_after),
        });
        let copies = if self.requests == Requests::Overlapping && self.rng.random_bool(0.1) { 2 } else { 1 };
        for _ in 0..copies {
            self.sent += 1;
            let at = self.now + (self.delay)(&mut self.rng);
            self.wire.insert((at, self.sent), Answer { id: id.clone(), certificate });
        }
    }

    /// The wait doubles from a second up to its bound, moved by up to a fifth.
    fn fail(&mut self, id: &SpiffeId, at: u64) {
        let failures = self.failures.entry(id.clone()).or_default();
        let wait = (1 << (*failures).min(8)).min(BACKOFF_MAX_SECS);
        *failures += 1;
        self.renewal_until.remove(id);
        self.due_after_failure.insert(id.clone(), at + wait..=at + wait + wait / 5);
    }

    fn hear(&mut self, Answer { id, certificate }: Answer) {
        if certificate.is_some_and(|certificate| self.adopt(&id, certificate)) {
            return;
        }
        self.refused += 1;
        self.schedule.failed(&id, self.now, &mut self.rng);
        if self.asked.remove(&id).is_some() {
            self.fail(&id, self.now);
        }
    }

    fn adopt(&mut self, id: &SpiffeId, certificate: Certificate) -> bool {
        let validity = (certificate.not_before, certificate.not_after);
        let is_newest = self.held.get(id).is_none_or(|held| held.not_before <= certificate.not_before);
        let is_good = certificate.not_after > self.now && is_newest && self.wanted.contains_key(id);
        let adoption = self.schedule.issued(id, validity, self.now, &mut self.rng);
        assert_eq!(adoption == Adoption::Use, is_good, "seed {}: {certificate:?} at {}", self.seed, self.now);
        if is_good {
            self.used += 1;
            self.asked.remove(id);
            self.failures.remove(id);
            self.due_after_failure.remove(id);
            self.held.insert(id.clone(), certificate);
        }
        is_good
    }

    /// What holds at every moment.
    fn look(&mut self) {
        for id in self.wanted.keys() {
            let held = self.held.get(id);
            let state = self.schedule.state(id, self.now).expect("wanted");
            let as_it_is = match (state, held) {
                (CertState::Initializing { .. }, None) => true,
                (CertState::Available { not_after_secs, .. }, Some(held)) => {
                    not_after_secs == held.not_after && self.now < held.not_after
                }
                (CertState::Expired { not_after_secs }, Some(held)) => {
                    self.expired += 1;
                    not_after_secs == held.not_after && self.now >= held.not_after
                }
                (CertState::Initializing { .. }, Some(_))
                | (CertState::Available { .. } | CertState::Expired { .. }, None) => false,
            };
            assert!(as_it_is, "seed {}: {id} is {state:?}, held {held:?}, now {}", self.seed, self.now);
            if matches!(state, CertState::Available { .. }) {
                self.provided.insert(id.clone(), self.now);
            }
            let until = self.renewal_until.get(id);
            let is_late = until.is_some_and(|until| self.now > *until) && self.requests == Requests::OneAtATime;
            assert!(!is_late, "seed {}: {id} keeps what replaced roots signed", self.seed);
            let silence = self.now - self.provided[id];
            assert!(silence <= LONGEST_SILENCE, "seed {}: nothing is done for {id} since {silence} s", self.seed);
        }
    }
}
