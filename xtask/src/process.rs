//! Running other programs: every failure names the command; a time limit ends what the command started.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The command line as a person would type it.
pub(crate) fn shown(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}

/// Runs to the end with our own output; an exit code other than 0 is an error.
pub(crate) fn run(mut command: Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("start `{}`", shown(&command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", shown(&command));
    }
    Ok(())
}

/// Standard output of a command that succeeded; its standard error is part of the error otherwise.
pub(crate) fn output(mut command: Command) -> Result<String> {
    let result = command.stdin(Stdio::null()).output().with_context(|| format!("start `{}`", shown(&command)))?;
    if !result.status.success() {
        bail!("`{}` failed: {}\n{}", shown(&command), result.status, String::from_utf8_lossy(&result.stderr).trim());
    }
    String::from_utf8(result.stdout).with_context(|| format!("output of `{}` is not UTF-8", shown(&command)))
}

/// Whether the command can be run and exits with 0; it prints nothing.
pub(crate) fn succeeds(program: &str, arguments: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// The first file of that name in `PATH` or where Debian keeps what administrators run.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(system).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// How a watched command ended.
pub(crate) enum End {
    Exited(ExitStatus),
    /// The limit passed; the command and what it had started were killed.
    OutOfTime,
}

/// Runs with standard output handed line by line to `see`, at most for `limit`.
pub(crate) fn watch(mut command: Command, limit: Duration, mut see: impl FnMut(&str)) -> Result<End> {
    let name = shown(&command);
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().with_context(|| format!("start `{name}`"))?;
    let stdout = child.stdout.take().context("standard output was asked for")?;
    let (lines, received) = mpsc::sync_channel::<String>(LINES_IN_FLIGHT);
    let reader = thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            if lines.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });
    let deadline = Instant::now() + limit;
    loop {
        match received.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => see(&line),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                kill_with_descendants(&mut child);
                drop(received);
                // A descendant that left our reach may still hold the pipe, so the reader is not waited for.
                return Ok(End::OutOfTime);
            }
        }
    }
    let status = child.wait().with_context(|| format!("wait for `{name}`"))?;
    reader.join().map_err(|_| anyhow::anyhow!("reading the output of `{name}` panicked"))?;
    Ok(End::Exited(status))
}

/// Lines read ahead of their handling.
const LINES_IN_FLIGHT: usize = 1024;

/// Ends the child and every process below it, found by parent ids, so that nothing of a hung test stays.
fn kill_with_descendants(child: &mut Child) {
    let parents = parents();
    let mut doomed = vec![child.id()];
    let mut next = 0;
    while let Some(&parent) = doomed.get(next) {
        doomed.extend(parents.iter().filter(|&(_, &of)| of == parent).map(|(&pid, _)| pid));
        next += 1;
    }
    for pid in doomed.iter().rev() {
        succeeds("kill", &["-KILL", &pid.to_string()]);
    }
    // Reaps it; it is dead or was already gone.
    drop(child.wait());
}

/// Parent id of every process.
fn parents() -> BTreeMap<u32, u32> {
    let Ok(processes) = fs::read_dir("/proc") else { return BTreeMap::new() };
    processes
        .flatten()
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            // The name in parentheses may hold spaces and parentheses itself.
            let after_name = stat.rsplit_once(')')?.1;
            Some((pid, after_name.split_whitespace().nth(1)?.parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_out_of_time_takes_its_children_with_it() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 600 & echo $!; wait"]);
        let mut sleeper = None;
        let end = watch(command, Duration::from_millis(500), |line| sleeper = line.parse::<u32>().ok()).unwrap();
        assert!(matches!(end, End::OutOfTime));
        let sleeper = sleeper.expect("the shell printed the id of its child");
        let gone = |pid: u32| match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z')),
            Err(_) => true,
        };
        let deadline = Instant::now() + Duration::from_secs(5);
        while !gone(sleeper) {
            assert!(Instant::now() < deadline, "process {sleeper} lives on");
            thread::yield_now();
        }
    }

    #[test]
    fn lines_arrive_in_order_and_the_exit_code_is_kept() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two; exit 3"]);
        let mut lines = Vec::new();
        let end = watch(command, Duration::from_secs(30), |line| lines.push(line.to_owned())).unwrap();
        assert!(matches!(end, End::Exited(status) if status.code() == Some(3)));
        assert_eq!(lines, ["one", "two"]);
    }
}
