//! The verbs: each gathers what it needs and renders it. Text goes to the caller, messages go to stderr.

mod access_log;
mod analyze;
mod authn;
mod authz;
mod bpf;
mod enroll;
mod logs;
mod manifests;
mod names;
mod nodes;
mod overview;
pub mod sandbox;
mod validate;

use anyhow::Context;
use clap::CommandFactory;

use self::enroll::Wish;
use crate::cli::{Authn, Authz, Cli, Global, Saved, Verb};
use crate::exit::Findings;
use crate::render::{self, Row, View};
use crate::target::{Listed, Target};

/// A verb that did not end well: what it printed before, and why.
#[derive(Debug)]
pub struct Failure {
    /// Output that is good all the same.
    pub text: String,
    /// Chooses the exit code.
    pub error: anyhow::Error,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { text: String::new(), error }
    }
}

/// What a verb prints.
pub type Output = Result<String, Failure>;

/// Runs a verb to its end.
///
/// # Errors
/// Why it failed; the exit code follows from it ([`crate::exit::code`]).
pub fn run(cli: Cli) -> Output {
    let global = cli.global;
    match cli.verb {
        Verb::Sandbox(args) => sandbox::run(&global, args),
        Verb::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "mesh-ctl", &mut script);
            Ok(String::from_utf8_lossy(&script).into_owned())
        }
        Verb::Analyze(args) => block_on(analyze::run(&global, &args)),
        Verb::Enroll(args) => block_on(enroll::run(&global, &args, Wish::Enrolled)),
        Verb::Unenroll(args) => block_on(enroll::run(&global, &args, Wish::Outside)),
        Verb::Validate(args) => validate::run(&global, &args),
        Verb::Status(saved) => block_on(overview::status(&global, &saved)),
        Verb::ProxyStatus(saved) => block_on(overview::proxy_status(&global, &saved)),
        Verb::Version(saved) => block_on(overview::version(&global, &saved)),
        Verb::NodeConfig { what } => block_on(nodes::run(&global, &what)),
        Verb::Bpf { what } => block_on(bpf::run(&global, &what)),
        Verb::Logs(args) => block_on(logs::run(&global, &args)),
        Verb::Authn { what: Authn::TlsCheck(args) } | Verb::MtlsCheck(args) => block_on(authn::run(&global, &args)),
        Verb::Authz { what: Authz::Why(args) } => block_on(authz::run(&global, &args)),
    }
}

fn block_on(verb: impl Future<Output = Output>) -> Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("runtime")?;
    runtime.block_on(verb)
}

async fn target(global: &Global, saved: &Saved) -> anyhow::Result<Target> {
    Target::of(global, Some(saved)).await
}

/// A list of what the nodes said. Nodes that did not answer are named on stderr and make the verb fail.
fn listed<T, R: Row>(global: &Global, listed: Listed<T>, row: impl Fn(crate::render::OnNode<T>) -> R) -> Output {
    let rows: Vec<R> = listed.rows.into_iter().map(row).collect();
    let view = View::of(global);
    if rows.is_empty() && view.is_table() && !listed.errors.is_empty() {
        // Who did not answer may have some.
        return finish(String::new(), listed.errors);
    }
    finish(render::list(&rows, view)?, listed.errors)
}

/// Output that stands although some nodes did not answer.
fn finish(text: String, errors: Vec<anyhow::Error>) -> Output {
    let mut errors = errors.into_iter();
    let Some(first) = errors.next() else { return Ok(text) };
    for error in errors {
        eprintln!("mesh-ctl: {error:#}");
    }
    Err(Failure { text, error: first })
}

/// Output that names findings.
fn found(text: String, any: bool) -> Output {
    if any { Err(Failure { text, error: Findings.into() }) } else { Ok(text) }
}
