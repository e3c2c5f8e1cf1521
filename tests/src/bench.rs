//! The benchmark: the same work directly, through the mesh and through a peer's node proxy, in one run.

pub mod load;
