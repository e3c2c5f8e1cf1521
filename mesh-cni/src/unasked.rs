//! Pods that started while the agent was away: the plugin notes them, the agent looks whether one of them belongs to the mesh.
//!
//! A note stays in the file until the agent has settled it. Whoever changes the file holds a lock on it, and nobody puts another in
//! its place: so no note is written into a file that nobody reads.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::wire::Request;

/// Largest file in bytes: some thousand pods. What comes after is in the plugin's log only.
const MAX_BYTES: u64 = 1 << 20;
/// Whoever holds the lock has it for milliseconds; if it was stopped meanwhile, pods start all the same.
const LOCK_WITHIN: Duration = Duration::from_secs(1);
/// Pause between two attempts to lock.
const LOCK_EVERY: Duration = Duration::from_millis(5);

/// One pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Seconds since 1970.
    #[serde(default)]
    pub at_secs: u64,
    /// What the agent would have been told.
    #[serde(flatten)]
    pub request: Request,
}

impl Note {
    /// How old it is; one from the future is as old as can be.
    pub fn age(&self, now: SystemTime) -> Duration {
        now.duration_since(UNIX_EPOCH + Duration::from_secs(self.at_secs)).unwrap_or(Duration::MAX)
    }
}

/// Notes one.
///
/// # Errors
/// The directory cannot be written to, or the file is full or stays locked.
pub fn note(dir: &Path, request: &Request, now: SystemTime) -> io::Result<()> {
    let at_secs = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let line = line(&Note { at_secs, request: request.clone() })?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let mut file = locked(File::options().append(true).create(true).mode(0o600).open(path(dir))?)?;
    if file.metadata()?.len() >= MAX_BYTES {
        return Err(io::ErrorKind::StorageFull.into());
    }
    file.write_all(line.as_bytes())
}

/// All notes; lines that cannot be read are passed over.
///
/// # Errors
/// The file cannot be read, or stays locked.
pub fn read(dir: &Path) -> io::Result<Vec<Note>> {
    match open(dir)? {
        Some(mut file) => notes(&mut file),
        None => Ok(Vec::new()),
    }
}

/// Takes notes out, and with them what cannot be read.
///
/// # Errors
/// The file cannot be read or written to, or stays locked.
pub fn strike(dir: &Path, settled: &[Note]) -> io::Result<()> {
    let Some(mut file) = open(dir)? else { return Ok(()) };
    let kept = notes(&mut file)?.into_iter().filter(|note| !settled.contains(note));
    let kept = kept.map(|note| line(&note)).collect::<io::Result<String>>()?;
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(kept.as_bytes())
}

/// The file in a state directory.
pub fn path(dir: &Path) -> PathBuf {
    dir.join("unasked.jsonl")
}

/// The file, locked, if there is one.
fn open(dir: &Path) -> io::Result<Option<File>> {
    match File::options().read(true).write(true).open(path(dir)) {
        Ok(file) => locked(file).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The lock goes when the file is closed.
fn locked(file: File) -> io::Result<File> {
    let until = Instant::now() + LOCK_WITHIN;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < until => thread::sleep(LOCK_EVERY),
            Err(TryLockError::WouldBlock) => return Err(io::Error::new(io::ErrorKind::TimedOut, "it stays locked")),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

fn notes(file: &mut File) -> io::Result<Vec<Note>> {
    let mut bytes = Vec::new();
    file.take(2 * MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect())
}

fn line(note: &Note) -> io::Result<String> {
    Ok(format!("{}\n", serde_json::to_string(note)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Command;

    fn request(pod: &str) -> Request {
        Request {
            command: Command::Add,
            namespace: "batch".to_owned(),
            pod: pod.to_owned(),
            uid: format!("{pod}-1"),
            container: "c".to_owned(),
            netns: "/n".to_owned(),
            ips: Vec::new(),
        }
    }

    fn dir(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("mesh-cni-unasked-{name}-{}", std::process::id()))
    }

    #[test]
    fn a_note_stays_until_it_is_struck() {
        let (dir, noted) = (dir("struck"), UNIX_EPOCH + Duration::from_secs(1000));
        assert_eq!(read(&dir).unwrap(), []);
        strike(&dir, &[]).unwrap();
        note(&dir, &request("a"), noted).unwrap();
        note(&dir, &request("b"), noted).unwrap();
        // Of a version without times, and half a line.
        let old = serde_json::to_string(&request("old")).unwrap();
        File::options()
            .append(true)
            .open(path(&dir))
            .unwrap()
            .write_all(format!("{old}\n{{\"comm\n").as_bytes())
            .unwrap();
        let all = read(&dir).unwrap();
        let ages: Vec<_> =
            all.iter().map(|n| (&*n.request.pod, n.age(noted + Duration::from_secs(9)).as_secs())).collect();
        assert_eq!(ages, [("a", 9), ("b", 9), ("old", 1009)]);
        assert_eq!(all[0].age(noted - Duration::from_secs(1)), Duration::MAX);
        strike(&dir, &[all[0].clone(), all[2].clone()]).unwrap();
        assert_eq!(read(&dir).unwrap(), [all[1].clone()]);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn no_note_is_lost_while_others_are_struck() {
        const WRITERS: usize = 4;
        const EACH: usize = 50;
        let dir = dir("lost");
        let mut struck = Vec::new();
        thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS)
                .map(|writer| {
                    let dir = &dir;
                    scope.spawn(move || {
                        for nr in 0..EACH {
                            note(dir, &request(&format!("{writer}-{nr}")), SystemTime::now()).unwrap();
                        }
                    })
                })
                .collect();
            loop {
                let have_ended = writers.iter().all(thread::ScopedJoinHandle::is_finished);
                let notes = read(&dir).unwrap();
                strike(&dir, &notes).unwrap();
                struck.extend(notes.into_iter().map(|note| note.request.pod));
                if have_ended {
                    break;
                }
            }
        });
        struck.sort();
        struck.dedup();
        assert_eq!(struck.len(), WRITERS * EACH);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_lock_that_is_never_given_back_keeps_no_pod_from_starting() {
        let dir = dir("locked");
        note(&dir, &request("a"), SystemTime::now()).unwrap();
        let held = open(&dir).unwrap();
        assert_eq!(note(&dir, &request("b"), SystemTime::now()).unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(held);
        fs::remove_dir_all(dir).unwrap();
    }
}
