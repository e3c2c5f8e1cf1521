//! What CI runs, cheap stages first. A missing privilege is a failure, never a skip.

use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;

use crate::compile::{self, Profile};
use crate::stages::{Stages, Tally};
use crate::tree::Tree;
use crate::{cargo_test, process, setup, tidy, versions};

/// Which tests.
#[derive(Args)]
pub(crate) struct Options {
    /// Also the big ones: 100,000 random cases, 10,000 services.
    #[arg(long)]
    long: bool,
    /// Only tests with this in their name; the other checks are left out.
    filter: Option<String>,
}

/// Set for tests that have a bigger form of themselves.
const LONG_VARIABLE: &str = "MESH_TEST_LONG";
/// Unit and property tests take about a minute once they are built.
const UNIT_LIMIT: Duration = Duration::from_secs(20 * 60);
/// Real processes in namespaces.
const DATA_PATH_LIMIT: Duration = Duration::from_secs(25 * 60);
/// `--long` may take this many times as long.
const LONG_FACTOR: u32 = 6;
/// Two at once: the tests are many short waits, and the machine of CI has two cores.
const DATA_PATH_HARNESS: [&str; 1] = ["--test-threads=2"];

/// Runs all stages and prints their table. The exit code is 0 if something ran and nothing failed.
pub(crate) fn run(tree: &Tree, options: &Options) -> Result<ExitCode> {
    let mut stages = Stages::default();
    if !stages.run("setup", || setup::install().map(|()| Tally::default())) {
        return Ok(stages.close());
    }
    match &options.filter {
        None => checks(tree, &mut stages),
        Some(_) => stages.skip("format, lints, tidy, versions", "a filter was given"),
    }
    if !stages.run("build", || compile::all(tree, Profile::Debug).map(|()| Tally::ONE)) {
        stages.skip("tests", "the build failed");
        return Ok(stages.close());
    }
    stages.run("unit and property tests", || {
        let command = tree.cargo(&["test", "--locked", "--no-fail-fast", "--workspace", "--exclude=mesh-tests"]);
        tests(command, &["--quiet"], UNIT_LIMIT, options)
    });
    stages.run("data path tests", || {
        require_root()?;
        let command = tree.cargo(&["test", "--locked", "--no-fail-fast", "--package=mesh-tests"]);
        tests(command, &DATA_PATH_HARNESS, DATA_PATH_LIMIT, options)
    });
    Ok(stages.close())
}

fn checks(tree: &Tree, stages: &mut Stages) {
    stages.run("format", || process::run(tree.cargo(&["fmt", "--all", "--check"])).map(|()| Tally::ONE));
    stages.run("tidy", || {
        let findings = tidy::findings(tree)?;
        judged(&findings)
    });
    stages.run("versions and licences", || judged(&versions::findings(tree)?));
    stages.run("lints", || {
        let clippy = ["clippy", "--locked", "--workspace", "--all-targets", "--quiet", "--", "--deny=warnings"];
        process::run(tree.cargo(&clippy)).map(|()| Tally::ONE)
    });
}

/// One check: passed without findings; otherwise each is shown and counts.
fn judged(findings: &[String]) -> Result<Tally> {
    for finding in findings {
        println!("{finding}");
    }
    if findings.is_empty() { Ok(Tally::ONE) } else { Ok(Tally { passed: 0, failed: u64::try_from(findings.len())? }) }
}

fn tests(mut command: Command, harness: &[&str], limit: Duration, options: &Options) -> Result<Tally> {
    command.arg("--").args(harness).args(&options.filter);
    if options.long {
        command.env(LONG_VARIABLE, "1");
    }
    cargo_test::run(command, if options.long { limit * LONG_FACTOR } else { limit })
}

fn require_root() -> Result<()> {
    let mut command = Command::new("id");
    command.arg("-u");
    if process::output(command)?.trim() != "0" {
        bail!("these tests make network namespaces and load kernel programs: run as root");
    }
    Ok(())
}
