//! `mesh-ctl`: the command line, and the sandbox as a library.
//!
//! A verb gathers (talks to a [`target`]) and then renders (pure). No decision of the mesh is made here: what a
//! connection may do is asked of the node that would decide it.

pub mod admin;
pub mod cli;
pub mod exit;
pub mod render;
pub mod sandbox;
pub mod target;
pub mod verbs;
