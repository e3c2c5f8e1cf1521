//! The state directory: its lock, its layout and how files in it are written.
//!
//! `STATE/lock` (pid of the owner), `STATE/root-cert.pem` (bundle of trusted roots, for everybody to read),
//! `STATE/configuration` (last good versions), `STATE/ca/` and `STATE/token/` (0700; keys 0600). A file is replaced by
//! rename, so that a reader never sees half of it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

/// Permission bits of a directory that holds keys.
const PRIVATE_DIR_MODE: u32 = 0o700;
/// Permission bits of a key.
pub const PRIVATE_MODE: u32 = 0o600;
/// Permission bits of what may be published.
pub const PUBLIC_MODE: u32 = 0o644;

/// Paths below the state directory.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
}

/// Held as long as the process owns the state directory.
#[derive(Debug)]
pub struct StateLock {
    _file: Flock<File>,
}

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another process owns it.
    #[error("state directory {dir} is in use by pid {pid}; stop that process or choose another --state-dir")]
    InUse {
        /// The directory.
        dir: String,
        /// Its owner as the lock file names it; `unknown` when it names none.
        pid: String,
    },
    /// A file operation failed.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: String,
        /// Why not.
        source: io::Error,
    },
}

impl StateDir {
    /// Creates what is missing of the directories.
    pub fn open(root: &Path) -> Result<Self, StateError> {
        let dir = Self { root: root.to_owned() };
        fs::create_dir_all(root).map_err(|e| io_error("create", root, e))?;
        for private in [dir.ca(), dir.token()] {
            make_private_dir(&private)?;
        }
        Ok(dir)
    }

    /// Directory of the CA.
    pub fn ca(&self) -> PathBuf {
        self.root.join("ca")
    }

    /// Directory of the token signing key.
    pub fn token(&self) -> PathBuf {
        self.root.join("token")
    }

    /// The published bundle of roots.
    pub fn root_cert(&self) -> PathBuf {
        self.root.join("root-cert.pem")
    }

    /// Last good versions of objects.
    pub fn configuration(&self) -> PathBuf {
        self.root.join("configuration")
    }

    /// Default place of the admin socket.
    pub fn admin_socket(&self) -> PathBuf {
        self.root.join("admin.sock")
    }

    /// Takes the lock, or says who has it. The kernel releases it when the process ends, however it ends.
    pub fn lock(&self) -> Result<StateLock, StateError> {
        let path = self.root.join("lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(PRIVATE_MODE)
            .open(&path)
            .map_err(|e| io_error("open", &path, e))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut file) => {
                file.set_len(0)
                    .and_then(|()| writeln!(file, "{}", std::process::id()))
                    .map_err(|e| io_error("write", &path, e))?;
                Ok(StateLock { _file: file })
            }
            Err((mut file, _)) => {
                let mut pid = String::new();
                // The owner may be about to write its pid: an unreadable one is reported as unknown.
                let _ = file.read_to_string(&mut pid);
                let pid = Some(pid.trim()).filter(|pid| !pid.is_empty()).unwrap_or("unknown").to_owned();
                Err(StateError::InUse { dir: self.root.display().to_string(), pid })
            }
        }
    }
}

/// Replaces a file as a whole, with the given permission bits from its first byte on.
pub fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<(), StateError> {
    write_atomically_by(path, mode, |file| file.write_all(bytes))
}

/// The same with a writer in place of the bytes.
pub fn write_atomically_by(
    path: &Path,
    mode: u32,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), StateError> {
    let temporary = temporary_beside(path);
    let written = write_new(&temporary, mode, write).and_then(|()| fs::rename(&temporary, path));
    written.map_err(|e| {
        // What is left over must not keep a key.
        let _ = fs::remove_file(&temporary);
        io_error("write", path, e)
    })?;
    sync_parent(path)
}

/// Creates a file if nobody has; false when it was there already. Two processes may try at once.
pub fn create_exclusively(path: &Path, bytes: &[u8], mode: u32) -> Result<bool, StateError> {
    let temporary = temporary_beside(path);
    let linked =
        write_new(&temporary, mode, |file| file.write_all(bytes)).and_then(|()| fs::hard_link(&temporary, path));
    let _ = fs::remove_file(&temporary);
    match linked {
        Ok(()) => sync_parent(path).map(|()| true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(io_error("create", path, e)),
    }
}

/// Reads a text file, naming it in the error.
pub fn read_text(path: &Path) -> Result<String, StateError> {
    fs::read_to_string(path).map_err(|e| io_error("read", path, e))
}

fn temporary_beside(path: &Path) -> PathBuf {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{}", std::process::id()))
}

fn write_new(path: &Path, mode: u32, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    // A process of the same pid may have died here before.
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    write(&mut file)?;
    file.sync_all()
}

fn sync_parent(path: &Path) -> Result<(), StateError> {
    let parent = path.parent().unwrap_or(Path::new("."));
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(|e| io_error("sync", parent, e))
}

fn make_private_dir(path: &Path) -> Result<(), StateError> {
    match DirBuilder::new().mode(PRIVATE_DIR_MODE).create(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(io_error("create", path, e)),
        Ok(()) | Err(_) => fs::set_permissions(path, fs::Permissions::from_mode(PRIVATE_DIR_MODE))
            .map_err(|e| io_error("set the mode of", path, e)),
    }
}

pub(crate) fn io_error(what: &'static str, path: &Path, source: io::Error) -> StateError {
    StateError::Io { what, path: path.display().to_string(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TempDir;

    #[test]
    fn the_second_owner_learns_who_the_first_is() {
        let temp = TempDir::new();
        let dir = StateDir::open(temp.path()).unwrap();
        let held = dir.lock().unwrap();
        let error = dir.lock().unwrap_err().to_string();
        assert!(error.contains(&format!("in use by pid {}", std::process::id())), "{error}");
        drop(held);
        dir.lock().unwrap();
    }

    #[test]
    fn keys_are_private_and_creation_is_exclusive() {
        let temp = TempDir::new();
        let dir = StateDir::open(temp.path()).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir.ca()), mode(&dir.token())), (0o700, 0o700));
        let key = dir.ca().join("key");
        assert!(create_exclusively(&key, b"one", PRIVATE_MODE).unwrap());
        assert!(!create_exclusively(&key, b"two", PRIVATE_MODE).unwrap());
        assert_eq!((fs::read(&key).unwrap(), mode(&key)), (b"one".to_vec(), 0o600));
        write_atomically(&key, b"three", PRIVATE_MODE).unwrap();
        assert_eq!((fs::read(&key).unwrap(), mode(&key)), (b"three".to_vec(), 0o600));
        assert_eq!(fs::read_dir(dir.ca()).unwrap().count(), 1, "no temporary file stays");
    }
}
