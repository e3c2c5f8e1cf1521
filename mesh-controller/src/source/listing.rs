//! Which files there are, with what tells whether one has changed, and which places could not be looked at.

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_api::admin::Problem;
use mesh_api::problem;

/// Names that are read.
const EXTENSIONS: [&str; 3] = ["yaml", "yml", "json"];

/// Bounds of one look. What lies beyond them is not known to be gone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Files of all directories together.
    pub(super) files: usize,
    /// Directories of all together.
    pub(super) dirs: usize,
    /// Directories within one another.
    pub(super) depth: usize,
    /// A file that changed later than this before it was read may change once more without its times showing it: clocks
    /// of file systems go in steps, some of two seconds.
    pub(super) settling: Duration,
}

/// What one look may take in: a mesh of 100,000 pods and 10,000 services with a file for each.
pub(super) const LIMITS: Limits = Limits { files: 200_000, dirs: 10_000, depth: 64, settling: Duration::from_secs(2) };

/// A file to read.
#[derive(Debug)]
pub(super) struct File {
    /// Position of the directory that it was found by.
    pub(super) dir: usize,
    pub(super) path: PathBuf,
    pub(super) stamp: Stamp,
}

/// What changes with every change of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    identity: (u64, u64),
    pub(super) bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// Files and directories that may hold anything, and why.
#[derive(Debug, Default)]
pub(super) struct Doubts {
    pub(super) paths: BTreeSet<Arc<str>>,
    pub(super) problems: Vec<Problem>,
}

/// What a look at everything found.
#[derive(Debug, Default)]
pub(super) struct Listed {
    /// Sorted, so that "the first file" means the same each time.
    pub(super) files: Vec<File>,
    /// Directories that were looked into, by the names of their files.
    pub(super) dirs: HashSet<PathBuf>,
    /// There are links: what they lead to may change without a sign of it where they are.
    pub(super) has_links: bool,
}

/// Looks at all directories.
pub(super) fn list(dirs: &[PathBuf], limits: Limits, doubts: &mut Doubts) -> Listed {
    let (seen, listed) = (BTreeSet::new(), Listed::default());
    let mut listing = Listing { limits, dir: 0, seen, listed, overflowed: false, doubts };
    for (position, dir) in dirs.iter().enumerate() {
        listing.dir = position;
        listing.list(dir, 0);
    }
    listing.listed
}

/// What a path is of which nothing but its own change is known.
pub(super) enum Single {
    /// A file to read.
    File(Stamp),
    /// Not there.
    Gone,
    /// Never read.
    Ignored,
    /// A directory, a link, or something else after which nothing less than everything will do.
    Unclear,
}

/// Looks at one path alone.
pub(super) fn look_at_one(path: &Path) -> Single {
    let is_hidden = path.file_name().is_some_and(is_hidden);
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() && (is_hidden || !has_known_extension(path)) => Single::Ignored,
        Ok(metadata) if metadata.is_file() => Single::File(Stamp::of(&metadata)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Single::Gone,
        Ok(_) | Err(_) => Single::Unclear,
    }
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            identity: (metadata.dev(), metadata.ino()),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether a change after `now` would give another stamp.
    pub(super) fn is_settled(&self, now: SystemTime, settling: Duration) -> bool {
        let secs = u64::try_from(self.changed.0.max(self.modified.0)).unwrap_or(0);
        // The next whole second, which is not before the exact time.
        now.duration_since(UNIX_EPOCH).is_ok_and(|now| now >= Duration::from_secs(secs.saturating_add(1)) + settling)
    }
}

impl Doubts {
    pub(super) fn unreadable(&mut self, path: &Path, error: &io::Error) {
        let hint = "what it held before stays in force; check that it exists and its permissions";
        self.report(problem::UNREADABLE, path, format!("cannot be read: {error}"), hint);
    }

    /// A bound keeps the path from being read.
    fn beyond(&mut self, path: &Path, message: String) {
        let hint = "what was read before stays in force; put more objects into one file, or remove what is not needed";
        self.report(problem::LIMIT, path, message, hint);
    }

    fn report(&mut self, code: &str, path: &Path, message: String, hint: &str) {
        self.problems.push(problem::about_file(code, &path.display().to_string(), 0, message, hint));
        self.doubt(path);
    }

    /// Nobody knows what the path holds, and what is below it.
    fn doubt(&mut self, path: &Path) {
        self.paths.insert(path.display().to_string().into());
    }
}

