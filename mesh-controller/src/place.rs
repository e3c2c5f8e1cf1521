//! Lines of the fields that the compiler finds fault with.
//!
//! The compiler knows where an object begins; keeping a line for each field of every object would cost more than the
//! objects. So the few files with faults are read once more.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use mesh_api::admin::Problem;
use mesh_api::yaml::{Node, Value, documents};
use mesh_core::config;

use crate::problem;

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

/// The line of a field of the object that begins at `line`; none if no object begins there, because the file has
/// changed meanwhile.
fn line_in(nodes: &[Node], line: u32, field: &str) -> Option<u32> {
    nodes.iter().find_map(|node| {
        if node.line == line && node.get("items").is_none() {
            return Some(node.line_of(field));
        }
        match &node.get("items")?.value {
            Value::List(items) => items.iter().find(|item| item.line == line).map(|item| item.line_of(field)),
            Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::Text(_) | Value::Map(_) => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "kind: A
spec:
  ports: [1]
---
kind: List
items:
- kind: B
  spec:
    rules:
    - to: x
- kind: C
";

    fn line(object: u32, field: &str) -> Option<u32> {
        let nodes: Vec<Node> = documents(TEXT).into_iter().map(Result::unwrap).collect();
        line_in(&nodes, object, field)
    }

    #[test]
    fn a_field_has_its_own_line_in_documents_and_lists() {
        assert_eq!(line(1, "spec.ports[0]"), Some(3));
        assert_eq!(line(7, "spec.rules[0].to"), Some(10));
        assert_eq!(line(7, "spec.rules[4].to"), Some(9), "the deepest part that exists");
        assert_eq!(line(11, "spec.rules"), Some(11));
        assert_eq!(line(2, "spec.ports"), None, "no object begins there");
    }
}
