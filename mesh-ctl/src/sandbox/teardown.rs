//! Gives back what a record names, and looks whether anything is left.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};

use super::layout::{Layout, RUN_ROOT};
use super::state::{Lock, Process, State};
use super::{cgroup, files, netns, process};
use crate::exit::NotPermitted;

/// How long processes may take to end by themselves: less than a node proxy's drain, because all of its workloads end
/// at the same time.
const PATIENCE: Duration = Duration::from_secs(4);

/// What `down` gave back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// Processes that were ended.
    pub processes: usize,
    /// Of these, those that had to be killed.
    pub killed: usize,
    /// Network namespaces.
    pub netns: usize,
}

/// Ends the sandbox of this layout. None if there is none.
///
/// # Errors
/// Somebody else is changing it, something cannot be given back, or something is left at the end.
pub fn down(layout: &Layout) -> Result<Option<Removed>> {
    if !exists(&layout.run)? && !exists(&layout.cgroup)? {
        return Ok(None);
    }
    let lock = Lock::take(layout)?;
    let removed = give_back(layout)?;
    lock.remove();
    // Fails as long as other sandboxes exist.
    let _others = std::fs::remove_dir(RUN_ROOT);
    Ok(Some(removed))
}

/// Unlike [`Path::exists`] this does not say no to who may not look.
fn exists(path: &Path) -> Result<bool> {
    match path.try_exists() {
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(NotPermitted(format!("cannot look at {}", path.display())).into())
        }
        found => found.with_context(|| path.display().to_string()),
    }
}

/// As [`down`], for a caller that holds the lock.
///
/// # Errors
/// As [`down`].
pub fn give_back(layout: &Layout) -> Result<Removed> {
    // Without a record nothing but directories was made: the record is written first.
    let state = State::load(layout)?;
    let mut removed = Removed::default();
    if let Some(state) = &state {
        let alive: Vec<Process> = state.processes.values().filter(|p| process::is_alive(p)).cloned().collect();
        removed.processes = alive.len();
        removed.killed = process::end_all(&alive, PATIENCE)?.len();
        for top in &state.handles.cgroups {
            cgroup::remove(top)?;
        }
        for path in &state.handles.netns {
            removed.netns += usize::from(path.exists());
            netns::remove(path)?;
        }
        for path in &state.handles.mounts {
            unmount(path)?;
        }
    }
    remove_dir(&layout.run)?;
    let left = leftovers(layout, state.as_ref())?;
    if !left.is_empty() {
        bail!("the sandbox `{}` left behind: {}", layout.name, left.join(", "));
    }
    Ok(removed)
}

/// What of a sandbox still exists, in words.
///
/// # Errors
/// The mount table cannot be read.
pub fn leftovers(layout: &Layout, state: Option<&State>) -> Result<Vec<String>> {
    let mut left: Vec<String> =
        files::mounts_below(&layout.run)?.iter().map(|p| format!("mount {}", p.display())).collect();
    left.extend([&layout.run, &layout.cgroup].into_iter().filter(|p| p.exists()).map(|p| p.display().to_string()));
    let processes = state.into_iter().flat_map(|s| &s.processes);
    left.extend(processes.filter(|(_, p)| process::is_alive(p)).map(|(part, p)| format!("{part} (pid {})", p.pid)));
    Ok(left)
}

fn unmount(path: &Path) -> Result<()> {
    match umount2(path, MntFlags::empty()) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => Ok(()),
        // A reader outside the sandbox (a shell in it) must not keep the rest from going.
        Err(nix::Error::EBUSY) => {
            umount2(path, MntFlags::MNT_DETACH).with_context(|| format!("detach {}", path.display()))
        }
        Err(e) => Err(e).with_context(|| format!("unmount {}", path.display())),
    }
}

/// Never descends into a mount: that would delete what is mounted there.
fn remove_dir(run: &Path) -> Result<()> {
    let mounts = files::mounts_below(run)?;
    if let Some(mount) = mounts.first() {
        bail!("{} is still mounted; unmount it and run `down` again", mount.display());
    }
    match std::fs::remove_dir_all(run) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| format!("remove {}", run.display())),
    }
}
