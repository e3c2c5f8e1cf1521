//! `metadata`.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_core::config::objects::{Kind, Labels, Meta, Origin, Owner};
use serde::Deserialize;
use serde::de::IgnoredAny;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::yaml::FieldError;

/// Namespace of an object that names none, as kubectl has it.
pub(super) const DEFAULT_NAMESPACE: &str = "default";

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Metadata {
    name: String,
    namespace: Option<String>,
    pub(super) labels: BTreeMap<Arc<str>, Arc<str>>,
    annotations: BTreeMap<Arc<str>, Arc<str>>,
    creation_timestamp: Option<String>,
    deletion_timestamp: Option<IgnoredAny>,
    owner_references: Vec<OwnerReference>,
}

#[derive(Deserialize)]
struct OwnerReference {
    kind: Arc<str>,
    name: Arc<str>,
    #[serde(default)]
    controller: bool,
}

impl Metadata {
    pub(super) fn is_deleting(&self) -> bool {
        self.deletion_timestamp.is_some()
    }

    pub(super) fn controlling_owner(&self) -> Option<Owner> {
        let owner = self.owner_references.iter().find(|owner| owner.controller)?;
        Some(Owner { kind: owner.kind.clone(), name: owner.name.clone() })
    }

    pub(super) fn into_meta(self, kind: Kind, origin: Origin) -> Result<Meta, FieldError> {
        if !is_subdomain(&self.name) {
            let error = FieldError::new("metadata.name", format!("`{}` is not an object name", shorten(&self.name)));
            return Err(error.hint("use lower case letters, digits, `-` and `.`, at most 253"));
        }
        let namespace = self.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE);
        if !is_label(namespace) {
            let error =
                FieldError::new("metadata.namespace", format!("`{}` is not a namespace name", shorten(namespace)));
            return Err(error.hint("use lower case letters, digits and `-`, at most 63"));
        }
        let created_secs = self.creation_timestamp.as_deref().map(seconds).transpose()?.unwrap_or(0);
        Ok(Meta {
            namespace: if kind.is_cluster_wide() { "".into() } else { namespace.into() },
            name: self.name.into(),
            labels: self.labels,
            annotations: self.annotations,
            created_secs,
            origin,
        })
    }
}

fn seconds(text: &str) -> Result<u64, FieldError> {
    let parsed = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| {
        let error = FieldError::new("metadata.creationTimestamp", format!("`{}` is not a time", shorten(text)));
        error.hint("write it as 2026-01-31T12:00:00Z")
    })?;
    Ok(u64::try_from(parsed.unix_timestamp()).unwrap_or(0))
}

/// `spec.selector` with `matchLabels`.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Selector {
    pub(super) match_labels: Labels,
}

/// RFC 1123 label.
pub(super) fn is_label(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// RFC 1123 subdomain; unlike there, a part may be longer than 63, as the API server has it.
pub(super) fn is_subdomain(name: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(part)
}

/// A name that may be left out.
pub(super) fn optional_name(path: &str, name: Option<String>) -> Result<Arc<str>, FieldError> {
    let name = name.unwrap_or_default();
    if name.is_empty() || is_subdomain(&name) {
        return Ok(name.into());
    }
    let error = FieldError::new(path, format!("`{}` is not an object name", shorten(&name)));
    Err(error.hint("use lower case letters, digits, `-` and `.`, at most 253"))
}

/// A port of TCP or UDP.
pub(super) fn port(path: impl Into<String>, value: i64) -> Result<u16, FieldError> {
    u16::try_from(value).ok().filter(|port| *port != 0).ok_or_else(|| {
        FieldError::new(path, format!("{value} is not a port")).hint("a port is a number from 1 to 65535")
    })
}

/// An address without a prefix length or a zone.
pub(super) fn address(path: impl Into<String>, text: &str) -> Result<std::net::IpAddr, FieldError> {
    text.parse().map_err(|_| {
        FieldError::new(path, format!("`{}` is not an IP address", shorten(text)))
            .hint("write one IPv4 or IPv6 address")
    })
}

/// What of a value fits into a message.
pub(super) fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}
