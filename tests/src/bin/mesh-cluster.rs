//! Kubernetes clusters on this machine, for tests and for a look around. `cargo xtask cluster` builds and runs it.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use mesh_tests::cluster::{Cluster, Dns, Image, Options, tools};

/// Real Kubernetes clusters of up to three nodes on this machine.
#[derive(Parser)]
#[command(name = "mesh-cluster", disable_help_subcommand = true)]
struct Arguments {
    /// Which cluster, 1 to 9.
    #[arg(long, global = true, default_value_t = 1, env = "MESH_CLUSTER_ID")]
    id: u8,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build all programs into the cache: those of clusters, CoreDNS and helm.
    Build,
    /// Start a cluster; builds its programs first if they are not in the cache.
    Up {
        /// 1 to 3.
        #[arg(long, default_value_t = 2)]
        nodes: u8,
        /// Leave names unanswered: no CoreDNS.
        #[arg(long)]
        without_dns: bool,
    },
    /// End a cluster and give back everything that it had.
    Down,
    /// Its processes, nodes and pods.
    Status,
    /// Make an image of files and load it into every node.
    Load {
        /// Such as `localhost/web:1`.
        name: String,
        /// Path in the image and path on this machine; shared libraries of a program come with it.
        #[arg(value_name = "FILE=PATH", required = true)]
        files: Vec<String>,
        /// Also put busybox into it.
        #[arg(long)]
        busybox: bool,
        /// What its containers run.
        #[arg(last = true, value_name = "CMD")]
        command: Vec<String>,
    },
    /// Run a command in a node; without one, a shell.
    Shell {
        /// n1, n2 or n3.
        #[arg(default_value = "n1")]
        node: String,
        /// What to run.
        #[arg(last = true, value_name = "CMD")]
        command: Vec<String>,
    },
    /// Switch a node off, as a power cut does.
    Stop {
        /// n1, n2 or n3.
        node: String,
    },
    /// Switch a node on again.
    Start {
        /// n1, n2 or n3.
        node: String,
    },
    /// Print the path of the administrator's kubeconfig.
    Kubeconfig,
    /// Run kubectl as the administrator.
    Kubectl {
        /// Its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run helm as the administrator; builds it first if it is not in the cache.
    Helm {
        /// Its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments.id, arguments.verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(id: u8, verb: Verb) -> Result<()> {
    match verb {
        Verb::Build => {
            for module in [tools::KUBERNETES, tools::COREDNS, tools::HELM] {
                println!("{}", module.ready(&mut say)?.display());
            }
            Ok(())
        }
        Verb::Up { nodes, without_dns } => {
            up(&Options { id, nodes, dns: if without_dns { Dns::Nobody } else { Dns::CoreDns } })
        }
        Verb::Down => {
            let ended = Cluster::down(id)?;
            println!("{}", if ended { format!("cluster {id} has ended") } else { format!("there is no cluster {id}") });
            Ok(())
        }
        Verb::Status => status(&Cluster::open(id)?),
        Verb::Load { name, files, busybox, command } => {
            let mut image = if busybox { Image::new(&name).with_busybox()? } else { Image::new(&name) };
            for file in &files {
                let (inside, path) = file.split_once('=').with_context(|| format!("`{file}` is not FILE=PATH"))?;
                image = image.program(inside, Path::new(path))?;
            }
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            Cluster::open(id)?.load(&image.command(&command))
        }
        Verb::Shell { node, command } => {
            let command = if command.is_empty() { vec!["bash".to_owned()] } else { command };
            Err(Cluster::open(id)?.node(&node)?.command(&command)?.exec()).context("start the command")
        }
        Verb::Stop { node } => Cluster::open(id)?.node(&node)?.stop(),
        Verb::Start { node } => Cluster::open(id)?.node(&node)?.start(),
        Verb::Kubeconfig => {
            println!("{}", Cluster::open(id)?.kubeconfig().display());
            Ok(())
        }
        Verb::Kubectl { arguments } => {
            Err(Cluster::open(id)?.kubectl_command().args(arguments).exec()).context("start kubectl")
        }
        Verb::Helm { arguments } => {
            let helm = tools::HELM.program("helm", &mut say)?;
            let mut command = std::process::Command::new(helm);
            // Much of helm needs no cluster.
            if let Ok(cluster) = Cluster::open(id) {
                command.env("KUBECONFIG", cluster.kubeconfig());
            }
            command.args(arguments);
            Err(command.exec()).context("start helm")
        }
    }
}

fn say(line: &str) {
    eprintln!("{line}");
}

fn up(options: &Options) -> Result<()> {
    let cluster = Cluster::up(options, &mut say)?;
    println!("export KUBECONFIG={}", cluster.kubeconfig().display());
    Ok(())
}

fn status(cluster: &Cluster) -> Result<()> {
    for (name, pid, alive) in cluster.processes()? {
        println!("{name:<24} {pid:>8} {}", if alive { "runs" } else { "has ended" });
    }
    print!("{}", cluster.kubectl(&["get", "nodes", "-o", "wide"])?);
    print!("{}", cluster.kubectl(&["get", "pods", "-A", "-o", "wide"])?);
    Ok(())
}
