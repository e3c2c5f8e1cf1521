//! YAML (and so JSON) text to trees that remember their lines.
//!
//! Here: splitting a file into documents, parsing each on its own, [`read`]ing a tree into typed values. It is the only
//! module that touches the YAML crate. Not here: what the objects mean (see [`crate::k8s`]).
//!
//! Documents are separated before they are parsed: a line that begins with `---` can be nothing but a document marker
//! (YAML 1.2.2, 9.1.2), so one document that does not parse leaves its neighbours alone.

mod read;

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

pub use read::{FieldError, Unknown, field_path, read};

/// Documents in one file; more are refused, so that a runaway generator is noticed.
pub const MAX_DOCUMENTS: usize = 10_000;
/// Bytes of one file.
pub const MAX_FILE_BYTES: usize = 64 << 20;
/// Depth of a tree. Kubernetes objects stay below 20.
const MAX_DEPTH: usize = 64;
/// Nodes of one document: a List of about 10,000 pods.
const MAX_NODES: usize = 2_000_000;
/// Characters of an object key; annotations such as `last-applied-configuration` are values, not keys.
const MAX_KEY_CHARS: usize = 1_024;

/// A value and the line on which it begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// From 1.
    pub line: u32,
    /// What it is.
    pub value: Value,
}

/// What YAML's core schema knows.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `null`, `~` or nothing.
    Null,
    /// `true`, `false`, and as kubectl reads it `yes`, `no`, `on`, `off`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// Text.
    Text(String),
    /// A sequence.
    List(Vec<Node>),
    /// A mapping in the order of the file; keys are unique.
    Map(Vec<Entry>),
}

/// An entry of a mapping.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Key. Numbers and booleans as they are written.
    pub key: String,
    /// Line of the key, from 1.
    pub line: u32,
    /// Value.
    pub node: Node,
}

/// Why a document is not YAML.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SyntaxError {
    /// Line in the file, from 1.
    pub line: u32,
    /// What is wrong.
    pub message: String,
}

/// Parses a file, document by document. Empty documents are left out.
pub fn documents(text: &str) -> Vec<Result<Node, SyntaxError>> {
    if text.len() > MAX_FILE_BYTES {
        return vec![Err(SyntaxError { line: 1, message: format!("the file is larger than {MAX_FILE_BYTES} bytes") })];
    }
    let mut parsed = Vec::new();
    for (count, (first_line, chunk)) in split(text).into_iter().enumerate() {
        if count == MAX_DOCUMENTS {
            let message = format!("the file holds more than {MAX_DOCUMENTS} documents; the rest is not read");
            parsed.push(Err(SyntaxError { line: first_line, message }));
            break;
        }
        parsed.push(parse(chunk, first_line));
    }
    parsed
}

/// Chunks of a file with the line on which each begins; chunks with nothing but comments are left out.
fn split(text: &str) -> Vec<(u32, &str)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut chunks = Vec::new();
    let (mut start, mut start_line, mut offset, mut line_number) = (0, 1u32, 0, 1u32);
    for line in text.split_inclusive('\n') {
        let marker =
            line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if marker && offset > start {
            chunks.push((start_line, &text[start..offset]));
            (start, start_line) = (offset, line_number);
        }
        offset += line.len();
        line_number = line_number.saturating_add(1);
    }
    chunks.push((start_line, &text[start..]));
    chunks.retain(|(_, chunk)| chunk.lines().any(has_content));
    chunks
}

/// Whether a line is more than a comment, a directive or a marker.
fn has_content(line: &str) -> bool {
    let line = line.strip_prefix("---").unwrap_or(line).trim();
    !(line.is_empty() || line.starts_with('#') || line.starts_with('%') || line == "...")
}

fn parse(chunk: &str, first_line: u32) -> Result<Node, SyntaxError> {
    let options = serde_saphyr::options! {
        legacy_octal_numbers: true,
        with_snippet: false,
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            simple_key_max_lookahead: MAX_KEY_CHARS,
            max_nodes: MAX_NODES,
            max_events: 3 * MAX_NODES,
        },
    };
    let mut node: Node = serde_saphyr::from_str_with_options(chunk, options).map_err(|error| {
        let line = error.location().map_or(1, |at| to_line(at.line()));
        SyntaxError { line: first_line.saturating_add(line.max(1) - 1), message: describe(&error) }
    })?;
    shift(&mut node, first_line - 1);
    Ok(node)
}

