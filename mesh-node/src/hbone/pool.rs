//! Which tunnel carries the next connection. State and decisions only: no sockets, no clock.
//!
//! A tunnel belongs to a [`PoolKey`]: to two identities, two workloads and an address. It is never used for another
//! workload that got the same address later.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use mesh_core::identity::SpiffeId;
use mesh_core::workload::WorkloadUid;
use tokio::time::Instant;

use super::{CLIENT_STREAMS, IDLE_RELEASE};
use crate::tls::ExpectedServer;

/// Tunnels for one key: 25,600 connections from one workload to another, through one worker.
pub const MAX_TUNNELS_PER_KEY: usize = 256;

/// What a tunnel is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// Whose certificate the client shows.
    pub source_identity: SpiffeId,
    /// The client's enrolment: its namespace is where the tunnel's socket is.
    pub source: WorkloadUid,
    /// The server's workload.
    pub destination: WorkloadUid,
    /// Whom the server must prove to be.
    pub expected: ExpectedServer,
    /// Where the tunnel goes.
    pub address: SocketAddr,
}

/// What the pool wants to know about a tunnel.
pub trait PooledTunnel: Clone {
    /// Whether new streams can be opened on it.
    fn is_open(&self) -> bool;
    /// How many streams the other end allows.
    fn stream_limit(&self) -> u32;
}

/// Names a tunnel within its pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TunnelId(u64);

/// What to do for the next connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checkout<T, A> {
    /// Open a stream on this tunnel, and release it afterwards.
    Use(TunnelId, T),
    /// Somebody dials for this key: wait for the attempt, then ask again.
    Wait(A),
    /// Dial, and report the result.
    Dial(A),
    /// The other end takes no streams at all on a tunnel that is up. More tunnels would be no better.
    Refusing,
    /// The bound on tunnels is reached.
    Full,
}

/// Tunnels by key. `T` is a tunnel's handle, `A` an attempt that several callers can wait for.
#[derive(Debug)]
pub struct Pool<T, A> {
    entries: HashMap<Arc<PoolKey>, Entry<T, A>>,
    next_id: u64,
}

#[derive(Debug)]
struct Entry<T, A> {
    tunnels: Vec<Slot<T>>,
    dialling: Option<A>,
}

#[derive(Debug)]
struct Slot<T> {
    id: TunnelId,
    tunnel: T,
    streams: u32,
    idle_since: Instant,
}

impl<T, A> Default for Pool<T, A> {
    fn default() -> Self {
        Self { entries: HashMap::new(), next_id: 0 }
    }
}

impl<T: PooledTunnel, A: Clone> Pool<T, A> {
    /// Takes a place on a tunnel, or says what to do to get one. `attempt` is made only when the caller is to dial.
    pub fn checkout(&mut self, key: &Arc<PoolKey>, attempt: impl FnOnce() -> A) -> Checkout<T, A> {
        let entry =
            self.entries.entry(Arc::clone(key)).or_insert_with(|| Entry { tunnels: Vec::new(), dialling: None });
        entry.tunnels.retain(|slot| slot.tunnel.is_open());
        let free = entry.tunnels.iter_mut().find(|slot| slot.streams < slot.tunnel.stream_limit().min(CLIENT_STREAMS));
        if let Some(slot) = free {
            slot.streams += 1;
            return Checkout::Use(slot.id, slot.tunnel.clone());
        }
        if let Some(attempt) = &entry.dialling {
            return Checkout::Wait(attempt.clone());
        }
        if entry.tunnels.iter().any(|slot| slot.tunnel.stream_limit() == 0) {
            return Checkout::Refusing;
        }
        if entry.tunnels.len() >= MAX_TUNNELS_PER_KEY {
            return Checkout::Full;
        }
        let attempt = attempt();
        entry.dialling = Some(attempt.clone());
        Checkout::Dial(attempt)
    }

    /// A dial succeeded.
    pub fn dialled(&mut self, key: &Arc<PoolKey>, tunnel: T, now: Instant) -> TunnelId {
        let id = TunnelId(self.next_id);
        self.next_id += 1;
        let entry =
            self.entries.entry(Arc::clone(key)).or_insert_with(|| Entry { tunnels: Vec::new(), dialling: None });
        entry.dialling = None;
        entry.tunnels.push(Slot { id, tunnel, streams: 0, idle_since: now });
        id
    }

    /// A dial failed, or its result is not wanted any more.
    pub fn dial_failed(&mut self, key: &PoolKey) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.dialling = None;
        }
        self.forget_if_empty(key);
    }

    /// A stream ended.
    pub fn release(&mut self, key: &PoolKey, id: TunnelId, now: Instant) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        if let Some(slot) = entry.tunnels.iter_mut().find(|slot| slot.id == id) {
            slot.streams = slot.streams.saturating_sub(1);
            slot.idle_since = now;
        }
        entry.tunnels.retain(|slot| slot.tunnel.is_open());
        self.forget_if_empty(key);
    }

    /// A tunnel takes no more streams: it broke, or its other end said GOAWAY.
    pub fn closed(&mut self, key: &PoolKey, id: TunnelId) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.tunnels.retain(|slot| slot.id != id);
        }
        self.forget_if_empty(key);
    }

    /// Removes tunnels that had no stream for `IDLE_RELEASE`, and returns them.
    pub fn expire(&mut self, now: Instant) -> Vec<T> {
        self.take(|_, slot| slot.streams == 0 && now.saturating_duration_since(slot.idle_since) >= IDLE_RELEASE)
    }

    /// Keeps only tunnels that `keep` wants, and returns the others. Streams on those run on; new ones cannot begin.
    pub fn retain(&mut self, keep: impl Fn(&PoolKey, &T) -> bool) -> Vec<T> {
        self.take(|key, slot| !keep(key, &slot.tunnel))
    }

    /// Number of tunnels.
    pub fn len(&self) -> usize {
        self.entries.values().map(|entry| entry.tunnels.len()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn take(&mut self, out: impl Fn(&PoolKey, &Slot<T>) -> bool) -> Vec<T> {
        let mut taken = Vec::new();
        for (key, entry) in &mut self.entries {
            taken.extend(entry.tunnels.extract_if(.., |slot| out(key, slot)).map(|slot| slot.tunnel));
        }
        self.entries.retain(|_, entry| !entry.tunnels.is_empty() || entry.dialling.is_some());
        taken
    }

    fn forget_if_empty(&mut self, key: &PoolKey) {
        if self.entries.get(key).is_some_and(|entry| entry.tunnels.is_empty() && entry.dialling.is_none()) {
            self.entries.remove(key);
        }
    }
}

#[cfg(test)]
mod tests;
