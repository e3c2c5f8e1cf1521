//! Everything that a cluster has on this machine, to be compared with what is left when it has ended.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use mesh_ctl::sandbox::cgroup;

use super::Cluster;
use super::cgroups::Cgroups;
use super::record::Record;

/// What a cluster had at one moment.
#[derive(Debug, Clone)]
pub struct Footprint {
    /// Processes, with the times of their starts: an id that came around again has another.
    pub processes: Vec<(i32, String)>,
    /// Cgroups in all hierarchies.
    pub cgroups: Vec<PathBuf>,
    directory: PathBuf,
    prefix: String,
}

impl Footprint {
    /// Of a cluster now.
    ///
    /// # Errors
    /// It is gone.
    pub fn of(cluster: &Cluster) -> Result<Self> {
        let record = Record::load(cluster.id())?.context("the cluster is gone")?;
        let tops = record.cgroups.values();
        let pids = tops.clone().flat_map(|cgroups| cgroup::processes(&cgroups.unified));
        Ok(Self {
            processes: pids.filter_map(|pid| Some((pid, start_time(pid)?))).collect(),
            cgroups: tops.flat_map(Cgroups::all).cloned().collect(),
            directory: cluster.directory(),
            prefix: cluster.addresses().prefix(),
        })
    }

    /// What is still there, one line each.
    pub fn left(&self) -> Vec<String> {
        let processes = self.processes.iter().filter(|(pid, start)| start_time(*pid).as_ref() == Some(start));
        let mut left: Vec<String> = processes.map(|(pid, _)| format!("process {pid}")).collect();
        left.extend(self.cgroups.iter().filter(|path| path.exists()).map(|path| format!("cgroup {}", path.display())));
        left.extend(self.links().into_iter().map(|link| format!("link {link}")));
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let directory = self.directory.to_string_lossy();
        left.extend(mounts.lines().filter(|line| line.contains(&*directory)).map(|line| format!("mount {line}")));
        if self.directory.exists() {
            left.push(format!("directory {directory}"));
        }
        left
    }

    /// The machine's links of this cluster.
    pub fn links(&self) -> Vec<String> {
        let links = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
        let names = links.map(|link| link.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with(&self.prefix)).collect()
    }
}

/// In clock ticks since boot; none if the process is gone or only waits for being collected.
fn start_time(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; the state follows, and the start time is the 20th field from there.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if fields.next()? == "Z" { None } else { fields.nth(18).map(str::to_owned) }
}
