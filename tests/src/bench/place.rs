//! Where the benchmark runs: sandboxes with one client and two servers, one on each node, directly or in a mesh.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use mesh_ctl::sandbox::topology::DEFAULT_NAMESPACE;
use mesh_ctl::sandbox::{Mesh, Part, Sandbox, Topology, Workload, netns};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::cpu;
use super::load::{Outcome, Work};
use super::peer;
use super::table::Resident;
use crate::mesh_bed::page_of;

/// Port of the load server.
const PORT: u16 = 7000;
/// Kernel settings of every workload, on every system.
const PORT_SETTINGS: [(&str, &str); 2] = [("tcp_tw_reuse", "1"), ("ip_local_port_range", "10240 65000")];
/// Arguments of a node proxy that has one CPU.
const ONE_WORKER: [&str; 2] = ["--workers", "1"];
/// Where a node proxy shows its metrics, ours and ztunnel alike.
const METRICS_PORT: u16 = 15020;
/// Metric of opened connections, and the label of those that both identities authorized (Istio's names).
const OPENED: &str = "istio_tcp_connections_opened_total{";
const MUTUAL: &str = "connection_security_policy=\"mutual_tls\"";
/// Name of the client's workload.
const CLIENT: &str = "client";

/// Which way the load goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum System {
    /// Plain routing between the namespaces.
    Direct,
    /// This mesh.
    Mesh,
    /// Another node proxy in the same place, under our controller.
    Peer,
}

/// Where the server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Distance {
    /// On another node.
    Across,
    /// On the client's node.
    Same,
}

impl Distance {
    fn server(self) -> &'static str {
        match self {
            Self::Across => "server-across",
            Self::Same => "server-same",
        }
    }
}

/// A built place for one system.
#[derive(Debug)]
pub struct Place {
    system: System,
    sandbox: Sandbox,
    /// Pids of the node proxies' first processes, by node.
    proxies: Vec<(String, i32)>,
    peers: Vec<std::process::Child>,
}

impl Place {
    /// Builds it.
    ///
    /// # Errors
    /// A part does not come up.
    pub fn build(system: System, peer_binary: Option<&PathBuf>) -> Result<Self> {
        let name = match system {
            System::Direct => "bench-direct",
            System::Mesh => "bench-mesh",
            System::Peer => "bench-peer",
        };
        let topology = topology(system == System::Direct)?;
        // One worker a node, because a node has one CPU here; the peer is told the same.
        let one_worker =
            || Ok::<_, anyhow::Error>(Mesh { node_args: ONE_WORKER.map(String::from).into(), ..Mesh::beside()? });
        let mesh = if system == System::Direct { None } else { Some(one_worker()?) };
        let mut progress = |line: &str| eprintln!("  {name}: {line}");
        let mut place = match system {
            System::Direct | System::Mesh => {
                let sandbox = Sandbox::up(name, topology, mesh, &mut progress)?;
                Self { system, sandbox, proxies: Vec::new(), peers: Vec::new() }
            }
            System::Peer => {
                let binary = peer_binary.context("no binary of the peer was given")?;
                let sandbox = Sandbox::network(name, topology, mesh, &mut progress)?;
                let mut place = Self { system, sandbox, proxies: Vec::new(), peers: Vec::new() };
                if let Err(error) = place.start_peers(binary) {
                    place.down()?;
                    return Err(error);
                }
                place
            }
        };
        place.find_proxies();
        if let Err(error) = place.tune() {
            place.down()?;
            return Err(error);
        }
        Ok(place)
    }

