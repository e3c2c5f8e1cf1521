//! The node proxy: takes enrolled workloads' connections, authorizes them, carries them between nodes.
//!
//! Here: capture, tunnel, L4 authorization of connections, certificates, enrolment. Never here: what is decided
//! (`mesh_core`), HTTP routing.

pub mod capture;
