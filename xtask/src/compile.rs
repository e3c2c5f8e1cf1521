//! Building: the kernel programs first, because the node proxy embeds them, then every crate.

use anyhow::Result;

use crate::ebpf;
use crate::process;
use crate::tree::Tree;

/// Cargo's profile.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    Debug,
    Release,
}

impl Profile {
    pub(crate) fn of(release: bool) -> Profile {
        if release { Profile::Release } else { Profile::Debug }
    }

    /// Its directory below the build directory.
    pub(crate) fn directory(self) -> &'static str {
        match self {
            Profile::Debug => "debug",
            Profile::Release => "release",
        }
    }
}

/// The kernel programs and every crate.
pub(crate) fn all(tree: &Tree, profile: Profile) -> Result<()> {
    ebpf::build(tree)?;
    crates(tree, profile)
}

/// Every crate but this one, which is running.
pub(crate) fn crates(tree: &Tree, profile: Profile) -> Result<()> {
    let mut command = tree.cargo(&["build", "--locked", "--workspace", "--exclude=xtask"]);
    if profile == Profile::Release {
        command.arg("--release");
    }
    process::run(command)
}
