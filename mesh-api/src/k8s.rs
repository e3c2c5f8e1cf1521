//! Kubernetes and Istio objects as people write them, and their conversion to the compiler's inputs.
//!
//! Serde types hold the fields that the mesh reads; [`unread`] names those that exist besides, so that a misspelt
//! field is found. A kind is recognised by its group and name; every version in use of it is read alike.

mod core;
mod istio;
mod meta;
mod service;
mod unread;

use std::sync::Arc;

use mesh_core::config::objects::{Kind, Object, ObjectKey, Origin};
use serde::de::DeserializeOwned;

use crate::yaml::{FieldError, Node, Unknown, Value, read};

/// Depth to which a List may hold Lists.
const MAX_LIST_DEPTH: u32 = 4;

/// What became of one object of a file.
#[derive(Debug, Clone, PartialEq)]
pub enum Item {
    /// To be compiled.
    Object(Box<Object>),
    /// A kind that is known and has no effect here.
    Inert(Finding),
    /// Not to be used.
    Rejected(Finding),
}

/// What is wrong with an object, or why it does nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What kind of fault.
    pub reason: Reason,
    /// Which object it is, as far as that could be read.
    pub suspect: Suspect,
    /// `Kind namespace/name` for people, as far as it could be read.
    pub object: String,
    /// Where.
    pub error: FieldError,
}

/// Which object a document means that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Suspect {
    /// This one.
    Key(ObjectKey),
    /// Some object of this namespace and name: the kind is not readable, perhaps misspelt.
    Named {
        /// Namespace; `default` where none is given.
        namespace: String,
        /// Name.
        name: String,
    },
    /// Any.
    Unknown,
}

/// Kinds of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// A field that is unknown, missing, of the wrong type or out of range.
    Field,
    /// `apiVersion` or `kind` that the mesh does not know.
    Kind,
    /// A kind that needs a Kubernetes controller to mean anything, or that the mesh never reads.
    Inert,
}

/// Reads all objects of a document: one, or those of a List.
pub fn items(document: &Node, file: &Arc<str>) -> Vec<Item> {
    let mut found = Vec::new();
    collect(document, file, "", 0, &mut found);
    found
}

/// Reads an object that an API server holds.
///
/// Fields of Kubernetes' own kinds that are not known are passed over: the server is newer, and nothing of them would be
/// read. Of Istio's kinds they are refused all the same: a condition that is passed over makes a rule say more than it does.
pub fn from_api_server(object: serde_json::Value) -> Item {
    let node = Node::from(object);
    let is_istios = node.text("apiVersion").is_some_and(|version| version.contains(".istio.io/"));
    let unknown = if is_istios { Unknown::Refused(unread::unread) } else { Unknown::Ignored };
    read_object(&node, &Arc::from(""), "", unknown)
}

fn collect(node: &Node, file: &Arc<str>, path: &str, depth: u32, found: &mut Vec<Item>) {
    let kind = node.text("kind").unwrap_or_default();
    if !kind.ends_with("List") {
        found.push(object(node, file, path));
        return;
    }
    let Some(Value::List(children)) = node.get("items").map(|items| &items.value) else {
        found.push(reject(node, path, Reason::Field, FieldError::new("items", "a List needs a list of `items`")));
        return;
    };
    for (index, child) in children.iter().enumerate() {
        let path = format!("{path}items[{index}].");
        if depth == MAX_LIST_DEPTH {
            found.push(reject(child, &path, Reason::Field, FieldError::new("", "Lists are nested too deeply")));
            return;
        }
        collect(child, file, &path, depth + 1, found);
    }
}

fn object(node: &Node, file: &Arc<str>, path: &str) -> Item {
    read_object(node, file, path, Unknown::Refused(unread::unread))
}

fn read_object(node: &Node, file: &Arc<str>, path: &str, unknown: Unknown) -> Item {
    let kind = match classify(node) {
        Ok(Recognised::Read(kind)) => kind,
        Ok(Recognised::Inert(why)) => {
            let finding = finding(node, path, Reason::Inert, FieldError::new("kind", why));
            return Item::Inert(finding);
        }
        Err((reason, error)) => return reject(node, path, reason, error),
    };
    match convert(kind, node, file, unknown) {
        Ok(object) => Item::Object(Box::new(object)),
        Err(error) => reject(node, path, Reason::Field, error),
    }
}

fn reject(node: &Node, path: &str, reason: Reason, error: FieldError) -> Item {
    Item::Rejected(finding(node, path, reason, error))
}

fn finding(node: &Node, path: &str, reason: Reason, mut error: FieldError) -> Finding {
    if error.line == 0 {
        error.line = node.line_of(&error.path);
    }
    error.path.insert_str(0, path);
    let suspect = suspect(node);
    let object = match &suspect {
        Suspect::Key(key) => key.to_string(),
        Suspect::Named { .. } | Suspect::Unknown => describe(node),
    };
    Finding { reason, suspect, object, error }
}

/// The key that an object would have, whatever else is wrong with it.
fn suspect(node: &Node) -> Suspect {
    let metadata = node.get("metadata");
    let part = |key| metadata.and_then(|m| m.text(key));
    let Some(name) = part("name") else { return Suspect::Unknown };
    let namespace = part("namespace").unwrap_or(meta::DEFAULT_NAMESPACE);
    match classify(node) {
        Ok(Recognised::Read(kind)) => {
            Suspect::Key(ObjectKey::new(kind, if kind.is_cluster_wide() { "" } else { namespace }, name))
        }
        Ok(Recognised::Inert(_)) | Err(_) => Suspect::Named { namespace: namespace.into(), name: name.into() },
    }
}

