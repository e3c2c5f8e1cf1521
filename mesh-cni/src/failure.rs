//! What the runtime is told when a pod may not start.

use serde::Serialize;

use crate::config::NEWEST_VERSION;

/// Codes of the CNI specification; from 100 on they are the plugin's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    IncompatibleVersion = 1,
    InvalidEnvironment = 4,
    Io = 5,
    Undecodable = 6,
    InvalidConfiguration = 7,
    TryAgainLater = 11,
    Refused = 100,
}

/// One sentence for the pod's events, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) message: String,
    pub(crate) what_to_do: String,
}

/// The order of the fields is that of the specification.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Printed<'a> {
    cni_version: &'a str,
    code: u32,
    msg: &'a str,
    details: &'a str,
}

impl Failure {
    pub(crate) fn new(code: Code, message: impl Into<String>, what_to_do: impl Into<String>) -> Self {
        Self { code, message: message.into(), what_to_do: what_to_do.into() }
    }

    /// In the version of the configuration, if that is known.
    pub(crate) fn print(&self, version: Option<&str>) -> String {
        // Runtimes show the message alone.
        let msg = format!("mesh-cni: {}: {}", self.message, self.what_to_do);
        let cni_version = version.unwrap_or(NEWEST_VERSION);
        let printed = Printed { cni_version, code: self.code as u32, msg: &msg, details: &self.what_to_do };
        serde_json::to_string(&printed).unwrap_or_default()
    }
}
