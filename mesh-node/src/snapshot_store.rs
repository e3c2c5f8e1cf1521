//! The last good configuration on disk, so that a restart without a controller decides as before.
//!
//! One file, replaced as a whole: a line with format, turn, checksum and length, then the resources as they go over the wire.
//! A file that does not check out is refused as a whole: without one of its policies it would let in too much. While one
//! proxy takes over from another there are two writers, so each write has a file of its own until it is whole. What the
//! next one wrote is newer: processes take turns, each a higher one than it found, and nobody writes over a higher one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_api::proto::xds;
use mesh_api::wds::{self, WireError};
use mesh_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use mesh_core::snapshot::{Change, Snapshot};
use prost::Message;
use sha2::{Digest, Sha256};

/// Name of the file in the state directory.
const FILE: &str = "snapshot";
/// Name of the file with the last turn that was drawn.
const TURN: &str = "turn";
/// Where no turn can be drawn.
const FIRST_TURN: u64 = 1;
/// First word of the file; another version of the format gets another one.
const FORMAT: &str = "mesh-snapshot-2";
/// End of the name of a file that is being written.
const UNFINISHED: &str = ".new";
/// An unfinished file that was not written to for so long is nobody's any more: a write takes less than a second.
const ABANDONED_AFTER: Duration = Duration::from_secs(60);
/// Longest header line, bytes.
const MAX_HEADER_BYTES: usize = 256;
/// Largest file that is read, bytes: a mesh of 500,000 workloads.
const MAX_BYTES: usize = 512 << 20;

/// Versions of resources by name, of each type.
pub type Versions = BTreeMap<String, String>;

/// What was stored.
#[derive(Debug, Clone, Default)]
pub struct Stored {
    /// As changes to an empty snapshot.
    pub changes: Vec<Change>,
    /// Versions of workloads and services, and of policies, as the controller named them.
    pub versions: [Versions; 2],
}

/// Where a process stores.
#[derive(Debug, Clone)]
pub struct Storage {
    /// The state directory.
    pub dir: PathBuf,
    turn: u64,
}

impl Storage {
    /// Takes the next turn in a state directory, and reads what the last one stored.
    pub fn open(dir: PathBuf) -> (Self, Result<Option<Stored>, StoreError>) {
        let stored = load(&dir);
        let turn = next_turn(&dir).unwrap_or_else(|error| {
            tracing::warn!(dir = %dir.display(), %error, "no turn at the stored configuration; another process may write over it");
            FIRST_TURN
        });
        (Self { dir, turn }, stored)
    }

    /// As [`save`].
    pub fn save(&self, snapshot: &Snapshot, versions: &[Versions; 2]) -> io::Result<()> {
        save(&self.dir, self.turn, snapshot, versions)
    }
}

/// Why a stored configuration is not used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Written by another version of this program, or not by it.
    #[error("{}: not of the format {FORMAT}", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
    },
    /// Damaged.
    #[error("{}: {reason}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// How.
        reason: String,
    },
    /// A resource cannot be understood (any more).
    #[error("{}: {name}: {source}", path.display())]
    Resource {
        /// Which file.
        path: PathBuf,
        /// Which resource.
        name: String,
        /// What is wrong with it.
        source: WireError,
    },
}

/// Position of a type in [`Stored::versions`].
pub fn type_index(type_url: &str) -> Option<usize> {
    [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL].iter().position(|known| *known == type_url)
}

/// Reads what was stored; none when there is no file. Removes what killed writers left.
pub fn load(state_dir: &Path) -> Result<Option<Stored>, StoreError> {
    remove_abandoned(state_dir);
    let path = state_dir.join(FILE);
    let mut bytes = Vec::new();
    match File::open(&path).and_then(|file| file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes)) {
        Ok(_) => decode(&path, &bytes).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(StoreError::Read { path, source }),
    }
}

