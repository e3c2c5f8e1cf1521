//! One supervisor a state directory: an flock with the holder's pid in the file.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Name of the lock file in the state directory.
pub const LOCK_FILE: &str = "lock";

/// What is read of another holder's pid.
const MAX_PID_BYTES: u64 = 32;

/// The lock. It belongs to the open file, so it can be handed to the next supervisor and is never free in between; it
/// ends when the last process that has the file open is gone.
#[derive(Debug)]
pub struct StateLock {
    file: File,
}

/// Why the state directory is not ours.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds it.
    #[error("state directory {} is in use by pid {pid}; stop that process, or use --takeover to replace it", dir.display())]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// Whoever wrote the lock file; `unknown` when the file has no pid.
        pid: String,
    },
    /// The directory cannot be used.
    #[error("state directory {}", dir.display())]
    Unusable {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl StateLock {
    /// Takes the lock of a state directory, which is created if need be.
    pub fn acquire(dir: &Path) -> Result<Self, LockError> {
        let unusable = |source| LockError::Unusable { dir: dir.to_owned(), source };
        std::fs::create_dir_all(dir).map_err(unusable)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(dir.join(LOCK_FILE))
            .map_err(unusable)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                let mut pid = String::new();
                // What is in the file is only for the message; an unreadable one changes nothing.
                let read = (&file).take(MAX_PID_BYTES).read_to_string(&mut pid);
                let known = read.is_ok() && !pid.trim().is_empty();
                let pid = if known { pid.trim().to_owned() } else { "unknown".to_owned() };
                return Err(LockError::InUse { dir: dir.to_owned(), pid });
            }
            Err(std::fs::TryLockError::Error(source)) => return Err(unusable(source)),
        }
        let mut lock = Self { file };
        lock.write_pid().map_err(unusable)?;
        Ok(lock)
    }

    /// A lock that the running supervisor handed over.
    pub fn adopt(fd: OwnedFd) -> Self {
        Self { file: File::from(fd) }
    }

    /// Writes this process into the file.
    pub fn write_pid(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        writeln!(self.file, "{}", std::process::id())
    }
}

impl AsFd for StateLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_one_is_told_who_holds_it_until_the_last_holder_is_gone() {
        let dir = std::env::temp_dir().join(format!("mesh-lock-{}", std::process::id()));
        let lock = StateLock::acquire(&dir).expect("free");
        let refused = StateLock::acquire(&dir).expect_err("held").to_string();
        assert!(refused.contains(&format!("in use by pid {}", std::process::id())), "{refused}");
        let handed_over = StateLock::adopt(lock.as_fd().try_clone_to_owned().expect("dup"));
        drop(lock);
        StateLock::acquire(&dir).expect_err("the one who got it still holds it");
        drop(handed_over);
        StateLock::acquire(&dir).expect("free again");
        std::fs::remove_dir_all(&dir).expect("clean up");
    }
}
