//! Clusters for tests: an id that no other test has, and one cluster for as long as the bed lives.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};

use nix::fcntl::{Flock, FlockArg};

use crate::cluster::{Cluster, Dns, Options, cache_directory};

/// Ids that tests take if they are free; the lower ones are people's.
const IDS: std::ops::RangeInclusive<u8> = 5..=9;
/// Stands in the lock file of an id while a test has a cluster there.
const IN_USE: &str = "a test's";

/// A cluster that ends when it is dropped.
pub struct ClusterBed {
    /// The cluster.
    pub cluster: Cluster,
    id: HeldId,
}

/// The kernel holds the lock for this process alone, so the id is free again however it ends.
struct HeldId {
    id: u8,
    file: Flock<File>,
}

impl ClusterBed {
    /// Starts a cluster.
    ///
    /// # Panics
    /// All ids are taken, or the cluster does not start.
    pub fn up(nodes: u8, dns: Dns) -> Self {
        let id = HeldId::first_free().unwrap_or_else(|error| panic!("find an id for a cluster: {error:#}"));
        let options = Options { id: id.id, nodes, dns };
        let up = Cluster::up(&options, &mut |line| println!("cluster {}: {line}", options.id));
        Self { cluster: up.unwrap_or_else(|error| panic!("cluster {}: {error:#}", options.id)), id }
    }
}

impl Drop for ClusterBed {
    fn drop(&mut self) {
        if let Err(error) = Cluster::down(self.id.id).and_then(|_| self.id.give_back()) {
            eprintln!("cluster {} has not ended: {error:#}", self.id.id);
        }
    }
}

impl HeldId {
    /// One that nobody holds. What a killed test left there is ended; a cluster that is no test's stays.
    fn first_free() -> anyhow::Result<Self> {
        let cache = cache_directory()?;
        fs::create_dir_all(&cache)?;
        for id in IDS {
            let path = cache.join(format!("cluster-{id}.lock"));
            let file = File::options().create(true).truncate(false).read(true).write(true).open(path)?;
            let Ok(mut file) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { continue };
            let mut left = String::new();
            file.read_to_string(&mut left)?;
            if left == IN_USE {
                Cluster::down(id)?;
            } else if Cluster::exists(id) {
                continue;
            }
            file.seek(SeekFrom::Start(0))?;
            file.write_all(IN_USE.as_bytes())?;
            return Ok(Self { id, file });
        }
        anyhow::bail!("{} to {} are all in use", IDS.start(), IDS.end())
    }

    fn give_back(&mut self) -> anyhow::Result<()> {
        Ok(self.file.set_len(0)?)
    }
}
