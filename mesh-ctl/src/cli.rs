//! The command line as a tree of types.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::sandbox::serve::Protocol;
use crate::target::ROOT_NAMESPACE;

/// Name of the sandbox that is meant if none is named.
const DEFAULT_SANDBOX: &str = "default";
/// Flags that name the parts of a mesh one by one.
const SOCKETS: [&str; 2] = ["admin_socket", "controller_socket"];

/// Inspect an ambient mesh, and try one out on this machine.
#[derive(Debug, Parser)]
#[command(name = "mesh-ctl", version, max_term_width = 100, subcommand_required = true, arg_required_else_help = true)]
#[command(
    after_help = "Which mesh: that of --kubeconfig or --context; else of --admin-socket and --controller-socket; else of \
--sandbox; if none of these is given, the sandbox `default` if it is up, else the cluster that the kubeconfig names (as kubectl \
finds it; in a pod, its own)."
)]
pub struct Cli {
    /// Where to look and how to print.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Arguments that every verb takes.
#[derive(Debug, Clone, Default, Args)]
pub struct Global {
    /// Output format.
    #[arg(short, long, global = true, value_enum, default_value_t, help_heading = "Output")]
    pub output: Format,
    /// Leave the table's header out.
    #[arg(long, global = true, help_heading = "Output")]
    pub no_headers: bool,
    /// Sandbox to look at, make, use or end; those with different names do not meet [default: default].
    #[arg(long, global = true, value_name = "NAME", env = "MESH_SANDBOX", help_heading = "Selectors")]
    pub sandbox: Option<String>,
    /// Kubeconfig of the cluster to look at [default: KUBECONFIG, else ~/.kube/config].
    #[arg(long, global = true, value_name = "FILE", help_heading = "Selectors", conflicts_with_all = SOCKETS)]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig [default: its current one].
    #[arg(long, global = true, value_name = "NAME", help_heading = "Selectors", conflicts_with_all = SOCKETS)]
    pub context: Option<String>,
    /// Kubernetes namespace of the mesh's own parts.
    #[arg(
        short,
        long,
        global = true,
        value_name = "NAMESPACE",
        default_value = ROOT_NAMESPACE,
        visible_alias = "mesh-namespace",
        help_heading = "Selectors"
    )]
    pub istio_namespace: String,
    /// Admin socket of a node proxy, instead of a sandbox's (repeatable).
    #[arg(long, global = true, value_name = "PATH", help_heading = "Selectors")]
    pub admin_socket: Vec<PathBuf>,
    /// Admin socket of the controller, instead of a sandbox's.
    #[arg(long, global = true, value_name = "PATH", help_heading = "Selectors")]
    pub controller_socket: Option<PathBuf>,
    /// Only this node.
    #[arg(long, global = true, value_name = "NODE", help_heading = "Selectors")]
    pub node: Option<String>,
    /// Only this Kubernetes namespace; also completes names given without one [default: that of the context].
    #[arg(short, long, global = true, value_name = "NAMESPACE", help_heading = "Selectors")]
    pub namespace: Option<String>,
    /// All Kubernetes namespaces (the default for lists).
    #[arg(short = 'A', long, global = true, conflicts_with = "namespace", help_heading = "Selectors")]
    pub all_namespaces: bool,
}

impl Global {
    /// The sandbox that is meant.
    pub fn sandbox_name(&self) -> &str {
        self.sandbox.as_deref().unwrap_or(DEFAULT_SANDBOX)
    }
}

/// A saved dump instead of a running mesh.
#[derive(Debug, Clone, Default, Args)]
pub struct Saved {
    /// Read from a dump that `node-config all` wrote, as JSON or YAML.
    #[arg(short, long, value_name = "FILE", help_heading = "Selectors")]
    pub file: Option<PathBuf>,
}

