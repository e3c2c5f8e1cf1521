//! From a fresh machine to a running sandbox in one command.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::compile::{self, Profile};
use crate::setup;
use crate::tree::Tree;

/// Installs, builds, and hands over to `mesh-ctl sandbox` with the arguments, or with `up`.
pub(crate) fn run(tree: &Tree, arguments: &[String]) -> Result<ExitCode> {
    setup::install()?;
    compile::all(tree, Profile::Debug)?;
    let mut command = Command::new(tree.target.join(Profile::Debug.directory()).join("mesh-ctl"));
    command.arg("sandbox");
    if arguments.is_empty() {
        command.arg("up");
    } else {
        command.args(arguments);
    }
    // Standard input stays ours: `sandbox exec` may want it.
    let status = command.status().context("start mesh-ctl")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
