//! `mesh-ctl sandbox`: build, use and end a mesh on this machine.

mod first;
mod yaml;

use std::fmt::Write as _;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde::Serialize;

use super::{Output, found};
use crate::cli::{Global, SandboxArgs, SandboxVerb};
use crate::exit::{NotRun, Unavailable, Usage};
use crate::render::{self, Column, Row, View};
use crate::sandbox::layout::existing;
use crate::sandbox::netns;
use crate::sandbox::serve::{self, Name};
use crate::sandbox::{Enrolment, Layout, Mesh, Part, Phase, Sandbox, State, Topology, agent, teardown};

/// Pause between looks at a log that is followed.
const FOLLOW_EVERY: Duration = Duration::from_millis(200);

pub(super) fn run(global: &Global, args: SandboxArgs) -> Output {
    let name = global.sandbox_name();
    match args.verb {
        SandboxVerb::Up => up(global, name),
        SandboxVerb::Status => status(global, name),
        SandboxVerb::Apply { file } => yaml::apply(global, &open(name)?, &file),
        SandboxVerb::Delete { file } => yaml::delete(global, &open(name)?, &file),
        SandboxVerb::Exec { workload, command } => exec(name, &workload, &command),
        SandboxVerb::Logs { part, follow } => logs(name, part.as_deref(), follow),
        SandboxVerb::Down { all: true } => existing().iter().map(|name| down(name)).collect(),
        SandboxVerb::Down { all: false } => down(name),
        SandboxVerb::Agent => Ok(agent::run(Layout::of(name)?).map(|()| String::new())?),
        SandboxVerb::Serve { protocol, port, workload, version } => {
            runtime()?.block_on(serve::serve(protocol, port, Name { workload, version }))?;
            Ok(String::new())
        }
        SandboxVerb::Fetch { host, port } => Ok(runtime()?.block_on(serve::fetch(&host, port))?),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("runtime")
}

fn open(name: &str) -> Result<Sandbox> {
    let none = || anyhow!(Unavailable(format!("there is no sandbox `{name}`; make one with `mesh-ctl sandbox up`")));
    match State::load(&Layout::of(name)?)? {
        Some(_) => Sandbox::open(name),
        None => Err(none()),
    }
}

/// Builds it, or starts what does not run any more.
fn up(global: &Global, name: &str) -> Output {
    let began = Instant::now();
    let mut progress = |line: &str| eprintln!("  {line}");
    let layout = Layout::of(name)?;
    let sandbox = match State::load(&layout)? {
        Some(state) if state.phase == Phase::Up && has_namespaces(&state) => {
            let mut sandbox = Sandbox::open(name)?;
            let dead = sandbox.dead_parts();
            if dead.is_empty() {
                eprintln!("the sandbox `{name}` is up already");
                return status(global, name);
            }
            let dead: Vec<String> = dead.iter().map(ToString::to_string).collect();
            eprintln!("the sandbox `{name}` exists, but these do not run: {}", dead.join(", "));
            sandbox.start(&mut progress)?;
            sandbox
        }
        found => {
            if found.is_some() {
                eprintln!("of the sandbox `{name}` only a part is there; giving that back first");
                teardown::down(&layout)?;
            }
            eprintln!("building the sandbox `{name}`");
            Sandbox::up(name, Topology::demo(), Some(Mesh::beside()?), &mut progress)?
        }
    };
    eprintln!("  first request: client to web");
    let mut text = first::request(&sandbox)?;
    let own = own_command(name);
    let _ = write!(
        text,
        "\nup after {:.1} s. Try:\n  \
         {own} mtls-check client web-v2\n  \
         {own} authz why legacy db 5432\n  \
         {own} sandbox exec client -- curl -s http://web/\n\
         End it:\n  \
         {own} sandbox down\n",
        began.elapsed().as_secs_f64()
    );
    Ok(text)
}

/// Whether its network still exists: after a restart of the machine, or when somebody unmounted it, only files are left.
fn has_namespaces(state: &State) -> bool {
    state.handles.netns.iter().all(|path| netns::open(path).is_ok())
}

/// How this program was called, so that what it prints can be pasted.
fn own_command(name: &str) -> String {
    let argv0 = std::env::args().next().unwrap_or_else(|| "mesh-ctl".to_owned());
    let path = Path::new(&argv0);
    let here = std::env::current_dir().ok();
    let shown = here.and_then(|here| path.strip_prefix(here).ok()).unwrap_or(path).display();
    match name {
        "default" => shown.to_string(),
        name => format!("MESH_SANDBOX={name} {shown}"),
    }
}

/// A part of a sandbox.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PartRow {
    part: String,
    node: String,
    state: String,
    pid: String,
    addresses: Vec<String>,
    mesh: String,
    log: PathBuf,
}

