//! The processes of a sandbox's mesh: controller, enrolment agent, a node proxy on each node.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mesh_api::admin::{ControllerStatus, NodeStatus};

use super::build::{POLL, Sandbox};
use super::process::Place;
use super::state::{Mesh, Part};
use super::topology::{CONTROLLER_HOST, Topology};
use super::{Progress, files};
use crate::admin;

/// Each process of the mesh has to be ready within this time.
const READY_WITHIN: Duration = Duration::from_secs(20);
/// All nodes have what the controller publishes within this time: longer than they wait between two dials.
const IN_SYNC_WITHIN: Duration = Duration::from_secs(20);
/// Port of the controller's gRPC services.
const CONTROLLER_PORT: u16 = 15012;
/// Name in the controller's certificate.
const SERVER_NAME: &str = "istiod.istio-system.svc";
/// Lifetime of the nodes' tokens: longer than a sandbox is kept, because nobody renews them.
const TOKEN_TTL: &str = "720h";
/// Lines of a log that are shown when its process does not come up.
const LOG_TAIL_LINES: usize = 15;

/// Directory of the binaries: that of the running one, for test binaries the one above `deps`.
///
/// # Errors
/// `/proc/self/exe` cannot be read.
pub fn binaries_beside() -> Result<PathBuf> {
    let own = std::env::current_exe().context("path of this program")?;
    let dir = own.parent().unwrap_or(Path::new("/"));
    let dir = if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir };
    Ok(dir.to_path_buf())
}

/// A binary in the directory of binaries.
pub(super) fn binary(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    if !path.is_file() {
        bail!("{} is not built; build it with `cargo xtask build`", path.display());
    }
    Ok(path)
}

impl Mesh {
    /// The mesh whose binaries lie beside this one.
    ///
    /// # Errors
    /// A binary is not built.
    pub fn beside() -> Result<Self> {
        let binaries = binaries_beside()?;
        for name in ["mesh-controller", "mesh-node", "mesh-ctl"] {
            binary(&binaries, name)?;
        }
        Ok(Self { binaries, node_args: Vec::new(), controller_args: Vec::new() })
    }
}

impl Sandbox {
    /// Starts those of the mesh's processes that do not run, and waits until they are ready.
    pub(super) fn start_mesh(&mut self, progress: Progress<'_>) -> Result<()> {
        if self.running(&Part::Agent).is_none() {
            self.start_agent()?;
        }
        if self.running(&Part::Controller).is_none() {
            progress("controller");
            self.start_controller()?;
        }
        let nodes: Vec<String> = self.state.topology.nodes.iter().map(|n| n.name.clone()).collect();
        progress(&format!("node proxies on {}", nodes.join(", ")));
        for node in &nodes {
            if self.running(&Part::Node(node.clone())).is_none() {
                self.start_node(node, &[])?;
            }
        }
        nodes.iter().try_for_each(|node| self.wait_node_ready(node))?;
        // One that was ready by its stored configuration may still wait to dial the controller again.
        for late in self.wait_nodes_in_sync()? {
            progress(&format!("{late} has not what the controller publishes"));
        }
        Ok(())
    }

    /// Waits until every node has what the controller publishes; those that do not have it in time, and why.
    ///
    /// # Errors
    /// The controller does not answer.
    pub fn wait_nodes_in_sync(&self) -> Result<Vec<String>> {
        let deadline = Instant::now() + IN_SYNC_WITHIN;
        loop {
            let status: ControllerStatus = block_on(admin::get(&self.layout.controller_admin(), "/status"))?;
            let late: Vec<String> = self.state.topology.nodes.iter().filter_map(|n| behind(&status, &n.name)).collect();
            if late.is_empty() || Instant::now() > deadline {
                return Ok(late);
            }
            std::thread::sleep(POLL);
        }
    }

    /// Starts the controller and waits until it serves.
    ///
    /// # Errors
    /// It does not come up; the end of its log is given.
    pub fn start_controller(&mut self) -> Result<()> {
        let more = self.mesh()?.controller_args.clone();
        self.start_controller_with(&more)
    }

    /// As [`Self::start_controller`], with other arguments than the sandbox's.
    ///
    /// # Errors
    /// As [`Self::start_controller`].
    pub fn start_controller_with(&mut self, more: &[String]) -> Result<()> {
        let mesh = self.mesh()?;
        let dir = self.layout.controller();
        let mut argv = vec![binary(&mesh.binaries, "mesh-controller")?.display().to_string(), "run".into()];
        argv.extend(flags(&[
            ("--config-dir", &self.layout.config()),
            ("--state-dir", &dir.join("state")),
            ("--admin-socket", &self.layout.controller_admin()),
        ]));
        argv.extend(["--listen".into(), format!("0.0.0.0:{CONTROLLER_PORT}")]);
        argv.extend_from_slice(more);
        let place = self.host_place(CONTROLLER_HOST, "controller")?;
        self.spawn(Part::Controller, &argv, &[], place)?;
        let socket = self.layout.controller_admin();
        self.wait(&Part::Controller, || block_on(admin::send(&socket, "GET", "/ready", Vec::new())).map(|_| true))
    }

