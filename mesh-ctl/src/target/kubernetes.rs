//! The mesh of a Kubernetes cluster: which pods its parts are, through the API server that a kubeconfig names.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Container, Node as ClusterNode, Pod};
use kube::api::ListParams;
use kube::client::UpgradeConnectionError;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Api, Client, Config, ResourceExt};

use super::door::Door;
use super::pod::PodDoor;
use super::{AccessLog, Mesh, Node};
use crate::cli::Global;
use crate::exit::{BadInput, Forbidden, NoMesh, Unavailable};

/// A list may take this long, connecting included.
const LIST_WITHIN: Duration = Duration::from_secs(15);
/// The mesh's own namespace.
pub const ROOT_NAMESPACE: &str = "istio-system";
/// In a pod of the cluster this names the API server.
const IN_CLUSTER: &str = "KUBERNETES_SERVICE_HOST";

/// A part of the mesh, as the chart names it.
struct Part {
    /// Value of the label `app`.
    app: &'static str,
    container: &'static str,
    program: &'static str,
}

const PROXY: Part = Part { app: "mesh-node", container: "node-proxy", program: "/bin/mesh-node" };
const CONTROLLER: Part = Part { app: "mesh-controller", container: "controller", program: "/bin/mesh-controller" };

/// A client, and the namespace of the context; none if nothing names a cluster.
///
/// # Errors
/// The kubeconfig cannot be used.
pub(crate) async fn client(global: &Global) -> Result<Option<(Client, String)>> {
    let bad = |error: KubeconfigError| anyhow!(BadInput(format!("kubeconfig: {:#}", anyhow::Error::from(error))));
    let options = KubeConfigOptions { context: global.context.clone(), ..KubeConfigOptions::default() };
    let kubeconfig = match &global.kubeconfig {
        Some(path) => Some(Kubeconfig::read_from(path).map_err(bad)?),
        None => match Kubeconfig::read() {
            Ok(kubeconfig) => Some(kubeconfig),
            Err(KubeconfigError::FindPath) => None,
            Err(KubeconfigError::ReadConfig(error, _)) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(bad(error)),
        },
    };
    let mut config = match kubeconfig {
        Some(kubeconfig) => Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(bad)?,
        None if global.context.is_none() && std::env::var_os(IN_CLUSTER).is_some() => {
            Config::incluster().context("this pod's service account")?
        }
        None => return Ok(None),
    };
    config.connect_timeout = Some(LIST_WITHIN);
    let namespace = config.default_namespace.clone();
    Ok(Some((Client::try_from(config).context("make a client of the API server")?, namespace)))
}

/// The mesh that the API server knows.
///
/// # Errors
/// There is none, the API server does not answer, or this user may not see it.
pub(super) async fn find(global: &Global, (client, namespace): (Client, String)) -> Result<Mesh> {
    let root = global.istio_namespace.as_str();
    let pods = Api::<Pod>::namespaced(client.clone(), root);
    let (listed, wanted) = tokio::join!(list(&pods, root), wanted_nodes(&client, root));
    let listed = listed?;
    if listed.is_empty() {
        let none = format!("no mesh in namespace {root} of the cluster: there are no pods of it; -i names another");
        return Err(anyhow!(NoMesh(none)));
    }
    let mut proxies = one_a_node(&listed);
    let wanted = wanted.unwrap_or_else(|error| {
        eprintln!("mesh-ctl: {error:#}: a node that has no node proxy is not named");
        Vec::new()
    });
    let absent = wanted.into_iter().filter(|node| !proxies.contains_key(node)).collect::<Vec<_>>();
    proxies.extend(absent.into_iter().map(|node| (node, None)));
    let nodes = proxies.into_iter().map(|(name, pod)| Node {
        name: Some(name),
        proxy: pod.map(ResourceExt::name_any),
        door: pod.map_or_else(|| Door::Shut("it has no pod of the node proxy".into()), |pod| door(&pods, pod, &PROXY)),
        access_log: if pod.is_some() { AccessLog::Container } else { AccessLog::Unknown },
    });
    let mut controllers: Vec<_> = of_part(&listed, &CONTROLLER).map(|pod| door(&pods, pod, &CONTROLLER)).collect();
    if controllers.is_empty() {
        controllers.push(Door::Shut(format!("namespace {root} has no pod of it")));
    }
    Ok(Mesh { nodes: nodes.collect(), controllers, namespace })
}