fn describe(node: &Node) -> String {
    let kind = node.text("kind").unwrap_or_default();
    let metadata = node.get("metadata");
    let part = |key| metadata.and_then(|m| m.text(key)).unwrap_or_default();
    let name = match (part("namespace"), part("name")) {
        ("", name) => name.to_owned(),
        (namespace, name) => format!("{namespace}/{name}"),
    };
    format!("{kind} {name}").trim().chars().take(MAX_DESCRIPTION_CHARS).collect()
}

/// Characters of a description that come from the file.
const MAX_DESCRIPTION_CHARS: usize = 400;

enum Recognised {
    Read(Kind),
    Inert(String),
}

fn classify(node: &Node) -> Result<Recognised, (Reason, FieldError)> {
    let Value::Map(_) = node.value else {
        return Err((
            Reason::Field,
            FieldError::new("", "the document is not an object").hint("write apiVersion, kind, metadata and spec"),
        ));
    };
    let (Some(version), Some(kind)) = (node.text("apiVersion"), node.text("kind")) else {
        let missing = if node.text("kind").is_none() { "kind" } else { "apiVersion" };
        let error = FieldError::new(missing, format!("`{missing}` is missing or is not text"));
        return Err((Reason::Field, error.hint("every object says its apiVersion and kind")));
    };
    let (group, release) = version.rsplit_once('/').unwrap_or(("", version));
    let read = |kind, releases: &[&str]| {
        if releases.contains(&release) {
            return Ok(Recognised::Read(kind));
        }
        let error =
            FieldError::new("apiVersion", format!("`{version}` is not a version of {} that is read", kind.as_str()));
        Err((Reason::Kind, error.hint(format!("use one of: {}", releases.join(", ")))))
    };
    match (group, kind) {
        ("", "Namespace") => read(Kind::Namespace, &["v1"]),
        ("", "Node") => read(Kind::Node, &["v1"]),
        ("", "Pod") => read(Kind::Pod, &["v1"]),
        ("", "Service") => read(Kind::Service, &["v1"]),
        ("", "ServiceAccount") => read(Kind::ServiceAccount, &["v1"]),
        ("discovery.k8s.io", "EndpointSlice") => read(Kind::EndpointSlice, &["v1", "v1beta1"]),
        ("networking.istio.io", "WorkloadEntry") => read(Kind::WorkloadEntry, &["v1", "v1beta1", "v1alpha3"]),
        ("security.istio.io", "PeerAuthentication") => read(Kind::PeerAuthentication, &["v1", "v1beta1"]),
        ("security.istio.io", "AuthorizationPolicy") => read(Kind::AuthorizationPolicy, &["v1", "v1beta1"]),
        _ => unread_kind(group, kind),
    }
}

fn unread_kind(group: &str, kind: &str) -> Result<Recognised, (Reason, FieldError)> {
    let runs_pods = matches!(
        (group, kind),
        ("apps", "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet")
            | ("batch", "Job" | "CronJob")
            | ("", "ReplicationController")
    );
    if runs_pods {
        return Ok(Recognised::Inert(format!(
            "{kind} is accepted, but a configuration directory runs no controllers: it starts no pods by itself"
        )));
    }
    if unread::INERT_KINDS.contains(&(group, kind)) {
        return Ok(Recognised::Inert(format!("{kind} is accepted; the mesh does not read it")));
    }
    let known = unread::UNSERVED_KINDS.contains(&(group, kind));
    let (message, hint) = if known {
        (format!("{kind} ({group}) is not implemented: it has no effect"), "remove it, or expect nothing of it")
    } else {
        (format!("the kind `{kind}` of group `{group}` is not known"), "check apiVersion and kind for spelling")
    };
    Err((Reason::Kind, FieldError::new("kind", message).hint(hint)))
}

/// Kinds that share apiVersion, kind and metadata with every other.
trait Convert: DeserializeOwned {
    fn metadata(&mut self) -> meta::Metadata;
    fn convert(self, meta: mesh_core::config::objects::Meta) -> Result<Object, FieldError>;
}

fn convert(kind: Kind, node: &Node, file: &Arc<str>, unknown: Unknown) -> Result<Object, FieldError> {
    let origin = Origin { file: file.clone(), line: node.line };
    match kind {
        Kind::Namespace => convert_as::<core::Namespace>(kind, node, origin, unknown),
        Kind::Node => convert_as::<core::Node>(kind, node, origin, unknown),
        Kind::Pod => convert_as::<core::Pod>(kind, node, origin, unknown),
        Kind::ServiceAccount => convert_as::<core::ServiceAccount>(kind, node, origin, unknown),
        Kind::Service => convert_as::<service::Service>(kind, node, origin, unknown),
        Kind::EndpointSlice => convert_as::<service::EndpointSlice>(kind, node, origin, unknown),
        Kind::WorkloadEntry => convert_as::<istio::WorkloadEntry>(kind, node, origin, unknown),
        Kind::PeerAuthentication => convert_as::<istio::PeerAuthentication>(kind, node, origin, unknown),
        Kind::AuthorizationPolicy => convert_as::<istio::AuthorizationPolicy>(kind, node, origin, unknown),
    }
}

fn convert_as<T: Convert>(kind: Kind, node: &Node, origin: Origin, unknown: Unknown) -> Result<Object, FieldError> {
    let mut wire: T = read(node, unknown)?;
    let meta = wire.metadata().into_meta(kind, origin)?;
    wire.convert(meta)
}

#[cfg(test)]
pub(crate) mod shape;
#[cfg(test)]
mod tests;
