//! The commands of the CNI specification.

use std::io::Read;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use crate::ask::{Patience, Said, ask, attempt};
use crate::call::{self, Call, Command, PodName};
use crate::config::{NEWEST_VERSION, NetworkConfig, PluginConfig, VERSIONS};
use crate::failure::{Code, Failure};
use crate::store::{Standing, Store};
use crate::wire::{self, OUTSIDE_WAITS, Request};
use crate::{journal, unasked};

/// Largest configuration in bytes.
const MAX_STDIN: u64 = 1 << 20;
/// How long the end of a pod waits for the agent, which hears of it from the API server too.
const DEL_WAITS: Duration = Duration::from_secs(1);

/// What the process does last.
#[derive(Debug, PartialEq, Eq)]
pub struct Done {
    /// For the runtime.
    pub stdout: String,
    /// 0, or 1 for a failure.
    pub exit_code: u8,
}

/// Does what the variables say.
pub fn run(variable: &dyn Fn(&str) -> Option<String>, stdin: impl Read) -> Done {
    let command = match Command::read(variable) {
        Ok(command) => command,
        Err(failure) => return failed(&failure, None),
    };
    let read = read_stdin(stdin).and_then(|bytes| NetworkConfig::parse(&bytes));
    match (command, read) {
        (Command::Version, read) => succeeded(&version(read.ok().as_ref())),
        (Command::Del, Ok(config)) => {
            del(&config.ours, variable);
            nothing()
        }
        // There is nothing that would have to be undone.
        (Command::Del, Err(_)) => nothing(),
        (Command::Add | Command::Check | Command::Gc | Command::Status, Err(failure)) => failed(&failure, None),
        (Command::Add, Ok(config)) => match add(&config, variable) {
            Ok(result) => succeeded(&result),
            Err(failure) => failed(&failure, Some(&config)),
        },
        // The plugin leaves nothing in the pod that could be checked or left over. A node whose agent is away still runs the
        // pods that are not of the mesh: as "not ready" it would lose them.
        (Command::Check | Command::Gc | Command::Status, Ok(config)) => match config.supported() {
            Ok(()) => nothing(),
            Err(failure) => failed(&failure, Some(&config)),
        },
    }
}

fn add(config: &NetworkConfig, variable: &dyn Fn(&str) -> Option<String>) -> Result<Value, Failure> {
    let started = Instant::now();
    config.supported()?;
    let result = config.result()?;
    let call = Call::read(variable)?;
    let Some(pod) = &call.pod else {
        journal::write(&config.ours.log_file, &json!({ "add": call.container, "said": "not a pod: it starts" }));
        return Ok(result);
    };
    let request = request(wire::Command::Add, &call, pod, config.ips());
    let decided = decide(&config.ours, &request, started);
    let said = match &decided {
        Ok(said) => said,
        Err(failure) => &failure.message,
    };
    let pod = format!("{}/{}", pod.namespace, pod.name);
    let ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let line = json!({ "add": pod, "uid": request.uid, "container": call.container, "said": said, "ms": ms });
    journal::write(&config.ours.log_file, &line);
    decided.map(|_| result)
}

/// Whether the pod may start; says why.
fn decide(ours: &PluginConfig, request: &Request, started: Instant) -> Result<String, Failure> {
    if ours.exclude_namespaces.contains(&request.namespace) {
        return Ok("an excluded namespace: it starts".to_owned());
    }
    let standing = Store::read(&ours.state_dir)
        .map_or(Standing::Unknown, |store| store.standing(&request.namespace, SystemTime::now()));
    let outside_at = match standing {
        Standing::Outside => Some(started + OUTSIDE_WAITS),
        Standing::Member | Standing::Unknown => None,
    };
    match ask(&ours.agent_socket, request, Patience { deadline: started + ours.wait(), outside_at }) {
        Said::Proceed => Ok("the agent: it starts".to_owned()),
        Said::OutsideAsKnown { why_not_asked } => {
            let noted = unasked::note(&ours.state_dir, request, SystemTime::now()).map_err(|error| error.to_string());
            let noted = noted.err().map_or(String::new(), |error| format!("; the agent will not hear of it: {error}"));
            Ok(format!("its namespace has had no member: it starts unasked ({why_not_asked}){noted}"))
        }
        Said::Refused(reason) => {
            let message = format!("pod {}/{} may not start: {reason}", request.namespace, request.pod);
            Err(Failure::new(Code::Refused, message, "see the log of the mesh agent on this node"))
        }
        Said::TimedOut { last } => {
            let message = format!(
                "pod {}/{} has waited {} s for the mesh: {last}",
                request.namespace,
                request.pod,
                ours.wait().as_secs()
            );
            let what_to_do = "look at the mesh agent and the node proxy of this node; the pod is tried again";
            Err(Failure::new(Code::TryAgainLater, message, what_to_do))
        }
    }
}

/// Tells the agent, if it is there. Comes again for a pod that is gone, then without its network namespace.
fn del(ours: &PluginConfig, variable: &dyn Fn(&str) -> Option<String>) {
    let text = |name: &str| variable(name).unwrap_or_default();
    let Ok(Some(pod)) = call::pod(&text("CNI_ARGS")) else { return };
    let call = Call { container: text("CNI_CONTAINERID"), netns: text("CNI_NETNS"), pod: None };
    let told =
        attempt(&ours.agent_socket, &request(wire::Command::Del, &call, &pod, Vec::new()), Instant::now() + DEL_WAITS);
    let said = told.map_or_else(|error| error.to_string(), |_| "the agent knows".to_owned());
    let pod = format!("{}/{}", pod.namespace, pod.name);
    journal::write(&ours.log_file, &json!({ "del": pod, "container": call.container, "said": said }));
}

fn request(command: wire::Command, call: &Call, pod: &PodName, ips: Vec<String>) -> Request {
    Request {
        command,
        namespace: pod.namespace.clone(),
        pod: pod.name.clone(),
        uid: pod.uid.clone(),
        container: call.container.clone(),
        netns: call.netns.clone(),
        ips,
    }
}

fn version(config: Option<&NetworkConfig>) -> Value {
    let version = config.map(|config| config.cni_version.as_str()).filter(|version| !version.is_empty());
    json!({ "cniVersion": version.unwrap_or(NEWEST_VERSION), "supportedVersions": VERSIONS })
}

fn read_stdin(stdin: impl Read) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    match stdin.take(MAX_STDIN).read_to_end(&mut bytes) {
        Ok(_) => Ok(bytes),
        Err(error) => {
            let message = format!("standard input: {error}");
            Err(Failure::new(Code::Io, message, "this program is started by a container runtime, not by hand"))
        }
    }
}

fn succeeded(value: &Value) -> Done {
    Done { stdout: format!("{value}\n"), exit_code: 0 }
}

fn nothing() -> Done {
    Done { stdout: String::new(), exit_code: 0 }
}

fn failed(failure: &Failure, config: Option<&NetworkConfig>) -> Done {
    let version = config.map(|config| config.cni_version.as_str()).filter(|version| VERSIONS.contains(version));
    Done { stdout: format!("{}\n", failure.print(version)), exit_code: 1 }
}
