//! The enrolment agent: announces a sandbox's workloads to the node proxies and hands them the network namespaces.
//!
//! It plays the part that a CNI agent plays on a Kubernetes node, for all nodes of the sandbox, over the same
//! protocol. What should be enrolled is read from the sandbox's record; `sync` on the control socket reads it again.

pub mod control;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mesh_agent::{Board, Desired, Enrol, Netns, Outcome};
use mesh_api::proto::workload::zds::WorkloadInfo;

use self::control::{AgentStatus, EnrolmentState};
use super::layout::Layout;
use super::state::State;
use super::topology::Enrolment;

/// What the threads share.
struct Shared {
    layout: Layout,
    boards: BTreeMap<String, Arc<Board>>,
}

/// Runs the agent of a sandbox until the process ends.
///
/// # Errors
/// There is no such sandbox, or a socket cannot be opened.
pub fn run(layout: Layout) -> Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).with_ansi(false).init();
    let state = State::load(&layout)?.context("no such sandbox")?;
    let boards = state.topology.nodes.iter().map(|node| (node.name.clone(), Arc::default())).collect();
    let shared = Arc::new(Shared { layout, boards });
    shared.reload()?;
    for (node, board) in &shared.boards {
        let listener = mesh_agent::listen(&shared.layout.node_agent(node))?;
        let (board, node) = (Arc::clone(board), node.clone());
        let thread = std::thread::Builder::new().name(node.clone());
        thread.spawn(move || mesh_agent::accept(&listener, &node, &board)).context("start a thread")?;
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
    /// Reads the record and puts up what it says.
    fn reload(&self) -> Result<()> {
        let state = State::load(&self.layout)?.context("the sandbox is gone")?;
        let mut desired: BTreeMap<String, Desired> = BTreeMap::new();
        for w in state.topology.workloads.iter().filter(|w| w.enrolment == Enrolment::Mesh) {
            let info = WorkloadInfo {
                name: w.name.clone(),
                namespace: w.namespace.clone(),
                service_account: w.service_account.clone(),
            };
            let enrol = Enrol { key: w.key(), info, netns: Netns::Path(self.layout.netns(&w.key())) };
            desired.entry(w.node.clone()).or_default().insert(w.uid.clone(), enrol);
        }
        let living: BTreeSet<String> = state.topology.workloads.iter().map(|w| w.uid.clone()).collect();
        for (node, board) in &self.boards {
            board.post(desired.remove(node).unwrap_or_default(), living.clone());
        }
        Ok(())
    }

    fn wait_until_told(&self, within: Duration) -> AgentStatus {
        let deadline = Instant::now() + within;
        self.boards.values().for_each(|board| board.wait_until_told(deadline));
        self.status()
    }

    fn status(&self) -> AgentStatus {
        let mut status = AgentStatus::default();
        for (node, board) in &self.boards {
            if board.proxies() > 0 {
                status.proxies.insert(node.clone(), board.proxies());
            }
            for (uid, enrol) in board.desired().iter() {
                let why = match board.outcome(uid) {
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