    /// Starts a node's proxy with more arguments than those of the sandbox; does not wait.
    ///
    /// # Errors
    /// There is no such binary, or no token for the node.
    pub fn start_node(&mut self, node: &str, more: &[String]) -> Result<()> {
        self.node_token(node)?;
        let mut argv = self.node_argv(node)?;
        argv.extend_from_slice(more);
        let place = Place::open(&self.layout.proxy_cgroup(node), Some(&self.layout.netns(node)))?;
        self.spawn(Part::Node(node.to_string()), &argv, &[], place)
    }

    /// File with the token of a node, issued when there is none yet.
    ///
    /// # Errors
    /// There is no mesh, or the controller's program refuses.
    pub fn node_token(&self, node: &str) -> Result<PathBuf> {
        let token = self.layout.node(node).join("token");
        if !token.exists() {
            files::replace(&token, &self.issue_token(node)?, 0o600)?;
        }
        Ok(token)
    }

    /// The command line of a node's proxy.
    ///
    /// # Errors
    /// There is no mesh, or no such binary.
    pub fn node_argv(&self, node: &str) -> Result<Vec<String>> {
        let (mesh, layout) = (self.mesh()?, &self.layout);
        let dir = layout.node(node);
        let controller = Topology::host_addresses(0)[0];
        let mut argv = vec![binary(&mesh.binaries, "mesh-node")?.display().to_string(), "run".into()];
        argv.extend(["--node".into(), node.into()]);
        argv.extend(["--controller".into(), format!("{controller}:{CONTROLLER_PORT}")]);
        argv.extend(["--server-name".into(), SERVER_NAME.into()]);
        argv.extend(flags(&[
            ("--root-cert", &layout.controller().join("state/root-cert.pem")),
            ("--token-file", &dir.join("token")),
            ("--state-dir", &dir.join("state")),
            ("--bpffs", &layout.bpf().join(node)),
            ("--cgroup", &layout.pods_cgroup(node)),
            ("--agent-socket", &layout.node_agent(node)),
            ("--admin-socket", &layout.node_admin(node)),
            ("--access-log", &dir.join("access.log")),
        ]));
        argv.extend(["--access-log-format".into(), "json".into()]);
        argv.extend(mesh.node_args.clone());
        Ok(argv)
    }

    /// Waits until a node's proxy is ready.
    ///
    /// # Errors
    /// It is not in time; what it waits for and the end of its log are given.
    pub fn wait_node_ready(&self, node: &str) -> Result<()> {
        let socket = self.layout.node_admin(node);
        self.wait(&Part::Node(node.to_string()), || {
            block_on(admin::get::<NodeStatus>(&socket, "/status")).map(|status| status.ready)
        })
    }

    /// Starts the enrolment agent and waits for its socket.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start_agent(&mut self) -> Result<()> {
        let argv = ["sandbox", "agent", "--sandbox", &self.layout.name].map(String::from);
        let argv: Vec<String> = std::iter::once(self.own_binary()?.display().to_string()).chain(argv).collect();
        let place = Place::open(&self.layout.part_cgroup("agent"), None)?;
        self.spawn(Part::Agent, &argv, &[], place)?;
        let socket = self.layout.agent_control();
        self.wait(&Part::Agent, || super::agent::control::status(&socket).map(|_| true))
    }

    fn mesh(&self) -> Result<&Mesh> {
        self.state.mesh.as_ref().context("this sandbox has no mesh")
    }

    fn issue_token(&self, node: &str) -> Result<String> {
        let program = binary(&self.mesh()?.binaries, "mesh-controller")?;
        let mut command = Command::new(program);
        command.args(["token", node, "--ttl", TOKEN_TTL, "--state-dir"]).arg(self.layout.controller().join("state"));
        let output = command.output().context("run mesh-controller token")?;
        if !output.status.success() {
            bail!("mesh-controller token {node}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        String::from_utf8(output.stdout).context("token")
    }

    fn wait<E: std::fmt::Display>(&self, part: &Part, ready: impl Fn() -> Result<bool, E>) -> Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let answer = ready();
            if matches!(answer, Ok(true)) {
                return Ok(());
            }
            let dead = self.running(part).is_none();
            if dead || Instant::now() > deadline {
                let log = self.layout.log(part);
                let what = if dead {
                    "has ended".to_string()
                } else {
                    format!("is not ready after {} s", READY_WITHIN.as_secs())
                };
                let why = answer.err().filter(|_| !dead).map(|e| format!(" ({e})")).unwrap_or_default();
                bail!("{part} {what}{why}. The end of {}:\n{}", log.display(), tail(&log));
            }
            std::thread::sleep(POLL);
        }
    }
}

/// `NODE (WHY)` for a node that has not all that the controller publishes.
fn behind(status: &ControllerStatus, node: &str) -> Option<String> {
    let mut streams = status.nodes.iter().filter(|stream| stream.node == node).peekable();
    if streams.peek().is_none() {
        return Some(format!("{node} (not connected)"));
    }
    streams.find(|stream| stream.sync != "SYNCED").map(|stream| format!("{node} ({})", stream.sync))
}

fn flags(pairs: &[(&str, &PathBuf)]) -> Vec<String> {
    pairs.iter().flat_map(|(flag, path)| [flag.to_string(), path.display().to_string()]).collect()
}

/// Last lines of a log.
fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
}

fn block_on<T>(future: impl Future<Output = Result<T, admin::AdminError>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("runtime")?;
    Ok(runtime.block_on(future)?)
}
