//! Schemas of fields, as the API server's `openAPIV3Schema` has them.
//!
//! What can be built here is structural by construction: one type for each value, and no alternatives but in CEL rules.

use serde_json::{Map, Value, json};

/// What a field may hold.
#[derive(Debug, Clone)]
pub struct Schema {
    /// Its type and the bounds of that type.
    pub shape: Shape,
    description: &'static str,
    rules: Vec<Rule>,
}

/// Type and bounds.
#[derive(Debug, Clone)]
pub enum Shape {
    /// Fields by name; others are dropped, or refused where the client asks for that.
    Object {
        /// What it may have.
        fields: Vec<Field>,
        /// Fewest and most of them at a time.
        count: Bounds,
        /// Whether others are kept.
        others: Others,
    },
    /// Keys that the author chooses.
    Map {
        /// What each key has.
        values: Box<Schema>,
        /// Fewest and most of them.
        count: Bounds,
    },
    /// Values in their order.
    List {
        /// What each of them is.
        items: Box<Schema>,
        /// Fewest and most of them.
        count: Bounds,
        /// The field by which an item is told from its neighbours; without one the list is replaced as a whole.
        key: Option<&'static str>,
    },
    /// Any text.
    Text {
        /// Fewest and most characters.
        length: Bounds,
        /// A regular expression (RE2) that it matches.
        pattern: Option<&'static str>,
    },
    /// A point in time, RFC 3339.
    Time,
    /// One word of these.
    Word(&'static [&'static str]),
    /// A whole number.
    Number(Bounds),
    /// Yes or no.
    Bool,
    /// A whole number, or its digits as text.
    NumberOrText,
}

/// A field of an object.
#[derive(Debug, Clone)]
pub struct Field {
    /// As it is written.
    pub name: &'static str,
    /// Whether it must be there.
    pub need: Need,
    /// What it holds.
    pub schema: Schema,
}

/// Whether a field must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// It must.
    Required,
    /// It may be left out.
    Optional,
}

/// What becomes of fields that an object does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// They are dropped.
    Dropped,
    /// They are kept as they are.
    Kept,
}

/// Least and most; no bound where there is none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bounds {
    least: Option<u64>,
    most: Option<u64>,
}

impl Bounds {
    /// No bounds.
    pub const NONE: Self = Self { least: None, most: None };

    /// From the first to the last, both inclusive.
    pub const fn of(least: u64, most: u64) -> Self {
        Self { least: Some(least), most: Some(most) }
    }

    /// At least so many.
    pub const fn least(least: u64) -> Self {
        Self { least: Some(least), most: None }
    }

    /// At most so many.
    pub const fn most(most: u64) -> Self {
        Self { least: None, most: Some(most) }
    }
}

/// A condition in CEL.
#[derive(Debug, Clone, Copy)]
struct Rule {
    condition: &'static str,
    message: &'static str,
}

/// An object.
pub fn object(fields: Vec<Field>) -> Schema {
    Schema::new(Shape::Object { fields, count: Bounds::NONE, others: Others::Dropped })
}

/// An object that has at least one of its fields.
pub fn filled_object(fields: Vec<Field>) -> Schema {
    Schema::new(Shape::Object { fields, count: Bounds::least(1), others: Others::Dropped })
}

/// An object that keeps what it does not know.
pub fn open_object(fields: Vec<Field>) -> Schema {
    Schema::new(Shape::Object { fields, count: Bounds::NONE, others: Others::Kept })
}

/// A mapping with keys of the author's.
pub fn map(values: Schema, count: Bounds) -> Schema {
    Schema::new(Shape::Map { values: Box::new(values), count })
}

/// A list.
pub fn list(items: Schema, count: Bounds) -> Schema {
    Schema::new(Shape::List { items: Box::new(items), count, key: None })
}

/// A list whose items have a field that tells them apart.
pub fn keyed_list(key: &'static str, items: Schema, count: Bounds) -> Schema {
    Schema::new(Shape::List { items: Box::new(items), count, key: Some(key) })
}

/// Text of some length.
pub fn text(length: Bounds) -> Schema {
    Schema::new(Shape::Text { length, pattern: None })
}

/// Text of some length and form.
pub fn pattern(length: Bounds, pattern: &'static str) -> Schema {
    Schema::new(Shape::Text { length, pattern: Some(pattern) })
}

