//! The `mesh-ctl` binary: parses the command line, runs the verb, chooses the exit code.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser;
use mesh_ctl::cli::Cli;
use mesh_ctl::exit::{self, Findings};
use mesh_ctl::verbs;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, the rest is a wrong command line. Nobody reads when stdout is closed.
            let _ = error.print();
            return if error.use_stderr() { exit::USAGE.into() } else { exit::OK.into() };
        }
    };
    match verbs::run(cli) {
        Ok(text) => match std::io::stdout().write_all(text.as_bytes()) {
            // `mesh-ctl ... | head` is no failure.
            Ok(()) | Err(_) => exit::OK.into(),
        },
        Err(verbs::Failure { text, error }) => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            if !error.is::<Findings>() {
                eprintln!("mesh-ctl: {error:#}");
            }
            exit::code(&error).into()
        }
    }
}
