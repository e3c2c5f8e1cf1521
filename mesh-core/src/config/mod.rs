//! From Kubernetes and Istio objects to workloads, services and policies.
//!
//! [`Compiler::compile`] takes the next step of the configuration and answers with the changes that follow from it and
//! with everything that is wrong. Equal inputs give equal outputs, whatever the order they came in. Not here: reading
//! YAML, watching, the wire.

pub mod authorization;
mod compiler;
mod inputs;
pub mod objects;
pub mod peer_authentication;
pub mod problem;
mod selectors;
mod services;
mod workloads;

use std::sync::Arc;

pub use compiler::{Compiled, Compiler};
pub use objects::{Delta, Kind, Object, ObjectKey, Origin};
pub use problem::{Code, Problem, Severity};
pub use workloads::{Enrolment, enrolment};

/// Mesh-wide settings. A change of these needs a new compiler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Cluster id, the first part of a pod's uid.
    pub cluster: Arc<str>,
    /// Trust domain of all identities.
    pub trust_domain: Arc<str>,
    /// Domain of service names.
    pub domain: Arc<str>,
    /// Namespace whose policies are mesh-wide.
    pub root_namespace: Arc<str>,
    /// Network of workloads that do not say (empty: the default one).
    pub network: Arc<str>,
    /// What to do with what the node proxy cannot judge.
    pub http_fields: HttpFields,
    /// What `istio.io/use-waypoint` means where no waypoint can be found.
    pub waypoints: Waypoints,
}

/// What becomes of HTTP fields (and of `notPrincipals`, `notNamespaces` under ALLOW) at the node proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HttpFields {
    /// The rule gets stricter, never looser, and a problem says so.
    #[default]
    Stricter,
    /// Exactly as upstream's control plane and node proxy do, including where they fail open.
    UpstreamBehaviour,
}

/// What `istio.io/use-waypoint` asks of clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Waypoints {
    /// Connections go through the waypoint or are refused.
    #[default]
    Required,
    /// The label is ignored (a mesh without waypoints).
    Ignored,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            cluster: "Kubernetes".into(),
            trust_domain: "cluster.local".into(),
            domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
            network: "".into(),
            http_fields: HttpFields::default(),
            waypoints: Waypoints::default(),
        }
    }
}
