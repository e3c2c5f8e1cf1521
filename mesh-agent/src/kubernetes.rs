//! The agent of a Kubernetes node: follows the node's pods and tells its node proxies which of them to serve.

mod cni;
mod known;
pub mod netns;
mod owner;
pub mod pods;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::{Stream, StreamExt, stream};
use k8s_openapi::api::core::v1;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, Resource, ResourceExt};
use mesh_api::k8s::{Item, from_api_server};
use mesh_cni::config::PluginConfig;
use mesh_core::config::Object;
use mesh_core::config::objects::{Namespace, Pod};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use self::known::{Files, Known};
pub use self::owner::Owner;
use self::pods::Pods;
use crate::{Board, alive, conflist, proxy};

/// Quiet time after which a burst of changes counts as finished.
const QUIET: Duration = Duration::from_millis(10);
/// A burst that goes on is looked at after this time all the same.
const MAX_BURST: Duration = Duration::from_millis(100);
/// First pause before a pod's network namespace is looked for again.
const LOOK_FIRST: Duration = Duration::from_millis(100);
/// Longest pause.
const LOOK_MAX: Duration = Duration::from_secs(2);
/// All namespaces are looked at again after this time: a runtime may make a pod's network anew.
const LOOK_ANYWAY: Duration = Duration::from_secs(15);
/// How long node proxies have to let go of everything when the mesh is uninstalled.
const LET_GO_WITHIN: Duration = Duration::from_secs(20);

/// What the agent is told.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of the node.
    pub node: String,
    /// Unix socket that node proxies connect to.
    pub socket: PathBuf,
    /// None: pods do not wait for the mesh when they start.
    pub cni: Option<CniOptions>,
    /// Locked as long as the agent lives ([`crate::alive`]).
    pub alive_file: Option<PathBuf>,
    /// What runs the agents: when it is deleted, the agent takes with it what it has installed. None: it never does.
    pub owner: Option<Owner>,
}

/// Where the CNI plugin and its configuration go.
#[derive(Debug, Clone)]
pub struct CniOptions {
    /// The runtime's directory of configurations.
    pub conf_dir: PathBuf,
    /// The runtime's directory of plugins; none: the plugin is there already.
    pub bin_dir: Option<PathBuf>,
    /// What the configuration tells the plugin: paths are the same for the agent and on the node.
    pub plugin: PluginConfig,
}

/// What the watches have said.
#[derive(Debug, Default)]
struct Heard {
    /// By namespace and name; with the UID.
    pods: Listed<(String, String), (String, Pod)>,
    namespaces: Listed<String, Namespace>,
}

/// Objects of one watch.
#[derive(Debug)]
struct Listed<K, V> {
    items: BTreeMap<K, V>,
    /// While a list is read anew: what was there before stays until its end.
    relisted: Option<BTreeMap<K, V>>,
    is_complete: bool,
}

impl<K, V> Default for Listed<K, V> {
    fn default() -> Self {
        Self { items: BTreeMap::new(), relisted: None, is_complete: false }
    }
}

impl<K: Ord, V> Listed<K, V> {
    /// Takes an event in; `read` gives key and value of an object, and no value of one that cannot be read.
    fn take<O>(&mut self, event: Event<O>, read: impl Fn(&O) -> (K, Option<V>)) {
        match event {
            Event::Init => self.relisted = Some(BTreeMap::new()),
            Event::InitDone => {
                self.items = self.relisted.take().unwrap_or_default();
                self.is_complete = true;
            }
            Event::Delete(object) => drop(self.items.remove(&read(&object).0)),
            Event::InitApply(object) | Event::Apply(object) => {
                if let (key, Some(value)) = read(&object) {
                    self.relisted.as_mut().unwrap_or(&mut self.items).insert(key, value);
                }
            }
        }
    }
}

impl Heard {
    fn take(&mut self, seen: Seen) {
        match seen {
            Seen::Pod(event) => self.pods.take(*event, pod),
            Seen::Namespace(event) => self.namespaces.take(*event, namespace),
            Seen::Failed(error) => tracing::warn!(%error, "a watch failed and begins anew; what is known stays"),
        }
    }
}

enum Seen {
    Pod(Box<Event<v1::Pod>>),
    Namespace(Box<Event<v1::Namespace>>),
    Failed(watcher::Error),
}

/// Runs until the process is told to end by SIGTERM or SIGINT.
///
/// # Errors
/// There is no API server, the socket cannot be made, or what was installed cannot be taken away.
pub fn run(options: Options) -> Result<()> {
    let _alive = options.alive_file.as_deref().map(alive::hold).transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(serve(options))
}

