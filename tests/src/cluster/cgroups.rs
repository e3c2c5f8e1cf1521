//! The cgroups of a cluster: one of the same name in every hierarchy of a machine with cgroup v1 and v2 side by side, below
//! that of whoever starts the cluster.
//!
//! All processes of a part are in its v2 cgroup, which lists and kills them. In v1 there are only limits and statistics.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mesh_ctl::sandbox::cgroup;
use serde::{Deserialize, Serialize};

use super::watch;

/// How long killed processes may take to go.
const ENDED_WITHIN: Duration = Duration::from_secs(60);
/// How long an empty cgroup of v1 may stay busy.
const FREE_WITHIN: Duration = Duration::from_secs(10);
/// Pause between looks.
const POLL: Duration = Duration::from_millis(10);
/// Puts itself into the cgroups before `--` and becomes the command behind it.
const JOIN: &str = r#"while [ "$1" != -- ]; do echo 0 >"$1/cgroup.procs" || exit 125; shift; done; shift; exec "$@""#;

/// The directories of one name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cgroups {
    /// Of v2.
    pub(super) unified: PathBuf,
    /// Of v1.
    pub(super) legacy: Vec<PathBuf>,
}

impl Cgroups {
    /// Those of a name below this process's own; nothing is made yet.
    pub(super) fn below_own(name: &str) -> Result<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").context("read /proc/self/cgroup")?;
        let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
        let found = Self::parse(&own, &mounts, name)?;
        ensure!(
            !found.legacy.is_empty(),
            "this machine has cgroup v2 alone; nodes have been proved with v1 and v2 side by side only"
        );
        Ok(found)
    }

    fn parse(own: &str, mounts: &str, name: &str) -> Result<Self> {
        let mounts: Vec<Vec<&str>> = mounts.lines().map(|line| line.split(' ').collect()).collect();
        let mount_of = |kind: &str, option: &str| {
            let fits = |mount: &&Vec<&str>| {
                let options = mount.get(3).copied().unwrap_or_default();
                mount.get(2) == Some(&kind) && (option.is_empty() || options.split(',').any(|have| have == option))
            };
            mounts.iter().find(fits).map(|mount| PathBuf::from(mount[1]))
        };
        let below = |mount: &Path, path: &str| mount.join(path.trim_start_matches('/')).join(name);
        let (mut unified, mut legacy) = (None, Vec::new());
        for line in own.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            let first = controllers.split(',').next().unwrap_or_default();
            if controllers.is_empty() {
                unified = mount_of("cgroup2", "").map(|mount| below(&mount, path));
            } else if let Some(mount) = mount_of("cgroup", first) {
                legacy.push(below(&mount, path));
            }
        }
        Ok(Self { unified: unified.context("cgroup v2 is not mounted")?, legacy })
    }

    /// Makes them; those that are there stay.
    pub(super) fn create(&self) -> Result<()> {
        cgroup::create(&self.unified)?;
        for directory in &self.legacy {
            cgroup::create(directory)?;
            // A cpuset without processors and memory takes no process.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let parents = directory.parent().map(|parent| parent.join(file)).filter(|parents| parents.exists());
                if let Some(parents) = parents {
                    fs::copy(&parents, directory.join(file)).with_context(|| format!("copy {}", parents.display()))?;
                }
            }
        }
        Ok(())
    }

    /// The command line that runs a command in all of them.
    pub(super) fn joined<S: AsRef<str>>(&self, command: &[S]) -> Vec<String> {
        let mut line = ["sh", "-c", JOIN, "join"].map(str::to_owned).to_vec();
        line.extend(self.all().map(|directory| directory.to_string_lossy().into_owned()));
        line.push("--".to_owned());
        line.extend(command.iter().map(|word| word.as_ref().to_owned()));
        line
    }

    /// Kills what is in them and removes them.
    pub(super) fn remove(&self) -> Result<()> {
        // Hundreds of processes on a busy machine take longer than the sandbox ever waits.
        watch::until("all processes end", ENDED_WITHIN, || cgroup::remove(&self.unified).map(Some))?;
        self.legacy.iter().try_for_each(|directory| remove_tree(directory))
    }

    /// The directories.
    pub(super) fn all(&self) -> impl Iterator<Item = &PathBuf> {
        self.legacy.iter().chain([&self.unified])
    }
}

fn remove_tree(top: &Path) -> Result<()> {
    let below = fs::read_dir(top).into_iter().flatten().flatten();
    for entry in below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_tree(&entry.path())?;
    }
    let deadline = Instant::now() + FREE_WITHIN;
    loop {
        match fs::remove_dir(top) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            // The last process is gone from v2 and not yet from here.
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(POLL);
            }
            Err(error) => bail!("remove cgroup {}: {error}", top.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hierarchy_is_found() {
        let own = "9:name=systemd:/\n4:memory:/a/b\n1:cpu,cpuacct:/\n0::/\n";
        let mounts = "cgroup /c/systemd cgroup rw,name=systemd 0 0\ncgroup /c/memory cgroup rw,memory 0 0\n\
                      cgroup /c/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\ncgroup2 /c/unified cgroup2 rw 0 0\n";
        let found = Cgroups::parse(own, mounts, "x").unwrap();
        assert_eq!(found.unified, Path::new("/c/unified/x"));
        let legacy: Vec<_> = found.legacy.iter().map(|path| path.to_string_lossy()).collect();
        assert_eq!(legacy, ["/c/systemd/x", "/c/memory/a/b/x", "/c/cpu,cpuacct/x"]);
        assert!(Cgroups::parse(own, "", "x").is_err());
    }
}