/// The crate's own words, on one line and without its position, which counts from the start of the document.
fn describe(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let text = text.lines().next().unwrap_or("not YAML");
    let cut = [" at line ", " (line "].iter().filter_map(|mark| text.find(mark)).min().unwrap_or(text.len());
    text[..cut].trim_end_matches(':').chars().take(MAX_MESSAGE_CHARS).collect()
}

/// Characters of a message of the parser that are kept.
const MAX_MESSAGE_CHARS: usize = 300;

fn shift(node: &mut Node, by: u32) {
    node.line = node.line.saturating_add(by);
    match &mut node.value {
        Value::List(items) => items.iter_mut().for_each(|item| shift(item, by)),
        Value::Map(entries) => {
            for entry in entries {
                entry.line = entry.line.saturating_add(by);
                shift(&mut entry.node, by);
            }
        }
        Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::Text(_) => {}
    }
}

fn to_line(line: u64) -> u32 {
    u32::try_from(line).unwrap_or(u32::MAX)
}

/// A tree without lines (all are 0): what an API server says has none.
impl From<serde_json::Value> for Node {
    fn from(value: serde_json::Value) -> Self {
        use serde_json::Value as Json;
        let value = match value {
            Json::Null => Value::Null,
            Json::Bool(value) => Value::Bool(value),
            Json::Number(number) => match number.as_i64() {
                Some(value) => Value::Int(value),
                None => Value::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => Value::Text(text),
            Json::Array(items) => Value::List(items.into_iter().map(Self::from).collect()),
            Json::Object(map) => Value::Map(
                map.into_iter().map(|(key, value)| Entry { key, line: 0, node: Self::from(value) }).collect(),
            ),
        };
        Self { line: 0, value }
    }
}

impl Node {
    /// The value of a mapping's key.
    pub fn get(&self, key: &str) -> Option<&Node> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|entry| entry.key == key).map(|entry| &entry.node),
            Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::Text(_) | Value::List(_) => None,
        }
    }

    /// The text of a mapping's key.
    pub fn text(&self, key: &str) -> Option<&str> {
        match &self.get(key)?.value {
            Value::Text(text) => Some(text),
            Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::List(_) | Value::Map(_) => None,
        }
    }

    /// Line of the field that a path such as `spec.rules[0].to` names, or of the deepest part of it that exists.
    pub fn line_of(&self, path: &str) -> u32 {
        let mut node = self;
        let mut line = self.line;
        let mut rest = path;
        while !rest.is_empty() {
            let step;
            (step, rest) = next_step(rest);
            let found = match (&node.value, step) {
                (Value::Map(entries), Step::Key(key)) => {
                    entries.iter().find(|entry| entry.key == key).map(|entry| (entry.line, &entry.node))
                }
                (Value::List(items), Step::Index(index)) => items.get(index).map(|item| (item.line, item)),
                // The path leads past what the document holds.
                _ => None,
            };
            let Some((found_line, found_node)) = found else { break };
            (line, node) = (found_line, found_node);
        }
        line
    }
}

enum Step<'p> {
    Key(&'p str),
    Index(usize),
}

