//! One look at all directories: files, documents, objects, and what is wrong with them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_api::admin::Problem;
use mesh_api::k8s::{Item, Suspect, items};
use mesh_api::yaml::{MAX_FILE_BYTES, documents};
use mesh_core::config::{Object, ObjectKey};
use sha2::{Digest, Sha256};

use crate::problem;

/// Files of all directories together.
const MAX_FILES: usize = 100_000;
/// Directories of all together; they nest at most as deep.
const MAX_DIRS: usize = 1_000;
/// What one look may take in.
pub(super) const LIMITS: Limits = Limits { files: MAX_FILES, dirs: MAX_DIRS };
/// Names that are read.
const EXTENSIONS: [&str; 3] = ["yaml", "yml", "json"];

/// What is there now.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Objects that may be used. Of several with one key, the one of the first file.
    pub(super) objects: BTreeMap<ObjectKey, Object>,
    /// Keys of objects that are there and may not be used.
    pub(super) rejected: BTreeSet<ObjectKey>,
    /// Files with objects whose kind could not be recognised, by namespace and name.
    pub(super) nameless: BTreeSet<(Arc<str>, String, String)>,
    /// Files and directories that may hold anything.
    pub(super) doubtful: BTreeSet<Arc<str>>,
    pub(super) problems: Vec<Problem>,
}

/// Bounds of one look. What lies beyond them is not known to be gone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) files: usize,
    pub(super) dirs: usize,
}

/// What files held when they were last parsed, so that a change of one file costs the parsing of one.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    files: HashMap<Arc<str>, Arc<Content>>,
}

#[derive(Debug)]
struct Content {
    digest: [u8; 32],
    objects: Vec<Object>,
    rejected: Vec<Suspect>,
    problems: Vec<Problem>,
}

/// Reads all directories. Files that did not change since the last look are not parsed again.
pub(super) fn scan(dirs: &[PathBuf], limits: Limits, parsed: &mut Parsed) -> Scan {
    let mut found = Scan::default();
    let mut listing = Listing { limits, seen: BTreeSet::new(), paths: Vec::new(), overflowed: false };
    for dir in dirs {
        listing.list(dir, &mut found);
    }
    let mut files = HashMap::new();
    for path in listing.paths {
        let name: Arc<str> = path.display().to_string().into();
        // One file may be reached by two directories.
        if files.contains_key(&name) {
            continue;
        }
        match read(&path) {
            Ok(text) => {
                let content = parse(&name, &text, parsed.files.get(&name));
                merge(&name, &content, &mut found);
                files.insert(name, content);
            }
            // Gone since the directory was listed: as if it had not been there.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => found.unreadable(&path, &e),
        }
    }
    parsed.files = files;
    found.problems.sort();
    found
}

/// The files to read, in an order in which "the first file" means the same each time.
struct Listing {
    limits: Limits,
    /// Device and inode: a directory is read once, by whatever links it is reached.
    seen: BTreeSet<(u64, u64)>,
    paths: Vec<PathBuf>,
    /// There are more files than may be read.
    overflowed: bool,
}

impl Listing {
    /// Takes in all files below a directory, sorted. What cannot be looked at may hold anything.
    fn list(&mut self, dir: &Path, found: &mut Scan) {
        let entries = match self.entries(dir) {
            Ok(entries) => entries,
            Err(NotListed::Overflow) => return found.doubt(dir),
            Err(NotListed::Bound) => {
                let message = format!("there are more than {} directories; this one is not read", self.limits.dirs);
                return found.beyond(dir, message);
            }
            Err(NotListed::Failed(e)) => return found.unreadable(dir, &e),
        };
        for entry in entries {
            let (path, name) = (entry.path(), entry.file_name());
            // Editors' and Kubernetes' own entries; a mounted ConfigMap shows its files as links through `..data`.
            if name.to_string_lossy().starts_with('.') {
                continue;
            }
            let metadata = match fs::metadata(&path) {
                Ok(metadata) => metadata,
                // Gone since the directory was listed. A link that leads nowhere is there, and is reported below.
                Err(e) if e.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(&path).is_err() => continue,
                Err(e) => {
                    found.unreadable(&path, &e);
                    continue;
                }
            };
            if metadata.is_dir() {
                self.list(&path, found);
            } else if metadata.is_file() && has_known_extension(&path) {
                if self.paths.len() == self.limits.files {
                    self.overflowed = true;
                    let message =
                        format!("there are more than {} files; this and later ones are not read", self.limits.files);
                    found.beyond(&path, message);
                    // So that what is not known is bounded, too: this directory as a whole, and those that follow.
                    return found.doubt(dir);
                }
                self.paths.push(path);
            }
        }
    }

