//! The definitions, the reader and the files of the tree agree.

use std::collections::BTreeSet;
use std::path::Path;

use super::schema::Shape;
use super::*;
use crate::k8s::shape::{self, words};
use crate::k8s::{Finding, Item, Reason, from_api_server};

#[test]
fn the_files_are_what_is_generated() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(DIRECTORY);
    let there: BTreeSet<String> = std::fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".yaml"))
        .collect();
    let definitions = definitions();
    assert_eq!(there, definitions.iter().map(Definition::file_name).collect());
    for definition in definitions {
        let text = std::fs::read_to_string(directory.join(definition.file_name())).unwrap();
        assert!(text == definition.to_yaml().unwrap(), "{} differs: run `{COMMAND}`", definition.file_name());
    }
}

#[test]
fn the_reader_takes_every_version_of_the_kinds_that_are_read_and_none_of_the_others() {
    for definition in definitions() {
        for version in definition.versions {
            let object = json!({
                "apiVersion": format!("{}/{version}", definition.group),
                "kind": definition.kind,
                "metadata": {"name": "a", "namespace": "b"},
                "spec": {"address": "10.0.0.1"},
            });
            let by_kind = |finding: &Finding| finding.reason == Reason::Kind;
            let refused = matches!(from_api_server(object), Item::Rejected(finding) if by_kind(&finding));
            assert_eq!(refused, definition.effect == Effect::Stored, "{} {version}", definition.kind);
        }
    }
}

/// Conditions that the reader refuses, and with them the policy: the API server has to keep them for it to see.
const REFUSED: [&str; 2] = ["trustDomains", "notTrustDomains"];

#[test]
fn the_reader_knows_the_fields_of_the_schemas_and_no_others() {
    for definition in definitions().iter().filter(|definition| definition.effect == Effect::Read) {
        let reads = shape::of(definition.kind);
        let mut has = shape::Shape::new();
        note("spec".to_owned(), &definition.spec, &mut has);
        let unread: Vec<_> = reads.iter().filter(|(_, what)| *what == "unread").map(|(path, _)| path).collect();
        let below_unread = |path: &str| {
            let below = |unread: &str| path.strip_prefix(unread).is_some_and(|rest| rest.starts_with(['.', '[', '{']));
            unread.iter().any(|unread| below(unread))
        };
        for (path, what) in &has {
            let read = reads.get(path).map_or("nothing", String::as_str);
            let refused = REFUSED.iter().any(|name| path.ends_with(name) || path.ends_with(&format!("{name}[]")));
            let expected = if refused { "nothing" } else { what };
            assert!(
                read == expected || read == "unread" || below_unread(path),
                "{path}: the schema has {what}, the reader {read}"
            );
        }
        for path in reads.keys().filter(|path| path.starts_with("spec")) {
            assert!(has.contains_key(path), "{}: the reader knows {path}, the schema does not", definition.kind);
        }
    }
}

/// Paths and types as the reader's are noted.
fn note(path: String, schema: &Schema, into: &mut shape::Shape) {
    let what = match &schema.shape {
        Shape::Object { fields, .. } => {
            for field in fields {
                note(format!("{path}.{}", field.name), &field.schema, into);
            }
            "object".to_owned()
        }
        Shape::Map { values, .. } => {
            note(format!("{path}{{}}"), values, into);
            "map".to_owned()
        }
        Shape::List { items, .. } => {
            note(format!("{path}[]"), items, into);
            "list".to_owned()
        }
        Shape::Text { .. } | Shape::Time => "text".to_owned(),
        Shape::Word(of) => words(of),
        Shape::Number(_) => "number".to_owned(),
        Shape::Bool => "bool".to_owned(),
        Shape::NumberOrText => "number or text".to_owned(),
    };
    into.insert(path, what);
}
