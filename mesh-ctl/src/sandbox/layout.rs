//! Where everything of one sandbox lies. Names only; nothing is created here.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

use super::topology::is_label;
use crate::exit::Usage;

/// Parent of all sandboxes' directories.
pub const RUN_ROOT: &str = "/run/mesh-sandbox";
/// Longest name: socket paths below the directory have to fit into the 108 bytes of `sun_path`.
pub const MAX_NAME: usize = 32;

/// Paths of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Its name.
    pub name: String,
    /// `/run/mesh-sandbox/NAME`.
    pub run: PathBuf,
    /// Its directory in the cgroup v2 tree.
    pub cgroup: PathBuf,
    /// Where a cgroup v2 tree has to be mounted first, on a machine that has none.
    pub own_cgroup_mount: Option<PathBuf>,
}

impl Layout {
    /// Paths of the sandbox of this name on this machine.
    ///
    /// # Errors
    /// The name is not a short DNS label, or `/proc/mounts` cannot be read.
    pub fn of(name: &str) -> Result<Self> {
        if !is_label(name) || name.len() > MAX_NAME {
            let rule = format!("use lower case letters, digits and `-`, at most {MAX_NAME} bytes");
            return Err(anyhow!(Usage(format!("sandbox name `{name}`: {rule}"))));
        }
        let mounts = std::fs::read_to_string("/proc/mounts").context("read /proc/mounts")?;
        Ok(Self::with_mounts(name, &mounts))
    }

    fn with_mounts(name: &str, mounts: &str) -> Self {
        let run = Path::new(RUN_ROOT).join(name);
        let found = mounts.lines().filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (at, kind) = (fields.next()?, fields.next()?);
            (kind == "cgroup2" && !at.starts_with(RUN_ROOT)).then(|| PathBuf::from(at))
        });
        let root = found.min();
        let own = run.join("cgroup2");
        let cgroup = root.as_ref().unwrap_or(&own).join(format!("mesh-sandbox-{name}"));
        Self { name: name.to_string(), run, cgroup, own_cgroup_mount: root.is_none().then_some(own) }
    }

    /// The file of all handles.
    pub fn state(&self) -> PathBuf {
        self.run.join("state.json")
    }

    /// Held by whoever changes the sandbox. Beside the directory, so that it outlives it until the end of `down`.
    pub fn lock(&self) -> PathBuf {
        Path::new(RUN_ROOT).join(format!(".{}.lock", self.name))
    }

    /// Configuration directory of the controller.
    pub fn config(&self) -> PathBuf {
        self.run.join("config")
    }

    /// Bind mount of a network namespace.
    pub fn netns(&self, name: &str) -> PathBuf {
        self.run.join("netns").join(name)
    }

    /// The bpffs mount.
    pub fn bpf(&self) -> PathBuf {
        self.run.join("bpf")
    }

    /// Files of the controller.
    pub fn controller(&self) -> PathBuf {
        self.run.join("controller")
    }

    /// Admin socket of the controller.
    pub fn controller_admin(&self) -> PathBuf {
        self.controller().join("admin.sock")
    }

    /// Files of a node.
    pub fn node(&self, node: &str) -> PathBuf {
        self.run.join("nodes").join(node)
    }

    /// Admin socket of a node proxy.
    pub fn node_admin(&self, node: &str) -> PathBuf {
        self.node(node).join("admin.sock")
    }

    /// Where the enrolment agent listens for a node's proxies.
    pub fn node_agent(&self, node: &str) -> PathBuf {
        self.node(node).join("agent.sock")
    }

    /// Control socket of the enrolment agent.
    pub fn agent_control(&self) -> PathBuf {
        self.run.join("agent.sock")
    }

    /// Files of a workload.
    pub fn workload(&self, key: &str) -> PathBuf {
        self.run.join("workloads").join(key)
    }

    /// Cgroup of a node's proxy.
    pub fn proxy_cgroup(&self, node: &str) -> PathBuf {
        self.cgroup.join(node).join("proxy")
    }

    /// Top of the cgroups of a node's workloads: capture is attached here.
    pub fn pods_cgroup(&self, node: &str) -> PathBuf {
        self.cgroup.join(node).join("pods")
    }

    /// Cgroup of a part that belongs to no node (`controller`, `agent`).
    pub fn part_cgroup(&self, part: &str) -> PathBuf {
        self.cgroup.join(part)
    }

    /// Log of a part: `controller`, `agent`, a node's name, or a workload's key.
    pub fn log(&self, part: &super::state::Part) -> PathBuf {
        use super::state::Part;
        match part {
            Part::Controller => self.controller().join("controller.log"),
            Part::Agent => self.run.join("agent.log"),
            Part::Node(node) => self.node(node).join("node.log"),
            Part::Workload(key) => self.workload(key).join("log"),
        }
    }
}

/// Names of the sandboxes that have a directory, sorted.
pub fn existing() -> Vec<String> {
    let entries = std::fs::read_dir(RUN_ROOT).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|e| e.path().is_dir())
        .filter_map(|e| e.file_name().into_string().ok())
        .filter(|n| is_label(n))
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_and_unified_and_missing_cgroup_trees() {
        let at = |mounts: &str| Layout::with_mounts("x", mounts);
        let hybrid = at("cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n");
        assert_eq!(hybrid.cgroup, Path::new("/sys/fs/cgroup/unified/mesh-sandbox-x"));
        assert_eq!(hybrid.own_cgroup_mount, None);
        let none = at("proc /proc proc rw 0 0\n");
        assert_eq!(none.cgroup, Path::new("/run/mesh-sandbox/x/cgroup2/mesh-sandbox-x"));
        assert_eq!(none.own_cgroup_mount, Some("/run/mesh-sandbox/x/cgroup2".into()));
        let another_sandbox = at("cgroup2 /run/mesh-sandbox/y/cgroup2 cgroup2 rw 0 0\n");
        assert_eq!(another_sandbox.own_cgroup_mount, none.own_cgroup_mount);
    }

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for name in ["", "..", "a/b", "A", "-x", &"x".repeat(33)] {
            assert!(Layout::of(name).is_err(), "{name}");
        }
    }
}
