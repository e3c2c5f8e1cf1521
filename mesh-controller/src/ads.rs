//! Delta ADS: configuration to node proxies.
//!
//! - [`catalogue`]: all resources as they are now, and which changed after which generation.
//! - [`session`]: one node's stream, as a function of what it says and of the catalogue; no I/O.
//! - [`service`]: the gRPC method that drives sessions.
//! - [`nodes`]: who is connected, for status.

pub mod catalogue;
pub mod nodes;
pub mod service;
pub mod session;
