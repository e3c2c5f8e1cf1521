//! A whole cluster: up, down, its parts and its images.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use mesh_ctl::sandbox::{files, process};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::addresses::MOST_NODES;
use super::cgroups::Cgroups;
use super::control_plane::{self, ControlPlane};
use super::record::{Record, Turn};
use super::{Addresses, Image, Node, Progress, configuration, dns, node, report, shell, tools, watch};

/// Two nodes are ready after six seconds on an idle machine.
const READY_WITHIN: Duration = Duration::from_secs(180);
/// A second for a hundred megabytes, once containerd runs.
const LOADED_WITHIN: Duration = Duration::from_secs(60);
/// Programs of the machine that nodes run.
const NEEDED: [&str; 9] = ["containerd", "ctr", "runc", "nft", "iptables", "ip", "bash", "unshare", "nsenter"];
/// Where Debian's package has the CNI plugins.
const PLUGINS: &str = "/usr/lib/cni";

/// What a cluster shall be.
#[derive(Debug, Clone)]
pub struct Options {
    /// 1 to 9; clusters of different ids run side by side.
    pub id: u8,
    /// 1 to 3.
    pub nodes: u8,
    /// Whether names are answered.
    pub dns: Dns,
}

/// Whether a cluster has a DNS server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dns {
    /// CoreDNS at the usual address.
    CoreDns,
    /// Pods are given its address and nobody answers.
    Nobody,
}

/// A cluster that is up. To drop it leaves it up.
#[derive(Debug)]
pub struct Cluster {
    id: u8,
    addresses: Addresses,
    nodes: u8,
    pub(super) programs: PathBuf,
}

impl Cluster {
    /// Builds what is missing, starts everything, and returns when the nodes are ready. On failure nothing stays but the
    /// error, which has the logs' last lines.
    ///
    /// # Errors
    /// The id is taken, or something does not start.
    pub fn up(options: &Options, progress: Progress<'_>) -> Result<Self> {
        let addresses = Addresses::of(options.id)?;
        ensure!((1..=MOST_NODES).contains(&options.nodes), "a cluster has 1 to {MOST_NODES} nodes");
        ensure!(nix::unistd::geteuid().is_root(), "a cluster needs root");
        let missing = missing();
        ensure!(missing.is_empty(), "a cluster needs {}: run `cargo xtask setup`", missing.join(", "));
        let programs = tools::KUBERNETES.ready(progress)?;
        let directory = Record::directory(options.id);
        ensure!(
            Record::make_directory(options.id)?,
            "{} exists: cluster {} is up or was left; end it with `mesh-cluster down --id {}`",
            directory.display(),
            options.id,
            options.id
        );
        if let Err(error) = unused(&addresses) {
            // Nothing else has been made yet.
            fs::remove_dir(&directory).with_context(|| format!("remove {}", directory.display()))?;
            return Err(error);
        }
        let started = Instant::now();
        let mut cgroups = BTreeMap::new();
        let names = (1..=options.nodes).map(|number| format!("n{number}"));
        for part in names.chain([control_plane::PART.to_owned()]) {
            cgroups.insert(part.clone(), Cgroups::below_own(&format!("{}-{part}", addresses.prefix()))?);
        }
        let mut record = Record { addresses, nodes: options.nodes, programs, cgroups, processes: BTreeMap::new() };
        record.save()?;
        let cluster = Self::of(&record);
        let built = cluster.build(&mut record, options, &mut |line: &str| {
            progress(&format!("{line} after {:.1} s", started.elapsed().as_secs_f64()));
        });
        if let Err(error) = built {
            let shown = report::of(&record);
            // The first failure is what counts.
            let _ended = Self::down(options.id);
            return Err(anyhow!("{error:#}\n{shown}"));
        }
        Ok(cluster)
    }

    /// One that is up.
    ///
    /// # Errors
    /// There is none of this id.
    pub fn open(id: u8) -> Result<Self> {
        let record = Record::load(id)?.with_context(|| format!("there is no cluster {id}"))?;
        Ok(Self::of(&record))
    }

