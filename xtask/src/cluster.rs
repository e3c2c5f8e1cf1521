//! A Kubernetes cluster on this machine: builds the harness and hands over to `mesh-cluster`.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::compile::Profile;
use crate::process;
use crate::setup;
use crate::tree::Tree;

/// Installs, builds, and hands over to `mesh-cluster` with the arguments, or with `up`.
pub(crate) fn run(tree: &Tree, arguments: &[String]) -> Result<ExitCode> {
    setup::install()?;
    process::run(tree.cargo(&["build", "--locked", "--quiet", "--package=mesh-tests", "--bin=mesh-cluster"]))?;
    let mut command = Command::new(tree.target.join(Profile::Debug.directory()).join("mesh-cluster"));
    if arguments.is_empty() {
        command.arg("up");
    } else {
        command.args(arguments);
    }
    // Standard input stays ours: `shell` and `kubectl apply` may want it.
    let status = command.status().context("start mesh-cluster")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
