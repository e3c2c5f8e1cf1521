//! The enrolment agent: announces a sandbox's workloads to the node proxies and hands them the network namespaces.
//!
//! It plays the part that a CNI agent plays on a Kubernetes node, for all nodes of the sandbox, over the same
//! protocol. What should be enrolled is read from the sandbox's record; `sync` on the control socket reads it again.

mod announce;
pub mod control;
mod proxy;

use std::collections::BTreeMap;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mesh_api::proto::workload::zds::WorkloadInfo;

use self::announce::{Desired, Enrol, Outcome};
use self::control::{AgentStatus, EnrolmentState};
use super::layout::Layout;
use super::state::State;
use super::topology::Enrolment;

/// What the threads share.
struct Shared {
    layout: Layout,
    inner: Mutex<Inner>,
    told: Condvar,
}

#[derive(Default)]
struct Inner {
    desired: BTreeMap<String, Arc<Desired>>,
    /// Counts reloads.
    generation: u64,
    next_connection: u64,
    connections: BTreeMap<u64, Connection>,
}

/// A connected proxy.
struct Connection {
    node: String,
    /// A byte here makes its thread look at the desired set again.
    waker: UnixStream,
    /// Last reload of which it has heard everything.
    told_generation: u64,
    outcomes: BTreeMap<String, Outcome>,
}

/// Runs the agent of a sandbox until the process ends.
///
/// # Errors
/// There is no such sandbox, or a socket cannot be opened.
pub fn run(layout: Layout) -> Result<()> {
    let state = State::load(&layout)?.context("no such sandbox")?;
    let shared = Arc::new(Shared { layout, inner: Mutex::default(), told: Condvar::new() });
    shared.reload()?;
    for node in &state.topology.nodes {
        let listener = proxy::listen(&shared.layout.node_agent(&node.name))?;
        let (shared, node) = (Arc::clone(&shared), node.name.clone());
        let thread = std::thread::Builder::new().name(node.clone());
        thread.spawn(move || proxy::accept(&listener, &node, &shared)).context("start a thread")?;
    }
    let control = bind(&shared.layout.agent_control())?;
    control::serve(&control, &shared);
    Ok(())
}

fn bind(path: &Path) -> Result<UnixListener> {
    // Left by an agent that was killed; two agents cannot run, because starting one needs the sandbox's lock.
    let _stale = std::fs::remove_file(path);
    UnixListener::bind(path).with_context(|| format!("listen at {}", path.display()))
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics half way through a change of the map.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the record and wakes every connection.
    fn reload(&self) -> Result<()> {
        let state = State::load(&self.layout)?.context("the sandbox is gone")?;
        let mut desired: BTreeMap<String, Desired> = BTreeMap::new();
        for w in state.topology.workloads.iter().filter(|w| w.enrolment == Enrolment::Mesh) {
            let info = WorkloadInfo {
                name: w.name.clone(),
                namespace: w.namespace.clone(),
                service_account: w.service_account.clone(),
            };
            let enrol = Enrol { key: w.key(), info, netns: self.layout.netns(&w.key()) };
            desired.entry(w.node.clone()).or_default().insert(w.uid.clone(), enrol);
        }
        let mut inner = self.lock();
        inner.desired = desired.into_iter().map(|(node, set)| (node, Arc::new(set))).collect();
        inner.generation += 1;
        for connection in inner.connections.values() {
            // A full pipe holds a byte already; a closed one has no reader left.
            let _woken = std::io::Write::write(&mut &connection.waker, b"w");
        }
        Ok(())
    }

    fn desired(&self, node: &str) -> (u64, Arc<Desired>) {
        let inner = self.lock();
        (inner.generation, inner.desired.get(node).cloned().unwrap_or_default())
    }

    fn connected(&self, node: &str, waker: UnixStream) -> u64 {
        let mut inner = self.lock();
        let id = inner.next_connection;
        inner.next_connection += 1;
        let connection = Connection { node: node.to_string(), waker, told_generation: 0, outcomes: BTreeMap::new() };
        inner.connections.insert(id, connection);
        id
    }

    fn report(&self, id: u64, generation: u64, outcomes: &BTreeMap<String, Outcome>) {
        if let Some(connection) = self.lock().connections.get_mut(&id) {
            connection.told_generation = generation;
            connection.outcomes.clone_from(outcomes);
        }
        self.told.notify_all();
    }

    fn disconnected(&self, id: u64) {
        self.lock().connections.remove(&id);
        self.told.notify_all();
    }

    fn wait_until_told(&self, within: Duration) -> AgentStatus {
        let deadline = Instant::now() + within;
        let mut inner = self.lock();
        while inner.connections.values().any(|c| c.told_generation < inner.generation) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            inner = self.told.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        inner.status()
    }

    fn status(&self) -> AgentStatus {
        self.lock().status()
    }
}

impl Inner {
    fn status(&self) -> AgentStatus {
        let mut status = AgentStatus::default();
        for connection in self.connections.values() {
            *status.proxies.entry(connection.node.clone()).or_default() += 1;
        }
        for (node, desired) in &self.desired {
            // Ids grow: the newest proxy is the one that takes over.
            let newest = self.connections.values().rev().find(|c| c.node == *node);
            for (uid, enrol) in desired.iter() {
                let why = match newest.map(|c| c.outcomes.get(uid)) {
                    None => "no node proxy is connected".to_string(),
                    Some(None) => "the node proxy has not answered yet".to_string(),
                    Some(Some(Outcome::Refused { why, .. })) => format!("the node proxy refuses: {why}"),
                    Some(Some(Outcome::Enrolled)) => String::new(),
                };
                let (workload, node) = (enrol.key.clone(), node.clone());
                status.workloads.push(EnrolmentState { workload, node, enrolled: why.is_empty(), why });
            }
        }
        status.workloads.sort_by(|a, b| a.workload.cmp(&b.workload));
        status
    }
}
