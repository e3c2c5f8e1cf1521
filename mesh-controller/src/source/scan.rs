//! What all files hold, kept between looks: a look costs the reading of the files that have changed.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_api::admin::Problem;
use mesh_api::k8s::{Item, Suspect, items};
use mesh_api::problem;
use mesh_api::yaml::{MAX_FILE_BYTES, documents};
use mesh_core::config::{Object, ObjectKey};
use sha2::{Digest, Sha256};

use super::Changed;
use super::listing::{self, Doubts, Limits, Listed, Single, Stamp, list, look_at_one};

/// What one look found.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// Keys of objects that may be others than at the last look, or gone.
    pub(super) affected: BTreeSet<ObjectKey>,
    /// Keys of objects that are there and may not be used.
    pub(super) rejected: BTreeSet<ObjectKey>,
    /// Files with objects whose kind could not be recognised, by namespace and name.
    pub(super) nameless: BTreeSet<(Arc<str>, String, String)>,
    /// What is wrong, and what may hold anything.
    pub(super) doubts: Doubts,
}

/// All files and the objects in them.
#[derive(Debug, Default)]
pub(super) struct Index {
    files: HashMap<Arc<str>, File>,
    /// Who has an object of a key; the first one counts.
    claims: HashMap<ObjectKey, Vec<Claim>>,
    /// Keys with more than one claim.
    contested: BTreeSet<ObjectKey>,
    /// Files with objects that may not be used, or with findings.
    troubled: BTreeSet<Arc<str>>,
    looks: u64,
    /// Directories that the last look at everything looked into; none if nothing less than everything will do next time.
    pub(super) dirs: HashSet<PathBuf>,
    /// Files that were read in the last look.
    pub(super) read: usize,
}

#[derive(Debug)]
struct File {
    content: Arc<Content>,
    stamp: Stamp,
    /// Whether a change since would show in the stamp.
    is_settled: bool,
    /// The last look that it was found in.
    look: u64,
}

#[derive(Debug)]
struct Content {
    digest: [u8; 32],
    objects: Vec<Arc<Object>>,
    rejected: Vec<Suspect>,
    problems: Vec<Problem>,
}

#[derive(Debug)]
struct Claim {
    dir: usize,
    file: Arc<str>,
    object: Arc<Object>,
}

impl Index {
    /// The object of a key that counts.
    pub(super) fn first(&self, key: &ObjectKey) -> Option<&Arc<Object>> {
        self.claims.get(key)?.first().map(|claim| &claim.object)
    }

    /// Looks at what may have changed.
    pub(super) fn look(&mut self, dirs: &[PathBuf], limits: Limits, changed: &Changed) -> Look {
        let mut look = Look::default();
        // Before anything is looked at: what changes from now on is seen next time.
        let now = SystemTime::now();
        self.looks += 1;
        self.read = 0;
        let only = match changed {
            Changed::Paths(paths) => self.single_files(dirs, limits, paths),
            Changed::Anything => None,
        };
        let (files, gone) = match only {
            Some((files, gone)) => (files, Some(gone)),
            None => {
                let Listed { files, dirs, has_links } = list(dirs, limits, &mut look.doubts);
                self.dirs = if has_links { HashSet::new() } else { dirs };
                (files, None)
            }
        };
        for file in files {
            self.read_if_changed(&file, (now, limits.settling), &mut look);
        }
        let not_found = || {
            let old = self.files.iter().filter(|(_, file)| file.look != self.looks);
            old.map(|(name, _)| name.clone()).collect()
        };
        for name in gone.unwrap_or_else(not_found) {
            if let Some(file) = self.files.remove(&name) {
                self.withdraw(&name, &file.content, &mut look.affected);
            }
        }
        if !look.doubts.paths.is_empty() {
            self.dirs.clear();
        }
        self.report(&mut look);
        look
    }

    /// The files to read and those that are gone, where that can be told from the paths that have changed. It cannot where
    /// there are links or doubts, nor for directories.
    fn single_files(
        &self,
        dirs: &[PathBuf],
        limits: Limits,
        paths: &BTreeSet<PathBuf>,
    ) -> Option<(Vec<listing::File>, Vec<Arc<str>>)> {
        // Also for no paths at all: what could not be read must be found unreadable again, or it would count as gone.
        if self.dirs.is_empty() {
            return None;
        }
        let (mut files, mut gone) = (Vec::new(), Vec::new());
        for path in paths {
            let dir = dirs.iter().position(|dir| path.starts_with(dir))?;
            if !self.dirs.contains(path.parent()?) {
                return None;
            }
            match look_at_one(path) {
                Single::File(stamp) => files.push(listing::File { dir, path: path.clone(), stamp }),
                Single::Gone if self.dirs.contains(path) => return None,
                Single::Gone => gone.push(path.to_string_lossy().into()),
                Single::Ignored => {}
                Single::Unclear => return None,
            }
        }
        (self.files.len() + files.len() <= limits.files).then_some((files, gone))
    }

