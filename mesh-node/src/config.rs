//! The command line of `mesh-node`; every flag is also an environment variable `MESH_<FLAG>`.
//!
//! Here: flags and what they mean together. Not here: doing anything.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use mesh_agent::kubernetes::Owner;

use crate::runtime::{AccessLogConfig, AccessLogFormat, DataPathConfig};

/// The value of `--cgroup` that has the directory looked for.
pub const AUTO: &str = "auto";
/// Longest time that a proxy may drain: an orchestrator kills it long before.
const MAX_DRAIN: Duration = Duration::from_secs(3600);
/// Most worker threads; beyond the CPUs of a big machine more only cost memory.
const MAX_WORKERS: usize = 256;

/// The node proxy: captures connections of enrolled workloads, authorizes them and carries them between nodes.
#[derive(Debug, Parser)]
#[command(name = "mesh-node", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the node proxy under its supervisor until SIGTERM
    Run(Box<Config>),
    /// The proxy itself, started by `run`
    #[command(hide = true)]
    Proxy(Box<Config>),
    /// Run a Kubernetes node's agent: tell the node proxy which pods belong to the mesh
    Agent(AgentArgs),
    /// Remove all that was pinned or attached in the kernel, and say what
    Cleanup(CleanupArgs),
    /// Say which kernel features are needed and which are there
    Check,
    /// Wait until this pod's agent has ended: it may have something to say to the node proxy at its end
    AgentEnded(AgentEndedArgs),
    /// Exit with 0 if the node proxy of this pod is ready, for a probe: on one node, two share the readiness port
    Ready(ReadyArgs),
    /// Carry standard input and output to the admin interface of the node proxy that runs here
    Admin(AdminArgs),
}

/// Flags of `ready`.
#[derive(Debug, Args)]
pub struct ReadyArgs {
    /// Pod that should be ready
    #[arg(long, env = "MESH_POD", value_name = "NAME", value_parser = parse_name)]
    pub pod: String,
    /// Address of the readiness port
    #[arg(long, env = "MESH_READY_ADDR", default_value = "127.0.0.1:15021", value_name = "ADDR")]
    pub ready_addr: SocketAddr,
}

/// Flags of `admin`.
#[derive(Debug, Args)]
pub struct AdminArgs {
    /// Unix socket of the admin interface
    #[arg(long, env = "MESH_ADMIN_SOCKET", value_name = "PATH")]
    pub admin_socket: PathBuf,
}

/// Flags of `agent`.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Name of this node
    #[arg(long, env = "MESH_NODE", value_name = "NAME", value_parser = parse_name, required_unless_present = "uninstall")]
    pub node: Option<String>,
    /// Unix socket that the node proxy connects to
    #[arg(long, env = "MESH_AGENT_SOCKET", value_name = "PATH", required_unless_present = "uninstall")]
    pub agent_socket: Option<PathBuf>,
    /// Pods that wait for the mesh when they start
    #[command(flatten)]
    pub cni: CniArgs,
    /// File that is locked as long as this agent lives, for `agent-ended`
    #[arg(long, env = "MESH_ALIVE_FILE", value_name = "PATH")]
    pub alive_file: Option<PathBuf>,
    /// DaemonSet that runs the agents; when it is deleted, an agent that is told to end takes its CNI configuration away and
    /// lets its pods go
    #[arg(long, env = "MESH_DAEMONSET", value_name = "NAMESPACE/NAME")]
    pub daemonset: Option<Owner>,
    /// Remove the CNI configuration, plugin and state of this node, and end
    #[arg(long, requires = "cni_conf_dir")]
    pub uninstall: bool,
    /// Form of the log on stderr; RUST_LOG selects what is logged
    #[arg(long, env = "MESH_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// Flags of `agent` that make pods wait when they start. Paths are the same here and on the node.