fn decode(path: &Path, bytes: &[u8]) -> Result<Stored, StoreError> {
    let damaged = |reason: &str| StoreError::Damaged { path: path.to_owned(), reason: reason.to_owned() };
    let format = || StoreError::Format { path: path.to_owned() };
    if bytes.len() > MAX_BYTES {
        return Err(damaged("too large"));
    }
    let end = bytes.iter().take(MAX_HEADER_BYTES).position(|b| *b == b'\n').ok_or_else(format)?;
    let header = std::str::from_utf8(&bytes[..end]).map_err(|_| format())?;
    let mut words = header.split(' ');
    if words.next() != Some(FORMAT) {
        return Err(format());
    }
    let turn = words.next().and_then(|word| word.parse().ok());
    let (Some(turn), Some(checksum), Some(length), None) = (turn, words.next(), words.next(), words.next()) else {
        return Err(damaged("its first line is not complete"));
    };
    let body = &bytes[end + 1..];
    if length.parse() != Ok(body.len()) {
        return Err(damaged("it is cut short or has something appended"));
    }
    if checksum_of(turn, body) != checksum {
        return Err(damaged("its checksum does not match"));
    }
    let mut stored = Stored::default();
    let mut rest = body;
    while !rest.is_empty() {
        let resource = xds::Resource::decode_length_delimited(&mut rest).map_err(|e| damaged(&e.to_string()))?;
        let any = resource.resource.unwrap_or_default();
        let index = type_index(&any.type_url).ok_or_else(|| damaged("a resource of an unknown type"))?;
        let change = wds::decode(&any.type_url, &any.value).map_err(|source| StoreError::Resource {
            path: path.to_owned(),
            name: resource.name.clone(),
            source,
        })?;
        stored.changes.push(change);
        stored.versions[index].insert(resource.name, resource.version);
    }
    Ok(stored)
}

/// Writes a configuration in place of the last one, unless that is of a later turn. Atomic: a crash leaves the old file or
/// the new one. Blocks.
pub fn save(state_dir: &Path, turn: u64, snapshot: &Snapshot, versions: &[Versions; 2]) -> io::Result<()> {
    let body = encode(snapshot, versions);
    let (new, file) =
        (state_dir.join(format!("{FILE}.{:016x}{UNFINISHED}", rand::random::<u64>())), state_dir.join(FILE));
    let directory = File::open(state_dir)?;
    let written = write(&new, turn, &body).and_then(|()| {
        // Until it is closed: between the look at the last one and its replacement nobody else may replace it.
        directory.lock()?;
        if turn_of(&file).is_some_and(|last| last > turn) { fs::remove_file(&new) } else { fs::rename(&new, &file) }
    });
    if let Err(error) = written {
        // It may not even be there; the first error is what there is to say.
        let _ = fs::remove_file(&new);
        return Err(error);
    }
    directory.sync_all()
}

/// Draws a turn that no other process has.
fn next_turn(state_dir: &Path) -> io::Result<u64> {
    let directory = File::open(state_dir)?;
    directory.lock()?;
    let path = state_dir.join(TURN);
    let drawn = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    // Also that of a damaged configuration, which is to be replaced.
    let stored = turn_of(&state_dir.join(FILE)).unwrap_or(0);
    let turn = drawn.max(stored).saturating_add(1);
    let new = state_dir.join(format!("{TURN}{UNFINISHED}"));
    fs::write(&new, format!("{turn}\n"))?;
    fs::rename(&new, &path)?;
    Ok(turn)
}

/// The turn of a stored configuration; none if there is none, or no whole first line.
fn turn_of(file: &Path) -> Option<u64> {
    let mut header = String::new();
    BufReader::new(File::open(file).ok()?.take(MAX_HEADER_BYTES as u64)).read_line(&mut header).ok()?;
    header.strip_prefix(FORMAT)?.split_ascii_whitespace().next()?.parse().ok()
}

fn write(path: &Path, turn: u64, body: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    writeln!(file, "{FORMAT} {turn} {} {}", checksum_of(turn, body), body.len())?;
    file.write_all(body)?;
    file.sync_all()
}

/// What cannot be looked at or removed does no harm but take room.
fn remove_abandoned(state_dir: &Path) {
    for entry in fs::read_dir(state_dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with(FILE) || !name.ends_with(UNFINISHED) {
            continue;
        }
        let modified = entry.metadata().and_then(|metadata| metadata.modified());
        if modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age >= ABANDONED_AFTER)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn encode(snapshot: &Snapshot, versions: &[Versions; 2]) -> Vec<u8> {
    let workloads = snapshot.workloads().map(|w| Change::UpsertWorkload(w.clone()));
    let services = snapshot.services().map(|s| Change::UpsertService(s.clone()));
    let policies = snapshot.policies().map(|p| Change::UpsertPolicy(p.clone()));
    let mut body = Vec::new();
    for change in workloads.chain(services).chain(policies) {
        let wds::Resource { type_url, name, content: Some(content) } = wds::encode(&change) else { continue };
        let version = type_index(type_url).and_then(|index| versions[index].get(&name)).cloned();
        let resource = xds::Resource {
            version: version.unwrap_or(content.version),
            resource: Some(prost_types::Any { type_url: type_url.to_owned(), value: content.bytes.to_vec() }),
            name,
            ..Default::default()
        };
        // A vector grows as needed, so encoding cannot fail.
        let _ = resource.encode_length_delimited(&mut body);
    }
    body
}

fn checksum_of(turn: u64, body: &[u8]) -> String {
    hex(&Sha256::new().chain_update(turn.to_be_bytes()).chain_update(body).finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a `String` cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
