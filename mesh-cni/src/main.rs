//! Variables and standard input in, standard output and exit code out.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let done = mesh_cni::plugin::run(&|name| std::env::var(name).ok(), std::io::stdin().lock());
    let written = std::io::stdout().write_all(done.stdout.as_bytes());
    // Who does not hear the answer must not take it for a success.
    if written.is_err() { ExitCode::FAILURE } else { ExitCode::from(done.exit_code) }
}
