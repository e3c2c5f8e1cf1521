//! The command line.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use mesh_api::admin::Problem;
use mesh_api::problem;
use mesh_core::config::{Compiler, Delta, HttpFields, Settings, Waypoints};
use time::OffsetDateTime;

use crate::app::{self, Asked, Options, Origin};
use crate::ca::store::{RotationStage, SignerSource, rotate};
use crate::door::unix_now;
use crate::kubernetes::review::Account;
use crate::place;
use crate::source::{Changed, Source};
use crate::state_dir::StateDir;
use crate::token::TokenKey;

/// Exit code of `check` when it finds errors (as `istioctl analyze`).
const EXIT_FINDINGS: u8 = 79;

/// Control plane of the mesh: pushes configuration to node proxies and signs their workloads' certificates.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve configuration and certificates until SIGTERM
    Run(Box<RunArgs>),
    /// Print a token that lets a node connect
    Token(TokenArgs),
    /// Report what is wrong with configuration directories; exit code 79 if objects are not applied
    Check(CheckArgs),
    /// Replace the mesh's own root certificate, in three stages, without an interruption
    RotateRoot(RotateArgs),
    /// Carry standard input and output to the admin interface of the controller that runs here
    Admin(AdminArgs),
}

#[derive(Debug, Args)]
struct AdminArgs {
    /// Unix socket of the admin interface
    #[arg(long, env = "MESH_ADMIN_SOCKET", value_name = "PATH")]
    admin_socket: PathBuf,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Directory of Kubernetes and Istio YAML or JSON; give it again for more, the first has precedence
    #[arg(long, env = "MESH_CONFIG_DIR", value_name = "DIR", value_delimiter = ',')]
    #[arg(required_unless_present = "kubernetes", conflicts_with = "kubernetes")]
    config_dir: Vec<PathBuf>,
    /// Read the Kubernetes API server in place of directories: as this pod's service account, or as KUBECONFIG says. It
    /// judges the tokens of nodes then, and the signer is a Secret of the root namespace (cacerts, else istio-ca-secret)
    #[arg(long, env = "MESH_KUBERNETES", conflicts_with = "cacerts")]
    kubernetes: bool,
    /// Service account of node proxies on Kubernetes; give it again for more
    #[arg(long, env = "MESH_NODE_ACCOUNT", default_value = "istio-system/mesh-node", value_name = "NAMESPACE/NAME")]
    #[arg(value_delimiter = ',')]
    node_account: Vec<Account>,
    /// ValidatingWebhookConfiguration by which the API server asks this controller about objects; its caBundle is kept. Without
    /// it no port is opened for that
    #[arg(long, env = "MESH_WEBHOOK", requires = "kubernetes", value_name = "NAME")]
    webhook: Option<String>,
    /// Address of the port where the API server asks (HTTPS, /validate)
    #[arg(long, env = "MESH_WEBHOOK_LISTEN", default_value = "0.0.0.0:15017", value_name = "ADDR")]
    webhook_listen: SocketAddr,
    /// Name of this replica among others of the cluster, of which one leads; the host's name if it is not given
    #[arg(long, env = "MESH_POD", requires = "kubernetes", value_name = "NAME")]
    replica: Option<String>,
    /// Directory of keys, certificates and the lock
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR")]
    state_dir: PathBuf,
    /// Address of the gRPC port (configuration and certificates)
    #[arg(long, env = "MESH_LISTEN", default_value = "0.0.0.0:15012", value_name = "ADDR")]
    listen: SocketAddr,
    /// Unix socket of the admin interface [default: STATE/admin.sock]
    #[arg(long, env = "MESH_ADMIN_SOCKET", value_name = "PATH")]
    admin_socket: Option<PathBuf>,
    /// Address of the metrics port; none is opened unless it is given
    #[arg(long, env = "MESH_MONITORING", value_name = "ADDR")]
    monitoring: Option<SocketAddr>,
    /// Trust domain of all identities
    #[arg(long, env = "MESH_TRUST_DOMAIN", default_value = "cluster.local", value_name = "NAME")]
    trust_domain: String,
    /// Cluster id, the first part of a pod's uid
    #[arg(long, env = "MESH_CLUSTER", default_value = "Kubernetes", value_name = "ID")]
    cluster: String,
    #[command(flatten)]
    meaning: MeaningArgs,
    /// Life of workload certificates, at most 90d
    #[arg(long, env = "MESH_LEAF_TTL", default_value = "24h", value_name = "DURATION", value_parser = parse_duration)]
    leaf_ttl: Duration,
    /// Directory with ca-cert.pem, ca-key.pem (ECDSA P-256 or P-384, or RSA), root-cert.pem and cert-chain.pem to use in
    /// place of a root of our own
    #[arg(long, env = "MESH_CACERTS", value_name = "DIR")]
    cacerts: Option<PathBuf>,
    /// Names and addresses in the server's certificate, besides the usual ones
    #[arg(long, env = "MESH_SERVER_NAME", value_name = "NAME", value_delimiter = ',')]
    server_name: Vec<String>,
    /// Form of the log on stderr; RUST_LOG selects what is logged
    #[arg(long, env = "MESH_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
}

