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
pub(super) fn scan(dirs: &[PathBuf], parsed: &mut Parsed) -> Scan {
    let mut found = Scan::default();
    let mut paths = Vec::new();
    let mut seen = BTreeSet::new();
    for dir in dirs {
        list(dir, &mut seen, &mut paths, &mut found);
    }
    let mut files = HashMap::new();
    for path in paths {
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
            Err(e) => {
                found.unreadable(&name, &e);
                found.doubtful.insert(name);
            }
        }
    }
    parsed.files = files;
    found.problems.sort();
    found
}

/// All files below a directory, sorted, so that "the first file" means the same each time.
fn list(dir: &Path, seen: &mut BTreeSet<(u64, u64)>, paths: &mut Vec<PathBuf>, found: &mut Scan) {
    let entries = fs::metadata(dir).and_then(|metadata| {
        // Device and inode: a directory is read once, by whatever links it is reached.
        if !seen.insert((metadata.dev(), metadata.ino())) {
            return Ok(Vec::new());
        }
        fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>()
    });
    let mut entries = match entries {
        Ok(entries) => entries,
        Err(e) => {
            let name = dir.display().to_string();
            found.unreadable(&name, &e);
            found.doubtful.insert(name.into());
            return;
        }
    };
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, name) = (entry.path(), entry.file_name());
        // Editors' and Kubernetes' own entries; a mounted ConfigMap shows its files as links through `..data`.
        if name.to_string_lossy().starts_with('.') {
            continue;
        }
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if metadata.is_dir() && seen.len() < MAX_DIRS {
            list(&path, seen, paths, found);
        } else if metadata.is_file() && path.extension().is_some_and(|e| EXTENSIONS.iter().any(|known| e == *known)) {
            if paths.len() == MAX_FILES {
                let message = format!("there are more than {MAX_FILES} files; this and later ones are not read");
                found.problems.push(problem::about_file(problem::LIMIT, &path.display().to_string(), 0, message, ""));
                return;
            }
            paths.push(path);
        }
    }
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
    fn unreadable(&mut self, name: &str, error: &io::Error) {
        let message = format!("cannot be read: {error}");
        let hint = "what it held before stays in force; check that it exists and its permissions";
        self.problems.push(problem::about_file(problem::UNREADABLE, name, 0, message, hint));
    }
}
