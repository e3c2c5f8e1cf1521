//! What the node proxies of one node should serve, and how they have answered.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::announce::{Desired, Netns, Outcome, Told};

/// The one cell that the threads of a node share.
#[derive(Debug, Default)]
pub struct Board {
    inner: Mutex<Inner>,
    told: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    desired: Arc<Desired>,
    /// Workloads that live on the node, in the mesh or not.
    living: Arc<BTreeSet<String>>,
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
    answers: BTreeMap<String, Told>,
}

impl Board {
    /// Puts up what should be served, and the UIDs of all that live, and wakes whoever announces it.
    pub fn post(&self, desired: Desired, living: BTreeSet<String>) {
        let mut inner = self.lock();
        inner.living = Arc::new(living);
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
        inner.connections.values().next_back().map(|newest| newest.answers.get(uid).map(|told| told.outcome.clone()))
    }

    /// As [`Board::outcome`], for what was said of that network namespace: an answer for one before it does not count.
    pub(crate) fn outcome_in(&self, uid: &str, netns: &Netns) -> Option<Option<Outcome>> {
        let inner = self.lock();
        let newest = inner.connections.values().next_back()?;
        let told = newest.answers.get(uid).filter(|told| told.stamp == netns.stamp());
        Some(told.map(|told| told.outcome.clone()))
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

    pub(crate) fn living(&self) -> Arc<BTreeSet<String>> {
        self.lock().living.clone()
    }

    pub(crate) fn current(&self) -> (u64, Arc<Desired>) {
        let inner = self.lock();
        (inner.generation, inner.desired.clone())
    }

    pub(crate) fn connected(&self, waker: UnixStream) -> u64 {
        let mut inner = self.lock();
        let id = inner.next_connection;
        inner.next_connection += 1;
        inner.connections.insert(id, Connection { waker, told_generation: 0, answers: BTreeMap::new() });
        id
    }

    pub(crate) fn report(&self, id: u64, generation: Option<u64>, answers: &BTreeMap<String, Told>) {
        if let Some(connection) = self.lock().connections.get_mut(&id) {
            connection.told_generation = generation.unwrap_or(connection.told_generation);
            connection.answers.clone_from(answers);
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