/// How YAML is read, mesh-wide.
#[derive(Debug, Args)]
struct MeaningArgs {
    /// Namespace whose policies are mesh-wide
    #[arg(long, env = "MESH_ROOT_NAMESPACE", default_value = "istio-system", value_name = "NAMESPACE")]
    root_namespace: String,
    /// What node proxies do about fields that they cannot see, HTTP's above all
    #[arg(long, env = "MESH_HTTP_FIELDS", default_value = "stricter")]
    http_fields: HttpFieldsArg,
    /// What `istio.io/use-waypoint` asks of clients
    #[arg(long, env = "MESH_WAYPOINTS", default_value = "required")]
    waypoints: WaypointsArg,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum HttpFieldsArg {
    /// The rule gets stricter, never looser, and a warning says so
    Stricter,
    /// As istiod and ztunnel do, where they fail open too
    Upstream,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum WaypointsArg {
    /// Connections go through the waypoint, or are refused
    Required,
    /// Nothing: a mesh without waypoints
    Ignored,
}

impl MeaningArgs {
    fn settings(self) -> Settings {
        Settings {
            root_namespace: self.root_namespace.into(),
            http_fields: match self.http_fields {
                HttpFieldsArg::Stricter => HttpFields::Stricter,
                HttpFieldsArg::Upstream => HttpFields::UpstreamBehaviour,
            },
            waypoints: match self.waypoints {
                WaypointsArg::Required => Waypoints::Required,
                WaypointsArg::Ignored => Waypoints::Ignored,
            },
            ..Settings::default()
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Args)]
struct TokenArgs {
    /// Name of the node
    node: String,
    /// State directory of the controller
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR")]
    state_dir: PathBuf,
    /// Life of the token, at most 365d
    #[arg(long, env = "MESH_TTL", default_value = "24h", value_name = "DURATION", value_parser = parse_duration)]
    ttl: Duration,
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// Directory of YAML or JSON
    #[arg(long, env = "MESH_CONFIG_DIR", required = true, value_name = "DIR", value_delimiter = ',')]
    config_dir: Vec<PathBuf>,
    #[command(flatten)]
    meaning: MeaningArgs,
    /// Form of the result
    #[arg(short, long, default_value = "table")]
    output: Output,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    Table,
    Json,
}

#[derive(Debug, Args)]
struct RotateArgs {
    /// What to do; the stages come in this order
    stage: RotationStage,
    /// State directory of the controller, which may be running
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR")]
    state_dir: PathBuf,
    /// Trust domain, part of the new root's name
    #[arg(long, env = "MESH_TRUST_DOMAIN", default_value = "cluster.local", value_name = "NAME")]
    trust_domain: String,
}

/// Parses the command line and does what it says.
pub fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run(args) => run(*args),
        Command::Token(args) => token(&args),
        Command::Check(args) => check(args),
        Command::RotateRoot(args) => rotate_root(&args),
        Command::Admin(args) => {
            mesh_api::admin_pipe::run(&args.admin_socket).map(|()| ExitCode::SUCCESS).map_err(Into::into)
        }
    };
    done.unwrap_or_else(|error| {
        eprintln!("mesh-controller: {error:#}");
        ExitCode::FAILURE
    })
}

/// Where the host's name is.
const HOST_NAME: &str = "/proc/sys/kernel/hostname";

fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    log_to_stderr(args.log_format);
    let admin_socket = args.admin_socket.unwrap_or_else(|| args.state_dir.join("admin.sock"));
    let origin = match args.kubernetes {
        true => Origin::Kubernetes {
            node_accounts: args.node_account,
            webhook: args.webhook.map(|configuration| Asked { configuration, listen: args.webhook_listen }),
            replica: match args.replica {
                Some(name) => name,
                None => std::fs::read_to_string(HOST_NAME).context(HOST_NAME)?.trim().to_owned(),
            },
        },
        false => Origin::Directories(args.config_dir),
    };
    let options = Options {
        origin,
        state_dir: args.state_dir,
        listen: args.listen,
        admin_socket,
        monitoring: args.monitoring,
        settings: Settings {
            cluster: args.cluster.into(),
            trust_domain: args.trust_domain.into(),
            ..args.meaning.settings()
        },
        leaf_ttl: args.leaf_ttl,
        cacerts: args.cacerts,
        server_names: args.server_name,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(app::run(options))?;
    Ok(ExitCode::SUCCESS)
}

/// What is logged unless `RUST_LOG` says otherwise. The client of the API server warns of what is dealt with here.
const DEFAULT_FILTER: &str = "info,kube_client=off";

fn log_to_stderr(format: LogFormat) {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    match format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}

fn token(args: &TokenArgs) -> anyhow::Result<ExitCode> {
    let dir = StateDir::open(&args.state_dir)?;
    if !TokenKey::exists(&dir) {
        let place = args.state_dir.display();
        eprintln!("made a new key in {place}: only a controller that runs with this state directory takes the token");
    }
    let key = TokenKey::open(&dir)?;
    println!("{}", key.issue(&args.node, unix_now(), args.ttl.as_secs())?);
    Ok(ExitCode::SUCCESS)
}

fn rotate_root(args: &RotateArgs) -> anyhow::Result<ExitCode> {
    if !args.state_dir.is_dir() {
        anyhow::bail!(
            "{}: there is no state directory of a controller; name it with --state-dir",
            args.state_dir.display()
        );
    }
    let dir = StateDir::open(&args.state_dir)?;
    let now = OffsetDateTime::now_utc();
    let done = rotate(&dir, args.stage, &args.trust_domain, now, &mut rand::rng())?;
    // What a running controller publishes within seconds, for one that is not running.
    let source = SignerSource::Own(dir.ca());
    let authority = source.authority(&source.read()?, now)?;
    crate::state_dir::write_atomically(
        &dir.root_cert(),
        authority.bundle_pem().as_bytes(),
        crate::state_dir::PUBLIC_MODE,
    )?;
    println!("{done}");
    Ok(ExitCode::SUCCESS)
}

fn check(args: CheckArgs) -> anyhow::Result<ExitCode> {
    let batch = Source::directories(args.config_dir).poll(&Changed::Anything);
    let compiled = Compiler::new(args.meaning.settings()).compile(&batch.deltas);
    let mut problems = batch.problems;
    problems.extend(place::of_compiler(&compiled.problems));
    problems.sort_by(|a, b| (&a.file, a.line, &a.code, &a.field).cmp(&(&b.file, b.line, &b.code, &b.field)));
    match args.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&problems)?),
        Output::Table => print!("{}", render(&problems, count_objects(&batch.deltas))),
    }
    let has_errors = problems.iter().any(|p| p.severity == problem::ERROR);
    Ok(if has_errors { ExitCode::from(EXIT_FINDINGS) } else { ExitCode::SUCCESS })
}

