//! The chained CNI plugin: a pod starts when the agent says that its node proxy serves it, or that it is none of the mesh.
//!
//! ```text
//! runtime -> plugin -> config, call -> store (namespaces, known before) -> ask (the agent, until a deadline)
//! ```
//!
//! The agent uses [`wire`], [`store`], [`unasked`] and [`config`] too. Not here: who belongs to the mesh (`mesh-core`, asked by
//! `mesh-agent`), and anything that asks an API server or needs a runtime: this program is started for every pod.

mod ask;
mod call;
pub mod config;
mod failure;
mod journal;
pub mod plugin;
pub mod store;
pub mod unasked;
pub mod wire;
