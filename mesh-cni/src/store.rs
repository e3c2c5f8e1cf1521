//! What is known of namespaces while the agent is away: a file that the agent writes and the plugin reads.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Form of the file. One of another form is no knowledge at all.
const VERSION: u32 = 1;
/// Largest file in bytes: 10,000 namespaces of the longest names are a quarter of it.
const MAX_BYTES: u64 = 4 << 20;
/// What is older says nothing: who was left alone yesterday may have joined.
pub const BELIEVED_FOR: Duration = Duration::from_secs(24 * 3600);

/// Namespaces at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Store {
    version: u32,
    /// Seconds since 1970.
    written_at_secs: u64,
    /// Namespaces that belong to the mesh, or have had a pod that does.
    pub members: BTreeSet<String>,
    /// The others.
    pub outside: BTreeSet<String>,
}

/// What a store says of a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It has, or had, pods in the mesh.
    Member,
    /// No pod of it has ever belonged to the mesh.
    Outside,
    /// It is new, or the store is old.
    Unknown,
}

impl Store {
    /// What is known at that time.
    pub fn new(members: BTreeSet<String>, outside: BTreeSet<String>, now: SystemTime) -> Self {
        Self { version: VERSION, written_at_secs: secs(now), members, outside }
    }

    /// What it says of a namespace at that time.
    pub fn standing(&self, namespace: &str, now: SystemTime) -> Standing {
        if self.members.contains(namespace) {
            return Standing::Member;
        }
        // One of the future was written by another clock.
        let age = secs(now).checked_sub(self.written_at_secs);
        let is_believed = age.is_some_and(|age| age < BELIEVED_FOR.as_secs());
        if is_believed && self.outside.contains(namespace) { Standing::Outside } else { Standing::Unknown }
    }

    /// Reads it.
    ///
    /// # Errors
    /// There is none, or it cannot be understood: then nothing is known.
    pub fn read(dir: &Path) -> io::Result<Self> {
        let mut bytes = Vec::new();
        File::open(path(dir))?.take(MAX_BYTES).read_to_end(&mut bytes)?;
        let store: Self = serde_json::from_slice(&bytes)?;
        if store.version != VERSION {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("version {}", store.version)));
        }
        Ok(store)
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// The directory cannot be made or written to.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        // While one agent follows another there are two.
        let fresh = dir.join(format!(".namespaces.{}.tmp", std::process::id()));
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        fs::rename(&fresh, path(dir))?;
        // The name must outlive a power cut too.
        File::open(dir)?.sync_all()
    }
}

/// The file in a state directory.
pub fn path(dir: &Path) -> PathBuf {
    dir.join("namespaces.json")
}

fn secs(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn only_a_young_store_says_who_is_outside_and_any_says_who_belongs() {
        let written = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let store = Store::new(set(&["shop"]), set(&["batch"]), written);
        let check = |namespace: &str, now: SystemTime, expected: Standing| {
            assert_eq!(store.standing(namespace, now), expected, "{namespace} at {now:?}");
        };
        let day = BELIEVED_FOR;
        check("batch", written, Standing::Outside);
        check("batch", written + day - Duration::from_secs(1), Standing::Outside);
        check("batch", written + day, Standing::Unknown);
        check("batch", written - Duration::from_secs(1), Standing::Unknown);
        check("shop", written + day * 100, Standing::Member);
        check("new", written, Standing::Unknown);
    }

    #[test]
    fn what_is_written_is_read_and_anything_else_is_no_knowledge() {
        let dir = std::env::temp_dir().join(format!("mesh-cni-store-{}", std::process::id()));
        assert!(Store::read(&dir).is_err());
        let store = Store::new(set(&["shop"]), set(&["batch"]), SystemTime::now());
        store.write(&dir).unwrap();
        assert_eq!(Store::read(&dir).unwrap(), store);
        let text = fs::read_to_string(path(&dir)).unwrap();
        for broken in [&text[..text.len() - 3], "", "{}", &text.replace("\"version\":1", "\"version\":2")] {
            fs::write(path(&dir), broken).unwrap();
            assert!(Store::read(&dir).is_err(), "{broken}");
        }
        fs::remove_dir_all(dir).unwrap();
    }
}