async fn serve(options: Options) -> Result<()> {
    // From the beginning: the first process of a container does not end by a signal that it has not asked for.
    let (mut terminated, mut interrupted) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let client = Client::try_default().await.context("find the API server")?;
    let owner = options.owner.clone().map(|owner| owner.watch(client.clone()));
    let node = Node::default();
    let (plugin, known) = match &options.cni {
        Some(cni) => {
            let (plugin, known) = serve_plugin(cni, client.clone(), &node)?;
            (Some(plugin), Some(known))
        }
        None => (None, None),
    };
    tokio::select! {
        result = follow(client.clone(), &options, &node, known) => return result,
        _ = terminated.recv() => {}
        _ = interrupted.recv() => return Ok(()),
    }
    // Ends. An agent that another one follows leaves everything as it is.
    let is_last = match &owner {
        Some(owner) => owner.is_gone(client).await,
        None => false,
    };
    if is_last {
        return let_go(&options, plugin, &node).await;
    }
    tracing::info!("told to end; pods of the mesh wait for the next agent");
    Ok(())
}

/// What is known of the node's pods, and what should be served.
#[derive(Default)]
struct Node {
    pods: Arc<Mutex<Pods>>,
    board: Arc<Board>,
}

/// Follows the node's pods; may be dropped at any time.
async fn follow(client: Client, options: &Options, node: &Node, mut known: Option<Known>) -> Result<()> {
    let mut seen = pin!(watches(client, &options.node));
    let mut heard = Heard::default();
    let mut listening = false;
    let mut pause = LOOK_FIRST;
    let mut look_at = Instant::now() + LOOK_ANYWAY;
    loop {
        tokio::select! {
            event = seen.next() => {
                heard.take(event.context("the watches have ended")?);
                rest_of_burst(&mut seen, |event| heard.take(event)).await;
                pause = LOOK_FIRST;
            }
            () = sleep_until(look_at) => {}
        }
        if !(heard.pods.is_complete && heard.namespaces.is_complete) {
            // What is not known yet would be taken for gone.
            look_at = Instant::now() + LOOK_ANYWAY;
            continue;
        }
        let is_settled = look(&heard, node).await?;
        look_at = Instant::now() + if is_settled { LOOK_ANYWAY } else { pause };
        pause = (pause * 2).min(LOOK_MAX);
        if let Some(known) = &mut known {
            known.follow(&node.pods).await?;
        }
        if !std::mem::replace(&mut listening, true) {
            let listener = proxy::listen(&options.socket)?;
            let (board, node) = (Arc::clone(&node.board), options.node.clone());
            let thread = std::thread::Builder::new().name("proxies".into());
            thread.spawn(move || proxy::accept(&listener, &node, &board)).context("start a thread")?;
            tracing::info!(node = options.node, socket = %options.socket.display(), "ready");
        }
    }
}

fn watches(client: Client, node: &str) -> impl Stream<Item = Seen> {
    let on_node = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    stream::select(
        watcher(Api::<v1::Pod>::all(client.clone()), on_node)
            .default_backoff()
            .map(|e| e.map_or_else(Seen::Failed, |event| Seen::Pod(Box::new(event)))),
        watcher(Api::<v1::Namespace>::all(client), watcher::Config::default())
            .default_backoff()
            .map(|e| e.map_or_else(Seen::Failed, |event| Seen::Namespace(Box::new(event)))),
    )
}

/// Takes in what comes without a pause, for a while.
async fn rest_of_burst<T>(seen: &mut (impl Stream<Item = T> + Unpin), mut take: impl FnMut(T)) {
    let until = Instant::now() + MAX_BURST;
    while Instant::now() < until {
        match timeout(QUIET, seen.next()).await {
            Ok(Some(event)) => take(event),
            Ok(None) | Err(_) => return,
        }
    }
}

/// Takes in what was heard, looks for network namespaces, and posts what should be served; whether all of them are known.
async fn look(heard: &Heard, Node { pods, board }: &Node) -> Result<bool> {
    let members = {
        let mut pods = cni::lock(pods);
        pods.set_namespaces(heard.namespaces.items.values().cloned());
        pods.set_pods(heard.pods.items.values().cloned().collect(), std::time::Instant::now());
        pods.members()
    };
    let found = tokio::task::spawn_blocking(move || netns::find(&members)).await.context("look for namespaces")?;
    // Whoever posts holds the lock: what is posted later knows more.
    let mut pods = cni::lock(pods);
    match found {
        Ok(found) => pods.found(found),
        Err(error) => tracing::error!(%error, "network namespaces of pods are not found (is this the node's /proc?)"),
    }
    board.post(pods.desired(), pods.living());
    Ok(pods.homeless().is_empty())
}