/// How to print.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns that fit a terminal.
    #[default]
    #[value(alias = "short")]
    Table,
    /// All columns.
    Wide,
    /// `{apiVersion: mesh-ctl/v1, kind, items}`.
    Json,
    /// The same as YAML.
    Yaml,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Make, use and end a mesh on this machine (needs root).
    Sandbox(SandboxArgs),
    /// Controller and nodes at a glance, and what is wrong with the configuration.
    Status(Saved),
    /// What the node proxies have been told and what they do with it.
    #[command(visible_aliases = ["zc", "ztunnel-config"])]
    NodeConfig {
        /// Which part.
        #[command(subcommand)]
        what: NodeConfig,
    },
    /// What the kernel programs are attached to and what they did.
    Bpf {
        /// Which part.
        #[command(subcommand)]
        what: Bpf,
    },
    /// Connections of a workload, from the access logs of its node and of its peers' nodes.
    Logs(LogsArgs),
    /// Authentication between workloads.
    Authn {
        /// Which check.
        #[command(subcommand)]
        what: Authn,
    },
    /// Is it mTLS from SRC to DST: as configured, and as observed? Same as `authn tls-check`.
    MtlsCheck(TlsCheckArgs),
    /// Authorization between workloads.
    Authz {
        /// Which question.
        #[command(subcommand)]
        what: Authz,
    },
    /// Whether every node proxy has the controller's configuration.
    #[command(visible_alias = "ps")]
    ProxyStatus(Saved),
    /// What is wrong with the configuration of the mesh as a whole; with FILES: once they are applied.
    Analyze(AnalyzeArgs),
    /// Take the pods of namespaces into the mesh (on Kubernetes).
    #[command(visible_alias = "enrol")]
    Enroll(EnrollArgs),
    /// Take the pods of namespaces out of the mesh.
    #[command(visible_alias = "unenrol")]
    Unenroll(EnrollArgs),
    /// What is wrong with the objects of files, each alone, without a mesh.
    Validate(ValidateArgs),
    /// Versions of this program, the controller and the nodes.
    Version(Saved),
    /// Completion script for a shell.
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Parts of a node's configuration.
#[derive(Debug, Subcommand)]
pub enum NodeConfig {
    /// Workloads that the node knows.
    #[command(visible_alias = "workloads")]
    Workload(Saved),
    /// Services and their endpoints.
    #[command(visible_alias = "services")]
    Service(Saved),
    /// Authorization policies.
    #[command(visible_alias = "policies")]
    Policy(Saved),
    /// Certificates of the node's own workloads.
    #[command(visible_alias = "certificates")]
    Certificate(Saved),
    /// Live connections.
    #[command(visible_alias = "connection")]
    Connections(Saved),
    /// Log level of the node proxies.
    Log {
        /// Sets it, e.g. `info` or `mesh_node::outbound=debug,info`.
        #[arg(long)]
        level: Option<String>,
    },
    /// Everything, as a dump that `-f` reads.
    All(Saved),
}

/// Parts of the kernel's state.
#[derive(Debug, Subcommand)]
pub enum Bpf {
    /// Programs with hooks and attachments, and verdicts by reason.
    Status(Saved),
    /// Fill of the maps; of one map its entries.
    Map {
        /// Name of a map.
        name: Option<String>,
        /// Saved dump.
        #[command(flatten)]
        saved: Saved,
    },
    /// Drops and refusals, newest last.
    Events(Saved),
}

/// Authentication checks.
#[derive(Debug, Subcommand)]
pub enum Authn {
    /// Is it mTLS from SRC to DST: as configured, and as observed?
    TlsCheck(TlsCheckArgs),
}

/// Authorization questions.
#[derive(Debug, Subcommand)]
pub enum Authz {
    /// Would this connection be let in, by which rule, and what is missing?
    Why(WhyArgs),
}

/// Arguments of `mtls-check`.
#[derive(Debug, Args)]
#[command(
    after_help = "STATUS is OK (both identities are verified; mutual TLS between nodes), PLAINTEXT (one of them is \
not in the mesh, or plaintext was observed) or REFUSED (plaintext, and the server demands mutual TLS). SERVER is what the \
server demands: STRICT, MIXED (not the same on all ports), \
PERMISSIVE, or NONE when it is not in the mesh. Exits with 79 unless all are OK."
)]
pub struct TlsCheckArgs {
    /// Client: POD[.NAMESPACE] or pod/NAME.
    pub source: String,
    /// Server: POD[.NAMESPACE], pod/NAME or svc/NAME; none: every workload of the mesh.
    pub destination: Option<String>,
}

/// Arguments of `authz why`.
#[derive(Debug, Args)]
pub struct WhyArgs {
    /// Client: POD[.NAMESPACE], pod/NAME, or an IP address outside the mesh.
    pub source: String,
    /// Server: POD[.NAMESPACE], pod/NAME or svc/NAME.
    pub destination: String,
    /// Port: of the service for svc/NAME, else of the pod.
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,
}

/// Arguments of `analyze`.
#[derive(Debug, Args)]
#[command(
    after_help = "Findings have Istio's codes where it has one for the same (IST0101, IST0102, IST0106, IST0127, IST0133), else \
those of docs/operations.md. Those of one namespace (-n, else the context's) and of the mesh's own are shown, and all of files; -A \
shows all. Exits with 79 if there are errors."
)]
pub struct AnalyzeArgs {
    /// Files and directories of YAML or JSON, or `-`; their objects count in place of the mesh's.
    #[arg(value_name = "FILE", required_if_eq("offline", "true"))]
    pub files: Vec<PathBuf>,
    /// Look at the files alone.
    #[arg(long)]
    pub offline: bool,
}

/// Arguments of `enroll` and `unenroll`.
#[derive(Debug, Args)]
pub struct EnrollArgs {
    /// NAMESPACE or ns/NAMESPACE.
    #[arg(value_name = "NAMESPACE", required = true)]
    pub namespaces: Vec<String>,
}

