//! The project's tasks, as `cargo xtask <task>`: install what is missing, build, test, benchmark, tidy.
//!
//! This crate knows the tree and the tools, and no mesh crate: it must build and run when they do not.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod cargo_test;
mod cluster;
mod compile;
mod ebpf;
mod generate;
mod kernel;
mod metadata;
mod process;
mod sandbox;
mod setup;
mod spdx;
mod stages;
mod test;
mod tidy;
mod tree;
mod versions;
mod vm;

use tree::Tree;

/// Build, test and try the mesh.
#[derive(Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what the build and the tests need and this machine lacks; says what and why.
    Setup {
        /// Only name what is missing; exit code 1 if anything is.
        #[arg(long)]
        check: bool,
    },
    /// Build the kernel programs and every crate.
    Build {
        /// With optimisation.
        #[arg(long)]
        release: bool,
    },
    /// Build the kernel programs only.
    Ebpf,
    /// Set up, build and start the sandbox; arguments go to `mesh-ctl sandbox` (none: `up`).
    Sandbox {
        /// What `mesh-ctl sandbox` is to do.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Set up, build and start a Kubernetes cluster; arguments go to `mesh-cluster` (none: `up`).
    Cluster {
        /// What `mesh-cluster` is to do; `--help` names all.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run every check and test that CI runs, cheap ones first.
    Test(test::Options),
    /// Measure throughput, latency, CPU and memory against plain routing (and a peer); arguments go to `mesh-bench run`.
    Bench {
        /// E.g. `--rounds 5 --peer-ztunnel BINARY`; `--help` names all.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Write `crds/` anew from the types of mesh-api.
    Generate,
    /// Check crate edges, sizes, unsafe code, links and stray paths.
    Tidy,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments.task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    let tree = Tree::find()?;
    match task {
        Task::Setup { check: true } => return Ok(setup::check()),
        Task::Setup { check: false } => setup::install()?,
        Task::Build { release } => {
            setup::install()?;
            compile::all(&tree, compile::Profile::of(release))?;
        }
        Task::Ebpf => {
            setup::install()?;
            println!("{}", ebpf::build(&tree)?.display());
        }
        Task::Sandbox { arguments } => return sandbox::run(&tree, &arguments),
        Task::Cluster { arguments } => return cluster::run(&tree, &arguments),
        Task::Bench { arguments } => return bench::run(&tree, &arguments),
        Task::Test(options) => return test::run(&tree, &options),
        Task::Generate => generate::run(&tree)?,
        Task::Tidy => return tidy::run(&tree),
    }
    Ok(ExitCode::SUCCESS)
}
