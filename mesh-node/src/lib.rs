//! The node proxy: takes enrolled workloads' connections, authorizes them, carries them between nodes.
//!
//! Here: capture, tunnel, L4 authorization of connections, certificates, enrolment. Never here: what is decided
//! (`mesh_core`), HTTP routing.

pub mod accept;
pub mod access_log;
pub mod admin;
pub mod app;
pub mod ca_client;
pub mod capture;
pub mod certificates;
pub mod check;
pub mod cli;
pub mod config;
pub mod connections;
pub mod controller;
pub mod dial;
pub mod enrol;
pub mod handshakes;
pub mod hbone;
pub mod http_server;
pub mod identity;
pub mod inbound;
pub mod interfaces;
pub mod limits;
pub mod logging;
pub mod metrics;
pub mod outbound;
pub mod readiness;
pub mod relay;
pub mod runtime;
pub mod seqpacket;
pub mod snapshot_store;
pub mod supervisor;
pub mod tls;
pub mod view_change;
pub mod wire;
pub mod workers;
pub mod xds;
