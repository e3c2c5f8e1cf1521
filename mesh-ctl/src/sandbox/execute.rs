//! Carries a plan out. Every step can be repeated on what a killed run left behind only after `down`.

use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use super::plan::{Plan, Step};
use super::{cgroup, files, links, netns};

/// Runs the steps in order. The handles must be recorded already.
///
/// # Errors
/// The first step that failed; what was made so far stays and is given back by `down`.
pub(super) fn execute(plan: &Plan) -> Result<()> {
    plan.steps.iter().try_for_each(step)
}

fn step(step: &Step) -> Result<()> {
    match step {
        Step::Dir(path) => files::private_dir(path),
        Step::Cgroup(path) => cgroup::create(path),
        Step::MountCgroup2(path) => mount_at("cgroup2", path),
        Step::MountBpf(path) => mount_at("bpf", path),
        Step::Netns(path) => netns::create(path),
        Step::Net { netns, ops } => netns::run_in(netns, || links::apply(ops)).with_context(|| {
            format!("in network namespace {}", netns.file_name().unwrap_or_default().to_string_lossy())
        }),
    }
}

fn mount_at(kind: &str, path: &Path) -> Result<()> {
    mount(Some(kind), path, Some(kind), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("mount {kind} at {}", path.display()))
}