    fn read_if_changed(&mut self, found: &listing::File, (now, settling): (SystemTime, Duration), look: &mut Look) {
        let name = found.path.to_string_lossy();
        if let Some(file) = self.files.get_mut(&*name)
            && (file.look == self.looks || (file.is_settled && file.stamp == found.stamp))
        {
            // One file may be reached by two directories.
            file.look = self.looks;
            return;
        }
        let name: Arc<str> = name.into();
        self.read += 1;
        match read(&found.path, found.stamp) {
            Ok(text) => {
                let content = parse(&name, &text, self.files.get(&name).map(|file| &file.content));
                let is_settled = found.stamp.is_settled(now, settling);
                let file = File { content, stamp: found.stamp, is_settled, look: self.looks };
                self.put(found.dir, &name, file, &mut look.affected);
                return;
            }
            // Gone since the directory was listed: as if it had not been there.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => look.doubts.unreadable(&found.path, &e),
        }
        if let Some(file) = self.files.remove(&name) {
            self.withdraw(&name, &file.content, &mut look.affected);
        }
    }

    fn put(&mut self, dir: usize, name: &Arc<str>, file: File, affected: &mut BTreeSet<ObjectKey>) {
        let content = file.content.clone();
        let old = self.files.insert(name.clone(), file);
        if old.as_ref().is_some_and(|old| Arc::ptr_eq(&old.content, &content)) {
            return;
        }
        if let Some(old) = old {
            self.withdraw(name, &old.content, affected);
        }
        if !(content.rejected.is_empty() && content.problems.is_empty()) {
            self.troubled.insert(name.clone());
        }
        for object in &content.objects {
            let key = object.key();
            let claims = self.claims.entry(key.clone()).or_default();
            claims.push(Claim { dir, file: name.clone(), object: object.clone() });
            if claims.len() > 1 {
                // Stable: of two in one file the upper one stays before the other.
                claims.sort_by(|a, b| (a.dir, Path::new(&*a.file)).cmp(&(b.dir, Path::new(&*b.file))));
                self.contested.insert(key.clone());
            }
            affected.insert(key);
        }
    }

    /// Takes the claims of a file back.
    fn withdraw(&mut self, name: &Arc<str>, content: &Content, affected: &mut BTreeSet<ObjectKey>) {
        self.troubled.remove(name);
        for object in &content.objects {
            let key = object.key();
            if let Some(claims) = self.claims.get_mut(&key) {
                claims.retain(|claim| claim.file != *name);
                if claims.len() < 2 {
                    self.contested.remove(&key);
                }
                if claims.is_empty() {
                    self.claims.remove(&key);
                }
            }
            affected.insert(key);
        }
    }

    /// All that is wrong now, whenever it was found.
    fn report(&self, look: &mut Look) {
        for name in &self.troubled {
            let Some(file) = self.files.get(name) else { continue };
            look.doubts.problems.extend(file.content.problems.iter().cloned());
            for suspect in &file.content.rejected {
                match suspect.clone() {
                    Suspect::Key(key) => drop(look.rejected.insert(key)),
                    Suspect::Named { namespace, name: object } => {
                        look.nameless.insert((name.clone(), namespace, object));
                    }
                    Suspect::Unknown => drop(look.doubts.paths.insert(name.clone())),
                }
            }
        }
        for key in &self.contested {
            if let Some([first, others @ ..]) = self.claims.get(key).map(Vec::as_slice) {
                look.doubts
                    .problems
                    .extend(others.iter().map(|other| problem::duplicate(key, &other.object, &first.object)));
            }
        }
        look.doubts.problems.sort();
    }
}

fn read(path: &Path, stamp: Stamp) -> io::Result<String> {
    let limit = MAX_FILE_BYTES as u64;
    let mut bytes = Vec::with_capacity(usize::try_from(stamp.bytes.min(limit)).unwrap_or(0) + 1);
    fs::File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() > MAX_FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {MAX_FILE_BYTES} bytes")));
    }
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
                Item::Object(object) => content.objects.push(Arc::new(*object)),
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
