//! The pool's decisions: rules one by one, and a worker's life under a simulated clock, with dials that fail, come late
//! and out of order, tunnels that break, and workloads and certificates that are replaced.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

#[derive(Debug, Clone)]
struct FakeTunnel {
    serial: u64,
    /// Stands for certificate and roots.
    credentials: u32,
    open: Rc<Cell<bool>>,
    limit: Rc<Cell<u32>>,
}

impl FakeTunnel {
    fn new(serial: u64, limit: u32) -> Self {
        Self { serial, credentials: 0, open: Rc::new(Cell::new(true)), limit: Rc::new(Cell::new(limit)) }
    }
}

impl PooledTunnel for FakeTunnel {
    fn is_open(&self) -> bool {
        self.open.get()
    }

    fn stream_limit(&self) -> u32 {
        self.limit.get()
    }
}

type TestPool = Pool<FakeTunnel, u64>;

impl TestPool {
    /// When the next tunnel may expire, as a duration from `now`.
    fn next_expiry(&self, now: Instant) -> Option<Duration> {
        self.entries
            .values()
            .flat_map(|entry| &entry.tunnels)
            .filter(|slot| slot.streams == 0)
            .map(|slot| (slot.idle_since + IDLE_RELEASE).saturating_duration_since(now))
            .min()
    }

    /// Streams on each tunnel of a key.
    fn streams(&self, key: &PoolKey) -> Vec<u32> {
        self.entries.get(key).map(|entry| entry.tunnels.iter().map(|slot| slot.streams).collect()).unwrap_or_default()
    }
}

fn key_to(destination: &str) -> Arc<PoolKey> {
    Arc::new(PoolKey {
        source_identity: SpiffeId::new("cluster.local", "default", "client"),
        source: WorkloadUid("client-1".into()),
        destination: WorkloadUid(destination.into()),
        expected: ExpectedServer::exactly(SpiffeId::new("cluster.local", "default", "server")),
        address: SocketAddr::from(([10, 0, 0, 1], 15008)),
    })
}

/// A pool with a tunnel that is idle since `now`.
fn with_tunnel(key: &Arc<PoolKey>, limit: u32, now: Instant) -> (TestPool, FakeTunnel, TunnelId) {
    let mut pool = TestPool::default();
    assert_eq!(kind(pool.checkout(key, || 1)), "dial 1");
    let tunnel = FakeTunnel::new(1, limit);
    let id = pool.dialled(key, tunnel.clone(), now);
    (pool, tunnel, id)
}

fn kind(checkout: Checkout<FakeTunnel, u64>) -> String {
    match checkout {
        Checkout::Use(_, tunnel) => format!("use {}", tunnel.serial),
        Checkout::Wait(attempt) => format!("wait {attempt}"),
        Checkout::Dial(attempt) => format!("dial {attempt}"),
        Checkout::Refusing => "refusing".to_owned(),
        Checkout::Full => "full".to_owned(),
    }
}

#[test]
fn the_first_caller_dials_and_the_others_wait_for_it() {
    let (mut pool, key) = (TestPool::default(), key_to("web-1"));
    assert_eq!(kind(pool.checkout(&key, || 1)), "dial 1");
    assert_eq!(kind(pool.checkout(&key, || unreachable!("one dial at a time"))), "wait 1");
    pool.dialled(&key, FakeTunnel::new(7, 100), Instant::now());
    assert_eq!(kind(pool.checkout(&key, || 2)), "use 7");
    assert_eq!(pool.streams(&key), [1]);
}

#[test]
fn after_a_failed_dial_the_next_caller_dials_again() {
    let (mut pool, key) = (TestPool::default(), key_to("web-1"));
    assert_eq!(kind(pool.checkout(&key, || 1)), "dial 1");
    pool.dial_failed(&key);
    assert!(pool.entries.is_empty(), "nothing is left of it");
    assert_eq!(kind(pool.checkout(&key, || 2)), "dial 2");
}

