//! The agent's control socket: a line in (`sync` or `status`), a JSON document out.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::Shared;

/// Longest request line in bytes.
const MAX_LINE: u64 = 64;
/// A client has to ask within this time.
const ASK_WITHIN: Duration = Duration::from_secs(2);
/// How long `sync` waits for the proxies that are connected.
pub const SYNC_WITHIN: Duration = Duration::from_secs(20);

/// What the agent knows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Connected proxies by node.
    pub proxies: std::collections::BTreeMap<String, usize>,
    /// Workloads that should be enrolled.
    pub workloads: Vec<EnrolmentState>,
}

/// One workload that should be enrolled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolmentState {
    /// Key in the sandbox.
    pub workload: String,
    /// Node.
    pub node: String,
    /// Whether the newest proxy of the node serves it.
    pub enrolled: bool,
    /// Why not, in words.
    pub why: String,
}

impl AgentStatus {
    /// Workloads that are not enrolled, each with the reason.
    pub fn missing(&self) -> Vec<String> {
        let missing = self.workloads.iter().filter(|w| !w.enrolled);
        missing.map(|w| format!("{} on {}: {}", w.workload, w.node, w.why)).collect()
    }
}

/// Asks the agent to read the sandbox's record again and waits until every connected proxy has heard of it.
///
/// # Errors
/// The agent does not run or does not answer in time.
pub fn sync(socket: &Path) -> Result<AgentStatus> {
    ask(socket, "sync")
}

/// Asks the agent what it knows.
///
/// # Errors
/// As [`sync`].
pub fn status(socket: &Path) -> Result<AgentStatus> {
    ask(socket, "status")
}

fn ask(socket: &Path, line: &str) -> Result<AgentStatus> {
    let talk = || -> std::io::Result<Vec<u8>> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(SYNC_WITHIN + ASK_WITHIN))?;
        writeln!(stream, "{line}")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    };
    let answer = talk().with_context(|| format!("ask the enrolment agent at {}", socket.display()))?;
    serde_json::from_slice(&answer).context("the enrolment agent ended without an answer")
}

/// Serves the control socket for the life of the process.
pub(super) fn serve(listener: &UnixListener, shared: &Arc<Shared>) {
    for stream in listener.incoming().flatten() {
        // One at a time: the only client is this sandbox's `mesh-ctl`, which holds the sandbox's lock.
        if let Err(error) = answer(&stream, shared) {
            eprintln!("control: {error:#}");
        }
    }
}

fn answer(stream: &UnixStream, shared: &Arc<Shared>) -> Result<()> {
    stream.set_read_timeout(Some(ASK_WITHIN))?;
    let mut line = String::new();
    BufReader::new(stream).take(MAX_LINE).read_line(&mut line)?;
    let status = match line.trim() {
        "sync" => {
            shared.reload()?;
            shared.wait_until_told(SYNC_WITHIN)
        }
        "status" => shared.status(),
        other => anyhow::bail!("unknown request `{other}`"),
    };
    let mut stream = stream;
    stream.write_all(&serde_json::to_vec(&status)?)?;
    Ok(())
}
