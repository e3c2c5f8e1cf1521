//! The record of one sandbox: what it was asked to be and every handle that has to be given back.
//!
//! Handles are recorded before they are created, so that whoever finds the file after a crash can remove all of it.
//! A process is the exception (its pid is not known before): it is born into a recorded cgroup, which lists it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::layout::Layout;
use super::topology::Topology;
use crate::exit::NotPermitted;

/// Layout of the file; another one is not read.
pub const STATE_VERSION: u32 = 1;
/// Attempts to get the lock when its file is removed in between by the one who held it.
const LOCK_ATTEMPTS: u32 = 16;

/// Contents of `state.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// Name of the sandbox.
    pub name: String,
    /// How far it got.
    pub phase: Phase,
    /// What it is.
    pub topology: Topology,
    /// How its mesh runs; none: only namespaces and workloads.
    pub mesh: Option<Mesh>,
    /// What has to be given back.
    pub handles: Handles,
    /// Processes by part.
    pub processes: BTreeMap<Part, Process>,
}

/// How far a sandbox got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Being built, or its builder died.
    Creating,
    /// Built; processes may have died since.
    Up,
}

/// How the mesh of a sandbox runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    /// Directory of `mesh-controller`, `mesh-node` and `mesh-ctl`.
    pub binaries: PathBuf,
    /// More arguments for each node proxy.
    pub node_args: Vec<String>,
    /// More arguments for the controller.
    pub controller_args: Vec<String>,
}

/// What the kernel keeps until it is given back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handles {
    /// Bind mounts of network namespaces. Links, addresses, routes and sysctls go with them.
    pub netns: BTreeSet<PathBuf>,
    /// Other mounts.
    pub mounts: BTreeSet<PathBuf>,
    /// Tops of cgroup trees.
    pub cgroups: BTreeSet<PathBuf>,
}

/// A part of a sandbox that runs as a process. Written `controller`, `agent`, `node/NAME`, `workload/NAME`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Part {
    /// The controller.
    Controller,
    /// The enrolment agent.
    Agent,
    /// A node's proxy (its supervisor).
    Node(String),
    /// A workload's command.
    Workload(String),
}

/// A process that was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot: a pid that came around again has another.
    pub start_ticks: u64,
    /// What was run.
    pub argv: Vec<String>,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Controller => f.write_str("controller"),
            Self::Agent => f.write_str("agent"),
            Self::Node(name) => write!(f, "node/{name}"),
            Self::Workload(key) => write!(f, "workload/{key}"),
        }
    }
}

impl From<Part> for String {
    fn from(part: Part) -> Self {
        part.to_string()
    }
}

impl TryFrom<String> for Part {
    type Error = String;

    fn try_from(s: String) -> Result<Self, String> {
        match s.split_once('/') {
            None if s == "controller" => Ok(Self::Controller),
            None if s == "agent" => Ok(Self::Agent),
            Some(("node", name)) => Ok(Self::Node(name.into())),
            Some(("workload", key)) => Ok(Self::Workload(key.into())),
            None | Some(_) => Err(format!("`{s}` is no part of a sandbox")),
        }
    }
}

impl State {
    /// Of a sandbox that is about to be built.
    pub fn new(name: &str, topology: Topology, mesh: Option<Mesh>, handles: Handles) -> Self {
        Self {
            version: STATE_VERSION,
            name: name.into(),
            phase: Phase::Creating,
            topology,
            mesh,
            handles,
            processes: BTreeMap::new(),
        }
    }

    /// Reads the record; none if there is no sandbox of this name, or it died before it created anything.
    ///
    /// # Errors
    /// The file cannot be read or is not of this version.
    pub fn load(layout: &Layout) -> Result<Option<Self>> {
        let path = layout.state();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                return Err(NotPermitted(format!("cannot read {}", path.display())).into());
            }
            Err(e) => return Err(e).with_context(|| format!("read {}", path.display())),
        };
        let state: Self = serde_json::from_str(&text).with_context(|| {
            format!(
                "{} is not a record of this version of mesh-ctl; end the sandbox with the one that made it",
                path.display()
            )
        })?;
        if state.version != STATE_VERSION {
            bail!("{} has version {}, this mesh-ctl reads {STATE_VERSION}", path.display(), state.version);
        }
        Ok(Some(state))
    }

    /// Writes the record so that a reader sees the old or the new one, never half.
    ///
    /// # Errors
    /// The directory does not exist or cannot be written.
    pub fn save(&self, layout: &Layout) -> Result<()> {
        let path = layout.state();
        let temporary = path.with_extension("json.new");
        let text = serde_json::to_vec_pretty(self).context("encode state")?;
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(&text)?;
            file.sync_data()?;
            std::fs::rename(&temporary, &path)
        };
        write().with_context(|| format!("write {}", path.display()))
    }
}

impl Handles {
    /// Takes another set in.
    pub fn extend(&mut self, other: &Self) {
        self.netns.extend(other.netns.iter().cloned());
        self.mounts.extend(other.mounts.iter().cloned());
        self.cgroups.extend(other.cgroups.iter().cloned());
    }
}

/// The right to change one sandbox; given back on drop.
#[derive(Debug)]
pub struct Lock {
    file: Flock<File>,
    path: PathBuf,
}

impl Lock {
    /// Takes the lock of a sandbox.
    ///
    /// # Errors
    /// Somebody else holds it, or its file cannot be created.
    pub fn take(layout: &Layout) -> Result<Self> {
        let path = layout.lock();
        let parent = Path::new(super::layout::RUN_ROOT);
        for _ in 0..LOCK_ATTEMPTS {
            super::files::private_dir(parent)?;
            let file = match File::options().create(true).truncate(false).write(true).open(&path) {
                Ok(file) => file,
                // The last of the other sandboxes has just taken the directory with it.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e).with_context(|| format!("open {}", path.display())),
            };
            let Ok(file) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
                bail!("another mesh-ctl is changing the sandbox `{}` now; try again when it has ended", layout.name);
            };
            if same_file(&file, &path) {
                return Ok(Self { file, path });
            }
        }
        bail!("{} is removed as often as it is made", path.display())
    }

    /// Removes the lock file itself, as the last trace of the sandbox.
    pub fn remove(self) {
        // Still held: whoever opened it meanwhile finds that the path names another file and tries again.
        let _gone = std::fs::remove_file(&self.path);
        drop(self.file);
    }
}

fn same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => a.ino() == b.ino() && a.dev() == b.dev(),
        (Err(_), _) | (_, Err(_)) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read_as_it_was_written() {
        let mut state = State::new("x", Topology::demo(), None, Handles::default());
        state.handles.netns.insert("/run/mesh-sandbox/x/netns/client".into());
        for part in [Part::Controller, Part::Agent, Part::Node("node-a".into()), Part::Workload("web.shop".into())] {
            state.processes.insert(part, Process { pid: 7, start_ticks: 99, argv: vec!["x".into()] });
        }
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<State>(&text).unwrap(), state);
        assert!(Part::try_from("pod/x".to_string()).is_err());
    }
}
