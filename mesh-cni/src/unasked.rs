//! Pods that started while the agent was away: the plugin notes them, the agent looks whether one of them belongs to the mesh.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::wire::Request;

/// Largest file in bytes: some thousand pods. What comes after is in the plugin's log only.
const MAX_BYTES: u64 = 1 << 20;

/// Notes one.
///
/// # Errors
/// The directory cannot be written to, or the file is full.
pub fn note(dir: &Path, request: &Request) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let mut file = File::options().append(true).create(true).mode(0o600).open(path(dir))?;
    if file.metadata()?.len() >= MAX_BYTES {
        return Err(io::ErrorKind::StorageFull.into());
    }
    // One write: other plugins append too.
    file.write_all(format!("{}\n", serde_json::to_string(request)?).as_bytes())
}

/// Takes all notes; lines that cannot be read are passed over.
///
/// # Errors
/// The file cannot be read.
pub fn take(dir: &Path) -> io::Result<Vec<Request>> {
    let taken = dir.join(".unasked.taken");
    match fs::rename(path(dir), &taken) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    }
    let mut text = String::new();
    File::open(&taken)?.take(2 * MAX_BYTES).read_to_string(&mut text)?;
    fs::remove_file(taken)?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// The file in a state directory.
pub fn path(dir: &Path) -> PathBuf {
    dir.join("unasked.jsonl")
}
