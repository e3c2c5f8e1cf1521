//! Findings of the readers, in one form with those of the compiler, and the lines of files that they are about.
//!
//! Numbers below 100 are the readers'; from 101 on they are [`mesh_core::config::Code`]'s. A number never changes its
//! meaning.

use mesh_core::config;

use crate::admin::Problem;
use crate::k8s::{Finding, Reason};
use crate::yaml::{Node, Value};

/// A file or directory that cannot be read.
pub const UNREADABLE: &str = "MESH001";
/// A document that is not YAML.
pub const SYNTAX: &str = "MESH002";
/// A field that does not fit.
pub const FIELD: &str = "MESH003";
/// A kind or version that the mesh does not know.
pub const KIND: &str = "MESH004";
/// An object that another file has as well.
pub const DUPLICATE: &str = "MESH005";
/// A kind without effect here.
pub const INERT: &str = "MESH006";
/// A bound of the reader.
pub const LIMIT: &str = "MESH007";

/// Nothing is published, because what is not understood might have been in force.
pub const WITHHELD: &str = "MESH008";

/// `severity` of an object that is not applied.
pub const ERROR: &str = "error";
/// `severity` of an object that does less than it seems to.
pub const WARNING: &str = "warning";

/// A finding about a file as a whole.
pub fn about_file(code: &str, file: &str, line: u32, message: String, hint: &str) -> Problem {
    Problem {
        code: code.into(),
        severity: ERROR.into(),
        object: String::new(),
        file: file.into(),
        line,
        field: String::new(),
        message,
        hint: hint.into(),
    }
}

/// A finding about an object that was read.
pub fn about_object(finding: Finding, file: &str) -> Problem {
    let (code, severity) = match finding.reason {
        Reason::Field => (FIELD, ERROR),
        Reason::Kind => (KIND, ERROR),
        Reason::Inert => (INERT, WARNING),
    };
    Problem {
        code: code.into(),
        severity: severity.into(),
        object: finding.object,
        file: file.into(),
        line: finding.error.line,
        field: finding.error.path,
        message: finding.error.message,
        hint: finding.error.hint,
    }
}

/// A finding of the compiler.
pub fn of_compiler(problem: &config::Problem) -> Problem {
    Problem {
        code: problem.code.to_string(),
        severity: problem.severity.as_str().into(),
        object: problem.object.to_string(),
        file: problem.origin.file.to_string(),
        line: problem.origin.line,
        field: problem.field.clone(),
        message: problem.message.clone(),
        hint: problem.hint.clone(),
    }
}

/// A second object of one key.
pub fn duplicate(key: &config::ObjectKey, second: &config::Object, first: &config::Object) -> Problem {
    let (here, there) = (&second.meta().origin, &first.meta().origin);
    Problem {
        code: DUPLICATE.into(),
        severity: ERROR.into(),
        object: key.to_string(),
        file: here.file.to_string(),
        line: here.line,
        field: "metadata.name".into(),
        message: format!("the object is there already, in {}:{}, which stays in force", there.file, there.line),
        hint: "remove one of the two, or rename it".into(),
    }
}

/// One line: code, place, object, field, fact, what to do.
pub fn line(p: &Problem) -> String {
    let place = match (p.file.as_str(), p.line) {
        ("", _) => String::new(),
        (file, 0) => format!(" {file}:"),
        (file, line) => format!(" {file}:{line}:"),
    };
    let part = |text: &str| if text.is_empty() { String::new() } else { format!(" {text}") };
    let field = if p.field.is_empty() { String::new() } else { format!(" {}:", p.field) };
    let hint = if p.hint.is_empty() { String::new() } else { format!(". {}", p.hint) };
    format!("{}{place}{}{field}{}{hint}", p.code, part(&p.object), part(&p.message))
}

/// The line of a field of the object that begins at `line`; none if no object begins there, because the file has
/// changed meanwhile.
pub fn line_in(nodes: &[Node], line: u32, field: &str) -> Option<u32> {
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
    use crate::yaml::documents;

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