fn count_objects(deltas: &[Delta]) -> usize {
    deltas.iter().filter(|delta| matches!(delta, Delta::Upsert(_))).count()
}

/// One line a finding, then the sum.
fn render(problems: &[Problem], objects: usize) -> String {
    let mut text = String::new();
    for found in problems {
        text.push_str(&format!("{:<8}{}\n", found.severity, problem::line(found)));
    }
    let errors = problems.iter().filter(|p| p.severity == problem::ERROR).count();
    let warnings = problems.len() - errors;
    text + &format!("{objects} objects read, {errors} errors, {warnings} warnings\n")
}

/// `90s`, `15m`, `24h`, `7d`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let refuse = || format!("`{text}` is not a duration such as 90s, 15m, 24h or 7d");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| refuse())?;
    let unit_secs = match &text[digits.len()..] {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err(refuse()),
    };
    let secs = number.checked_mul(unit_secs).filter(|secs| *secs > 0).ok_or_else(refuse)?;
    Ok(Duration::from_secs(secs))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations() {
        let secs = |text| parse_duration(text).ok().map(|d| d.as_secs());
        assert_eq!(["90s", "15m", "24h", "7d"].map(secs), [Some(90), Some(900), Some(86_400), Some(604_800)]);
        assert_eq!(["", "5", "h", "-1h", "1w", "0s", "1h30m", "99999999999999999999d"].map(secs), [None; 8]);
    }
}