/// One of some words.
pub fn word(words: &'static [&'static str]) -> Schema {
    Schema::new(Shape::Word(words))
}

/// A whole number.
pub fn number(range: Bounds) -> Schema {
    Schema::new(Shape::Number(range))
}

/// A field that may be left out.
pub fn optional(name: &'static str, schema: Schema) -> Field {
    Field { name, need: Need::Optional, schema }
}

/// A field that must be there.
pub fn required(name: &'static str, schema: Schema) -> Field {
    Field { name, need: Need::Required, schema }
}

impl Schema {
    /// Any value of a shape.
    pub fn new(shape: Shape) -> Self {
        Self { shape, description: "", rules: Vec::new() }
    }

    /// Says what it is for.
    #[must_use]
    pub fn about(mut self, description: &'static str) -> Self {
        self.description = description;
        self
    }

    /// Adds a condition in CEL, and what the API server says where it does not hold.
    #[must_use]
    pub fn rule(mut self, condition: &'static str, message: &'static str) -> Self {
        self.rules.push(Rule { condition, message });
        self
    }

    /// As the API server reads it.
    pub fn to_json(&self) -> Value {
        let mut json = self.shape.to_json();
        if !self.description.is_empty() {
            json.insert("description".into(), self.description.into());
        }
        if !self.rules.is_empty() {
            let rules = self.rules.iter().map(|rule| json!({"rule": rule.condition, "message": rule.message}));
            json.insert("x-kubernetes-validations".into(), rules.collect());
        }
        json.into()
    }
}

impl Shape {
    fn to_json(&self) -> Map<String, Value> {
        let of_type = |name: &str| Map::from_iter([("type".to_owned(), Value::from(name))]);
        match self {
            Self::Object { fields, count, others } => {
                let mut json = of_type("object");
                let properties = fields.iter().map(|field| (field.name.to_owned(), field.schema.to_json()));
                json.insert("properties".into(), Value::Object(properties.collect()));
                let required: Vec<_> =
                    fields.iter().filter(|field| field.need == Need::Required).map(|field| field.name).collect();
                if !required.is_empty() {
                    json.insert("required".into(), required.into());
                }
                count.write(&mut json, ["minProperties", "maxProperties"]);
                if *others == Others::Kept {
                    json.insert("x-kubernetes-preserve-unknown-fields".into(), true.into());
                }
                json
            }
            Self::Map { values, count } => {
                let mut json = of_type("object");
                json.insert("additionalProperties".into(), values.to_json());
                count.write(&mut json, ["minProperties", "maxProperties"]);
                json
            }
            Self::List { items, count, key } => {
                let mut json = of_type("array");
                json.insert("items".into(), items.to_json());
                count.write(&mut json, ["minItems", "maxItems"]);
                if let Some(key) = key {
                    json.insert("x-kubernetes-list-type".into(), "map".into());
                    json.insert("x-kubernetes-list-map-keys".into(), json!([key]));
                }
                json
            }
            Self::Text { length, pattern } => {
                let mut json = of_type("string");
                length.write(&mut json, ["minLength", "maxLength"]);
                if let Some(pattern) = pattern {
                    json.insert("pattern".into(), (*pattern).into());
                }
                json
            }
            Self::Time => {
                let mut json = of_type("string");
                json.insert("format".into(), "date-time".into());
                json
            }
            Self::Word(words) => {
                let mut json = of_type("string");
                json.insert("enum".into(), json!(words));
                json
            }
            Self::Number(range) => {
                let mut json = of_type("integer");
                range.write(&mut json, ["minimum", "maximum"]);
                json
            }
            Self::Bool => of_type("boolean"),
            Self::NumberOrText => Map::from_iter([
                ("anyOf".to_owned(), json!([{"type": "integer"}, {"type": "string"}])),
                ("x-kubernetes-int-or-string".to_owned(), true.into()),
            ]),
        }
    }
}

impl Bounds {
    fn write(self, json: &mut Map<String, Value>, [least, most]: [&str; 2]) {
        for (name, bound) in [(least, self.least), (most, self.most)] {
            if let Some(bound) = bound {
                json.insert(name.into(), bound.into());
            }
        }
    }
}