    /// Entries of a directory, sorted; none of one that was read already.
    fn entries(&mut self, dir: &Path) -> Result<Vec<fs::DirEntry>, NotListed> {
        if self.overflowed {
            return Err(NotListed::Overflow);
        }
        let metadata = fs::metadata(dir)?;
        let identity = (metadata.dev(), metadata.ino());
        if self.seen.contains(&identity) {
            return Ok(Vec::new());
        }
        if self.seen.len() == self.limits.dirs {
            return Err(NotListed::Bound);
        }
        self.seen.insert(identity);
        let mut entries = fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        Ok(entries)
    }
}

/// Why a directory was not looked into.
enum NotListed {
    /// The bound on files was passed before, which is reported already.
    Overflow,
    /// The bound on directories.
    Bound,
    /// The kernel refused.
    Failed(io::Error),
}

impl From<io::Error> for NotListed {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

fn has_known_extension(path: &Path) -> bool {
    path.extension().is_some_and(|e| EXTENSIONS.iter().any(|known| e == *known))
}

fn read(path: &Path) -> io::Result<String> {
    if fs::metadata(path)?.len() > MAX_FILE_BYTES as u64 {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {MAX_FILE_BYTES} bytes")));
    }
    let bytes = fs::read(path)?;
    String::from_utf8(bytes).map_err(|e| {
        let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count();
        io::Error::new(io::ErrorKind::InvalidData, format!("not UTF-8 (line {line})"))
    })
}

fn parse(name: &Arc<str>, text: &str, last: Option<&Arc<Content>>) -> Arc<Content> {
    let digest: [u8; 32] = Sha256::digest(text).into();
    if let Some(last) = last.filter(|last| last.digest == digest) {
        return last.clone();
    }
    let mut content = Content { digest, objects: Vec::new(), rejected: Vec::new(), problems: Vec::new() };
    for document in documents(text) {
        let node = match document {
            Ok(node) => node,
            Err(e) => {
                content.rejected.push(Suspect::Unknown);
                let hint = "mend the YAML; the other documents of the file are read";
                content.problems.push(problem::about_file(problem::SYNTAX, name, e.line, e.message, hint));
                continue;
            }
        };
        for item in items(&node, name) {
            match item {
                Item::Object(object) => content.objects.push(*object),
                Item::Inert(finding) => content.problems.push(problem::about_object(finding, name)),
                Item::Rejected(finding) => {
                    content.rejected.push(finding.suspect.clone());
                    content.problems.push(problem::about_object(finding, name));
                }
            }
        }
    }
    Arc::new(content)
}

fn merge(name: &Arc<str>, content: &Content, found: &mut Scan) {
    found.problems.extend(content.problems.iter().cloned());
    for suspect in &content.rejected {
        match suspect.clone() {
            Suspect::Key(key) => drop(found.rejected.insert(key)),
            Suspect::Named { namespace, name: object } => {
                found.nameless.insert((name.clone(), namespace, object));
            }
            Suspect::Unknown => drop(found.doubtful.insert(name.clone())),
        }
    }
    for object in &content.objects {
        let key = object.key();
        match found.objects.get(&key) {
            None => {
                found.objects.insert(key, object.clone());
            }
            Some(first) => found.problems.push(duplicate(&key, object, first)),
        }
    }
}

fn duplicate(key: &ObjectKey, second: &Object, first: &Object) -> Problem {
    let (here, there) = (&second.meta().origin, &first.meta().origin);
    Problem {
        code: problem::DUPLICATE.into(),
        severity: problem::ERROR.into(),
        object: key.to_string(),
        file: here.file.to_string(),
        line: here.line,
        field: "metadata.name".into(),
        message: format!("the object is there already, in {}:{}, which stays in force", there.file, there.line),
        hint: "remove one of the two, or rename it".into(),
    }
}

impl Scan {
    fn unreadable(&mut self, path: &Path, error: &io::Error) {
        let message = format!("cannot be read: {error}");
        let hint = "what it held before stays in force; check that it exists and its permissions";
        self.problems.push(problem::about_file(problem::UNREADABLE, &path.display().to_string(), 0, message, hint));
        self.doubt(path);
    }

    /// A bound keeps the path from being read.
    fn beyond(&mut self, path: &Path, message: String) {
        let hint = "what was read before stays in force; put more objects into one file, or remove what is not needed";
        self.problems.push(problem::about_file(problem::LIMIT, &path.display().to_string(), 0, message, hint));
        self.doubt(path);
    }

    /// Nobody knows what the path holds, and what is below it.
    fn doubt(&mut self, path: &Path) {
        self.doubtful.insert(path.display().to_string().into());
    }
}
