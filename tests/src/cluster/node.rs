//! One node: its namespaces and cgroups, its link, its power switch, and commands in it.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_ctl::sandbox::files;
use mesh_ctl::sandbox::process::{self, Place};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::cgroups::Cgroups;
use super::record::{Record, Turn};
use super::{configuration, shell, watch};

/// The node's first process.
const SCRIPT: &str = include_str!("../../cluster/node.sh");
/// Until the namespaces exist.
const BORN_WITHIN: Duration = Duration::from_secs(20);

/// A node of a cluster, running or not.
#[derive(Debug, Clone)]
pub struct Node {
    pub(super) id: u8,
    pub(super) number: u8,
}

impl Node {
    /// `n1`, `n2` or `n3`.
    pub fn name(&self) -> String {
        format!("n{}", self.number)
    }

    /// Its addresses.
    ///
    /// # Errors
    /// The cluster is gone.
    pub fn addresses(&self) -> Result<(Ipv4Addr, Ipv6Addr)> {
        Ok(self.record()?.addresses.node(self.number))
    }

    /// Where the files that it writes and its logs are.
    pub fn directory(&self) -> PathBuf {
        Record::directory(self.id).join(self.name())
    }

    /// Its cgroup of version 2; that of its pods is `kubepods` below it.
    ///
    /// # Errors
    /// The cluster is gone.
    pub fn cgroup(&self) -> Result<PathBuf> {
        Ok(self.cgroups(&self.record()?)?.unified)
    }

    /// The machine's id of its first process; none if the node is off.
    ///
    /// # Errors
    /// The cluster is gone.
    pub fn first_process(&self) -> Result<Option<i32>> {
        let record = self.record()?;
        let Some(parent) = record.processes.get(&self.name()).filter(|recorded| process::is_alive(recorded)) else {
            return Ok(None);
        };
        // The recorded process made the namespaces; its one child is the first that lives in them.
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", parent.pid)).unwrap_or_default();
        Ok(children.split_whitespace().next().and_then(|pid| pid.parse().ok()))
    }

    /// A command in the node, not started yet: in its namespaces, and in its cgroups, which namespaces alone do not give.
    ///
    /// # Errors
    /// The node is off.
    pub fn command<S: AsRef<str>>(&self, command: &[S]) -> Result<Command> {
        let record = self.record()?;
        let first = self.first_process()?.with_context(|| format!("node {} is off", self.name()))?;
        let mut line = ["nsenter", "--all", "--target"].map(str::to_owned).to_vec();
        line.extend([first.to_string(), "--".to_owned()]);
        line.extend(command.iter().map(|word| word.as_ref().to_owned()));
        let line = self.cgroups(&record)?.joined(&line);
        let path = std::env::var("PATH").unwrap_or_default();
        let mut joined = Command::new(&line[0]);
        joined.args(&line[1..]).env("PATH", format!("{}:{path}", record.programs.display()));
        Ok(joined)
    }

    /// Standard output of a command in the node.
    ///
    /// # Errors
    /// The node is off, or the command fails.
    pub fn sh<S: AsRef<str>>(&self, command: &[S]) -> Result<String> {
        shell::output(&mut self.command(command)?)
    }

    /// Switches it off as a power cut does: whatever runs in it is killed at once.
    ///
    /// # Errors
    /// A process does not end, or the cluster is gone.
    pub fn stop(&self) -> Result<()> {
        let _turn = Turn::wait(self.id)?;
        self.cut(&mut self.record()?)
    }

    /// Switches it on, with the state that it had. Returns when its namespaces exist; kubelet comes later.
    ///
    /// # Errors
    /// It is on, or cannot be made.
    pub fn start(&self) -> Result<()> {
        let _turn = Turn::wait(self.id)?;
        ensure!(self.first_process()?.is_none(), "node {} is on", self.name());
        let mut record = self.record()?;
        // What a node that ended by itself left behind.
        self.cut(&mut record)?;
        self.boot(&mut record)
    }