async fn list(pods: &Api<Pod>, root: &str) -> Result<Vec<Pod>> {
    let apps = format!("app in ({},{})", PROXY.app, CONTROLLER.app);
    let parameters = ListParams::default().labels(&apps);
    let doing = format!("list pods in namespace {root}");
    within(pods.list(&parameters), &doing).await.map(|list| list.items)
}

/// Nodes on which the DaemonSet wants a pod.
async fn wanted_nodes(client: &Client, root: &str) -> Result<Vec<String>> {
    let sets = Api::<DaemonSet>::namespaced(client.clone(), root);
    let doing = format!("get daemonset {} in namespace {root}", PROXY.app);
    let set = within(sets.get_opt(PROXY.app), &doing).await?;
    let nodes = Api::<ClusterNode>::all(client.clone());
    let parameters = ListParams::default();
    let nodes = within(nodes.list_metadata(&parameters), "list nodes").await?;
    let Some(set) = set else { return Ok(Vec::new()) };
    let wants = |node: &BTreeMap<String, String>| wants(&set, node);
    Ok(nodes.items.into_iter().filter(|node| wants(node.labels())).map(|node| node.name_any()).collect())
}

/// Whether a DaemonSet wants a pod on a node with these labels. By affinity it may want fewer nodes than can be told here: then
/// none is missed.
fn wants(set: &DaemonSet, labels: &BTreeMap<String, String>) -> bool {
    let Some(pod) = set.spec.as_ref().and_then(|spec| spec.template.spec.as_ref()) else { return false };
    let selector = pod.node_selector.iter().flatten();
    pod.affinity.is_none() && selector.into_iter().all(|(key, value)| labels.get(key) == Some(value))
}

async fn within<T>(request: impl Future<Output = kube::Result<T>>, doing: &str) -> Result<T> {
    match tokio::time::timeout(LIST_WITHIN, request).await {
        Ok(answer) => answer.map_err(|error| explain(error, doing)),
        Err(_) => Err(anyhow!(Unavailable(format!("cannot {doing}: the API server says nothing for {LIST_WITHIN:?}")))),
    }
}

/// What an error of the API server means for whoever runs this program.
pub(crate) fn explain(error: kube::Error, doing: &str) -> anyhow::Error {
    let by_code = |code: u16, message: &str| match code {
        401 => anyhow!(Forbidden(format!("cannot {doing}: the API server does not know this user ({message})"))),
        403 => anyhow!(Forbidden(format!(
            "not permitted to {doing}: {message}. docs/kubernetes.md has the rights that mesh-ctl needs"
        ))),
        _ => anyhow!(Unavailable(format!("cannot {doing}: {message}"))),
    };
    match error {
        kube::Error::Api(status) => by_code(status.code, &status.message),
        kube::Error::UpgradeConnection(UpgradeConnectionError::ProtocolSwitch(code)) => {
            by_code(code.as_u16(), &format!("the API server answers {code}"))
        }
        // Nobody answered, or not as an API server does.
        other => anyhow!(Unavailable(format!("cannot {doing}: {:#}", anyhow::Error::from(other)))),
    }
}

fn of_part<'a>(pods: &'a [Pod], part: &Part) -> impl Iterator<Item = &'a Pod> {
    let app = part.app;
    pods.iter().filter(move |pod| pod.labels().get("app").is_some_and(|value| value == app))
}

/// The node proxy's pod of each node: while one replaces another, the one that can be asked.
fn one_a_node(pods: &[Pod]) -> BTreeMap<String, Option<&Pod>> {
    let mut proxies: BTreeMap<String, Option<&Pod>> = BTreeMap::new();
    for pod in of_part(pods, &PROXY) {
        let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) else { continue };
        let kept = proxies.entry(node).or_default();
        if kept.is_none_or(|kept| rank(pod) > rank(kept)) {
            *kept = Some(pod);
        }
    }
    proxies
}

