//! What is wrong with the configuration, for the author of the YAML.

use std::fmt;

use super::objects::{Meta, ObjectKey, Origin};

/// One finding: where, what, what follows, what to do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Object.
    pub object: ObjectKey,
    /// Path of the field, e.g. `spec.rules[0].to[0].operation.ports[1]`; empty when it is the object as a whole.
    pub field: String,
    /// Stable number.
    pub code: Code,
    /// Whether the object is in force.
    pub severity: Severity,
    /// Where the object was read.
    pub origin: Origin,
    /// The fact and its consequence.
    pub message: String,
    /// What to do.
    pub hint: String,
}

/// Whether an object is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The object is not applied; its last good version stays in force.
    Error,
    /// Applied, but it does not do what it seems to.
    Warning,
}

/// Kinds of findings of the compiler. Numbers are stable; those below 100 are the readers'.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Code {
    /// A value that cannot be meant: bad port, bad CIDR, empty list, fields that exclude each other.
    InvalidValue,
    /// HTTP fields, which the node proxy cannot see.
    HttpAtNodeProxy,
    /// AUDIT or CUSTOM, which the node proxy cannot carry out.
    ActionAtNodeProxy,
    /// A policy with `targetRefs` applies at a waypoint only.
    NeedsWaypoint,
    /// A selector that matches no workload.
    SelectsNothing,
    /// `when.key` that is not known.
    UnknownCondition,
    /// An address that another object owns.
    AddressTaken,
    /// Another object of the same level is older and wins, or the level does not apply.
    NotEffective,
    /// A value of a newer or other mesh that has no effect here.
    UnknownValue,
}

impl Code {
    /// `MESHnnn`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidValue => "MESH101",
            Self::HttpAtNodeProxy => "MESH102",
            Self::ActionAtNodeProxy => "MESH103",
            Self::NeedsWaypoint => "MESH104",
            Self::SelectsNothing => "MESH105",
            Self::UnknownCondition => "MESH106",
            Self::AddressTaken => "MESH107",
            Self::NotEffective => "MESH108",
            Self::UnknownValue => "MESH109",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Severity {
    /// `error` or `warning`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// Collects findings about one object.
pub(crate) struct Findings {
    object: ObjectKey,
    origin: Origin,
    problems: Vec<Problem>,
}

impl Findings {
    pub(crate) fn about(object: ObjectKey, meta: &Meta) -> Self {
        Self { object, origin: meta.origin.clone(), problems: Vec::new() }
    }

    /// A value that makes the object unusable.
    pub(crate) fn error(&mut self, field: impl Into<String>, message: impl Into<String>, hint: impl Into<String>) {
        self.push(Code::InvalidValue, Severity::Error, (field.into(), message.into(), hint.into()));
    }

    pub(crate) fn warn(
        &mut self,
        code: Code,
        field: impl Into<String>,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.push(code, Severity::Warning, (field.into(), message.into(), hint.into()));
    }

    fn push(&mut self, code: Code, severity: Severity, (field, message, hint): (String, String, String)) {
        let (object, origin) = (self.object.clone(), self.origin.clone());
        self.problems.push(Problem { object, field, code, severity, origin, message, hint });
    }

    pub(crate) fn has_errors(&self) -> bool {
        self.problems.iter().any(|p| p.severity == Severity::Error)
    }

    pub(crate) fn into_problems(self) -> Vec<Problem> {
        self.problems
    }
}