    /// Ends a cluster and gives back all that it had, whoever made it and however that one ended. False if there was none.
    ///
    /// # Errors
    /// Something cannot be given back.
    pub fn down(id: u8) -> Result<bool> {
        let directory = Record::directory(id);
        if !directory.exists() {
            return Ok(false);
        }
        let _turn = Turn::wait(id)?;
        if let Some(mut record) = Record::load(id)? {
            for number in 1..=record.nodes {
                Node { id, number }.cut(&mut record)?;
            }
            if let Some(cgroups) = record.cgroups.get(control_plane::PART) {
                cgroups.remove().context("end the control plane")?;
            }
            for ended in record.processes.values() {
                // Collects it if it is a child of this process; it is dead.
                let _status = waitpid(Pid::from_raw(ended.pid), None);
            }
            let bridge = record.addresses.prefix();
            if node::link_exists(&bridge) {
                shell::ip(&format!("link del {bridge}"))?;
            }
        }
        match fs::remove_dir_all(&directory) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
            Err(error) => Err(error).with_context(|| format!("remove {}", directory.display())),
        }
    }

    /// Whether there is a cluster of this id, or what is left of one.
    pub fn exists(id: u8) -> bool {
        Record::directory(id).exists()
    }

    /// Its id.
    pub fn id(&self) -> u8 {
        self.id
    }

    /// Its addresses.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Where its state and its logs are.
    pub fn directory(&self) -> PathBuf {
        Record::directory(self.id)
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory().join("admin.conf")
    }

    /// Its nodes, running or not.
    pub fn nodes(&self) -> Vec<Node> {
        (1..=self.nodes).map(|number| Node { id: self.id, number }).collect()
    }

    /// The node of a name.
    ///
    /// # Errors
    /// There is none.
    pub fn node(&self, name: &str) -> Result<Node> {
        let node = self.nodes().into_iter().find(|node| node.name() == name);
        node.with_context(|| format!("cluster {} has no node {name}: they are n1 to n{}", self.id, self.nodes))
    }

    /// Every process of the record by name, with its id and whether it runs.
    ///
    /// # Errors
    /// The cluster is gone.
    pub fn processes(&self) -> Result<Vec<(String, i32, bool)>> {
        let record = self.record()?;
        Ok(record.processes.iter().map(|(name, p)| (name.clone(), p.pid, process::is_alive(p))).collect())
    }

    /// Loads an image into every node that runs, and into the others when they start.
    ///
    /// # Errors
    /// It cannot be made, or a node refuses it.
    pub fn load(&self, image: &Image) -> Result<()> {
        let _turn = Turn::wait(self.id)?;
        let file = self.save_image(image)?;
        for node in self.nodes() {
            if node.first_process()?.is_none() {
                continue;
            }
            // One that was just switched on has no containerd yet.
            watch::until(&format!("node {} takes image {}", node.name(), image.name()), LOADED_WITHIN, || {
                node.sh(&["ctr", "-n", "k8s.io", "images", "import", &file.to_string_lossy()]).map(Some)
            })?;
        }
        Ok(())
    }

    fn of(record: &Record) -> Self {
        let addresses = record.addresses;
        Self { id: addresses.id(), addresses, nodes: record.nodes, programs: record.programs.clone() }
    }

    pub(super) fn record(&self) -> Result<Record> {
        Record::load(self.id)?.with_context(|| format!("cluster {} is gone", self.id))
    }

    fn build(&self, record: &mut Record, options: &Options, progress: Progress<'_>) -> Result<()> {
        let _turn = Turn::wait(self.id)?;
        self.save_image(&Image::busybox()?)?;
        if options.dns == Dns::CoreDns {
            self.save_image(&dns::image(progress)?)?;
        }
        record.cgroups[control_plane::PART].create()?;
        for line in configuration::bridge(&self.addresses, self.nodes).lines() {
            shell::ip(line)?;
        }
        ControlPlane::of(record).start()?;
        progress("the control plane is ready");
        for node in self.nodes() {
            node.boot(record)?;
        }
        let proxies = ["create", "clusterrolebinding", "kube-proxy", "--clusterrole=system:node-proxier"];
        self.kubectl(&[&proxies[..], &["--user=system:kube-proxy"]].concat())?;
        if options.dns == Dns::CoreDns {
            self.apply(&dns::manifests(&self.addresses))?;
        }
        let names: Vec<String> = self.nodes().iter().map(|node| format!("node/{}", node.name())).collect();
        watch::until("all nodes are ready", READY_WITHIN, || {
            for node in self.nodes() {
                ensure!(node.first_process()?.is_some(), "node {} has ended; see node.log", node.name());
            }
            let mut wait = self.kubectl_command();
            wait.args(["wait", "--for=condition=Ready", "--timeout=5s"]).args(&names);
            shell::output(&mut wait).map(Some)
        })?;
        watch::until("the default service account exists", READY_WITHIN, || {
            self.kubectl(&["get", "serviceaccount", "default"]).map(Some)
        })?;
        progress("the nodes are ready");
        if options.dns == Dns::CoreDns {
            watch::until("names are answered", READY_WITHIN, || {
                let wait =
                    ["wait", "--for=condition=Available", "--timeout=5s", "-n", "kube-system", "deployment/coredns"];
                self.kubectl(&wait).map(Some)
            })?;
            progress("DNS is ready");
        }
        Ok(())
    }

    /// Writes its archive to where nodes look when they start.
    fn save_image(&self, image: &Image) -> Result<PathBuf> {
        let directory = self.directory().join("images");
        files::private_dir(&directory)?;
        let (file, unfinished) = (directory.join(image.file_name()), directory.join("unfinished"));
        let write = || fs::File::create(&unfinished)?.write_all(&image.archive()?).map_err(anyhow::Error::from);
        write().with_context(|| format!("write image {}", image.name()))?;
        fs::rename(&unfinished, &file).with_context(|| format!("name {}", file.display()))?;
        Ok(file)
    }
}

/// What others have under the cluster's names and addresses would be taken for ours, and removed.
fn unused(addresses: &Addresses) -> Result<()> {
    let (bridge, host) = (addresses.prefix(), addresses.host().0);
    ensure!(!node::link_exists(&bridge), "there is a link {bridge} already, and it is no cluster's");
    let is_local = UdpSocket::bind((host, 0)).is_ok();
    ensure!(!is_local, "this machine has address {host} already: something else uses it");
    Ok(())
}

/// What nodes need and this machine lacks.
fn missing() -> Vec<&'static str> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = |program: &&str| std::env::split_paths(&path).any(|directory| directory.join(program).is_file());
    let mut missing: Vec<&str> = NEEDED.into_iter().filter(|program| !is_there(program)).collect();
    if !Path::new(PLUGINS).join("bridge").is_file() {
        missing.push("CNI plugins");
    }
    missing
}
