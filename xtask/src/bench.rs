//! The benchmark: an optimised build, then the matrix of `mesh-bench run`.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::compile::{self, Profile};
use crate::setup;
use crate::tree::Tree;

/// Installs, builds, and hands over to `mesh-bench run` with the arguments.
pub(crate) fn run(tree: &Tree, arguments: &[String]) -> Result<ExitCode> {
    setup::install()?;
    compile::all(tree, Profile::Release)?;
    let program = tree.target.join(Profile::Release.directory()).join("mesh-bench");
    let status = Command::new(program).arg("run").args(arguments).status().context("start mesh-bench")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
