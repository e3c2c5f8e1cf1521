//! `mesh-bench`: the load server, the load client, and the run that puts them into place (see `cargo xtask bench`).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use mesh_tests::bench::load::{self, Load, Work};
use mesh_tests::bench::place::System;
use mesh_tests::bench::run::{self, Plan};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Load for the benchmark.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Answers every kind of load.
    Serve {
        /// Address to listen on.
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Does one kind of load and prints what it did as JSON.
    Client {
        /// Kind of work.
        #[arg(long)]
        work: Work,
        /// Server.
        #[arg(long)]
        target: SocketAddr,
        /// Connections at once.
        #[arg(long, default_value_t = 1)]
        connections: usize,
        /// How long, seconds.
        #[arg(long, default_value_t = 1.0)]
        secs: f64,
        /// CPU to stay on.
        #[arg(long)]
        cpu: Option<usize>,
    },
    /// Builds two nodes for each system, runs the matrix and prints the table.
    Run {
        /// Rounds; the median is quoted.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Seconds of one measurement.
        #[arg(long, default_value_t = 1.0)]
        secs: f64,
        /// Connections of the memory rows.
        #[arg(long, default_value_t = 2000)]
        idle_connections: usize,
        /// A ztunnel binary to measure in the same run.
        #[arg(long)]
        peer_ztunnel: Option<PathBuf>,
        /// What is measured; by default all, the peer only when its binary is given.
        #[arg(long, value_enum, value_delimiter = ',')]
        systems: Vec<System>,
    },
}

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("runtime")?;
    match Args::parse().verb {
        Verb::Serve { listen } => runtime.block_on(load::serve(listen)),
        Verb::Client { work, target, connections, secs, cpu } => {
            if let Some(cpu) = cpu {
                let mut set = CpuSet::new();
                set.set(cpu).context("CPU number")?;
                sched_setaffinity(Pid::this(), &set).with_context(|| format!("stay on CPU {cpu}"))?;
            }
            let load = Load { work, target, connections, duration: Duration::from_secs_f64(secs) };
            let outcome = runtime.block_on(load::run(load, || println!("opened")))?;
            let own = mesh_tests::bench::cpu::cpu_secs(std::process::id().cast_signed());
            println!("{}", serde_json::to_string(&(outcome, own)).context("answer")?);
            Ok(())
        }
        Verb::Run { rounds, secs, idle_connections, peer_ztunnel, mut systems } => {
            if systems.is_empty() {
                systems.extend([System::Direct, System::Mesh]);
                systems.extend(peer_ztunnel.as_ref().map(|_| System::Peer));
            }
            let table = run::run(&Plan { rounds, secs, idle_connections, systems, peer: peer_ztunnel })?;
            println!("{table}");
            Ok(())
        }
    }
}
