//! What the verbs of the command line do.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use mesh_agent::conflist::{self, PluginConfig};
use mesh_agent::kubernetes::CniOptions;

use crate::config::{AgentArgs, AgentEndedArgs, CleanupArgs, Cli, CniArgs, Command, Config};
use crate::{app, capture, check, logging, readiness, supervisor};

/// Time for the kernel to release links that are no longer pinned; milliseconds are usual.
const RELEASED_WITHIN: Duration = Duration::from_secs(2);
/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Parses the command line and does what it says.
pub fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run(config) => run(*config),
        Command::Proxy(config) => return app::main(&config),
        Command::Agent(args) => agent(args),
        Command::Cleanup(args) => cleanup(&args),
        Command::Check => Ok(check::run()),
        Command::AgentEnded(args) => agent_ended(&args),
        Command::Ready(args) => readiness::ask(args.ready_addr, &args.pod),
        Command::Admin(args) => {
            mesh_api::admin_pipe::run(&args.admin_socket).map(|()| ExitCode::SUCCESS).map_err(Into::into)
        }
    };
    done.unwrap_or_else(|error| {
        eprintln!("mesh-node: {error:#}");
        ExitCode::FAILURE
    })
}

/// The supervisor. The proxy is this program again, with the same flags.
fn run(config: Config) -> anyhow::Result<ExitCode> {
    logging::init(config.log_format);
    if let Some(cgroup) = &config.own_cgroup {
        enter_cgroup(cgroup)?;
    }
    let mut args = vec![OsString::from("proxy")];
    args.extend(std::env::args_os().skip(2));
    let status = supervisor::run(supervisor::Options {
        state_dir: config.state_dir,
        takeover: config.takeover,
        stay: config.stay,
        program: std::env::current_exe().context("path of this program")?,
        args,
        drain: config.drain,
    })?;
    Ok(ExitCode::from(status))
}

fn agent_ended(args: &AgentEndedArgs) -> anyhow::Result<ExitCode> {
    let has_ended = mesh_agent::alive::wait_for_end(&args.alive_file, args.within)?;
    anyhow::ensure!(has_ended, "the agent still lives after {:?}", args.within);
    Ok(ExitCode::SUCCESS)
}

fn agent(args: AgentArgs) -> anyhow::Result<ExitCode> {
    logging::init(args.log_format);
    let CniArgs { cni_conf_dir, cni_bin_dir, cni_socket, cni_state_dir } = args.cni;
    if args.uninstall {
        let conf_dir = cni_conf_dir.context("--cni-conf-dir is not given")?;
        conflist::uninstall(&conf_dir, cni_bin_dir.as_deref(), &cni_state_dir)?;
        return Ok(ExitCode::SUCCESS);
    }
    let cni = cni_conf_dir.map(|conf_dir| CniOptions {
        conf_dir,
        bin_dir: cni_bin_dir,
        plugin: PluginConfig { agent_socket: cni_socket, state_dir: cni_state_dir, ..PluginConfig::default() },
    });
    let node = args.node.context("--node is not given")?;
    let socket = args.agent_socket.context("--agent-socket is not given")?;
    mesh_agent::kubernetes::run(mesh_agent::kubernetes::Options {
        node,
        socket,
        cni,
        alive_file: args.alive_file,
        owner: args.daemonset,
    })?;
    Ok(ExitCode::SUCCESS)
}

fn enter_cgroup(cgroup: &Path) -> anyhow::Result<()> {
    let procs = cgroup.join("cgroup.procs");
    std::fs::write(&procs, std::process::id().to_string()).with_context(|| format!("write {}", procs.display()))
}

/// What is attached to a cgroup after the kernel had its time: a link without a pin is released after an RCU grace period.
fn still_attached(cgroup: &Path) -> anyhow::Result<Vec<String>> {
    let deadline = Instant::now() + RELEASED_WITHIN;
    loop {
        let left = capture::attached_to_cgroup(cgroup)?;
        if left.is_empty() || Instant::now() >= deadline {
            return Ok(left);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn cleanup(args: &CleanupArgs) -> anyhow::Result<ExitCode> {
    if !args.force && capture::is_serving(&args.bpffs)? {
        anyhow::bail!(
            "a node proxy serves the workloads that are captured in {}: end it first, or they are open while it still \
             believes to guard them (--force does it all the same)",
            args.bpffs.display()
        );
    }
    let removed = capture::cleanup(&args.bpffs)?;
    for what in &removed {
        println!("removed {what}");
    }
    if removed.is_empty() {
        println!("nothing was pinned in {}", args.bpffs.display());
    }
    let Some(cgroup) = &args.cgroup else { return Ok(ExitCode::SUCCESS) };
    let left = still_attached(cgroup)?;
    for program in &left {
        println!("still attached to {}: {program}; a process holds it: is a node proxy running?", cgroup.display());
    }
    Ok(if left.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
