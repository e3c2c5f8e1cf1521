//! Findings of the readers, in one form with those of the compiler.
//!
//! Numbers below 100 are the readers'; from 101 on they are [`mesh_core::config::Code`]'s. A number never changes its
//! meaning.

use mesh_api::admin::Problem;
use mesh_api::k8s::{Finding, Reason};
use mesh_core::config;

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
