//! `mesh-fuzz`: runs all targets, or one, or one input again.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use mesh_fuzz::targets::{self, Target};
use mesh_fuzz::{Outcome, Run, supervise, work};

/// Feed malformed input to everything that reads bytes from outside.
#[derive(Parser)]
struct Arguments {
    /// Only this target.
    target: Option<String>,
    /// Time for each target, in seconds.
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// The same seed gives the same inputs; a run without one takes a new seed and prints it.
    #[arg(long)]
    seed: Option<u64>,
    /// Where failing inputs are kept.
    #[arg(long, default_value = "target/fuzz")]
    directory: PathBuf,
    /// Run the target on this file, once, in this process.
    #[arg(long, requires = "target")]
    replay: Option<PathBuf>,
    /// Be a worker.
    #[arg(long, hide = true, requires = "target")]
    work: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let all = targets::all();
    let chosen: Vec<&Target> = match &arguments.target {
        None => all.iter().collect(),
        Some(name) => vec![all.iter().find(|target| target.name == name).with_context(|| {
            let names: Vec<&str> = all.iter().map(|target| target.name).collect();
            format!("no target {name}; there are: {}", names.join(", "))
        })?],
    };
    let run = Run {
        seed: arguments.seed.unwrap_or_else(rand::random),
        time: Duration::from_secs(arguments.seconds),
        directory: arguments.directory.clone(),
    };
    if let (Some(file), [target]) = (&arguments.replay, &*chosen) {
        (target.run)(&fs::read(file).with_context(|| format!("read {}", file.display()))?);
        println!("{}: no harm done", target.name);
        return Ok(ExitCode::SUCCESS);
    }
    if let (true, [target]) = (arguments.work, &*chosen) {
        work(target, &run)?;
        return Ok(ExitCode::SUCCESS);
    }
    Ok(run_all(&chosen, &run))
}

/// Runs the targets, as many at once as there are processors, and prints a result line as test programs do.
fn run_all(chosen: &[&Target], run: &Run) -> ExitCode {
    let next = Mutex::new(chosen.iter());
    let failed = Mutex::new(0_usize);
    let workers = thread::available_parallelism().map_or(1, std::num::NonZero::get).min(chosen.len());
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(target) = next.lock().ok().and_then(|mut next| next.next()) {
                    let passed = run_one(target, run);
                    if let (false, Ok(mut failed)) = (passed, failed.lock()) {
                        *failed += 1;
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or(chosen.len());
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("test result: {word}. {} passed; {failed} failed; 0 ignored; 0 measured", chosen.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_one(target: &Target, run: &Run) -> bool {
    let outcome = supervise(target, run, worker(target, run));
    match outcome {
        Ok(Outcome::Passed(inputs)) => {
            println!("fuzz {} ... ok ({inputs} inputs, seed {})", target.name, run.seed);
            true
        }
        Ok(Outcome::Failed { how, number, file }) => {
            println!("fuzz {} ... FAILED at input {number} of seed {}: {how}", target.name, run.seed);
            println!("  again: cargo run -p mesh-fuzz -- {} --replay {}", target.name, file.display());
            false
        }
        Err(error) => {
            println!("fuzz {} ... FAILED: {error:#}", target.name);
            false
        }
    }
}

/// This program again, as a worker.
fn worker(target: &Target, run: &Run) -> Command {
    // Not by its path: a build beside the run may put another program there.
    let mut command = Command::new("/proc/self/exe");
    command.arg(target.name).arg("--work").arg("--directory").arg(&run.directory);
    command.arg("--seed").arg(run.seed.to_string()).arg("--seconds").arg(run.time.as_secs().to_string());
    command
}
