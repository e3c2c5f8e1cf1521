//! The control plane: reads configuration, compiles it (in `mesh-core`), publishes it to node proxies, and is the CA.
//!
//! ```text
//! source -> control (compile) -> ads::catalogue -> ads::session -> a node's stream
//! ca::store -> ca::authority -> ca::service -> a workload's certificate
//! ```
//!
//! Never here: the data plane, and decisions about a connection. Only [`app`] spawns tasks.

pub mod admin;
pub mod ads;
pub mod app;
pub mod ca;
pub mod cli;
pub mod control;
pub mod door;
pub mod entitlement;
pub mod kubernetes;
pub mod last_good;
pub mod limit;
pub mod metrics;
pub mod place;
pub mod publish;
pub mod server;
pub mod source;
pub mod state_dir;
pub mod status;
#[cfg(test)]
mod testing;
pub mod token;
