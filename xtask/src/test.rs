//! What CI runs, cheap stages first. A missing privilege is a failure, never a skip.

use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;

use crate::compile::{self, Profile};
use crate::stages::{Stages, Tally};
use crate::tree::Tree;
use crate::{cargo_test, ebpf, process, setup, tidy, versions, vm};

/// Which tests.
#[derive(Args)]
pub(crate) struct Options {
    /// Only the capture tests, on the newest Debian kernel of this series, such as 6.1 or 6.12.
    #[arg(long, value_name = "SERIES")]
    kernel: Option<String>,
    /// Also the big ones: 100,000 random cases, 10,000 services, more kernels.
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
/// For each target.
const FUZZ_TIME: Duration = Duration::from_secs(30);
/// All targets, two at a time, also with `--long`.
const FUZZ_LIMIT: Duration = Duration::from_secs(30 * 60);
/// `--long` may take this many times as long.
const LONG_FACTOR: u32 = 6;
/// Two at once: the tests are many short waits, and the machine of CI has two cores.
const DATA_PATH_HARNESS: [&str; 1] = ["--test-threads=2"];

/// Runs all stages and prints their table. The exit code is 0 if something ran and nothing failed.
pub(crate) fn run(tree: &Tree, options: &Options) -> Result<ExitCode> {
    let mut stages = Stages::default();
    let ready = stages.run("setup", || setup::install().map(|()| Tally::default()))
        && stages.run("kernel programs", || ebpf::build(tree).map(|_| Tally::ONE));
    if !ready {
        stages.skip("everything else", "it needs what failed");
        return Ok(stages.close());
    }
    match (&options.kernel, &options.filter) {
        (Some(series), filter) => {
            stages.skip("all other stages", "a kernel was named");
            on_kernel(tree, &mut stages, series, filter.as_deref());
        }
        (None, Some(_)) => {
            stages.skip("checks, fuzzing, other kernels", "a filter was given");
            tests(tree, &mut stages, options);
        }
        (None, None) => {
            checks(tree, &mut stages);
            if tests(tree, &mut stages, options) {
                stages.run("malformed input", || fuzz(tree, options));
                let series: &[&str] = if options.long { &[vm::OLDEST, vm::NEXT] } else { &[vm::OLDEST] };
                series.iter().for_each(|series| on_kernel(tree, &mut stages, series, None));
            }
        }
    }
    Ok(stages.close())
}

/// Whether everything could be built; the tests themselves are counted.
fn tests(tree: &Tree, stages: &mut Stages, options: &Options) -> bool {
    if !stages.run("build", || compile::crates(tree, Profile::Debug).map(|()| Tally::ONE)) {
        stages.skip("all tests", "the build failed");
        return false;
    }
    stages.run("unit and property tests", || {
        let command = tree.cargo(&["test", "--locked", "--no-fail-fast", "--workspace", "--exclude=mesh-tests"]);
        harness(command, &["--quiet"], UNIT_LIMIT, options)
    });
    // Minutes on a fresh machine, nothing later. A test that was named builds what it needs by itself.
    if options.filter.is_none() {
        let mut build = Command::new(tree.target.join(Profile::Debug.directory()).join("mesh-cluster"));
        build.arg("build");
        stages.run("Kubernetes programs", || process::run(build).map(|()| Tally::ONE));
    }
    stages.run("data path tests", || {
        require_root()?;
        let command = tree.cargo(&["test", "--locked", "--no-fail-fast", "--package=mesh-tests"]);
        harness(command, &DATA_PATH_HARNESS, DATA_PATH_LIMIT, options)
    });
    true
}

/// Every target for its time; each counts as one test.
fn fuzz(tree: &Tree, options: &Options) -> Result<Tally> {
    let time = if options.long { FUZZ_TIME * LONG_FACTOR } else { FUZZ_TIME };
    let mut command = tree.cargo(&["run", "--locked", "--quiet", "--package=mesh-fuzz", "--"]);
    command.arg("--directory").arg(tree.target.join("fuzz")).arg("--seconds").arg(time.as_secs().to_string());
    cargo_test::run(command, FUZZ_LIMIT)
}

fn on_kernel(tree: &Tree, stages: &mut Stages, series: &str, filter: Option<&str>) {
    stages.run(&format!("capture tests on Linux {series}"), || vm::run(tree, series, filter));
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

fn harness(mut command: Command, arguments: &[&str], limit: Duration, options: &Options) -> Result<Tally> {
    command.arg("--").args(arguments).args(&options.filter);
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