/// The first step of a path as [`field_path`] writes it: `key`, `["quoted.key"]` or `[3]`.
fn next_step(path: &str) -> (Step<'_>, &str) {
    let path = path.strip_prefix('.').unwrap_or(path);
    if let Some(rest) = path.strip_prefix("[\"") {
        let (key, rest) = rest.split_once("\"]").unwrap_or((rest, ""));
        return (Step::Key(key), rest);
    }
    if let Some((index, rest)) = path.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return (index.parse().map_or(Step::Key(index), Step::Index), rest);
    }
    let end = path.find(['.', '[']).unwrap_or(path.len()).max(1).min(path.len());
    (Step::Key(&path[..end]), &path[end..])
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = serde_saphyr::Spanned::<Value>::deserialize(deserializer)?;
        Ok(Node { line: to_line(spanned.referenced.line()), value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E: de::Error>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E: de::Error>(self, v: i64) -> Result<Value, E> {
        Ok(Value::Int(v))
    }

    fn visit_u64<E: de::Error>(self, v: u64) -> Result<Value, E> {
        // Beyond i64 no field of ours has a meaning; the range check of the field says so.
        #[allow(clippy::cast_precision_loss)]
        Ok(i64::try_from(v).map_or(Value::Float(v as f64), Value::Int))
    }

    fn visit_f64<E: de::Error>(self, v: f64) -> Result<Value, E> {
        Ok(Value::Float(v))
    }

    fn visit_str<E: de::Error>(self, v: &str) -> Result<Value, E> {
        Ok(Value::Text(v.to_owned()))
    }

    fn visit_string<E: de::Error>(self, v: String) -> Result<Value, E> {
        Ok(Value::Text(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<serde_saphyr::Spanned<String>>()? {
            let node = map.next_value()?;
            entries.push(Entry { line: to_line(key.referenced.line()), key: key.value, node });
        }
        Ok(Value::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(text: &str) -> Node {
        let mut all = documents(text);
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0).expect("parses")
    }

    #[test]
    fn lines_count_through_the_file() {
        let all = documents("# c\na: 1\n---\n\nb:\n  - x\n  - y: 2\n---\n# nothing\n--- \nc: 3\n");
        assert_eq!(all.len(), 3);
        let second = all[1].as_ref().unwrap();
        assert_eq!(second.line_of("b"), 5);
        assert_eq!(second.line_of("b[1].y"), 7);
        assert_eq!(second.line_of("b[9].y"), 5, "the deepest part that exists");
        assert_eq!(all[2].as_ref().unwrap().line_of("c"), 11);
    }

    #[test]
    fn a_broken_document_leaves_its_neighbours_alone() {
        let all = documents("a: 1\n---\nb: [1\nc: }\n---\nd: 4\n");
        assert!(all[0].is_ok() && all[2].is_ok());
        let error = all[1].as_ref().unwrap_err();
        assert!((3..=5).contains(&error.line), "{error:?}");
    }

    #[test]
    fn duplicate_keys_are_refused_with_their_line() {
        let all = documents("---\nspec:\n  a: 1\n  b: 2\n  a: 3\n");
        let error = all[0].as_ref().unwrap_err();
        assert_eq!(error.line, 5, "{error:?}");
        assert!(error.message.contains("duplicate"), "{error:?}");
        assert!(!error.message.contains("line"), "{error:?}");
    }

    #[test]
    fn scalars_read_as_kubectl_reads_them() {
        let node = only("a: yes\nb: \"yes\"\nc: 0644\nd: 8080\ne: ~\nf: 1.5\n8080: x\ng: on\n");
        assert_eq!(node.get("a").unwrap().value, Value::Bool(true));
        assert_eq!(node.text("b"), Some("yes"));
        assert_eq!(node.get("c").unwrap().value, Value::Int(420));
        assert_eq!(node.get("d").unwrap().value, Value::Int(8080));
        assert_eq!(node.get("e").unwrap().value, Value::Null);
        assert_eq!(node.get("f").unwrap().value, Value::Float(1.5));
        assert_eq!(node.text("8080"), Some("x"));
        assert_eq!(node.get("g").unwrap().value, Value::Bool(true));
    }

    #[test]
    fn json_with_tabs_is_yaml_too() {
        let node = only("{\n\t\"kind\": \"Pod\",\n\t\"n\": [1, 2]\n}\n");
        assert_eq!(node.text("kind"), Some("Pod"));
        assert_eq!(node.line_of("n[1]"), 3);
    }

    #[test]
    fn ten_thousand_documents_pass_and_one_more_is_named() {
        let text = "---\na: 1\n".repeat(MAX_DOCUMENTS + 1);
        let all = documents(&text);
        assert_eq!(all.len(), MAX_DOCUMENTS + 1);
        assert!(all[..MAX_DOCUMENTS].iter().all(Result::is_ok));
        assert_eq!(all[MAX_DOCUMENTS].as_ref().unwrap_err().line, 20_001);
    }

    #[test]
    fn bombs_end_early() {
        let mut bomb = String::from("a0: &a0 [x]\n");
        for i in 1..30 {
            let p = i - 1;
            bomb += &format!("a{i}: &a{i} [*a{p}, *a{p}, *a{p}, *a{p}, *a{p}, *a{p}, *a{p}, *a{p}]\n");
        }
        assert!(documents(&bomb)[0].is_err());
        assert!(documents(&"[".repeat(100_000))[0].is_err());
    }

    #[test]
    fn markers_inside_text_do_not_split() {
        assert_eq!(documents("a: |\n  ---\n  b\n").len(), 1);
        assert_eq!(documents("a: ---b\n").len(), 1);
        assert_eq!(documents("---a: 1\n").len(), 1);
    }
}