    pub(super) fn cut(&self, record: &mut Record) -> Result<()> {
        if let Some(cgroups) = record.cgroups.get(&self.name()) {
            cgroups.remove().with_context(|| format!("switch off node {}", self.name()))?;
        }
        if let Some(ended) = record.processes.remove(&self.name()) {
            // Collects it if it is a child of this process; it is dead.
            let _status = waitpid(Pid::from_raw(ended.pid), None);
        }
        let link = self.link(record);
        // It goes with the node's namespace, a moment later; a new one must not meet it.
        if link_exists(&link) {
            let deleted = shell::ip(&format!("link del {link}"));
            ensure!(deleted.is_ok() || !link_exists(&link), "link {link} stays: {deleted:?}");
        }
        record.save()
    }

    pub(super) fn boot(&self, record: &mut Record) -> Result<()> {
        let (name, directory) = (self.name(), self.directory());
        self.write_files(record)?;
        let cgroups = self.cgroups(record)?;
        cgroups.create()?;
        let text = |path: &PathBuf| path.to_string_lossy().into_owned();
        let script = directory.join("node.sh");
        let unshare = "unshare --mount --uts --ipc --net --pid --cgroup --fork --kill-child bash";
        let mut line: Vec<String> = unshare.split(' ').map(str::to_owned).collect();
        line.extend([text(&script), name.clone(), text(&directory), text(&record.programs)]);
        let log = directory.join("node.log");
        let place = Place::open(&cgroups.unified, None)?;
        let started = process::spawn(&cgroups.joined(&line), &[], place, &log)?;
        record.processes.insert(name.clone(), started);
        record.save()?;
        let first = watch::until(&format!("node {name} is born (see {})", log.display()), BORN_WITHIN, || {
            // Its own child exists a moment before the namespaces' files can be told from ours.
            Ok(self.first_process()?.filter(|pid| is_apart(*pid)))
        })?;
        let (link, bridge) = (self.link(record), record.addresses.prefix());
        shell::ip(&format!("link add {link} type veth peer name eth0 netns {first}"))?;
        shell::ip(&format!("link set {link} master {bridge} up"))
    }

    fn write_files(&self, record: &Record) -> Result<()> {
        let directory = self.directory();
        let cluster = Record::directory(self.id);
        let addresses = &record.addresses;
        files::private_dir(&directory)?;
        let (v4, v6) = addresses.node(self.number);
        let kubeconfig = fs::read_to_string(cluster.join(format!("{}.conf", self.name())));
        for (file, text) in [
            ("node.sh", SCRIPT.to_owned()),
            ("containerd.toml", configuration::containerd()),
            ("kubelet.yaml", configuration::kubelet(addresses)),
            ("kubelet.conf", kubeconfig.context("read the kubeconfig of the node")?),
            ("kube-proxy.yaml", configuration::kube_proxy(&cluster.join("kube-proxy.conf"))),
            ("pods.conflist", configuration::pods(addresses, self.number)),
            ("network", configuration::network(addresses, self.number, record.nodes)),
            ("addresses", format!("{v4},{v6}")),
        ] {
            files::replace(&directory.join(file), &text, 0o600)?;
        }
        Ok(())
    }

    fn record(&self) -> Result<Record> {
        Record::load(self.id)?.with_context(|| format!("there is no cluster {}", self.id))
    }

    fn cgroups(&self, record: &Record) -> Result<Cgroups> {
        record.cgroups.get(&self.name()).cloned().with_context(|| format!("the cluster has no node {}", self.name()))
    }

    /// The machine's end of its link.
    fn link(&self, record: &Record) -> String {
        format!("{}-{}", record.addresses.prefix(), self.name())
    }
}

/// Whether a process has a network namespace that is not ours.
fn is_apart(pid: i32) -> bool {
    let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/net")).ok();
    let theirs = namespace(&pid.to_string());
    theirs.is_some() && theirs != namespace("self")
}

pub(super) fn link_exists(name: &str) -> bool {
    PathBuf::from(format!("/sys/class/net/{name}")).exists()
}
