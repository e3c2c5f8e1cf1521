//! `sandbox apply` and `sandbox delete`: files of the controller's configuration directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use mesh_api::admin::Problem;
use serde_json::Value;

use super::super::{Failure, Output, found, overview};
use super::runtime;
use crate::admin;
use crate::cli::Global;
use crate::exit::{BadInput, Unavailable, Usage};
use crate::render::{self, View};
use crate::sandbox::{Sandbox, files};

/// Prefix of applied files, so that they follow those that the sandbox wrote.
const PREFIX: &str = "50-";
/// The controller reads its directory within this time after a change.
const READ_WITHIN: Duration = Duration::from_secs(2);
/// Pause between looks.
const POLL: Duration = Duration::from_millis(20);

/// What the controller publishes: versions by resource, and what is wrong.
#[derive(Debug, PartialEq)]
struct Published {
    resources: Value,
    problems: Vec<Problem>,
}

pub(super) fn apply(global: &Global, sandbox: &Sandbox, file: &Path) -> Output {
    let text = std::fs::read_to_string(file).map_err(|e| anyhow!(BadInput(format!("{}: {e}", file.display()))))?;
    let place = place(sandbox, file)?;
    let replaces = std::fs::read_to_string(&place).is_ok_and(|last| last != text);
    let before = published(sandbox)?;
    files::replace(&place, &text, 0o600)?;
    let problems: Vec<Problem> = check(sandbox)?.into_iter().filter(|p| Path::new(&p.file) == place).collect();
    let (after, late) = in_force(sandbox, &before)?;
    let problems: Vec<Problem> =
        problems.into_iter().map(|p| Problem { file: file.display().to_string(), ..p }).collect();
    let mut text = String::new();
    if View::of(global).is_table() {
        // Files are known by their names, wherever they were: what replaces another one must not do so unsaid.
        let instead = if replaces { " in place of the last file of that name" } else { "" };
        let done = if problems.iter().any(|p| p.severity == "error") {
            "applied in part (what is refused below keeps its last good version, if it had one)"
        } else {
            "applied"
        };
        text += &format!("{} {done}{instead}, {}\n", file.display(), changes(&before, &after));
    }
    if !problems.is_empty() || !View::of(global).is_table() {
        let rows: Vec<_> = problems.iter().cloned().map(overview::ProblemRow).collect();
        text += &render::list(&rows, View::of(global))?;
    }
    if !late.is_empty() {
        return Err(Failure { text, error: not_everywhere(&late) });
    }
    found(text, problems.iter().any(|p| p.severity == "error"))
}

pub(super) fn delete(global: &Global, sandbox: &Sandbox, file: &Path) -> Output {
    let place = place(sandbox, file)?;
    if !place.exists() {
        let applied = applied(sandbox);
        let there =
            if applied.is_empty() { "nothing was".to_owned() } else { format!("applied are {}", applied.join(", ")) };
        return Err(anyhow!(Usage(format!("{} was not applied; {there}", file.display()))).into());
    }
    let before = published(sandbox)?;
    std::fs::remove_file(&place).with_context(|| place.display().to_string())?;
    let (after, late) = in_force(sandbox, &before)?;
    let text = match View::of(global).is_table() {
        true => format!("{} deleted, {}\n", file.display(), changes(&before, &after)),
        false => String::new(),
    };
    if late.is_empty() { Ok(text) } else { Err(Failure { text, error: not_everywhere(&late) }) }
}

fn place(sandbox: &Sandbox, file: &Path) -> Result<PathBuf> {
    let name = file.file_name().and_then(|n| n.to_str()).filter(|n| n.ends_with(".yaml") || n.ends_with(".yml"));
    let name =
        name.ok_or_else(|| anyhow!(BadInput(format!("{}: a name that ends in .yaml is needed", file.display()))))?;
    Ok(sandbox.layout.config().join(format!("{PREFIX}{name}")))
}

fn applied(sandbox: &Sandbox) -> Vec<String> {
    let entries = std::fs::read_dir(sandbox.layout.config()).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.file_name().to_str()?.strip_prefix(PREFIX).map(str::to_owned)).collect();
    names.sort();
    names
}

/// What is wrong with the directory as it is now, whether or not the controller has read it yet.
fn check(sandbox: &Sandbox) -> Result<Vec<Problem>> {
    let mesh = sandbox.state().mesh.as_ref().context("this sandbox has no mesh")?;
    let mut command = Command::new(mesh.binaries.join("mesh-controller"));
    command.args(["check", "-o", "json", "--config-dir"]).arg(sandbox.layout.config());
    let output = command.output().context("run mesh-controller check")?;
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("mesh-controller check: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

fn published(sandbox: &Sandbox) -> Result<Published> {
    let socket = sandbox.layout.controller_admin();
    let dump: Value = runtime()?.block_on(admin::get(&socket, "/config_dump"))?;
    let problems = serde_json::from_value(dump["status"]["problems"].clone()).context("problems")?;
    Ok(Published { resources: dump["resources"].clone(), problems })
}

/// Waits until the controller publishes something else than before (a file may change nothing), then until every node
/// has it. Returns those that do not, too.
fn in_force(sandbox: &Sandbox, before: &Published) -> Result<(Published, Vec<String>)> {
    let began = Instant::now();
    let mut now = published(sandbox)?;
    while now == *before && began.elapsed() < READ_WITHIN {
        std::thread::sleep(POLL);
        now = published(sandbox)?;
    }
    Ok((now, sandbox.wait_nodes_in_sync()?))
}

/// What is said of a change that nodes do not have yet.
fn not_everywhere(late: &[String]) -> anyhow::Error {
    anyhow!(Unavailable(format!("it is not in force on {}; see `mesh-ctl proxy-status`", late.join(", "))))
}

fn changes(before: &Published, after: &Published) -> String {
    let (before, after) = (versions(&before.resources), versions(&after.resources));
    let new = after.iter().filter(|(name, version)| before.get(*name) != Some(version)).count();
    let gone = before.keys().filter(|name| !after.contains_key(*name)).count();
    match new + gone {
        0 => "it changes nothing that is pushed to nodes".to_owned(),
        1 => "1 resource pushed to nodes".to_owned(),
        many => format!("{many} resources pushed to nodes"),
    }
}

fn versions(resources: &Value) -> BTreeMap<String, String> {
    let types = resources.as_object().into_iter().flatten();
    types
        .flat_map(|(kind, names)| {
            names
                .as_object()
                .into_iter()
                .flatten()
                .map(move |(name, version)| (format!("{kind} {name}"), version.to_string()))
        })
        .collect()
}
