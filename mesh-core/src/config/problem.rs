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

/// Findings of one severity that are kept of an object, in the order they are found. A list of a hundred thousand wrong
/// values would make a hundred thousand; nobody reads them, and each is many times the value's size, in several places.
pub const MAX_KEPT: usize = 16;

/// Collects findings about one object.
pub(crate) struct Findings {
    object: ObjectKey,
    origin: Origin,
    errors: Kept,
    warnings: Kept,
}

/// The first findings of a severity, and how many more there are.
#[derive(Default)]
struct Kept {
    problems: Vec<Problem>,
    /// The first one beyond [`MAX_KEPT`].
    next: Option<Problem>,
    /// All beyond [`MAX_KEPT`].
    more: usize,
}

impl Findings {
    pub(crate) fn about(object: ObjectKey, meta: &Meta) -> Self {
        Self { object, origin: meta.origin.clone(), errors: Kept::default(), warnings: Kept::default() }
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
        let kept = match severity {
            Severity::Error => &mut self.errors,
            Severity::Warning => &mut self.warnings,
        };
        kept.push(Problem { object, field, code, severity, origin, message, hint });
    }

    pub(crate) fn has_errors(&self) -> bool {
        !self.errors.problems.is_empty()
    }

    pub(crate) fn into_problems(self) -> Vec<Problem> {
        let mut all = self.errors.into_problems();
        all.append(&mut self.warnings.into_problems());
        all
    }
}

impl Kept {
    fn push(&mut self, problem: Problem) {
        if self.problems.len() < MAX_KEPT {
            self.problems.push(problem);
            return;
        }
        self.more += 1;
        if self.next.is_none() {
            self.next = Some(problem);
        }
    }

    /// The rest is one finding, at the place where it begins.
    fn into_problems(self) -> Vec<Problem> {
        let mut all = self.problems;
        all.extend(self.next.map(|next| match (self.more, next.severity) {
            (1, _) => next,
            (more, severity) => Problem {
                message: format!("here and elsewhere in the object: {more} more {}s", severity.as_str()),
                hint: "mend those that are told; the next ones are told then".to_owned(),
                ..next
            },
        }));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;
    use crate::config::authorization::compile;
    use crate::config::objects::{AuthorizationPolicy, Kind, PolicyRule, Source, Values};

    fn policy(blocks: usize, principals: usize) -> AuthorizationPolicy {
        let values = |count: usize| Values { is: (0..count).map(|i| format!("a*{i}").into()).collect(), not: vec![] };
        let source = Source { ip_blocks: values(blocks), principals: values(principals), ..Source::default() };
        let rules = vec![PolicyRule { from: Some(vec![source]), ..PolicyRule::default() }];
        AuthorizationPolicy { rules, ..AuthorizationPolicy::default() }
    }

    #[test]
    fn an_object_has_a_bounded_number_of_findings_whatever_it_holds() {
        let found = compile(&policy(100_000, 0), &Settings::default()).unwrap_err();
        assert_eq!(found.len(), MAX_KEPT + 1);
        let (last, told) = found.split_last().unwrap();
        for (i, problem) in told.iter().enumerate() {
            assert_eq!(problem.field, format!("spec.rules[0].from[0].source.ipBlocks[{i}]"));
            assert_eq!(problem.message, format!("`a*{i}` is neither an address nor a CIDR"));
        }
        assert_eq!((last.code, last.severity), (Code::InvalidValue, Severity::Error));
        assert_eq!(last.field, "spec.rules[0].from[0].source.ipBlocks[16]");
        assert_eq!(last.message, "here and elsewhere in the object: 99984 more errors");
    }

    #[test]
    fn warnings_do_not_take_the_room_of_errors() {
        let found = compile(&policy(1, 100_000), &Settings::default()).unwrap_err();
        let (errors, warnings): (Vec<_>, Vec<_>) = found.into_iter().partition(|p| p.severity == Severity::Error);
        assert_eq!((errors.len(), warnings.len()), (1, MAX_KEPT + 1));
        assert_eq!(errors[0].field, "spec.rules[0].from[0].source.ipBlocks[0]");
        assert!(warnings[MAX_KEPT].message.ends_with(" 99984 more warnings"), "{:?}", warnings[MAX_KEPT]);
        let warned = compile(&policy(0, 100_000), &Settings::default()).unwrap();
        assert_eq!(warned.problems, warnings);
    }

    #[test]
    fn nothing_is_counted_that_can_be_told() {
        let key = ObjectKey::new(Kind::Service, "shop", "web");
        for count in 0..=MAX_KEPT + 1 {
            let mut findings = Findings::about(key.clone(), &Meta::default());
            (0..count).for_each(|i| findings.error(format!("{i}"), "wrong", ""));
            assert_eq!(findings.has_errors(), count > 0);
            let fields: Vec<String> = findings.into_problems().into_iter().map(|problem| problem.field).collect();
            assert_eq!(fields, (0..count).map(|i| i.to_string()).collect::<Vec<_>>());
        }
    }
}
