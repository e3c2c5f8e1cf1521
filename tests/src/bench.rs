//! The benchmark: the same work directly, through the mesh and through a peer's node proxy, in one run.
//!
//! Nothing here is a test: machines are shared and noisy, so only ratios within one run mean something.

pub mod cpu;
pub mod load;
pub mod peer;
pub mod place;
pub mod run;
pub mod table;