#[derive(Debug, Args)]
pub struct CniArgs {
    /// The container runtime's directory of CNI configurations; without it pods start before the mesh serves them
    #[arg(long, env = "MESH_CNI_CONF_DIR", value_name = "DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// The container runtime's directory of CNI plugins: `mesh-cni`, which lies beside this program, is copied there
    #[arg(long, env = "MESH_CNI_BIN_DIR", value_name = "DIR", requires = "cni_conf_dir")]
    pub cni_bin_dir: Option<PathBuf>,
    /// Unix socket that the CNI plugin connects to
    #[arg(long, env = "MESH_CNI_SOCKET", default_value = "/run/mesh/cni.sock", value_name = "PATH")]
    pub cni_socket: PathBuf,
    /// Directory of what the CNI plugin knows while the agent is away
    #[arg(long, env = "MESH_CNI_STATE_DIR", default_value = "/var/lib/mesh/cni", value_name = "DIR")]
    pub cni_state_dir: PathBuf,
}

/// Flags of `agent-ended`.
#[derive(Debug, Args)]
pub struct AgentEndedArgs {
    /// The agent's `--alive-file`
    #[arg(long, env = "MESH_ALIVE_FILE", value_name = "PATH")]
    pub alive_file: PathBuf,
    /// Longest wait
    #[arg(long, default_value = "30s", value_name = "DURATION", value_parser = parse_drain)]
    pub within: Duration,
}

/// Flags of `cleanup`.
#[derive(Debug, Args)]
pub struct CleanupArgs {
    /// Directory of the pins, on a BPF file system
    #[arg(long, env = "MESH_BPFFS", value_name = "DIR")]
    pub bpffs: PathBuf,
    /// Cgroup that was captured; programs that are still attached to it are named
    #[arg(long, env = "MESH_CGROUP", value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// Also while a node proxy serves the workloads: from then on everything goes around it
    #[arg(long)]
    pub force: bool,
}

