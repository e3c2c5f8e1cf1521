//! Cgroups of a sandbox: made, emptied and removed, always below its own directory.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long killed processes may take to leave.
const EMPTY_WITHIN: Duration = Duration::from_secs(5);
/// Pause between looks at a cgroup that is being emptied.
const POLL: Duration = Duration::from_millis(5);

/// Makes a cgroup and its parents.
///
/// # Errors
/// Not permitted.
pub fn create(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("create cgroup {}", path.display()))
}

/// Processes of a cgroup and of those below it; none if it does not exist.
pub fn processes(top: &Path) -> Vec<i32> {
    let list = |dir: &PathBuf| {
        let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|l| l.parse().ok()).collect::<Vec<i32>>()
    };
    tree(top).iter().flat_map(list).collect()
}

/// Kills what is left in a cgroup tree and removes the tree. What is not there is no error.
///
/// # Errors
/// A process does not go, or a directory cannot be removed.
pub fn remove(top: &Path) -> Result<()> {
    if !top.exists() {
        return Ok(());
    }
    let deadline = Instant::now() + EMPTY_WITHIN;
    // Since Linux 5.14: kills the whole tree, forks under way included.
    std::fs::write(top.join("cgroup.kill"), "1").with_context(|| format!("kill what is in {}", top.display()))?;
    while !processes(top).is_empty() {
        if Instant::now() > deadline {
            bail!("processes {:?} in {} do not end", processes(top), top.display());
        }
        std::thread::sleep(POLL);
    }
    for dir in tree(top).iter().rev() {
        remove_dir(dir, deadline)?;
    }
    Ok(())
}

/// A cgroup stays busy for a moment after its last process is gone from the list.
fn remove_dir(dir: &Path, deadline: Instant) -> Result<()> {
    loop {
        match std::fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(POLL);
            }
            Err(e) => return Err(e).with_context(|| format!("remove cgroup {}", dir.display())),
        }
    }
}

/// A directory and all below it, parents first.
fn tree(top: &Path) -> Vec<PathBuf> {
    let mut all = vec![top.to_path_buf()];
    let mut next = 0;
    while let Some(dir) = all.get(next).cloned() {
        next += 1;
        let entries = std::fs::read_dir(&dir).into_iter().flatten().flatten();
        all.extend(entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    all
}
