//! What the node proxies of one node should serve, and how they have answered.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::announce::{Desired, Outcome};

/// The one cell that the threads of a node share.
#[derive(Debug, Default)]
pub struct Board {
    inner: Mutex<Inner>,
    told: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    desired: Arc<Desired>,
    /// Counts changes of `desired`.
    generation: u64,
    next_connection: u64,
    connections: BTreeMap<u64, Connection>,
}

/// A connected proxy.
#[derive(Debug)]
struct Connection {
    /// A byte here makes its thread look at the desired set again.
    waker: UnixStream,
    /// Last change of which it has heard everything.
    told_generation: u64,
    outcomes: BTreeMap<String, Outcome>,
}

impl Board {
    /// Puts up what should be served, and wakes whoever announces it.
    pub fn post(&self, desired: Desired) {
        let mut inner = self.lock();
        inner.desired = Arc::new(desired);
        inner.generation += 1;
        for connection in inner.connections.values() {
            // A full pipe holds a byte already; a closed one has no reader left.
            let _woken = (&connection.waker).write(b"w");
        }
    }

    /// What should be served.
    pub fn desired(&self) -> Arc<Desired> {
        self.lock().desired.clone()
    }

    /// Connected proxies.
    pub fn proxies(&self) -> usize {
        self.lock().connections.len()
    }

    /// How the newest proxy, which is the one that takes over, has answered for a workload; none: there is no proxy.
    pub fn outcome(&self, uid: &str) -> Option<Option<Outcome>> {
        // Ids grow.
        let inner = self.lock();
        inner.connections.values().next_back().map(|newest| newest.outcomes.get(uid).cloned())
    }

    /// Waits until every connected proxy has heard of everything, or until that time.
    pub fn wait_until_told(&self, deadline: Instant) {
        let mut inner = self.lock();
        while inner.connections.values().any(|c| c.told_generation < inner.generation) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            inner = self.told.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(crate) fn current(&self) -> (u64, Arc<Desired>) {
        let inner = self.lock();
        (inner.generation, inner.desired.clone())
    }

    pub(crate) fn connected(&self, waker: UnixStream) -> u64 {
        let mut inner = self.lock();
        let id = inner.next_connection;
        inner.next_connection += 1;
        inner.connections.insert(id, Connection { waker, told_generation: 0, outcomes: BTreeMap::new() });
        id
    }

    pub(crate) fn report(&self, id: u64, generation: Option<u64>, outcomes: &BTreeMap<String, Outcome>) {
        if let Some(connection) = self.lock().connections.get_mut(&id) {
            connection.told_generation = generation.unwrap_or(connection.told_generation);
            connection.outcomes.clone_from(outcomes);
        }
        self.told.notify_all();
    }

    pub(crate) fn disconnected(&self, id: u64) {
        self.lock().connections.remove(&id);
        self.told.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics half way through a change of the map.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
