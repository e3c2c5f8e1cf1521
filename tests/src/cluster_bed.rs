//! Clusters for tests: an id that no other test has, and one cluster for as long as the bed lives.

use std::fs::File;
use std::path::PathBuf;

use nix::fcntl::{Flock, FlockArg};

use crate::cluster::{Cluster, Dns, Options};

/// Ids that tests take; the lower ones are people's.
const IDS: std::ops::RangeInclusive<u8> = 5..=9;

/// A cluster that ends when it is dropped.
pub struct ClusterBed {
    /// The cluster.
    pub cluster: Cluster,
    /// Held by the kernel for this process alone, so that the id is free again however it ends.
    _id: Flock<File>,
}

impl ClusterBed {
    /// Starts a cluster. What a test that was killed left under the same id is ended first.
    ///
    /// # Panics
    /// All ids are taken, or the cluster does not start.
    pub fn up(nodes: u8, dns: Dns) -> Self {
        let (id, held) = free_id();
        Cluster::down(id).unwrap_or_else(|error| panic!("end what was left of cluster {id}: {error:#}"));
        let up = Cluster::up(&Options { id, nodes, dns }, &mut |line| println!("cluster {id}: {line}"));
        Self { cluster: up.unwrap_or_else(|error| panic!("cluster {id}: {error:#}")), _id: held }
    }
}

impl Drop for ClusterBed {
    fn drop(&mut self) {
        if let Err(error) = Cluster::down(self.cluster.id()) {
            eprintln!("cluster {} has not ended: {error:#}", self.cluster.id());
        }
    }
}

/// The first id whose lock nobody holds; a cluster without a lock is no test's and stays.
fn free_id() -> (u8, Flock<File>) {
    for id in IDS {
        let path = PathBuf::from(format!("/run/lock/mesh-cluster-{id}"));
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.unwrap_or_else(|error| panic!("open {}: {error}", path.display()));
        if let Ok(held) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            return (id, held);
        }
    }
    panic!("all clusters of tests ({} to {}) are in use", IDS.start(), IDS.end());
}
