//! Workload discovery: `istio.workload.Address` and `istio.security.Authorization` to and from `mesh-core`.
//!
//! What a resource means is decided here once for both ends. Encoding is canonical: equal values give equal bytes, and
//! a resource's version is a hash of them. Decoding is lenient where a newer sender can only make us choose worse
//! (load balancing, telemetry) and strict where it could make us let in what it meant to keep out: an Authorization
//! with a field or a value that we do not know is refused ([`decode_authorization`]), so that the last good version
//! stays in force and the sender learns of it. Whom a refused one concerns may still be told ([`scope_of_refused`]).

mod address;
mod authorization;
mod unknown;

use bytes::Bytes;
use mesh_core::snapshot::Change;
use mesh_core::workload::{ServiceName, WorkloadUid};
use prost::Message;
use sha2::{Digest, Sha256};

use crate::proto::workload::{Address, address::Type};
use crate::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};

pub use address::{decode_address, service_from_proto, service_to_proto, workload_from_proto, workload_to_proto};
pub use authorization::{decode_authorization, policy_from_proto, policy_to_proto, scope_of_refused};

/// Largest resource that is decoded. A service with 1,000 ports takes 20 KiB, a policy with 10,000 principals 1 MiB.
pub const RESOURCE_MAX_BYTES: usize = 4 << 20;

/// Hexadecimal digits of a version: 64 bits, so that two contents of one resource do not meet by chance.
const VERSION_DIGITS: usize = 16;

/// Why a resource is refused. The sender's fault; sending it again does not help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not a message of the type.
    #[error("not a valid message: {0}")]
    Malformed(String),
    /// Longer than [`RESOURCE_MAX_BYTES`].
    #[error("{0} bytes are too many for one resource")]
    TooLarge(usize),
    /// A field or value that this version does not know, in a message where that may change who is let in.
    #[error("{path}: unknown {what}; a newer control plane may mean less than we would allow")]
    Unknown {
        /// Where, e.g. `rules.clauses.matches`.
        path: String,
        /// What, e.g. `field 14`.
        what: String,
    },
    /// A value that cannot be meant.
    #[error("{field}: {reason}")]
    Invalid {
        /// Field path.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// A change as it goes over a delta stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// [`ADDRESS_TYPE_URL`] or [`AUTHORIZATION_TYPE_URL`].
    pub type_url: &'static str,
    /// Workload uid, `namespace/hostname` or `namespace/policy`.
    pub name: String,
    /// None: removed.
    pub content: Option<Content>,
}

/// A resource's body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// Hash of the bytes.
    pub version: String,
    /// The encoded message.
    pub bytes: Bytes,
}

/// Encodes a change.
pub fn encode(change: &Change) -> Resource {
    let address = |kind| Address { r#type: Some(kind) }.encode_to_vec();
    let (type_url, name, bytes) = match change {
        Change::UpsertWorkload(w) => {
            (ADDRESS_TYPE_URL, w.uid.to_string(), Some(address(Type::Workload(workload_to_proto(w)))))
        }
        Change::UpsertService(s) => {
            (ADDRESS_TYPE_URL, s.key.to_string(), Some(address(Type::Service(service_to_proto(s)))))
        }
        Change::UpsertPolicy(p) => {
            (AUTHORIZATION_TYPE_URL, p.name.to_string(), Some(policy_to_proto(p).encode_to_vec()))
        }
        Change::RemoveWorkload(uid) => (ADDRESS_TYPE_URL, uid.to_string(), None),
        Change::RemoveService(key) => (ADDRESS_TYPE_URL, key.to_string(), None),
        Change::RemovePolicy(name) => (AUTHORIZATION_TYPE_URL, name.to_string(), None),
    };
    Resource { type_url, name, content: bytes.map(|b| Content { version: version(&b), bytes: b.into() }) }
}

/// Decodes a resource of either type.
pub fn decode(type_url: &str, bytes: &[u8]) -> Result<Change, WireError> {
    match type_url {
        ADDRESS_TYPE_URL => decode_address(bytes),
        AUTHORIZATION_TYPE_URL => decode_authorization(bytes),
        other => Err(WireError::Malformed(format!("type {other} is not known"))),
    }
}

/// What the removal of a resource may mean. The name of an Address does not say whether it is a workload or a service;
/// removing what is not there changes nothing, so both are given.
pub fn removal(type_url: &str, name: &str) -> Vec<Change> {
    match type_url {
        ADDRESS_TYPE_URL => std::iter::once(Change::RemoveWorkload(WorkloadUid(name.into())))
            .chain(service_name(name).map(Change::RemoveService))
            .collect(),
        AUTHORIZATION_TYPE_URL => authorization::policy_name(name).map(Change::RemovePolicy).into_iter().collect(),
        // Nothing of another type was ever accepted.
        _ => Vec::new(),
    }
}

/// Content hash of an encoded resource.
pub fn version(bytes: &[u8]) -> String {
    let mut hex = String::with_capacity(VERSION_DIGITS);
    for byte in &Sha256::digest(bytes)[..VERSION_DIGITS / 2] {
        hex.push(char::from_digit(u32::from(byte >> 4), 16).unwrap_or('0'));
        hex.push(char::from_digit(u32::from(byte & 15), 16).unwrap_or('0'));
    }
    hex
}

fn message<M: Message + Default>(bytes: &[u8]) -> Result<M, WireError> {
    if bytes.len() > RESOURCE_MAX_BYTES {
        return Err(WireError::TooLarge(bytes.len()));
    }
    M::decode(bytes).map_err(|e| WireError::Malformed(e.to_string()))
}

fn service_name(name: &str) -> Option<ServiceName> {
    let (namespace, hostname) = name.split_once('/')?;
    let whole = !namespace.is_empty() && !hostname.is_empty() && !hostname.contains('/');
    whole.then(|| ServiceName { namespace: namespace.into(), hostname: hostname.into() })
}

fn invalid(field: &'static str, reason: impl Into<String>) -> WireError {
    WireError::Invalid { field, reason: reason.into() }
}