/// The larger, the better it answers.
fn rank(pod: &Pod) -> impl PartialOrd + use<> {
    let deleted = pod.metadata.deletion_timestamp.is_some();
    (why_not_running(pod, &PROXY).is_none(), !deleted, pod.metadata.creation_timestamp.as_ref().map(|time| time.0))
}

fn door(pods: &Api<Pod>, pod: &Pod, part: &Part) -> Door {
    let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
    if let Some(why) = why_not_running(pod, part) {
        return Door::Shut(format!("pod {namespace}/{name}: {why}"));
    }
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let container = containers.into_iter().find(|container| container.name == part.container);
    let Some(socket) = container.and_then(admin_socket) else {
        return Door::Shut(format!("pod {namespace}/{name}: its arguments name no admin socket"));
    };
    let program = container.and_then(|c| c.command.as_ref()?.first().cloned()).unwrap_or(part.program.to_owned());
    let command = vec![program, "admin".to_owned(), format!("--admin-socket={socket}")];
    Door::Pod(Box::new(PodDoor::new(pods.clone(), (&namespace, &name), part.container, command)))
}

/// Why nothing can be started in its container; none if it runs.
fn why_not_running(pod: &Pod, part: &Part) -> Option<String> {
    let status = pod.status.as_ref();
    let phase = status.and_then(|status| status.phase.clone()).unwrap_or_else(|| "it has no status".to_owned());
    let containers = status.and_then(|status| status.container_statuses.as_ref()).into_iter().flatten();
    let state = containers.into_iter().find(|c| c.name == part.container).and_then(|c| c.state.as_ref());
    let Some(state) = state else { return Some(phase) };
    if state.running.is_some() {
        return None;
    }
    let waiting = state.waiting.as_ref().map(|w| (w.reason.clone(), w.message.clone()));
    let ended = state.terminated.as_ref().map(|t| (t.reason.clone(), t.message.clone()));
    let (reason, message) = waiting.or(ended).unwrap_or_default();
    let said: Vec<String> = reason.into_iter().chain(message).collect();
    let said = if said.is_empty() { phase } else { said.join(": ") };
    Some(format!("container {} does not run: {said}", part.container))
}