#[test]
fn a_full_tunnel_is_joined_by_another_and_room_is_used_again() {
    let (now, key) = (Instant::now(), key_to("web-1"));
    let (mut pool, _, first) = with_tunnel(&key, 2, now);
    for expected in ["use 1", "use 1", "dial 2", "wait 2"] {
        assert_eq!(kind(pool.checkout(&key, || 2)), expected);
    }
    pool.release(&key, first, now);
    assert_eq!(kind(pool.checkout(&key, || 3)), "use 1", "room on the first, while the second is dialled");
    pool.dialled(&key, FakeTunnel::new(2, 2), now);
    assert_eq!(kind(pool.checkout(&key, || 3)), "use 2");
    assert_eq!(pool.streams(&key), [2, 1]);
}

#[test]
fn streams_on_a_tunnel_are_bounded_by_both_ends() {
    let (now, key) = (Instant::now(), key_to("web-1"));
    let (mut pool, tunnel, _) = with_tunnel(&key, u32::MAX, now);
    for _ in 0..CLIENT_STREAMS {
        assert_eq!(kind(pool.checkout(&key, || 2)), "use 1");
    }
    assert_eq!(kind(pool.checkout(&key, || 2)), "dial 2");
    pool.dial_failed(&key);
    // The other end may change its mind.
    tunnel.limit.set(5);
    assert_eq!(kind(pool.checkout(&key, || 2)), "dial 2");
}

#[test]
fn an_end_that_takes_no_streams_is_not_dialled_again_and_used_when_it_takes_some() {
    let (now, key) = (Instant::now(), key_to("web-1"));
    let (mut pool, tunnel, _) = with_tunnel(&key, 0, now);
    for _ in 0..3 {
        assert_eq!(kind(pool.checkout(&key, || unreachable!("more tunnels are no better"))), "refusing");
    }
    tunnel.limit.set(1);
    assert_eq!(kind(pool.checkout(&key, || 2)), "use 1");
    assert_eq!(kind(pool.checkout(&key, || 2)), "dial 2", "it is full, and there may be another");
}

#[test]
fn tunnels_for_one_key_are_bounded() {
    let (now, key) = (Instant::now(), key_to("web-1"));
    let mut pool = TestPool::default();
    for serial in 0..MAX_TUNNELS_PER_KEY as u64 {
        assert_eq!(kind(pool.checkout(&key, || serial)), format!("dial {serial}"));
        pool.dialled(&key, FakeTunnel::new(serial, 1), now);
        assert_eq!(kind(pool.checkout(&key, || 0)), format!("use {serial}"));
    }
    assert_eq!(kind(pool.checkout(&key, || 0)), "full");
    assert_eq!(kind(pool.checkout(&key_to("web-2"), || 9)), "dial 9", "others have their own");
}

#[test]
fn a_tunnel_that_takes_no_more_streams_is_not_handed_out() {
    let (now, key) = (Instant::now(), key_to("web-1"));
    let (mut pool, tunnel, id) = with_tunnel(&key, 100, now);
    assert_eq!(kind(pool.checkout(&key, || 2)), "use 1");
    tunnel.open.set(false);
    assert_eq!(kind(pool.checkout(&key, || 2)), "dial 2");
    // The stream on the old one ends later, and means nothing to the new one.
    pool.dialled(&key, FakeTunnel::new(2, 100), now);
    assert_eq!(kind(pool.checkout(&key, || 3)), "use 2");
    pool.release(&key, id, now);
    assert_eq!(pool.streams(&key), [1]);
}

#[test]
fn a_tunnel_that_broke_is_forgotten() {
    let (now, key) = (Instant::now(), key_to("web-1"));
    let (mut pool, _, id) = with_tunnel(&key, 100, now);
    pool.closed(&key, id);
    assert!(pool.is_empty() && pool.entries.is_empty());
    pool.closed(&key, id);
    pool.release(&key, id, now);
    assert!(pool.entries.is_empty());
}

