//! What is asked of a cluster that is up, by kubectl and helm, and waiting for it.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, anyhow};

use super::{Cluster, report, shell, tools, watch};

/// For whatever a caller waits without a limit of its own.
pub const PATIENCE: Duration = Duration::from_secs(120);

impl Cluster {
    /// kubectl as the administrator, not started yet.
    pub fn kubectl_command(&self) -> Command {
        let mut command = Command::new(self.programs.join("kubectl"));
        command.env("KUBECONFIG", self.kubeconfig());
        command
    }

    /// Standard output of kubectl as the administrator.
    ///
    /// # Errors
    /// kubectl fails; its standard error is part of the message.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        shell::output(self.kubectl_command().args(arguments))
    }

    /// Applies manifests.
    ///
    /// # Errors
    /// They are refused.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        self.kubectl_with(&["apply", "-f", "-"], yaml)
    }

    /// As [`Self::kubectl`], with text on its standard input.
    ///
    /// # Errors
    /// kubectl fails; its standard error is part of the message.
    pub fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        shell::output_with(self.kubectl_command().args(arguments), input)
    }

    /// `kubectl wait ARGUMENTS`, such as `--for=condition=Ready pod/web`, also for what does not exist yet.
    ///
    /// # Errors
    /// It does not happen in [`PATIENCE`]; the message has the cluster's state.
    pub fn wait(&self, arguments: &[&str]) -> Result<()> {
        let what = format!("kubectl wait {}", arguments.join(" "));
        self.until(&what, || {
            shell::output(self.kubectl_command().arg("wait").args(arguments).arg("--timeout=5s")).map(Some)
        })
        .map(drop)
    }

    /// Looks until there is something.
    ///
    /// # Errors
    /// There is nothing in [`PATIENCE`]; the message has the cluster's state.
    pub fn until<T>(&self, what: &str, look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        watch::until(what, PATIENCE, look).map_err(|error| anyhow!("{error:#}\n{}", self.report()))
    }

    /// Nodes, pods, events and the logs' last lines.
    pub fn report(&self) -> String {
        self.record().map_or_else(|error| format!("{error:#}"), |record| report::of(&record))
    }

    /// Waits until the kubelet of a node that was switched on has reported. The API server takes a node for ready for 40 s
    /// after it was switched off, so that condition alone says nothing.
    ///
    /// # Errors
    /// It does not report in [`PATIENCE`]; the message has the cluster's state.
    pub fn wait_for_kubelet(&self, node: &str) -> Result<()> {
        let renewed = || {
            let lease = format!("lease/{node}");
            self.kubectl(&["-n", "kube-node-lease", "get", &lease, "-o", "jsonpath={.spec.renewTime}"])
        };
        // A kubelet that was cut off early has no lease yet.
        let before = renewed().unwrap_or_default();
        self.until(&format!("kubelet of {node} reports"), || Ok((renewed()? != before).then_some(())))?;
        self.wait(&["--for=condition=Ready", &format!("node/{node}")])
    }

    /// Standard output of helm as the administrator; builds it if it is not there.
    ///
    /// # Errors
    /// It cannot be built, or fails.
    pub fn helm(&self, arguments: &[&str]) -> Result<String> {
        let program = tools::HELM.program("helm", &mut |line| println!("{line}"))?;
        shell::output(Command::new(program).env("KUBECONFIG", self.kubeconfig()).args(arguments))
    }
}
