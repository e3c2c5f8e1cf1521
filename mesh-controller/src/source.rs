//! Where configuration comes from.
//!
//! A source gives batches; a batch is what it found to be true at one moment, told as deltas against the batch before.
//! The set of sources is closed: directories of files, or a Kubernetes API server.

pub mod cluster;
pub mod directory;
mod listing;
mod scan;
pub mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use mesh_api::admin::Problem;
use mesh_core::config::{Delta, Object, ObjectKey};

use cluster::{Cluster, Seen};
use directory::Directories;

/// A place that configuration comes from.
#[derive(Debug)]
pub enum Source {
    /// `--config-dir`, all of them together.
    Directories(Box<Directories>),
    /// `--kubernetes`.
    Cluster(Cluster),
}

/// What may be another than when it was looked at last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changed {
    /// Nothing but these files and directories.
    Paths(BTreeSet<PathBuf>),
    /// Anything.
    Anything,
}

/// What changed since the last batch, and everything that is wrong now.
#[derive(Debug, Default, PartialEq)]
pub struct Batch {
    /// Removals first: an address may go from one object to another in one batch.
    pub deltas: Vec<Delta>,
    /// Sorted; what the reader found, not the compiler.
    pub problems: Vec<Problem>,
    /// Files or directories were not understood: they may hold objects that nobody knows of.
    pub doubtful: bool,
}

impl Source {
    /// A source that reads directories.
    pub fn directories(dirs: Vec<PathBuf>) -> Self {
        Self::Directories(Box::new(Directories::new(dirs)))
    }

    /// Takes over what was in force before a restart: the next batch tells what changed against it.
    pub fn resume(&mut self, objects: Vec<Object>) {
        match self {
            Self::Directories(directories) => directories.resume(objects),
            Self::Cluster(cluster) => cluster.resume(objects),
        }
    }

    /// Looks at what may have changed and says what did. Blocks on files.
    pub fn poll(&mut self, changed: &Changed) -> Batch {
        match self {
            Self::Directories(directories) => directories.poll(changed),
            // What it was told is all that can have changed.
            Self::Cluster(cluster) => cluster.poll(),
        }
    }

    /// Of objects whose authors are told what became of them: what the versions of the last batch say beside their meaning.
    pub fn seen(&self) -> Arc<BTreeMap<ObjectKey, Seen>> {
        match self {
            Self::Directories(_) => Arc::default(),
            Self::Cluster(cluster) => cluster.seen(),
        }
    }

    /// For status.
    pub fn describe(&self) -> Vec<String> {
        match self {
            Self::Directories(directories) => directories.dirs().iter().map(|dir| dir.display().to_string()).collect(),
            Self::Cluster(cluster) => cluster.describe(),
        }
    }
}

/// What says that a source has something new.
pub enum Notices {
    /// The file system.
    Directories(watch::Watch),
    /// Watches of the API server.
    Cluster(crate::kubernetes::follow::Notices),
}

impl Notices {
    /// Waits for the next change, and says where to look.
    pub async fn changed(&mut self) -> Changed {
        match self {
            Self::Directories(watch) => watch.changed().await,
            Self::Cluster(notices) => {
                notices.changed().await;
                Changed::Anything
            }
        }
    }
}