#[test]
fn an_idle_tunnel_is_released_after_its_time_and_a_busy_one_is_not() {
    let (now, key) = (Instant::now(), key_to("web-1"));
    let (mut pool, _, id) = with_tunnel(&key, 100, now);
    assert_eq!(pool.next_expiry(now), Some(IDLE_RELEASE));
    let moment = Duration::from_millis(1);
    assert!(pool.expire(now + IDLE_RELEASE - moment).is_empty());
    assert_eq!(kind(pool.checkout(&key, || 2)), "use 1");
    assert_eq!(pool.next_expiry(now), None);
    assert!(pool.expire(now + 10 * IDLE_RELEASE).is_empty());
    let later = now + 10 * IDLE_RELEASE;
    pool.release(&key, id, later);
    assert_eq!(pool.next_expiry(later + moment), Some(IDLE_RELEASE - moment));
    assert!(pool.expire(later + IDLE_RELEASE - moment).is_empty());
    assert_eq!(pool.expire(later + IDLE_RELEASE).len(), 1);
    assert!(pool.entries.is_empty());
}

#[test]
fn a_deleted_workloads_tunnels_go_at_once_and_the_others_stay() {
    let now = Instant::now();
    let (gone, stays) = (key_to("gone"), key_to("stays"));
    let (mut pool, _, id) = with_tunnel(&gone, 100, now);
    assert_eq!(kind(pool.checkout(&gone, || 2)), "use 1");
    assert_eq!(kind(pool.checkout(&stays, || 2)), "dial 2");
    pool.dialled(&stays, FakeTunnel::new(2, 100), now);
    let out = pool.retain(|key, _| key.destination != gone.destination);
    assert_eq!(out.iter().map(|tunnel| tunnel.serial).collect::<Vec<_>>(), [1]);
    assert_eq!(kind(pool.checkout(&gone, || 3)), "dial 3");
    assert_eq!(kind(pool.checkout(&stays, || 3)), "use 2");
    // The stream that was on it ends.
    pool.release(&gone, id, now);
    pool.dial_failed(&gone);
    assert!(!pool.entries.contains_key(&gone));
}

#[test]
fn a_tunnel_is_for_one_pair_of_workloads_and_identities_alone() {
    let now = Instant::now();
    let key = key_to("web-1");
    let (mut pool, _, _) = with_tunnel(&key, 100, now);
    let mut others: Vec<PoolKey> = (0..6).map(|_| key.as_ref().clone()).collect();
    others[0].destination = WorkloadUid("web-2".into());
    others[1].source = WorkloadUid("client-2".into());
    others[2].source_identity = SpiffeId::new("cluster.local", "default", "other");
    others[3].expected.identity = SpiffeId::new("cluster.local", "default", "other");
    others[4].expected.alternatives = vec![Arc::from("spiffe://cluster.local/ns/a/sa/b")].into();
    others[5].address = "10.0.0.2:15008".parse().expect("address");
    for other in others {
        assert_eq!(kind(pool.checkout(&Arc::new(other.clone()), || 9)), "dial 9", "{other:?}");
    }
    assert_eq!(kind(pool.checkout(&Arc::new(key.as_ref().clone()), || 9)), "use 1");
}

#[test]
fn tunnels_made_with_replaced_credentials_go_and_the_others_stay() {
    let (now, key) = (Instant::now(), key_to("web-1"));
    let (mut pool, _, _) = with_tunnel(&key, 1, now);
    assert_eq!(kind(pool.checkout(&key, || 2)), "use 1");
    assert_eq!(kind(pool.checkout(&key, || 2)), "dial 2");
    pool.dialled(&key, FakeTunnel { credentials: 1, ..FakeTunnel::new(2, 1) }, now);
    let out = pool.retain(|_, tunnel| tunnel.credentials == 1);
    assert_eq!(out.iter().map(|tunnel| tunnel.serial).collect::<Vec<_>>(), [1]);
    assert_eq!(kind(pool.checkout(&key, || 3)), "use 2");
}

// ---- A worker's life ----

const LIVES: u64 = 200;
const LIVES_LONG: u64 = 20_000;
const EVENTS: u32 = 400;
const DESTINATIONS: [&str; 3] = ["web-1", "web-2", "db-1"];
/// Small, so that tunnels are full often.
const LIMIT: u32 = 3;

/// A dial or a stream, by when it ends.
enum Event {
    /// With the credentials that it began with.
    DialEnds(Arc<PoolKey>, u32, bool),
    StreamEnds(Arc<PoolKey>, TunnelId),
    TunnelBreaks(Arc<PoolKey>, TunnelId, FakeTunnel),
}

