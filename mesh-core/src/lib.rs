//! What the mesh decides, as functions of values.
//!
//! Here: identity, the workload model, policy, routing, load balancing, the certificate schedule, config compilation.
//! Never here: async, clocks, random sources, I/O, logging, protobuf or Kubernetes types. Time and chance are arguments.

pub mod authorize;
mod balance;
pub mod certs;
pub mod chunked_map;
pub mod config;
pub mod flow;
pub mod identity;
pub mod inbound;
pub mod plan;
pub mod policy;
pub mod service;
pub mod snapshot;
pub mod workload;