/// Flags of `run`, and of the `proxy` that it starts with the same ones.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// Name of this node
    #[arg(long, env = "MESH_NODE", value_name = "NAME", value_parser = parse_name)]
    pub node: String,
    /// Pod that this process runs in [default: the name of the node]
    #[arg(long, env = "MESH_POD", value_name = "NAME", value_parser = parse_name)]
    pub pod: Option<String>,
    /// Namespace of that pod
    #[arg(long, env = "MESH_POD_NAMESPACE", default_value = "istio-system", value_name = "NAME", value_parser = parse_name)]
    pub pod_namespace: String,
    /// Address of that pod
    #[arg(long, env = "MESH_POD_IP", value_name = "IP")]
    pub pod_ip: Option<IpAddr>,
    /// Controller
    #[arg(long, env = "MESH_CONTROLLER", value_name = "HOST:PORT", value_parser = parse_host_port)]
    pub controller: String,
    /// Name that the controller's certificate must have
    #[arg(long, env = "MESH_SERVER_NAME", default_value = "istiod.istio-system.svc", value_name = "NAME")]
    pub server_name: String,
    /// Roots that the controller's certificate must chain to, PEM; read again for each connection
    #[arg(long, env = "MESH_ROOT_CERT", value_name = "FILE")]
    pub root_cert: PathBuf,
    /// This node's token; read again for each connection
    #[arg(long, env = "MESH_TOKEN_FILE", value_name = "FILE")]
    pub token_file: PathBuf,
    /// Directory of the lock, the hand-over socket and the last good configuration
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Directory for pins, on a BPF file system
    #[arg(long, env = "MESH_BPFFS", value_name = "DIR")]
    pub bpffs: PathBuf,
    /// Cgroup v2 directory above all workloads; `auto` is that of a kubelet's pods
    #[arg(long, env = "MESH_CGROUP", value_name = "DIR")]
    pub cgroup: PathBuf,
    /// Unix socket of the agent that announces workloads
    #[arg(long, env = "MESH_AGENT_SOCKET", value_name = "PATH")]
    pub agent_socket: PathBuf,
    /// Unix socket of the admin interface
    #[arg(long, env = "MESH_ADMIN_SOCKET", value_name = "PATH")]
    pub admin_socket: PathBuf,
    /// Address of the metrics port
    #[arg(long, env = "MESH_METRICS_ADDR", default_value = "0.0.0.0:15020", value_name = "ADDR")]
    pub metrics_addr: SocketAddr,
    /// Address of the readiness port
    #[arg(long, env = "MESH_READY_ADDR", default_value = "0.0.0.0:15021", value_name = "ADDR")]
    pub ready_addr: SocketAddr,
    /// Cluster id
    #[arg(long, env = "MESH_CLUSTER", default_value = "Kubernetes", value_name = "ID", value_parser = parse_cluster)]
    pub cluster: String,
    /// Network of this node; workloads of other networks are not reached from here
    #[arg(long, env = "MESH_NETWORK", default_value = "", value_name = "ID")]
    pub network: String,
    /// The only trust domain whose identities are accepted
    #[arg(long, env = "MESH_TRUST_DOMAIN", default_value = "cluster.local", value_name = "NAME", value_parser = parse_name)]
    pub trust_domain: String,
    /// Namespace whose policies are mesh-wide: one that cannot be understood refuses all connections of the mesh, and not
    /// of its namespace alone
    #[arg(long, env = "MESH_ROOT_NAMESPACE", default_value = "istio-system", value_name = "NAMESPACE", value_parser = parse_name)]
    pub root_namespace: String,
    /// Worker threads [default: one for each CPU that this process may use]
    #[arg(long, env = "MESH_WORKERS", value_name = "N", value_parser = parse_workers)]
    pub workers: Option<NonZeroUsize>,
    /// How long connections may go on after SIGTERM
    #[arg(long, env = "MESH_DRAIN", default_value = "10s", value_name = "DURATION", value_parser = parse_drain)]
    pub drain: Duration,
    /// Carry connections between two workloads of this node through a tunnel too
    #[arg(long, env = "MESH_FORCE_TUNNEL")]
    pub force_tunnel: bool,
    /// Form of the log on stderr; RUST_LOG selects what is logged
    #[arg(long, env = "MESH_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Where the access log goes: `-` is standard output; none is written unless it is given
    #[arg(long, env = "MESH_ACCESS_LOG", value_name = "PATH")]
    pub access_log: Option<PathBuf>,
    /// Form of the access log
    #[arg(long, env = "MESH_ACCESS_LOG_FORMAT", default_value = "text")]
    pub access_log_format: LogFormat,
    /// Take listeners, keys and duty over from the node proxy that runs on this state directory, if one does
    #[arg(long, env = "MESH_TAKEOVER")]
    pub takeover: bool,
    /// When another one has taken over, drain and then wait for SIGTERM: for who starts a process again that ends
    #[arg(long, env = "MESH_STAY")]
    pub stay: bool,
    /// Move into this cgroup v2 directory first; it must not be above the captured one
    #[arg(long, env = "MESH_OWN_CGROUP", value_name = "DIR")]
    pub own_cgroup: Option<PathBuf>,
}

/// Form of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Config {
    /// What the data path needs of it.
    pub fn data_path(&self) -> DataPathConfig {
        DataPathConfig {
            node: self.node.as_str().into(),
            cluster: self.cluster.as_str().into(),
            trust_domain: self.trust_domain.as_str().into(),
            workers: self.workers,
            force_tunnel: self.force_tunnel,
            access_log: self.access_log.as_ref().map(|path| AccessLogConfig {
                path: (path.as_os_str() != "-").then(|| path.clone()),
                format: match self.access_log_format {
                    LogFormat::Text => AccessLogFormat::Text,
                    LogFormat::Json => AccessLogFormat::Json,
                },
            }),
        }
    }
}

