//! What is written down of a cluster, before it is made, so that it can be ended by whoever comes later.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use mesh_ctl::sandbox::files;
use mesh_ctl::sandbox::state::Process;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::addresses::Addresses;
use super::cgroups::Cgroups;

/// Of a cluster in its directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) addresses: Addresses,
    /// How many nodes it was asked to have.
    pub(super) nodes: u8,
    /// The programs that it runs.
    pub(super) programs: PathBuf,
    /// By part: `plane`, `n1`, `n2`..
    pub(super) cgroups: BTreeMap<String, Cgroups>,
    /// By name: `etcd`, .. and `n1`, `n2`..
    pub(super) processes: BTreeMap<String, Process>,
}

impl Record {
    /// The directory of a cluster. Not below /var, /etc or /opt: nodes lay what they write over these, and that lies here.
    pub(super) fn directory(id: u8) -> PathBuf {
        PathBuf::from(format!("/tmp/mesh-cluster-{id}"))
    }

    /// Makes the directory; false if it is there.
    pub(super) fn make_directory(id: u8) -> Result<bool> {
        let directory = Self::directory(id);
        match DirBuilder::new().mode(0o700).create(&directory) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error).with_context(|| format!("create {}", directory.display())),
        }
    }

    /// Of a cluster; none if it does not exist, or its builder died before it made anything.
    pub(super) fn load(id: u8) -> Result<Option<Self>> {
        let path = path(&Self::directory(id));
        match fs::read(&path) {
            Ok(text) => {
                let record = serde_json::from_slice(&text);
                record.with_context(|| format!("{} is no record of this version", path.display())).map(Some)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        }
    }

    pub(super) fn save(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("encode the record")?;
        files::replace(&path(&Self::directory(self.addresses.id())), &text, 0o600)
    }
}

fn path(directory: &Path) -> PathBuf {
    directory.join("cluster.json")
}

/// The right to change a cluster; others wait for it.
pub(super) struct Turn {
    _held: Flock<File>,
}

impl Turn {
    pub(super) fn wait(id: u8) -> Result<Self> {
        let directory = Record::directory(id);
        let file = File::open(&directory).with_context(|| format!("open {}", directory.display()))?;
        match Flock::lock(file, FlockArg::LockExclusive) {
            Ok(held) => Ok(Self { _held: held }),
            Err((_, error)) => bail!("lock {}: {error}", directory.display()),
        }
    }
}
