//! `mesh-controller`.

use std::process::ExitCode;

fn main() -> ExitCode {
    mesh_controller::cli::main()
}