struct Worker {
    seed: u64,
    rng: StdRng,
    pool: TestPool,
    now: Instant,
    events: BTreeMap<(Instant, u64), Event>,
    serial: u64,
    /// In force.
    credentials: u32,
    /// Dials under way.
    dialling: BTreeSet<String>,
    /// Streams by tunnel, as the callers know them.
    streams: BTreeMap<u64, u32>,
    used: u32,
}

#[test]
fn through_any_life_of_a_worker_the_bounds_hold_and_nothing_is_left_over() {
    let is_long = std::env::var("MESH_TEST_LONG").is_ok_and(|value| value == "1");
    let mut used = 0;
    for seed in 0..if is_long { LIVES_LONG } else { LIVES } {
        used += Worker::new(seed).live();
    }
    assert!(used > 20_000, "{used} streams were opened");
}

impl Worker {
    fn new(seed: u64) -> Self {
        Self {
            seed,
            rng: StdRng::seed_from_u64(seed),
            pool: TestPool::default(),
            now: Instant::now(),
            events: BTreeMap::new(),
            serial: 0,
            credentials: 0,
            dialling: BTreeSet::new(),
            streams: BTreeMap::new(),
            used: 0,
        }
    }

    fn live(mut self) -> u32 {
        for _ in 0..EVENTS {
            let pause = Duration::from_millis(self.rng.random_range(0..2_000));
            self.pass(self.now + pause);
            match self.rng.random_range(0..40) {
                0 => self.replace_credentials(),
                1 => self.delete_workload(),
                2 => {
                    let pause = Duration::from_secs(self.rng.random_range(0..400));
                    self.pass(self.now + pause);
                }
                3 => self.expire(),
                _ => self.connect(),
            }
            self.look();
        }
        // Whatever is under way ends, and then all is idle.
        while let Some((at, _)) = self.events.keys().next().copied() {
            self.pass(at);
        }
        self.now += IDLE_RELEASE;
        self.expire();
        assert!(self.pool.is_empty(), "seed {}: {:?}", self.seed, self.pool);
        assert!(self.pool.entries.is_empty(), "seed {}: keys without tunnels", self.seed);
        self.used
    }

    fn connect(&mut self) {
        let key = key_to(DESTINATIONS[self.rng.random_range(0..DESTINATIONS.len())]);
        self.serial += 1;
        let serial = self.serial;
        match self.pool.checkout(&key, || serial) {
            Checkout::Use(id, tunnel) => {
                assert!(tunnel.is_open(), "seed {}: a closed tunnel", self.seed);
                assert_eq!(tunnel.credentials, self.credentials, "seed {}: replaced credentials", self.seed);
                let streams = self.streams.entry(tunnel.serial).or_default();
                *streams += 1;
                assert!(*streams <= LIMIT, "seed {}: {streams} streams on one tunnel", self.seed);
                self.used += 1;
                self.later(30_000, Event::StreamEnds(key, id));
            }
            Checkout::Wait(attempt) => {
                assert!(
                    attempt != serial && self.dialling.contains(&*key.destination.0),
                    "seed {}: nobody dials",
                    self.seed
                );
            }
            Checkout::Dial(attempt) => {
                assert_eq!(attempt, serial, "seed {}", self.seed);
                assert!(self.dialling.insert(key.destination.to_string()), "seed {}: two dials for one key", self.seed);
                let succeeds = self.rng.random_bool(0.8);
                self.later(5_000, Event::DialEnds(key, self.credentials, succeeds));
            }
            Checkout::Refusing => panic!("seed {}: all take streams", self.seed),
            Checkout::Full => panic!("seed {}: {} tunnels", self.seed, self.pool.len()),
        }
    }

    fn later(&mut self, within_millis: u64, event: Event) {
        self.serial += 1;
        let at = self.now + Duration::from_millis(self.rng.random_range(0..within_millis));
        self.events.insert((at, self.serial), event);
    }

