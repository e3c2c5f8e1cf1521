//! Connected node proxies, for status.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mesh_api::admin::ConnectedNode;

use super::catalogue::ResourceType;
use super::session::{Sync, SyncByType};

/// Streams of one node at once: two proxies while one takes over, and what is left of broken connections. So no node can
/// keep the others out.
pub const MAX_STREAMS_PER_NODE: usize = 8;

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
    types: SyncByType,
    /// Generation of the catalogue that `sync` speaks of.
    generation: u64,
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
    /// Notes a new stream; none if the node has [`MAX_STREAMS_PER_NODE`].
    pub fn connect(self: &Arc<Self>, node: &str, address: SocketAddr) -> Option<Stream> {
        let mut streams = self.lock();
        if streams.by_id.values().filter(|stream| stream.node == node).count() >= MAX_STREAMS_PER_NODE {
            return None;
        }
        let id = streams.next_id;
        streams.next_id += 1;
        let state = StreamState {
            node: node.to_owned(),
            address,
            sync: Sync::NotSent,
            types: [Sync::NotSent; ResourceType::ALL.len()],
            generation: 0,
            last_ack: None,
            rejected: BTreeMap::new(),
        };
        streams.by_id.insert(id, state);
        Some(Stream { nodes: self.clone(), id })
    }

    /// For `GET /status`, sorted by node; `generation` is the one that is published.
    pub fn rows(&self, generation: u64, now: Instant) -> Vec<ConnectedNode> {
        let streams = self.lock();
        let mut rows: Vec<_> = streams.by_id.values().map(|s| row(s, generation, now)).collect();
        rows.sort_by(|a, b| (&a.node, &a.address).cmp(&(&b.node, &b.address)));
        rows
    }

    fn lock(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream that has not looked at what is published yet is not in sync with it, whatever it said before.
fn row(stream: &StreamState, generation: u64, now: Instant) -> ConnectedNode {
    let word = |sync: Sync| match sync {
        Sync::NotSent => "NOT SENT".to_owned(),
        Sync::Synced if stream.generation >= generation => "SYNCED".to_owned(),
        Sync::Synced | Sync::Stale => "STALE".to_owned(),
    };
    let types = ResourceType::ALL.iter().zip(stream.types);
    ConnectedNode {
        node: stream.node.clone(),
        address: stream.address.to_string(),
        sync: word(stream.sync),
        types: types.map(|(kind, sync)| (kind.short_name().to_owned(), word(sync))).collect(),
        last_ack_secs: stream.last_ack.map_or(0, |at| now.saturating_duration_since(at).as_secs()),
        rejected: stream.rejected.clone(),
    }
}

impl Stream {
    /// Notes how the stream stands to a generation of the catalogue.
    pub fn note(&self, sync: Sync, types: SyncByType, generation: u64) {
        self.update(|state| (state.sync, state.types, state.generation) = (sync, types, generation));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_has_not_seen_what_is_published_is_stale() {
        let nodes = Arc::new(Nodes::default());
        let stream = nodes.connect("node-a", SocketAddr::from(([10, 0, 0, 1], 1))).expect("room");
        let shown = |generation| nodes.rows(generation, Instant::now())[0].sync.clone();
        let of_type = |generation| nodes.rows(generation, Instant::now())[0].types["Address"].clone();
        let [none, all] = [Sync::NotSent, Sync::Synced].map(|sync| [sync; ResourceType::ALL.len()]);
        assert_eq!(shown(0), "NOT SENT");
        stream.note(Sync::Synced, all, 3);
        assert_eq!(shown(3), "SYNCED");
        assert_eq!(shown(4), "STALE", "it was in sync with an older one");
        assert_eq!((of_type(3), of_type(4)), ("SYNCED".to_owned(), "STALE".to_owned()));
        stream.note(Sync::Stale, none, 4);
        assert_eq!((shown(4), of_type(4)), ("STALE".to_owned(), "NOT SENT".to_owned()));
        stream.note(Sync::Synced, all, 4);
        assert_eq!(shown(4), "SYNCED");
    }

    #[test]
    fn a_node_has_a_few_streams_and_the_others_have_theirs() {
        let nodes = Arc::new(Nodes::default());
        let connect = |node: &str| nodes.connect(node, SocketAddr::from(([10, 0, 0, 1], 1)));
        let mut streams: Vec<_> = (0..MAX_STREAMS_PER_NODE).map(|_| connect("node-a").expect("room")).collect();
        assert!(connect("node-a").is_none() && connect("node-b").is_some());
        streams.pop();
        assert!(connect("node-a").is_some());
    }
}