struct Listing<'a> {
    limits: Limits,
    dir: usize,
    /// Device and inode: a directory is read once, by whatever links it is reached.
    seen: BTreeSet<(u64, u64)>,
    listed: Listed,
    /// There are more files than may be read.
    overflowed: bool,
    doubts: &'a mut Doubts,
}

/// Why a directory was not looked into.
enum NotListed {
    /// The bound on files was passed before, which is reported already.
    Overflow,
    /// Another bound.
    Bound(String),
    /// The kernel refused.
    Failed(io::Error),
}

impl From<io::Error> for NotListed {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// What an entry of a directory is.
enum Entry {
    Dir,
    File(Stamp),
    /// Not read, or gone since the directory was.
    Other,
}

impl Listing<'_> {
    /// Takes in all files below a directory. What cannot be looked at may hold anything.
    fn list(&mut self, dir: &Path, depth: usize) {
        let entries = match self.entries(dir, depth) {
            Ok(entries) => entries,
            Err(NotListed::Overflow) => return self.doubts.doubt(dir),
            Err(NotListed::Bound(bound)) => return self.doubts.beyond(dir, format!("{bound}; this one is not read")),
            Err(NotListed::Failed(e)) => return self.doubts.unreadable(dir, &e),
        };
        for entry in entries {
            let path = entry.path();
            self.listed.has_links |= entry.file_type().is_ok_and(|kind| kind.is_symlink());
            match look_at(&entry, &path) {
                Ok(Entry::Dir) => self.list(&path, depth + 1),
                Ok(Entry::File(_)) if self.listed.files.len() == self.limits.files => {
                    self.overflowed = true;
                    let files = self.limits.files;
                    let message = format!("there are more than {files} files; this and later ones are not read");
                    self.doubts.beyond(&path, message);
                    // So that what is not known is bounded, too: this directory as a whole, and those that follow.
                    return self.doubts.doubt(dir);
                }
                Ok(Entry::File(stamp)) => self.listed.files.push(File { dir: self.dir, path, stamp }),
                Ok(Entry::Other) => {}
                Err(e) => self.doubts.unreadable(&path, &e),
            }
        }
    }

    /// Entries of a directory, sorted; none of one that was read already.
    fn entries(&mut self, dir: &Path, depth: usize) -> Result<Vec<fs::DirEntry>, NotListed> {
        if self.overflowed {
            return Err(NotListed::Overflow);
        }
        let metadata = fs::metadata(dir)?;
        let identity = (metadata.dev(), metadata.ino());
        if self.seen.contains(&identity) {
            return Ok(Vec::new());
        }
        if self.seen.len() == self.limits.dirs {
            return Err(NotListed::Bound(format!("there are more than {} directories", self.limits.dirs)));
        }
        if depth > self.limits.depth {
            return Err(NotListed::Bound(format!("directories are nested more than {} deep", self.limits.depth)));
        }
        self.seen.insert(identity);
        let mut entries = fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>()?;
        self.listed.dirs.insert(dir.to_owned());
        entries.retain(|entry| !is_hidden(&entry.file_name()));
        entries.sort_by_cached_key(fs::DirEntry::file_name);
        Ok(entries)
    }
}

fn look_at(entry: &fs::DirEntry, path: &Path) -> io::Result<Entry> {
    let kind = entry.file_type()?;
    if kind.is_dir() {
        return Ok(Entry::Dir);
    }
    if kind.is_file() && !has_known_extension(path) {
        return Ok(Entry::Other);
    }
    // What is no link costs no walk along the path.
    let metadata = if kind.is_symlink() { fs::metadata(path) } else { entry.metadata() };
    match metadata {
        Ok(metadata) if metadata.is_dir() => Ok(Entry::Dir),
        Ok(metadata) if metadata.is_file() && has_known_extension(path) => Ok(Entry::File(Stamp::of(&metadata))),
        Ok(_) => Ok(Entry::Other),
        // A link that leads nowhere is there.
        Err(e) if e.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(path).is_err() => Ok(Entry::Other),
        Err(e) => Err(e),
    }
}

/// Editors' and Kubernetes' own entries; a mounted ConfigMap shows its files as links through `..data`.
fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

fn has_known_extension(path: &Path) -> bool {
    path.extension().is_some_and(|e| EXTENSIONS.iter().any(|known| e == *known))
}
