//! The `mesh-ctl` binary. Its parts are in the library and have tests; the command line that puts them together does not exist yet,
//! and says so instead of doing half of it.

use std::process::ExitCode;

fn main() -> ExitCode {
    eprintln!("mesh-ctl: the command line is not built yet; README.md says what works today");
    ExitCode::FAILURE
}