/// Where a container's admin socket is, by its arguments.
fn admin_socket(container: &Container) -> Option<String> {
    let arguments = container.command.iter().chain(&container.args).flatten().collect::<Vec<_>>();
    let value = |flag: &str| {
        let joined = arguments.iter().find_map(|word| word.strip_prefix(flag)?.strip_prefix('='));
        let apart = arguments.iter().position(|word| *word == flag).and_then(|at| arguments.get(at + 1));
        joined.map(str::to_owned).or_else(|| apart.map(ToString::to_string))
    };
    value("--admin-socket").or_else(|| value("--state-dir").map(|dir| format!("{dir}/admin.sock")))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(name: &str, node: &str, container: &Value) -> Pod {
        let pod = json!({
            "metadata": {"name": name, "namespace": "istio-system", "labels": {"app": "mesh-node"},
                         "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"nodeName": node, "containers": [{"name": "node-proxy", "args": ["run", "--admin-socket=/a.sock"]}]},
            "status": {"phase": "Running", "containerStatuses": [{
                "name": "node-proxy", "ready": true, "image": "", "imageID": "", "restartCount": 0, "state": container}]},
        });
        serde_json::from_value(pod).expect("a pod")
    }

    fn running() -> Value {
        json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}})
    }

    #[test]
    fn while_a_pod_replaces_another_the_one_that_can_be_asked_is() {
        let mut leaving = pod("leaving", "n1", &running());
        let stamp = serde_json::from_value(json!("2026-01-02T00:00:00Z")).expect("a time");
        leaving.metadata.deletion_timestamp = Some(stamp);
        let starting = pod("starting", "n1", &json!({"waiting": {"reason": "ContainerCreating"}}));
        let fresh = pod("fresh", "n1", &running());
        let mut foreign = pod("foreign", "n2", &running());
        foreign.metadata.labels = Some([("app".to_owned(), "other".to_owned())].into());
        let chosen = |pods: &[Pod]| {
            let found = one_a_node(pods).into_iter();
            found.map(|(node, pod)| format!("{node}={}", pod.map(ResourceExt::name_any).unwrap_or_default())).collect()
        };
        let chosen: [Vec<String>; 4] = [
            chosen(&[leaving.clone(), starting.clone()]),
            chosen(&[starting.clone(), leaving.clone()]),
            chosen(&[fresh.clone(), leaving, starting.clone(), pod("b", "n3", &running())]),
            chosen(&[starting, foreign]),
        ];
        assert_eq!(chosen[..2], [["n1=leaving"], ["n1=leaving"]]);
        assert_eq!(chosen[2], ["n1=fresh", "n3=b"]);
        assert_eq!(chosen[3], ["n1=starting"]);
    }

    #[test]
    fn a_container_that_does_not_run_says_why() {
        let why = |state: Value| why_not_running(&pod("p", "n", &state), &PROXY);
        assert_eq!(why(running()), None);
        let waiting = json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}});
        assert_eq!(why(waiting).as_deref(), Some("container node-proxy does not run: CrashLoopBackOff: back-off 10s"));
        let ended = json!({"terminated": {"exitCode": 78, "reason": "Error"}});
        assert_eq!(why(ended).as_deref(), Some("container node-proxy does not run: Error"));
        let mut bare = pod("p", "n", &running());
        bare.status = Some(serde_json::from_value(json!({"phase": "Pending"})).expect("a status"));
        assert_eq!(why_not_running(&bare, &PROXY).as_deref(), Some("Pending"));
    }

    #[test]
    fn arguments_name_the_admin_socket() {
        let socket = |args: &[&str]| {
            let container = json!({"name": "c", "command": ["/bin/x"], "args": args});
            admin_socket(&serde_json::from_value(container).expect("a container"))
        };
        assert_eq!(socket(&["run", "--admin-socket=/run/a.sock"]).as_deref(), Some("/run/a.sock"));
        assert_eq!(socket(&["run", "--admin-socket", "/run/b.sock"]).as_deref(), Some("/run/b.sock"));
        assert_eq!(socket(&["run", "--state-dir=/var/lib/mesh"]).as_deref(), Some("/var/lib/mesh/admin.sock"));
        assert_eq!(socket(&["run", "--admin-socket"]), None);
        assert_eq!(socket(&["run"]), None);
    }

    #[test]
    fn a_node_is_missed_only_where_the_daemonset_wants_it() {
        let set = |spec: Value| -> DaemonSet {
            let spec = json!({"selector": {}, "template": {"spec": spec}});
            serde_json::from_value(json!({"spec": spec})).expect("a daemonset")
        };
        let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let linux: BTreeMap<String, String> = labels(&[("os", "linux"), ("zone", "a")]);
        assert!(wants(&set(json!({"containers": []})), &linux));
        assert!(wants(&set(json!({"containers": [], "nodeSelector": {"os": "linux"}})), &linux));
        assert!(!wants(&set(json!({"containers": [], "nodeSelector": {"os": "linux"}})), &labels(&[])));
        assert!(!wants(&set(json!({"containers": [], "affinity": {"nodeAffinity": {}}})), &linux));
    }

    #[test]
    fn refusals_and_silence_have_their_own_exit_codes() {
        let api = |code: u16| {
            let status = json!({"status": "Failure", "message": "because", "reason": "R", "code": code});
            kube::Error::Api(serde_json::from_value(status).expect("a status"))
        };
        let switch = |code| kube::Error::UpgradeConnection(UpgradeConnectionError::ProtocolSwitch(code));
        for (error, code) in [
            (api(403), crate::exit::NOT_PERMITTED),
            (api(401), crate::exit::NOT_PERMITTED),
            (api(404), crate::exit::UNAVAILABLE),
            (api(500), crate::exit::UNAVAILABLE),
            (switch(http::StatusCode::FORBIDDEN), crate::exit::NOT_PERMITTED),
            (switch(http::StatusCode::BAD_GATEWAY), crate::exit::UNAVAILABLE),
        ] {
            let text = format!("{error}");
            let explained = explain(error, "list pods");
            assert_eq!(crate::exit::code(&explained), code, "{text}");
            assert!(explained.to_string().contains("list pods"), "{explained}");
        }
    }
}
