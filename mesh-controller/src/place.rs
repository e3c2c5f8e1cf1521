//! Lines of the fields that the compiler finds fault with.
//!
//! The compiler knows where an object begins; keeping a line for each field of every object would cost more than the
//! objects. So the few files with faults are read once more.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use mesh_api::admin::Problem;
use mesh_api::problem::{self, line_in};
use mesh_api::yaml::{Node, documents};
use mesh_core::config;

/// Files that are read again for one compilation; problems of more files name the line of the object.
const MAX_FILES: usize = 64;
/// Larger files are not read again.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// The compiler's findings with the line of each field, where that can be told. Reads files.
pub fn of_compiler(problems: &[config::Problem]) -> Vec<Problem> {
    let mut files: HashMap<&str, Vec<Node>> = HashMap::new();
    let mut all = Vec::with_capacity(problems.len());
    for found in problems {
        let mut problem = problem::of_compiler(found);
        let file = &*found.origin.file;
        let known = files.contains_key(file) || files.len() < MAX_FILES;
        if !file.is_empty() && !found.field.is_empty() && known {
            let nodes = files.entry(file).or_insert_with(|| read(Path::new(file)));
            problem.line = line_in(nodes, found.origin.line, &found.field).unwrap_or(problem.line);
        }
        all.push(problem);
    }
    all
}

/// The documents of a file; none if it cannot be read any more.
fn read(file: &Path) -> Vec<Node> {
    if fs::metadata(file).is_ok_and(|metadata| metadata.len() > MAX_FILE_BYTES) {
        return Vec::new();
    }
    let text = fs::read_to_string(file).unwrap_or_default();
    documents(&text).into_iter().filter_map(Result::ok).collect()
}
