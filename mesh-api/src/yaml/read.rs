//! Typed values from a [`Node`], by serde, with the path and line of what does not fit.
//!
//! Stricter than serde alone, where [`Unknown`] says so: a key that the type does not have is an error, as
//! `kubectl --validate=strict` has it.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};
use serde::forward_to_deserialize_any;

use super::{Entry, Node, Value};

/// What becomes of keys that a type does not have.
#[derive(Clone, Copy)]
pub enum Unknown {
    /// They are errors, but for those that exist and are not read: named by serde's name of the type.
    Refused(fn(&str) -> &'static [&'static str]),
    /// Nothing. Who wrote the object has checked them, and may know more than we do.
    Ignored,
}

/// Which field does not fit, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct FieldError {
    /// E.g. `spec.rules[0].to[0].operation.ports[1]`.
    pub path: String,
    /// From 1; 0 when not known.
    pub line: u32,
    /// The fact.
    pub message: String,
    /// What to do; may be empty.
    pub hint: String,
}

impl FieldError {
    /// An error whose line [`Node::line_of`] can find later.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), line: 0, message: message.into(), hint: String::new() }
    }

    /// Adds what to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }
}

/// Reads a value. The first thing that does not fit ends it.
pub fn read<T: DeserializeOwned>(node: &Node, unknown: Unknown) -> Result<T, FieldError> {
    let cursor = Cursor { node, line: node.line, path: &Path::Root, unknown };
    T::deserialize(cursor).map_err(|error| {
        let Error { at, message, hint } = error;
        let (path, line) = at.unwrap_or((String::new(), node.line));
        // `version: 1` in a label is the commonest slip.
        let is_unquoted = message.starts_with("invalid type: ") && message.ends_with("expected a string");
        let hint = if is_unquoted && !message.contains(": sequence") && !message.contains(": map") {
            "put the value in quotes".to_owned()
        } else {
            hint
        };
        FieldError { path, line, message, hint }
    })
}

/// Appends a key to a path: `a.b`, or `a["x.y/z"]` where the key has characters of its own.
pub fn field_path(parent: &str, key: &str) -> String {
    if key.contains(['.', '[', ']', '/']) {
        format!("{parent}[\"{key}\"]")
    } else if parent.is_empty() {
        key.to_owned()
    } else {
        format!("{parent}.{key}")
    }
}

enum Path<'p> {
    Root,
    Key(&'p Path<'p>, &'p str),
    Index(&'p Path<'p>, usize),
}

impl Path<'_> {
    fn render(&self) -> String {
        match self {
            Path::Root => String::new(),
            Path::Key(parent, key) => field_path(&parent.render(), key),
            Path::Index(parent, index) => format!("{}[{index}]", parent.render()),
        }
    }
}

#[derive(Debug)]
struct Error {
    at: Option<(String, u32)>,
    message: String,
    hint: String,
}

impl Error {
    /// The innermost position wins.
    fn at(mut self, cursor: &Cursor<'_>) -> Self {
        self.at.get_or_insert_with(|| (cursor.path.render(), cursor.line));
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self { at: None, message: message.to_string(), hint: String::new() }
    }

    fn missing_field(field: &'static str) -> Self {
        Self { at: None, message: format!("the required field `{field}` is missing"), hint: format!("add `{field}`") }
    }
}

#[derive(Clone, Copy)]
struct Cursor<'n> {
    node: &'n Node,
    /// Line of the key where there is one, else of the value.
    line: u32,
    path: &'n Path<'n>,
    unknown: Unknown,
}

impl<'n> Cursor<'n> {
    fn visit_any<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(v) => visitor.visit_bool(*v),
            Value::Int(v) => visitor.visit_i64(*v),
            Value::Float(v) => visitor.visit_f64(*v),
            Value::Text(v) => visitor.visit_str(v),
            Value::List(items) => visitor.visit_seq(Items { cursor: self, items: items.iter().enumerate() }),
            Value::Map(entries) => visitor.visit_map(Fields::all(self, entries)),
        }
    }

    fn refuse_unknown(self, name: &str, fields: &[&str], entries: &[Entry]) -> Result<(), Error> {
        let Unknown::Refused(unread) = self.unknown else { return Ok(()) };
        let unread = unread(name);
        let known = |key: &str| fields.contains(&key) || unread.contains(&key);
        let Some(entry) = entries.iter().find(|entry| !known(&entry.key)) else { return Ok(()) };
        let nearest = fields.iter().chain(unread).filter(|field| is_near(field, &entry.key)).min();
        let hint = nearest.map_or_else(
            || format!("remove it, or move it to where it belongs; known here: {}", fields.join(", ")),
            |field| format!("did you mean `{field}`?"),
        );
        let at = Some((field_path(&self.path.render(), &entry.key), entry.line));
        Err(Error { at, message: format!("unknown field `{}`", entry.key), hint })
    }
}

/// Whether one edit (or a different case) turns one word into the other; a swap of neighbours counts as one.
fn is_near(a: &str, b: &str) -> bool {
    if a.eq_ignore_ascii_case(b) {
        return true;
    }
    let (short, long): (Vec<char>, Vec<char>) = if a.len() <= b.len() {
        (a.chars().collect(), b.chars().collect())
    } else {
        (b.chars().collect(), a.chars().collect())
    };
    let head = short.iter().zip(&long).take_while(|(x, y)| x == y).count();
    let tail = short[head..].iter().rev().zip(long[head..].iter().rev()).take_while(|(x, y)| x == y).count();
    let (short, long) = (&short[head..short.len() - tail], &long[head..long.len() - tail]);
    match (short, long) {
        ([], [_] | [_, _]) | ([_], [_]) => true,
        ([a, b], [c, d]) => a == d && b == c,
        _ => false, // More than one edit.
    }
}