impl Row for PartRow {
    const KIND: &'static str = "SandboxPart";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("PART"),
        Column::Narrow("NODE"),
        Column::Narrow("STATE"),
        Column::Narrow("PID"),
        Column::Narrow("ADDRESS"),
        Column::Narrow("MESH"),
        Column::Wide("LOG"),
    ];

    fn cells(&self) -> Vec<String> {
        vec![
            self.part.clone(),
            self.node.clone(),
            self.state.clone(),
            self.pid.clone(),
            self.addresses.first().cloned().unwrap_or_default(),
            self.mesh.clone(),
            self.log.display().to_string(),
        ]
    }
}

fn status(global: &Global, name: &str) -> Output {
    let sandbox = open(name)?;
    let mut rows: Vec<PartRow> = Vec::new();
    if sandbox.state().mesh.is_some() {
        rows.push(part_row(&sandbox, &Part::Controller, ""));
        rows.push(part_row(&sandbox, &Part::Agent, ""));
        rows.extend(sandbox.topology().nodes.iter().map(|n| part_row(&sandbox, &Part::Node(n.name.clone()), &n.name)));
    }
    let enrolled = sandbox.agent_status().ok();
    for workload in &sandbox.topology().workloads {
        let mut row = part_row(&sandbox, &Part::Workload(workload.key()), &workload.node);
        if workload.command.is_empty() {
            row.state = "idle".to_owned();
        }
        row.addresses = sandbox.topology().addresses(workload).into_iter().flatten().map(|a| a.to_string()).collect();
        let known = enrolled.iter().flat_map(|status| &status.workloads).find(|w| w.workload == workload.key());
        row.mesh = match (workload.enrolment, known) {
            (Enrolment::None, _) => "outside".to_owned(),
            (Enrolment::Mesh, Some(known)) if known.enrolled => "enrolled".to_owned(),
            (Enrolment::Mesh, Some(known)) => format!("waiting: {}", known.why),
            (Enrolment::Mesh, None) => "unknown".to_owned(),
        };
        rows.push(row);
    }
    let bad = rows.iter().any(|row| row.state == "dead" || row.mesh.starts_with("waiting") || row.mesh == "unknown");
    found(render::list(&rows, View::of(global))?, bad)
}

fn part_row(sandbox: &Sandbox, part: &Part, node: &str) -> PartRow {
    let running = sandbox.running(part);
    PartRow {
        node: node.to_owned(),
        state: if running.is_some() { "running" } else { "dead" }.to_owned(),
        pid: running.map(|process| process.pid.to_string()).unwrap_or_default(),
        addresses: Vec::new(),
        mesh: String::new(),
        log: sandbox.layout.log(part),
        part: part.to_string(),
    }
}