    /// A client that opens ten thousand connections a second runs out of ports after three, whatever carries them.
    fn tune(&self) -> Result<()> {
        for workload in &self.sandbox.topology().workloads {
            netns::run_in(&self.sandbox.layout.netns(&workload.key()), || {
                for (name, value) in PORT_SETTINGS {
                    std::fs::write(format!("/proc/sys/net/ipv4/{name}"), value).context(name)?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn start_peers(&mut self, binary: &Path) -> Result<()> {
        self.peers = peer::start(&mut self.sandbox, binary)?;
        [Distance::Across, Distance::Same].iter().try_for_each(|d| self.sandbox.start_workload(d.server()))
    }

    fn find_proxies(&mut self) {
        let nodes = self.sandbox.topology().nodes.clone();
        self.proxies = match self.system {
            System::Direct => Vec::new(),
            System::Mesh => nodes
                .iter()
                .filter_map(|n| Some((n.name.clone(), self.sandbox.running(&Part::Node(n.name.clone()))?.pid)))
                .collect(),
            System::Peer => {
                nodes.iter().zip(&self.peers).map(|(n, child)| (n.name.clone(), child.id().cast_signed())).collect()
            }
        };
    }

    /// Ends it.
    ///
    /// # Errors
    /// Something is left.
    pub fn down(mut self) -> Result<()> {
        peer::end(&mut self.peers)?;
        self.sandbox.down()
    }

    /// Resident memory of all node proxies, KiB.
    ///
    /// # Errors
    /// One is gone.
    pub fn proxies_rss_kib(&self) -> Result<u64> {
        self.proxies.iter().flat_map(|(_, pid)| cpu::family(*pid)).map(cpu::rss_kib).sum()
    }

    /// Resident memory of a node's processes, KiB, mean of the nodes.
    ///
    /// # Errors
    /// One is gone.
    pub fn resident(&self) -> Result<Resident> {
        let mut sum = Resident::default();
        for (_, pid) in &self.proxies {
            let (first, rest) = (cpu::rss_kib(*pid)?, cpu::family(*pid).into_iter().filter(|child| child != pid));
            let rest = rest.map(cpu::rss_kib).collect::<Result<Vec<_>>>()?;
            // Of several processes the first watches over the one that carries connections.
            let (proxy, supervisor) = if rest.is_empty() { (first, 0) } else { (rest.iter().sum(), first) };
            sum = Resident { proxy_kib: sum.proxy_kib + proxy, supervisor_kib: sum.supervisor_kib + supervisor };
        }
        let nodes = self.proxies.len().max(1) as u64;
        Ok(Resident { proxy_kib: sum.proxy_kib / nodes, supervisor_kib: sum.supervisor_kib / nodes })
    }

    /// Pins all that takes part: everything of the first node to CPU 0, of the second to CPU 1; for work on one node
    /// everything to CPU 0.
    ///
    /// # Errors
    /// Not permitted.
    pub fn pin(&self, distance: Distance) -> Result<()> {
        let cpu_of = |node: &str| usize::from(distance == Distance::Across && node == "node-b");
        for (node, pid) in &self.proxies {
            pin(&cpu::family(*pid), cpu_of(node))?;
        }
        for workload in [Distance::Across.server(), Distance::Same.server()] {
            let node = &self.sandbox.workload(workload)?.node;
            if let Some(process) = self.sandbox.running(&Part::Workload(workload.into())) {
                pin(&cpu::family(process.pid), cpu_of(node))?;
            }
        }
        Ok(())
    }

    /// Fails unless every connection that the client's node proxy has carried was authorized by both identities: a mesh
    /// that lets traffic through in clear would win every benchmark.
    ///
    /// # Errors
    /// One was not, there was none, or the node proxy does not say.
    pub fn prove_mutual(&self) -> Result<()> {
        if self.system == System::Direct {
            return Ok(());
        }
        let node = &self.sandbox.workload(CLIENT)?.node;
        let page = page_of(&self.sandbox, node, METRICS_PORT, "/metrics").context("metrics of the node proxy")?;
        let opened = page.lines().filter(|line| line.starts_with(OPENED) && line.contains("reporter=\"source\""));
        let (mutual, clear): (Vec<_>, Vec<_>) = opened.partition(|line| line.contains(MUTUAL));
        if mutual.is_empty() || !clear.is_empty() {
            bail!("{:?} is no mesh: with mutual TLS {mutual:?}, without {clear:?}", self.system);
        }
        Ok(())
    }

    /// Runs one load from the client; returns what it did and the CPU seconds of client, server and proxies.
    ///
    /// # Errors
    /// The client fails.
    pub fn run(&self, distance: Distance, work: Work, connections: usize, secs: f64) -> Result<(Outcome, f64)> {
        let mut command = self.client(distance, work, connections, secs)?;
        let before = self.cpu_secs(distance);
        let output = command.stdout(Stdio::piped()).output().context("load client")?;
        if !output.status.success() {
            bail!("{:?} {work:?}: {}", self.system, String::from_utf8_lossy(&output.stderr).trim());
        }
        let (outcome, client_cpu): (Outcome, f64) =
            serde_json::from_slice(&output.stdout).context("the load client's answer")?;
        Ok((outcome, self.cpu_secs(distance) - before + client_cpu))
    }

    /// A client process for a load, not started.
    ///
    /// # Errors
    /// The client's namespace is gone.
    pub fn client(&self, distance: Distance, work: Work, connections: usize, secs: f64) -> Result<Command> {
        let server = self.sandbox.workload(distance.server())?;
        let address = self.sandbox.topology().addresses(server).context("address of the server")?[0];
        let own = std::env::current_exe().context("path of this program")?;
        let mut command = self.sandbox.command(CLIENT, &own.display().to_string())?;
        let work = serde_json::to_value(work).context("name of the work")?;
        command.args(["client", "--work", work.as_str().context("name of the work")?]);
        command.args(["--target", &format!("{address}:{PORT}"), "--connections", &connections.to_string()]);
        command.args(["--secs", &secs.to_string(), "--cpu", "0"]);
        command.process_group(0);
        Ok(command)
    }

    fn cpu_secs(&self, distance: Distance) -> f64 {
        let server = self.sandbox.running(&Part::Workload(distance.server().into())).map(|p| p.pid);
        let roots = self.proxies.iter().map(|(_, pid)| *pid).chain(server);
        roots.flat_map(cpu::family).map(cpu::cpu_secs).sum()
    }
}

/// Pins all threads of processes to a CPU.
fn pin(pids: &std::collections::BTreeSet<i32>, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).context("CPU number")?;
    for pid in pids {
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for task in tasks.flatten() {
            if let Some(tid) = task.file_name().to_str().and_then(|t| t.parse().ok()) {
                sched_setaffinity(Pid::from_raw(tid), &set).with_context(|| format!("pin {tid} to CPU {cpu}"))?;
            }
        }
    }
    Ok(())
}

fn topology(direct: bool) -> Result<Topology> {
    let own = std::env::current_exe().context("path of this program")?.display().to_string();
    let workload = |name: &str, node: &str| {
        let workload = Workload::new(name, node).label("app", name);
        if direct { workload.outside_mesh() } else { workload }
    };
    let server = |name: &str, node: &str| {
        let listen = format!("0.0.0.0:{PORT}");
        workload(name, node).runs([own.as_str(), "serve", "--listen", listen.as_str()]).ready_on(PORT)
    };
    Ok(Topology::new()
        .node("node-a")
        .node("node-b")
        .namespace(DEFAULT_NAMESPACE, &[("istio.io/dataplane-mode", "ambient")])
        .workload(workload(CLIENT, "node-a"))
        .workload(server(Distance::Same.server(), "node-a"))
        .workload(server(Distance::Across.server(), "node-b")))
}
