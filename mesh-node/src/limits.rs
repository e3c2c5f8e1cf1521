//! Bounds on what peers and workloads can make a worker hold.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// Connections of one workload, all directions. At 20,000 the proxy holds some 100 MiB for it.
pub const MAX_CONNECTIONS_PER_WORKLOAD: usize = 20_000;
/// Tunnels from one address to one worker. A node proxy opens one for each 100 connections and pair of workloads.
pub const MAX_TUNNELS_PER_SOURCE: usize = 512;

/// Counts what each peer has.
#[derive(Debug)]
pub struct PerSource {
    limit: usize,
    taken: Mutex<HashMap<IpAddr, usize>>,
}

/// One of a peer's places, given back when dropped.
#[derive(Debug)]
pub struct SourcePlace {
    all: Arc<PerSource>,
    source: IpAddr,
}

impl PerSource {
    /// Nobody has anything yet, and nobody may have more than `limit`.
    pub fn new(limit: usize) -> Self {
        Self { limit, taken: Mutex::default() }
    }

    /// Takes a place for `source`, if it has not too many.
    pub fn take(self: &Arc<Self>, source: IpAddr) -> Option<SourcePlace> {
        let mut all = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = all.get(&source).copied().unwrap_or_default();
        if taken >= self.limit {
            return None;
        }
        all.insert(source, taken + 1);
        Some(SourcePlace { all: Arc::clone(self), source })
    }
}

impl Drop for SourcePlace {
    fn drop(&mut self) {
        let mut all = self.all.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(taken) = all.get_mut(&self.source) {
            *taken -= 1;
            if *taken == 0 {
                all.remove(&self.source);
            }
        }
    }
}
