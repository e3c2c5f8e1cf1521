//! The `mesh-node` binary.

use std::process::ExitCode;

/// Many small allocations with short lives from many threads: the system's allocator keeps more of them.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    mesh_node::cli::main()
}
