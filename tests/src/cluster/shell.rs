//! Running other programs to their end; every failure names the command and what it said.

use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// The command line as a person would type it.
pub(super) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Standard output of a command that succeeded.
pub(super) fn output(command: &mut Command) -> Result<String> {
    let ran = command.stdin(Stdio::null()).output().with_context(|| format!("start `{}`", shown(command)))?;
    judged(command, &ran)
}

/// As [`output`], with standard input.
pub(super) fn output_with(command: &mut Command, input: &str) -> Result<String> {
    use std::io::Write;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("start `{}`", shown(command)))?;
    let mut stdin = child.stdin.take().context("standard input was asked for")?;
    // One that ends early says why on standard error, which is what counts.
    let written = stdin.write_all(input.as_bytes());
    drop(stdin);
    let ran = child.wait_with_output().with_context(|| format!("wait for `{}`", shown(command)))?;
    let text = judged(command, &ran)?;
    written.with_context(|| format!("write to `{}`", shown(command)))?;
    Ok(text)
}

fn judged(command: &Command, ran: &Output) -> Result<String> {
    if !ran.status.success() {
        let said = String::from_utf8_lossy(&ran.stderr);
        bail!("`{}` failed: {}\n{}", shown(command), ran.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&ran.stdout).into_owned())
}

/// `ip ARGUMENTS`, words separated by one blank.
pub(super) fn ip(arguments: &str) -> Result<()> {
    output(Command::new("ip").args(arguments.split(' '))).map(drop)
}