/// `500ms`, `10s`, `5m`; zero is a drain that resets everything at once.
fn parse_drain(text: &str) -> Result<Duration, String> {
    let refuse = || format!("`{text}` is not a duration such as 500ms, 10s or 5m, at most {} s", MAX_DRAIN.as_secs());
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| refuse())?;
    let unit_millis = match &text[digits.len()..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        _ => return Err(refuse()),
    };
    let drain = number.checked_mul(unit_millis).map(Duration::from_millis);
    drain.filter(|drain| *drain <= MAX_DRAIN).ok_or_else(refuse)
}

fn parse_workers(text: &str) -> Result<NonZeroUsize, String> {
    let workers = text.parse().ok().filter(|workers: &NonZeroUsize| workers.get() <= MAX_WORKERS);
    workers.ok_or_else(|| format!("`{text}` is not a number from 1 to {MAX_WORKERS}"))
}

/// A DNS name: it is a part of identities and of metadata.
fn parse_name(text: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.' || c == '-';
    if text.is_empty() || text.len() > 253 || !text.chars().all(good) {
        return Err(format!("`{text}` is not a DNS name of lower-case letters, digits, `-` and `.`"));
    }
    Ok(text.to_owned())
}

/// Goes into a header of every call to the controller.
fn parse_cluster(text: &str) -> Result<String, String> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(format!("`{text}` is not a name of printable ASCII characters without spaces"));
    }
    Ok(text.to_owned())
}

fn parse_host_port(text: &str) -> Result<String, String> {
    let port = text.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse().ok());
    match port {
        Some(1_u16..) => Ok(text.to_owned()),
        Some(0) | None => Err(format!("`{text}` is not HOST:PORT")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_every_flag_is_an_environment_variable() {
        Cli::command().debug_assert();
        let mut command = Cli::command();
        let run = command.find_subcommand_mut("run").expect("run");
        for argument in run.get_arguments().filter(|a| !["help", "version"].contains(&a.get_id().as_str())) {
            let flag = argument.get_long().expect("only flags").to_uppercase().replace('-', "_");
            assert_eq!(argument.get_env().and_then(|e| e.to_str()), Some(format!("MESH_{flag}").as_str()));
        }
    }

    #[test]
    fn an_agent_needs_a_name_and_a_socket_and_its_uninstallation_needs_neither() {
        let is_fine =
            |flags: &str| Cli::try_parse_from(["mesh-node", "agent"].into_iter().chain(flags.split(' '))).is_ok();
        assert!(is_fine("--node a --agent-socket /s"));
        assert!(is_fine("--node a --agent-socket /s --cni-conf-dir /c --cni-bin-dir /b"));
        assert!(is_fine("--uninstall --cni-conf-dir /c"));
        assert!(!is_fine("--node a"));
        assert!(!is_fine("--uninstall"));
        assert!(!is_fine("--node a --agent-socket /s --cni-bin-dir /b"));
    }

    #[test]
    fn values_that_cannot_be_are_refused() {
        for (parse, good, bad) in [
            (
                (|text| parse_drain(text).map(drop)) as fn(&str) -> Result<(), String>,
                &["500ms", "0s", "10s", "60m"][..],
                &["", "s", "10", "10h", "-1s", "61m", "99999999999999999999s"][..],
            ),
            (|text| parse_workers(text).map(drop), &["1", "256"], &["0", "257", "x", ""]),
            (|text| parse_cluster(text).map(drop), &["Kubernetes", "c1.west"], &["", "two words", "\u{e4}"]),
            (|text| parse_name(text).map(drop), &["node-a", "cluster.local"], &["", "Node", "a/b", "a b"]),
            (
                |text| parse_host_port(text).map(drop),
                &["10.0.0.1:15012", "istiod.istio-system.svc:15012", "[fd00::1]:15012"],
                &["", "host", ":15012", "host:0", "host:65536", "host:"],
            ),
        ] {
            good.iter().for_each(|text| assert!(parse(text).is_ok(), "{text} is fine"));
            bad.iter().for_each(|text| assert!(parse(text).is_err(), "{text} is not"));
        }
    }
}