impl<'de> Deserializer<'de> for Cursor<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.visit_any(visitor).map_err(|error| error.at(&self))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.node.value {
            Value::Null => visitor.visit_none(),
            Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::Text(_) | Value::List(_) | Value::Map(_) => {
                visitor.visit_some(self)
            }
        }
        .map_err(|error: Error| error.at(&self))
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self).map_err(|error| error.at(&self))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let Value::Map(entries) = &self.node.value else { return self.deserialize_any(visitor) };
        self.refuse_unknown(name, fields, entries)?;
        // A null stands for a field that is not there, as the API server has it.
        let present = |entry: &&Entry| fields.contains(&entry.key.as_str()) && entry.node.value != Value::Null;
        let fields = Fields {
            cursor: self,
            entries: entries.iter().filter(present).collect::<Vec<_>>().into_iter(),
            value: None,
        };
        visitor.visit_map(fields).map_err(|error| error.at(&self))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let Value::Text(text) = &self.node.value else {
            return Err(<Error as de::Error>::custom("expected one of a set of words").at(&self));
        };
        let word: StrDeserializer<'_, Error> = text.as_str().into_deserializer();
        visitor.visit_enum(word).map_err(|error| error.at(&self))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        seq tuple tuple_struct map identifier ignored_any
    }
}

struct Items<'n> {
    cursor: Cursor<'n>,
    items: std::iter::Enumerate<std::slice::Iter<'n, Node>>,
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        let Some((index, node)) = self.items.next() else { return Ok(None) };
        let path = Path::Index(self.cursor.path, index);
        seed.deserialize(Cursor { node, line: node.line, path: &path, unknown: self.cursor.unknown }).map(Some)
    }
}

struct Fields<'n> {
    cursor: Cursor<'n>,
    entries: std::vec::IntoIter<&'n Entry>,
    value: Option<&'n Entry>,
}

impl<'n> Fields<'n> {
    fn all(cursor: Cursor<'n>, entries: &'n [Entry]) -> Self {
        Self { cursor, entries: entries.iter().collect::<Vec<_>>().into_iter(), value: None }
    }
}

impl<'de> MapAccess<'de> for Fields<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some(entry) = self.entries.next() else { return Ok(None) };
        self.value = Some(entry);
        let key: StrDeserializer<'_, Error> = entry.key.as_str().into_deserializer();
        seed.deserialize(key)
            .map_err(|error| {
                let at = (field_path(&self.cursor.path.render(), &entry.key), entry.line);
                Error { at: Some(error.at.unwrap_or(at)), ..error }
            })
            .map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let entry = self.value.take().expect("next_key_seed comes first, by serde's contract");
        let path = Path::Key(self.cursor.path, &entry.key);
        seed.deserialize(Cursor { node: &entry.node, line: entry.line, path: &path, unknown: self.cursor.unknown })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Spec {
        #[serde(default)]
        target_port: Option<u16>,
        #[serde(default)]
        labels: BTreeMap<String, String>,
        #[serde(default)]
        mode: Option<Mode>,
        #[serde(default)]
        rules: Vec<Inner>,
    }

    #[derive(Debug, Deserialize)]
    struct Inner {
        name: String,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(rename_all = "SCREAMING_SNAKE_CASE")]
    enum Mode {
        Strict,
        Permissive,
    }

    fn schema(name: &str) -> &'static [&'static str] {
        if name == "Spec" { &["ignored"] } else { &[] }
    }

    fn check(text: &str, expected: &str) {
        let node = super::super::documents(text).remove(0).expect("parses");
        let got = match read::<Spec>(&node, Unknown::Refused(schema)) {
            Ok(spec) => format!("{:?} {:?} {:?} {}", spec.target_port, spec.labels, spec.mode, spec.rules.len()),
            Err(e) => format!("{}:{}: {} [{}]", e.line, e.path, e.message, e.hint),
        };
        assert_eq!(got, expected, "{text}");
        let _ = node;
    }

    #[test]
    fn reads_and_points() {
        check(
            "targetPort: 80\nlabels: {a: b}\nmode: STRICT\nignored: {x: 1}\n",
            r#"Some(80) {"a": "b"} Some(Strict) 0"#,
        );
        check("targetPort:\nlabels: ~\nmode: null\n", "None {} None 0");
        check("mode: STRICT\ntargetPort: 70000\n", "2:targetPort: invalid value: integer `70000`, expected u16 []");
        check(
            "labels:\n  a: b\n  x.y/z: 1\n",
            "3:labels[\"x.y/z\"]: invalid type: integer `1`, expected a string [put the value in quotes]",
        );
        check("\nmode: LOOSE\n", "2:mode: unknown variant `LOOSE`, expected `STRICT` or `PERMISSIVE` []");
        check("targetport: 1\n", "1:targetport: unknown field `targetport` [did you mean `targetPort`?]");
        check("rules:\n- name: a\n- nmae: b\n", "3:rules[1].nmae: unknown field `nmae` [did you mean `name`?]");
        check("rules:\n- name: a\n- {}\n", "3:rules[1]: the required field `name` is missing [add `name`]");
        check("rules: [5]\n", "1:rules[0]: invalid type: integer `5`, expected struct Inner []");
        check("mode: 7\n", "1:mode: expected one of a set of words []");
    }

    #[test]
    fn reads_names() {
        let node = super::super::documents("name: x\n").remove(0).unwrap();
        assert_eq!(read::<Inner>(&node, Unknown::Refused(schema)).unwrap().name, "x");
    }
}
