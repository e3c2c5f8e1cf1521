//! Sandboxes: a mesh on one machine, out of network namespaces, cgroups and the real processes.
//!
//! A [`Topology`] is a value; [`plan`](plan::plan) turns it into steps; [`Sandbox`] carries them out and records every
//! handle before it is created, so that [`teardown::down`] can give everything back after a crash at any moment.
//! Nothing of a sandbox lies in the host's own network namespace, so two sandboxes cannot meet.
//!
//! What deliberately does not live here: the command line (`crate::verbs`), and any decision of the mesh.

pub mod agent;
mod build;
pub mod cgroup;
mod execute;
pub mod files;
pub mod layout;
mod links;
pub mod manifests;
mod mesh;
pub mod names;
pub mod netns;
pub mod plan;
pub mod process;
pub mod serve;
pub mod state;
pub mod teardown;
pub mod topology;

pub use build::Sandbox;
pub use layout::Layout;
pub use mesh::binaries_beside;
pub use state::{Mesh, Part, Phase, State};
pub use topology::{Enrolment, Node, Service, Topology, Workload};

/// Told what is being done, one line each.
pub type Progress<'a> = &'a mut dyn FnMut(&str);