/// Arguments of `validate`.
#[derive(Debug, Args)]
#[command(
    after_help = "The same is found as by the API server's question to the controller before an object is written, for every kind \
that the mesh reads; what depends on other objects is not (see `mesh-controller check`). Exits with 79 if there are errors."
)]
pub struct ValidateArgs {
    /// File or directory of YAML or JSON, or `-` (repeatable).
    #[arg(short, long, value_name = "FILE", required_unless_present = "files")]
    pub filename: Vec<PathBuf>,
    /// The same.
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,
}

/// Arguments of `logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// POD[.NAMESPACE] or pod/NAME.
    pub workload: String,
    /// Only the last lines of each node.
    #[arg(long, value_name = "LINES", default_value_t = 100)]
    pub tail: usize,
}

/// `sandbox` and its verbs.
#[derive(Debug, Args)]
pub struct SandboxArgs {
    /// What to do.
    #[command(subcommand)]
    pub verb: SandboxVerb,
}

/// Verbs of the sandbox.
#[derive(Debug, Subcommand)]
pub enum SandboxVerb {
    /// Build it, or repair it, and make a first request.
    Up,
    /// Its parts and whether they run.
    Status,
    /// Give YAML to its controller and print what the controller says about it.
    Apply {
        /// A file of Kubernetes and Istio objects.
        file: PathBuf,
    },
    /// Take a file back that was applied.
    Delete {
        /// The file, by the name under which it was applied.
        file: PathBuf,
    },
    /// Run a command in a workload.
    Exec {
        /// The workload.
        workload: String,
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Log of a part: `controller`, `agent`, a node, or a workload.
    Logs {
        /// The part; none: of the mesh's processes.
        part: Option<String>,
        /// Go on as it grows.
        #[arg(short, long)]
        follow: bool,
    },
    /// End it and give everything back.
    Down {
        /// Every sandbox of this machine.
        #[arg(long)]
        all: bool,
    },
    /// The enrolment agent.
    #[command(hide = true)]
    Agent,
    /// A server of the demonstration.
    #[command(hide = true)]
    Serve {
        /// What it speaks.
        protocol: Protocol,
        /// TCP port, of both families.
        #[arg(long)]
        port: u16,
        /// Who it says it is.
        #[arg(long, default_value = "server")]
        workload: String,
        /// Version that it names.
        #[arg(long, default_value = "")]
        version: String,
    },
    /// One HTTP request.
    #[command(hide = true)]
    Fetch {
        /// Name or address.
        host: String,
        /// TCP port.
        port: u16,
    },
}

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory};

    use super::*;

    /// Every verb that a user can call, with its whole path.
    fn leaves(command: &Command, path: &str, found: &mut Vec<(String, Command)>) {
        let path = format!("{path} {}", command.get_name()).trim().to_owned();
        let mut children = command.get_subcommands().filter(|c| c.get_name() != "help").peekable();
        if children.peek().is_none() {
            found.push((path.clone(), command.clone()));
        }
        children.for_each(|child| leaves(child, &path, found));
    }

    fn built() -> Command {
        let mut command = Cli::command();
        command.build();
        command
    }

    #[test]
    fn the_tree_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_takes_the_output_format_and_says_what_it_does() {
        let mut verbs = Vec::new();
        leaves(&built(), "", &mut verbs);
        assert!(verbs.len() > 20, "{verbs:?}");
        for (path, verb) in verbs {
            let longs: Vec<&str> = verb.get_arguments().filter_map(clap::Arg::get_long).collect();
            assert!(longs.contains(&"output") && longs.contains(&"no-headers"), "{path}: {longs:?}");
            assert!(verb.get_about().is_some_and(|about| !about.to_string().is_empty()), "{path} has no description");
        }
    }

    #[test]
    fn what_users_of_istioctl_type_is_understood() {
        for line in [
            "mesh-ctl ztunnel-config workload",
            "mesh-ctl zc workloads -o json",
            "mesh-ctl ps",
            "mesh-ctl authn tls-check pod/web",
            "mesh-ctl mtls-check web db.shop",
            "mesh-ctl node-config service -n shop -o short",
            "mesh-ctl bpf map WORKLOADS --node a",
            "mesh-ctl ps --kubeconfig /k --context c -i mesh -n shop",
            "mesh-ctl status --istio-namespace mesh",
            "mesh-ctl validate -f a.yaml -f b",
            "mesh-ctl validate a.yaml -",
            "mesh-ctl analyze -A",
            "mesh-ctl analyze --offline a.yaml",
            "mesh-ctl unenroll shop ns/bank",
            "mesh-ctl sandbox exec client -- curl -s http://web/",
        ] {
            let parsed = Cli::try_parse_from(line.split(' '));
            assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
        }
        assert!(
            Cli::try_parse_from(["mesh-ctl", "ps", "--context", "c", "--admin-socket", "/s"]).is_err(),
            "which one?"
        );
        assert!(Cli::try_parse_from(["mesh-ctl", "sandbox", "exec", "client", "ls"]).is_err(), "`--` is needed");
    }
}
