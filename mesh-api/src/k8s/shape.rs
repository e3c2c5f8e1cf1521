//! What fields the reader's types have, found by asking serde: so that tests can hold them against something else.

use std::cell::RefCell;
use std::collections::BTreeMap;

use serde::de::value::StrDeserializer;
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde::forward_to_deserialize_any;

use super::{istio, unread};

/// What a type has, by path: `spec.rules[].when[].key` is `text`, `spec.ports{}` a `number`.
pub(crate) type Shape = BTreeMap<String, String>;

/// The shape of a kind of Istio's.
pub(crate) fn of(kind: &str) -> Shape {
    match kind {
        "WorkloadEntry" => trace::<istio::WorkloadEntry>(),
        "PeerAuthentication" => trace::<istio::PeerAuthentication>(),
        "AuthorizationPolicy" => trace::<istio::AuthorizationPolicy>(),
        other => panic!("{other} is not read"),
    }
}

fn trace<T: DeserializeOwned>() -> Shape {
    let found = RefCell::default();
    T::deserialize(Tracer { path: String::new(), found: &found }).map(drop).expect("every type takes its own fields");
    found.into_inner()
}

type Error = serde::de::value::Error;

/// Gives every type what it asks for, each list and map one item, and notes what that was.
struct Tracer<'f> {
    path: String,
    found: &'f RefCell<Shape>,
}

impl Tracer<'_> {
    fn note(&self, what: impl Into<String>) {
        self.found.borrow_mut().insert(self.path.clone(), what.into());
    }

    fn below(&self, step: &str) -> Self {
        let dot = if self.path.is_empty() || step.is_empty() || step.starts_with(['[', '{']) { "" } else { "." };
        Self { path: format!("{}{dot}{step}", self.path), found: self.found }
    }

    fn number<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.note("number");
        visitor.visit_u8(1)
    }
}

impl<'de> Deserializer<'de> for Tracer<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        panic!("{}: a type that takes anything says nothing of its fields", self.path)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.note("anything");
        visitor.visit_unit()
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.note("bool");
        visitor.visit_bool(true)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.note("text");
        visitor.visit_str("x")
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.note("list");
        visitor.visit_seq(Items { item: Some(self.below("[]")) })
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.note("map");
        visitor.visit_map(Entries { tracer: self.below("{}"), keys: ["x"].iter(), step: Step::Same })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.note("object");
        for field in unread::unread(name) {
            self.below(field).note("unread");
        }
        visitor.visit_map(Entries { tracer: self, keys: fields.iter(), step: Step::ByKey })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.note(words(variants));
        let word: StrDeserializer<'_, Error> = variants[0].into_deserializer();
        visitor.visit_enum(word)
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i128 u8 u16 u64 u128 f32 f64 char bytes byte_buf unit unit_struct newtype_struct tuple tuple_struct
        identifier
    }
}

/// How a set of words is noted.
pub(crate) fn words(words: &[&str]) -> String {
    let mut words = words.to_vec();
    words.sort_unstable();
    words.join("|")
}

struct Items<'f> {
    item: Option<Tracer<'f>>,
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        self.item.take().map(|item| seed.deserialize(item)).transpose()
    }
}

struct Entries<'f> {
    tracer: Tracer<'f>,
    keys: std::slice::Iter<'static, &'static str>,
    step: Step,
}

/// Where the value of a key is noted.
enum Step {
    /// At the path of the map's values.
    Same,
    /// Below, by the key.
    ByKey,
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some(key) = self.keys.as_slice().first() else { return Ok(None) };
        let key: StrDeserializer<'_, Error> = (*key).into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let key = self.keys.next().expect("a value follows its key, by serde's contract");
        seed.deserialize(match self.step {
            Step::Same => self.tracer.below(""),
            Step::ByKey => self.tracer.below(key),
        })
    }
}
