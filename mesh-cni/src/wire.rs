//! One line of JSON from the plugin to the agent, and one back.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The agent gives an answer within this time, be it "not yet".
pub const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// How long a pod of a namespace that is known to be outside waits for the agent, which may know better: this bridges a
/// restart of the agent.
pub const OUTSIDE_WAITS: Duration = Duration::from_secs(5);
// Whoever asks an agent that is there hears what it knows before the pod is taken for an outsider.
const _: () = assert!(ANSWER_WITHIN.as_millis() + 1000 < OUTSIDE_WAITS.as_millis());

/// Longest line in bytes, either way: names and addresses are short.
pub const MAX_LINE: u64 = 16 * 1024;

/// What the plugin says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    /// What is happening to the pod.
    pub command: Command,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// Empty where the runtime does not say it.
    #[serde(default)]
    pub uid: String,
    /// The sandbox.
    pub container: String,
    /// Path of its network namespace, on the node. Empty for a `del` of one that is gone.
    #[serde(default)]
    pub netns: String,
    /// Its addresses.
    #[serde(default)]
    pub ips: Vec<String>,
}

/// What is happening to a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Command {
    /// It has its interfaces, and no container runs yet.
    Add,
    /// Its network namespace is about to go.
    Del,
}

/// What the agent says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "lowercase", rename_all_fields = "camelCase")]
pub enum Answer {
    /// It is served, or not of the mesh.
    Proceed,
    /// Asking again does not help.
    Refused {
        /// For people.
        reason: String,
    },
    /// Not yet.
    Wait {
        /// For people.
        reason: String,
        /// It is known to belong to the mesh: nothing that was known before counts.
        #[serde(default)]
        is_member: bool,
    },
}
