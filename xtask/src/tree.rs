//! Where things are: the root of the work tree, the build directory, the files under version control.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;

/// The work tree that this xtask was built in.
pub(crate) struct Tree {
    /// The directory of the workspace's `Cargo.toml`.
    pub(crate) root: PathBuf,
    /// Cargo's build directory: `CARGO_TARGET_DIR`, or `target` in the root.
    pub(crate) target: PathBuf,
}

impl Tree {
    pub(crate) fn find() -> Result<Tree> {
        let manifest =
            env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest.parent().context("xtask lies below the root of the work tree")?.to_path_buf();
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir));
        Ok(Tree { root, target })
    }

    /// A cargo command that runs in the root, by the cargo that started us.
    pub(crate) fn cargo(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(&self.root).args(arguments);
        command
    }

    /// Files in version control or about to be, relative to the root, sorted.
    pub(crate) fn files(&self) -> Result<Vec<PathBuf>> {
        let mut command = Command::new("git");
        command.current_dir(&self.root).args(["ls-files", "--cached", "--others", "--exclude-standard"]);
        let listing = process::output(command)?;
        let mut files: Vec<PathBuf> =
            listing.lines().map(PathBuf::from).filter(|file| self.root.join(file).is_file()).collect();
        files.sort();
        Ok(files)
    }

    /// The text of a file of the tree; `None` if it is not text.
    pub(crate) fn text(&self, file: &Path) -> Result<Option<String>> {
        let bytes = fs::read(self.root.join(file)).with_context(|| format!("read {}", file.display()))?;
        Ok(String::from_utf8(bytes).ok())
    }
}
