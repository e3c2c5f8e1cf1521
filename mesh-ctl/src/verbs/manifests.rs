//! YAML and JSON files of Kubernetes and Istio objects, as a command line names them: files, directories, `-`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, anyhow};
use mesh_api::admin::Problem;
use mesh_api::k8s::{Item, items};
use mesh_api::problem;
use mesh_api::yaml::{MAX_FILE_BYTES, Node, documents};
use mesh_core::config::{self, Object, ObjectKey};

use crate::exit::BadInput;

/// Names that are read in a directory.
const EXTENSIONS: [&str; 3] = ["yaml", "yml", "json"];
/// Directories within one another.
const MAX_DEPTH: u32 = 64;
/// Stands for standard input.
const STDIN: &str = "-";

/// What files hold.
#[derive(Debug, Default)]
pub(super) struct Manifests {
    /// In order, each once.
    pub(super) objects: Vec<Object>,
    /// What the reader found.
    pub(super) problems: Vec<Problem>,
    /// Documents by file, for lines.
    nodes: HashMap<Arc<str>, Vec<Node>>,
    /// Objects by key.
    known: HashMap<ObjectKey, usize>,
}

impl Manifests {
    /// Reads what is named.
    ///
    /// # Errors
    /// One of them cannot be read.
    pub(super) fn read(paths: &[PathBuf]) -> Result<Self> {
        let mut manifests = Self::default();
        for path in paths {
            if path.as_os_str() == STDIN {
                manifests.add("standard input", &text(io::stdin().lock()).map_err(|e| unreadable(path, &e))?);
            } else {
                manifests.add_path(path, 0)?;
            }
        }
        Ok(manifests)
    }

    /// These on top of others, whose objects count where these have none of their key.
    pub(super) fn over(mut self, below: Self) -> Self {
        self.problems.extend(below.problems);
        self.nodes.extend(below.nodes);
        let known = self.known;
        self.objects.extend(below.objects.into_iter().filter(|object| !known.contains_key(&object.key())));
        self.known = self.objects.iter().enumerate().map(|(at, object)| (object.key(), at)).collect();
        self
    }

    /// A finding of the compiler, with its line.
    pub(super) fn of_compiler(&self, found: &config::Problem) -> Problem {
        let mut problem = problem::of_compiler(found);
        let nodes = self.nodes.get(&found.origin.file).map(Vec::as_slice).unwrap_or_default();
        problem.line = problem::line_in(nodes, found.origin.line, &found.field).unwrap_or(problem.line);
        problem
    }

    fn add_path(&mut self, path: &Path, depth: u32) -> Result<()> {
        let unreadable = |error: io::Error| unreadable(path, &error);
        if !fs::metadata(path).map_err(unreadable)?.is_dir() {
            let text = text(fs::File::open(path).map_err(unreadable)?).map_err(unreadable)?;
            self.add(&path.display().to_string(), &text);
            return Ok(());
        }
        if depth == MAX_DEPTH {
            return Err(unreadable(io::Error::other("directories are nested too deeply")));
        }
        let entries = fs::read_dir(path).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(unreadable)?;
        let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
        paths.sort();
        let is_read = |path: &&PathBuf| {
            let known = path.extension().and_then(|e| e.to_str()).is_some_and(|e| EXTENSIONS.contains(&e));
            known || path.is_dir()
        };
        paths.iter().filter(is_read).try_for_each(|path| self.add_path(path, depth + 1))
    }

    fn add(&mut self, file: &str, text: &str) {
        let name: Arc<str> = file.into();
        let mut nodes = Vec::new();
        for document in documents(text) {
            match document {
                Ok(node) => {
                    items(&node, &name).into_iter().for_each(|item| self.add_item(item, file));
                    nodes.push(node);
                }
                Err(error) => {
                    let hint = "mend the YAML; the other documents of the file are read";
                    let found = problem::about_file(problem::SYNTAX, file, error.line, error.message, hint);
                    self.problems.push(found);
                }
            }
        }
        self.nodes.insert(name, nodes);
    }

    fn add_item(&mut self, item: Item, file: &str) {
        match item {
            Item::Inert(finding) | Item::Rejected(finding) => self.problems.push(problem::about_object(finding, file)),
            Item::Object(object) => match self.known.entry(object.key()) {
                Entry::Occupied(first) => {
                    let found = problem::duplicate(first.key(), &object, &self.objects[*first.get()]);
                    self.problems.push(found);
                }
                Entry::Vacant(new) => {
                    new.insert(self.objects.len());
                    self.objects.push(*object);
                }
            },
        }
    }
}

fn text(from: impl Read) -> io::Result<String> {
    let mut text = String::new();
    from.take(MAX_FILE_BYTES as u64 + 1).read_to_string(&mut text)?;
    if text.len() > MAX_FILE_BYTES {
        return Err(io::Error::other(format!("larger than {MAX_FILE_BYTES} bytes")));
    }
    Ok(text)
}

fn unreadable(path: &Path, error: &io::Error) -> anyhow::Error {
    anyhow!(BadInput(format!("{}: {error}", path.display())))
}
