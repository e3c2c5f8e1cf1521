//! Connected node proxies, for status.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mesh_api::admin::ConnectedNode;

use super::session::Sync;

/// All streams of the process.
#[derive(Debug, Default)]
pub struct Nodes {
    streams: Mutex<Streams>,
}

#[derive(Debug, Default)]
struct Streams {
    next_id: u64,
    by_id: BTreeMap<u64, StreamState>,
}

#[derive(Debug)]
struct StreamState {
    node: String,
    address: SocketAddr,
    sync: Sync,
    last_ack: Option<Instant>,
    rejected: BTreeMap<String, String>,
}

/// One stream; dropping it takes it out of the status.
#[derive(Debug)]
pub struct Stream {
    nodes: Arc<Nodes>,
    id: u64,
}

impl Nodes {
    /// Notes a new stream.
    pub fn connect(self: &Arc<Self>, node: &str, address: SocketAddr) -> Stream {
        let mut streams = self.lock();
        let id = streams.next_id;
        streams.next_id += 1;
        let rejected = BTreeMap::new();
        streams
            .by_id
            .insert(id, StreamState { node: node.to_owned(), address, sync: Sync::NotSent, last_ack: None, rejected });
        Stream { nodes: self.clone(), id }
    }

    /// For `GET /status`, sorted by node.
    pub fn rows(&self, now: Instant) -> Vec<ConnectedNode> {
        let streams = self.lock();
        let mut rows: Vec<_> = streams.by_id.values().map(|s| row(s, now)).collect();
        rows.sort_by(|a, b| (&a.node, &a.address).cmp(&(&b.node, &b.address)));
        rows
    }

    fn lock(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn row(stream: &StreamState, now: Instant) -> ConnectedNode {
    ConnectedNode {
        node: stream.node.clone(),
        address: stream.address.to_string(),
        sync: match stream.sync {
            Sync::NotSent => "NOT SENT",
            Sync::Stale => "STALE",
            Sync::Synced => "SYNCED",
        }
        .into(),
        last_ack_secs: stream.last_ack.map_or(0, |at| now.saturating_duration_since(at).as_secs()),
        rejected: stream.rejected.clone(),
    }
}

impl Stream {
    /// Notes how the stream stands.
    pub fn note(&self, sync: Sync) {
        self.update(|state| state.sync = sync);
    }

    /// Notes an answer of the client and what it refuses.
    pub fn answered(&self, rejected: BTreeMap<String, String>, now: Instant) {
        self.update(|state| {
            state.last_ack = Some(now);
            state.rejected = rejected;
        });
    }

    fn update(&self, change: impl FnOnce(&mut StreamState)) {
        if let Some(state) = self.nodes.lock().by_id.get_mut(&self.id) {
            change(state);
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.nodes.lock().by_id.remove(&self.id);
    }
}