    fn pass(&mut self, until: Instant) {
        while let Some(entry) = self.events.first_entry().filter(|entry| entry.key().0 <= until) {
            self.now = entry.key().0;
            let event = entry.remove();
            self.happen(event);
            self.look();
        }
        self.now = until;
    }

    fn happen(&mut self, event: Event) {
        match event {
            // Its tunnel is held against the credentials in force before the pool gets it.
            Event::DialEnds(key, credentials, true) if credentials != self.credentials => {
                self.later(5_000, Event::DialEnds(key, self.credentials, true));
            }
            Event::DialEnds(key, _, false) => {
                self.dialling.remove(&*key.destination.0);
                self.pool.dial_failed(&key);
            }
            Event::DialEnds(key, credentials, true) => {
                self.dialling.remove(&*key.destination.0);
                self.serial += 1;
                let tunnel = FakeTunnel { credentials, ..FakeTunnel::new(self.serial, LIMIT) };
                let id = self.pool.dialled(&key, tunnel.clone(), self.now);
                if self.rng.random_bool(0.3) {
                    self.later(60_000, Event::TunnelBreaks(key, id, tunnel));
                }
            }
            Event::StreamEnds(key, id) => {
                let serial = self.serial_of(&key, id);
                self.pool.release(&key, id, self.now);
                if let Some(streams) = serial.and_then(|serial| self.streams.get_mut(&serial)) {
                    *streams -= 1;
                }
            }
            Event::TunnelBreaks(key, id, tunnel) => {
                tunnel.open.set(false);
                // The driver reports it, or the next caller sees it first.
                if self.rng.random_bool(0.5) {
                    self.pool.closed(&key, id);
                }
            }
        }
    }

    fn serial_of(&self, key: &PoolKey, id: TunnelId) -> Option<u64> {
        let entry = self.pool.entries.get(key)?;
        entry.tunnels.iter().find(|slot| slot.id == id).map(|slot| slot.tunnel.serial)
    }

    fn replace_credentials(&mut self) {
        self.credentials += 1;
        let in_force = self.credentials;
        let out = self.pool.retain(|_, tunnel| tunnel.credentials == in_force);
        self.are_gone(&out);
    }

    fn delete_workload(&mut self) {
        let gone = DESTINATIONS[self.rng.random_range(0..DESTINATIONS.len())];
        let out = self.pool.retain(|key, _| *key.destination.0 != *gone);
        self.are_gone(&out);
        assert!(self.slots().all(|(key, _)| *key.destination.0 != *gone), "seed {}", self.seed);
    }

    fn are_gone(&self, tunnels: &[FakeTunnel]) {
        for tunnel in tunnels {
            assert!(self.slots().all(|(_, slot)| slot.tunnel.serial != tunnel.serial), "seed {}", self.seed);
        }
    }

    fn expire(&mut self) {
        let next = self.pool.next_expiry(self.now);
        let out = self.pool.expire(self.now);
        assert_eq!(out.is_empty(), next.is_none_or(|wait| !wait.is_zero()), "seed {}: {next:?}", self.seed);
        for tunnel in &out {
            let streams = self.streams.get(&tunnel.serial).copied().unwrap_or_default();
            assert_eq!(streams, 0, "seed {}: a busy tunnel was released", self.seed);
        }
        self.are_gone(&out);
    }

    fn slots(&self) -> impl Iterator<Item = (&Arc<PoolKey>, &Slot<FakeTunnel>)> {
        self.pool.entries.iter().flat_map(|(key, entry)| entry.tunnels.iter().map(move |slot| (key, slot)))
    }

    /// The pool's books are the callers'.
    fn look(&self) {
        for (key, slot) in self.slots() {
            let streams = self.streams.get(&slot.tunnel.serial).copied().unwrap_or_default();
            assert_eq!(slot.streams, streams, "seed {}: streams to {:?}", self.seed, key.destination);
        }
        for (key, entry) in &self.pool.entries {
            assert_eq!(entry.dialling.is_some(), self.dialling.contains(&*key.destination.0), "seed {}", self.seed);
            assert!(!entry.tunnels.is_empty() || entry.dialling.is_some(), "seed {}: an empty entry", self.seed);
        }
    }
}
