//! The plugin's part of a network configuration: what the agent writes and the plugin reads.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::failure::{Code, Failure};

/// The plugin's name in a configuration, and its file in the directory of plugins.
pub const PLUGIN: &str = "mesh-cni";
/// Versions in which a result is handed from plugin to plugin as it is: all of them since chains exist.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The newest of them.
pub const NEWEST_VERSION: &str = "1.1.0";
/// Longest wait that a configuration may ask for: kubelet gives a runtime two minutes.
const MAX_WAIT_SECS: u64 = 110;

/// Settings of the plugin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PluginConfig {
    /// The plugin's name.
    #[serde(rename = "type")]
    pub plugin: String,
    /// Unix socket of the agent.
    pub agent_socket: PathBuf,
    /// Pods of these namespaces never wait: the agent and what it needs are among them.
    pub exclude_namespaces: Vec<String>,
    /// Log of the plugin.
    pub log_file: PathBuf,
    /// Directory of what is known while the agent is away.
    pub state_dir: PathBuf,
    /// Longest time that a pod waits for the agent; then kubelet tries again.
    pub wait_secs: u64,
}

impl Default for PluginConfig {
    fn default() -> Self {
        Self {
            plugin: PLUGIN.to_owned(),
            agent_socket: "/run/mesh/cni.sock".into(),
            exclude_namespaces: vec!["kube-system".to_owned(), "istio-system".to_owned()],
            log_file: "/var/log/mesh/cni.log".into(),
            state_dir: "/var/lib/mesh/cni".into(),
            wait_secs: 90,
        }
    }
}

impl PluginConfig {
    /// Longest time that a pod waits.
    pub fn wait(&self) -> Duration {
        Duration::from_secs(self.wait_secs.min(MAX_WAIT_SECS))
    }
}

/// What a runtime gives the plugin on standard input. Fields that are not known are other plugins' or a newer runtime's.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NetworkConfig {
    #[serde(default)]
    pub(crate) cni_version: String,
    /// What the plugins before this one have made.
    pub(crate) prev_result: Option<Value>,
    #[serde(flatten)]
    pub(crate) ours: PluginConfig,
}

impl NetworkConfig {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Failure> {
        serde_json::from_slice(bytes).map_err(|error| {
            let message = format!("the network configuration cannot be read: {error}");
            Failure::new(Code::Undecodable, message, "correct the file in the CNI configuration directory")
        })
    }

    pub(crate) fn supported(&self) -> Result<(), Failure> {
        if VERSIONS.contains(&&*self.cni_version) {
            return Ok(());
        }
        let message = format!("cniVersion `{}` is not supported", self.cni_version);
        let what_to_do = format!("set one of {} in the network configuration", VERSIONS.join(", "));
        Err(Failure::new(Code::IncompatibleVersion, message, what_to_do))
    }

    /// What the plugin prints on success: the result so far, as it is.
    pub(crate) fn result(&self) -> Result<Value, Failure> {
        match &self.prev_result {
            Some(Value::Object(result)) => {
                let mut result = result.clone();
                result.insert("cniVersion".to_owned(), self.cni_version.as_str().into());
                Ok(Value::Object(result))
            }
            Some(_) | None => Err(Failure::new(
                Code::InvalidConfiguration,
                "there is no prevResult",
                "put this plugin behind the one that makes the pod's interface, in the `plugins` of a .conflist",
            )),
        }
    }

    /// Addresses of the pod, in any version.
    pub(crate) fn ips(&self) -> Vec<String> {
        let ips = self.prev_result.as_ref().and_then(|result| result.get("ips")).and_then(Value::as_array);
        let address = |ip: &Value| ip.get("address")?.as_str()?.split('/').next().map(str::to_owned);
        ips.into_iter().flatten().filter_map(address).collect()
    }
}
