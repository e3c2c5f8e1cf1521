//! Real processes in real namespaces: what the tiers above unit tests share.

pub mod bench;

pub mod bpf_map;

pub mod cacerts;
pub mod capture_bed;

pub mod cluster;
pub mod cluster_bed;

pub mod ends;
pub mod greeter;
pub mod hostile;
pub mod kubernetes_bed;

pub mod link;

pub mod mesh_bed;
pub mod policy_bed;
pub mod records;
pub mod sandbox_bed;
pub mod usage;

pub mod wire;
