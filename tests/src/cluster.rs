//! A real Kubernetes cluster on this machine, for tests: etcd, the control plane, and up to three nodes with kubelet,
//! containerd and kube-proxy. Nothing is faked, and neither a container engine nor an image registry is needed.
//!
//! The control plane runs in the machine's own namespaces, on a bridge with no way out. A node is a tree of processes in
//! mount, PID, network, UTS, IPC and cgroup namespaces of its own: to kill its first process is a power cut. All that a
//! cluster has is recorded on disk before it is made, so whoever comes later can end it.
//!
//! What deliberately does not live here: anything of the mesh. [`crate::cluster_bed`] is what tests hold.

pub mod addresses;
mod archive;
mod cgroups;
mod configuration;
mod control_plane;
mod dns;
mod footprint;
pub mod image;
mod life;
pub mod node;
mod pki;
mod record;
mod report;
mod requests;
mod shell;
pub mod tools;
mod watch;

pub use addresses::Addresses;
pub use footprint::Footprint;
pub use image::Image;
pub use life::{Cluster, Dns, Options};
pub use node::Node;
pub use requests::PATIENCE;
pub use tools::{Tools, cache_directory};

/// Told what is being done, one line each.
pub type Progress<'a> = &'a mut dyn FnMut(&str);