/// What serves the CNI plugin.
struct Plugin {
    answering: JoinHandle<()>,
    keeper: conflist::Keeper,
    files: Arc<Files>,
}

/// Answers the CNI plugin from now on, and only then makes runtimes start it.
fn serve_plugin(cni: &CniOptions, client: Client, node: &Node) -> Result<(Plugin, Known)> {
    let desk = cni::Desk::new(client, Arc::clone(&node.pods), Arc::clone(&node.board), cni::host_netns()?);
    let answering = tokio::spawn(cni::serve(cni::listen(&cni.plugin.agent_socket)?, Arc::new(desk)));
    if let Some(bin_dir) = &cni.bin_dir {
        conflist::install_plugin(bin_dir).context("install the CNI plugin")?;
    }
    let (conf_dir, bin_dir) = (cni.conf_dir.clone(), cni.bin_dir.clone());
    let keeper = conflist::Keeper::start(conf_dir, bin_dir, cni.plugin.clone()).context("start a thread")?;
    let files = Arc::new(Files::new(cni.plugin.state_dir.clone()));
    Ok((Plugin { answering, keeper, files: Arc::clone(&files) }, Known::read(files)))
}

/// Lets all pods go and takes away what would keep new ones waiting for ever. A file that cannot be removed keeps no pod in the
/// mesh, so its error comes last.
async fn let_go(options: &Options, plugin: Option<Plugin>, Node { pods, board }: &Node) -> Result<()> {
    tracing::info!("the mesh is uninstalled: its pods are let go");
    if let Some(plugin) = &plugin {
        plugin.answering.abort();
    }
    {
        // Requests that are being answered post nothing else any more.
        let mut pods = cni::lock(pods);
        pods.close();
        board.post(pods.desired(), pods.living());
    }
    let (board, deadline) = (Arc::clone(board), std::time::Instant::now() + LET_GO_WITHIN);
    let told = tokio::task::spawn_blocking(move || board.wait_until_told(deadline));
    let uninstalled = plugin.zip(options.cni.clone()).map(|(plugin, cni)| {
        tokio::task::spawn_blocking(move || {
            plugin.keeper.stop();
            plugin.files.close();
            conflist::uninstall(&cni.conf_dir, cni.bin_dir.as_deref(), &cni.plugin.state_dir)
        })
    });
    told.await.context("wait for the node proxies")?;
    match uninstalled {
        Some(uninstalled) => uninstalled.await.context("take the CNI plugin away")?,
        None => Ok(()),
    }
}

fn pod(pod: &v1::Pod) -> ((String, String), Option<(String, Pod)>) {
    let key = (pod.namespace().unwrap_or_default(), pod.name_any());
    match read(pod) {
        Some(Object::Pod(read)) => (key, Some((pod.uid().unwrap_or_default(), read))),
        Some(_) | None => (key, None),
    }
}

fn namespace(namespace: &v1::Namespace) -> (String, Option<Namespace>) {
    match read(namespace) {
        Some(Object::Namespace(read)) => (namespace.name_any(), Some(read)),
        Some(_) | None => (namespace.name_any(), None),
    }
}

/// As the controller reads it: both must say the same of it.
fn read<K: Resource<DynamicType = ()> + serde::Serialize>(object: &K) -> Option<Object> {
    let mut value = serde_json::to_value(object).ok()?;
    value["apiVersion"] = K::api_version(&()).into();
    value["kind"] = K::kind(&()).into();
    match from_api_server(value) {
        Item::Object(object) => Some(*object),
        Item::Rejected(finding) | Item::Inert(finding) => {
            tracing::error!(object = finding.object, error = %finding.error, "an object cannot be read");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_burst_without_end_is_left_and_one_with_an_end_is_heard_to_it() {
        let mut count = 0_u64;
        // The test ends only if this does.
        rest_of_burst(&mut stream::repeat(()), |()| count += 1).await;
        assert!(count > 0);
        let mut heard = Vec::new();
        rest_of_burst(&mut stream::iter([1, 2, 3]), |event| heard.push(event)).await;
        assert_eq!(heard, [1, 2, 3]);
        rest_of_burst(&mut stream::iter([4]).chain(stream::pending()), |event| heard.push(event)).await;
        assert_eq!(heard, [1, 2, 3, 4]);
    }
}