/// Becomes the command: its input, output, signals and exit code are its own.
fn exec(name: &str, workload: &str, command: &[String]) -> Output {
    let sandbox = open(name)?;
    if let Err(error) = sandbox.workload(workload) {
        return Err(anyhow!(Usage(format!("{error:#}"))).into());
    }
    let (program, args) = command.split_first().context("a command is needed")?;
    let source = sandbox.command(workload, program)?.args(args).exec();
    Err(anyhow!(NotRun { program: program.clone(), source }).into())
}

fn logs(name: &str, part: Option<&str>, follow: bool) -> Output {
    let sandbox = open(name)?;
    let files = log_files(&sandbox, part)?;
    let mut at: Vec<u64> = vec![0; files.len()];
    loop {
        for ((label, file), at) in files.iter().zip(&mut at) {
            *at += print_from(file, *at, (files.len() > 1).then_some(label.as_str()))?;
        }
        if !follow {
            return Ok(String::new());
        }
        std::thread::sleep(FOLLOW_EVERY);
    }
}

fn log_files(sandbox: &Sandbox, part: Option<&str>) -> Result<Vec<(String, PathBuf)>> {
    let nodes = sandbox.topology().nodes.iter().map(|n| Part::Node(n.name.clone()));
    let mut parts: Vec<Part> = [Part::Controller, Part::Agent].into_iter().chain(nodes).collect();
    if let Some(wanted) = part {
        parts.extend(sandbox.topology().workloads.iter().map(|w| Part::Workload(w.key())));
        let names: Vec<String> = parts.iter().map(short).collect();
        parts.retain(|part| short(part) == wanted || part.to_string() == wanted);
        if parts.is_empty() {
            return Err(anyhow!(Usage(format!("no part `{wanted}`; there are {}", names.join(", ")))));
        }
    }
    Ok(parts.iter().map(|part| (short(part), sandbox.layout.log(part))).collect())
}

fn short(part: &Part) -> String {
    match part {
        Part::Controller | Part::Agent => part.to_string(),
        Part::Node(name) | Part::Workload(name) => name.clone(),
    }
}

/// Prints what a log has from `at`; returns how much that was. A part that never ran has no log.
fn print_from(file: &Path, at: u64, label: Option<&str>) -> Result<u64> {
    let mut log = match std::fs::File::open(file) {
        Ok(log) => log,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error).with_context(|| file.display().to_string()),
    };
    log.seek(SeekFrom::Start(at))?;
    let mut text = Vec::new();
    log.read_to_end(&mut text)?;
    if let (Some(label), false) = (label, text.is_empty()) {
        // Not `println!`, which panics where nobody reads any more.
        writeln!(std::io::stdout(), "==> {label}")?;
    }
    std::io::stdout().write_all(&text)?;
    std::io::stdout().flush()?;
    Ok(text.len() as u64)
}

fn down(name: &str) -> Output {
    Ok(match teardown::down(&Layout::of(name)?)? {
        None => format!("there is no sandbox `{name}`\n"),
        Some(removed) => {
            let killed = if removed.killed == 0 { String::new() } else { format!(" ({} killed)", removed.killed) };
            let (processes, netns) = (removed.processes, removed.netns);
            format!(
                "sandbox `{name}` ended: {processes} processes{killed}, {netns} network namespaces, all given back\n"
            )
        }
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::cli::Cli;

    /// `default` may be somebody's.
    #[test]
    fn the_sandbox_that_is_named_is_the_one_that_ends() {
        let name = format!("no-such-{}", std::process::id());
        for line in [["--sandbox", &name, "sandbox", "down"], ["sandbox", "down", "--sandbox", &name]] {
            let cli = Cli::try_parse_from(["mesh-ctl"].iter().chain(&line)).expect("parses");
            let text = crate::verbs::run(cli).map_err(|failure| failure.error).expect("nothing to end");
            assert_eq!(text, format!("there is no sandbox `{name}`\n"));
        }
        // A second flag for the same would be read in one of two places only.
        assert!(Cli::try_parse_from(["mesh-ctl", "sandbox", "--name", &name, "status"]).is_err());
    }
}
