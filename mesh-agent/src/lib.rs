//! Enrolment, the agent's side: which workloads of a node belong to the mesh, and telling its node proxies.
//!
//! ```text
//! kubernetes (pods, namespaces, their network namespaces) -+
//!                                                          +-> Board -> proxy (one thread for each node proxy)
//! the sandbox's record (in mesh-ctl) ----------------------+
//! ```
//!
//! A pod that starts is told of by the CNI plugin (`mesh-cni`) too, which waits for the proxy's answer; `conflist` makes runtimes
//! start that plugin.
//!
//! Not here: what enrolment does (`mesh-node`), and what a pod's labels mean (`mesh-core`).

pub mod alive;
mod announce;
mod board;
pub mod conflist;
pub mod kubernetes;
mod proxy;

pub use announce::{Desired, Enrol, Netns, Outcome};
pub use board::Board;
pub use proxy::{accept, listen};
