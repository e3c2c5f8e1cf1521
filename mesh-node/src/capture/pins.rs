//! Where everything is pinned, below the versioned directory.
//!
//! ```text
//! <bpffs>/v3/maps/<MAP>
//! <bpffs>/v3/links/<program>                        attached to the workloads' cgroup
//! <bpffs>/v3/workloads/<cookie>/lookup              attached to the workload's namespace
//! <bpffs>/v3/workloads/<cookie>/gate                attached to it, too
//! <bpffs>/v3/workloads/<cookie>/<ifindex>_<program> tcx links, attached to its interfaces
//! <bpffs>/v3/workloads/<cookie>/<ifindex>_tc_host_<way>     the same, attached to the node's ends of its links
//! <bpffs>/v3/workloads/<cookie>/<ifindex>_<program>_clsact  programs, where the kernel has no tcx
//! <bpffs>/v3/workloads/<cookie>/moved_<link>_<program>      tcx links of interfaces that are elsewhere now
//! ```

use std::io;
use std::path::{Path, PathBuf};

use mesh_ebpf_common::LAYOUT_VERSION;

/// The file that pins a workload's `sk_lookup` link; its presence says that enrolment came to its end once.
pub(super) const LOOKUP: &str = "lookup";
/// The file that pins a workload's gate.
pub(super) const GATE: &str = "gate";
/// Begins the name of a pinned link that went with its interface into another namespace, and whose name another has.
pub(super) const MOVED: &str = "moved_";
/// Ends the name of a pinned program that a clsact filter runs.
pub(super) const CLSACT_SUFFIX: &str = "_clsact";

/// The directories of one layout version.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    root: PathBuf,
}

impl Pins {
    pub(super) fn new(bpffs: &Path) -> Self {
        Self { root: bpffs.join(version_name()) }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    pub(super) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    pub(super) fn link(&self, program: &str) -> PathBuf {
        self.links().join(program)
    }

    pub(super) fn workloads(&self) -> PathBuf {
        self.root.join("workloads")
    }

    pub(super) fn workload(&self, cookie: u64) -> PathBuf {
        self.workloads().join(cookie.to_string())
    }

    pub(super) fn create(&self) -> io::Result<()> {
        [self.maps(), self.links(), self.workloads()].iter().try_for_each(std::fs::create_dir_all)
    }

    /// Cookies that have a directory.
    pub(super) fn cookies(&self) -> io::Result<Vec<u64>> {
        Ok(entries(&self.workloads())?.iter().filter_map(|path| path.file_name()?.to_str()?.parse().ok()).collect())
    }
}

/// `v3`
pub(super) fn version_name() -> String {
    format!("v{LAYOUT_VERSION}")
}

/// A pin of a workload's interface, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct InterfacePin {
    pub(super) index: u32,
    pub(super) program: &'static str,
    pub(super) clsact: bool,
}

impl InterfacePin {
    pub(super) fn file_name(&self) -> String {
        let suffix = if self.clsact { CLSACT_SUFFIX } else { "" };
        format!("{}_{}{suffix}", self.index, self.program)
    }

    /// From a file name; `programs` are those that may attach to an interface.
    pub(super) fn parse(name: &str, programs: &[&'static str]) -> Option<Self> {
        let (name, clsact) = name.strip_suffix(CLSACT_SUFFIX).map_or((name, false), |name| (name, true));
        let (index, program) = name.split_once('_')?;
        let program = programs.iter().find(|known| **known == program)?;
        Some(Self { index: index.parse().ok()?, program, clsact })
    }
}

/// What is in a directory, sorted; nothing if there is none.
pub(super) fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match std::fs::read_dir(dir) {
        Ok(entries) => {
            let mut paths = entries.map(|entry| entry.map(|e| e.path())).collect::<io::Result<Vec<_>>>()?;
            paths.sort();
            Ok(paths)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::InterfacePin;

    #[test]
    fn pin_names_are_read_back() {
        let programs = ["tc_ingress", "tc_egress_l2"];
        for (pin, name) in [
            (InterfacePin { index: 2, program: "tc_ingress", clsact: false }, "2_tc_ingress"),
            (InterfacePin { index: 41, program: "tc_egress_l2", clsact: true }, "41_tc_egress_l2_clsact"),
        ] {
            assert_eq!(pin.file_name(), name);
            assert_eq!(InterfacePin::parse(name, &programs), Some(pin), "{name}");
        }
        for name in ["lookup", "2_other", "x_tc_ingress"] {
            assert_eq!(InterfacePin::parse(name, &programs), None, "{name}");
        }
    }
}
