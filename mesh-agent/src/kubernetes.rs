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
use futures_util::{StreamExt, stream};
use k8s_openapi::api::core::v1;
use kube::api::Api;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, Resource, ResourceExt};
use mesh_api::k8s::{Item, from_api_server};
use mesh_cni::config::PluginConfig;
use mesh_core::config::Object;
use mesh_core::config::objects::{Namespace, Pod};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep, sleep_until};

use self::known::Known;
pub use self::owner::Owner;
use self::pods::Pods;
use crate::{Board, alive, conflist, proxy};

/// Quiet time after which a burst of changes counts as finished.
const QUIET: Duration = Duration::from_millis(10);
/// First pause before a pod's network namespace is looked for again.
const LOOK_FIRST: Duration = Duration::from_millis(100);
/// Longest pause.
const LOOK_MAX: Duration = Duration::from_secs(2);
/// All namespaces are looked at again after this time: a runtime may make a pod's network anew.
const LOOK_ANYWAY: Duration = Duration::from_secs(15);
/// How long node proxies have to let go of everything when the mesh is uninstalled.
const LET_GO_WITHIN: Duration = Duration::from_secs(20);
/// Pause after a watch failed.
const RETRY: Duration = Duration::from_secs(1);

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
    runtime.block_on(async move {
        let client = Client::try_default().await.context("find the API server")?;
        serve(client, options).await
    })
}

async fn serve(client: Client, options: Options) -> Result<()> {
    let on_node = watcher::Config::default().fields(&format!("spec.nodeName={}", options.node));
    let seen = stream::select(
        watcher(Api::<v1::Pod>::all(client.clone()), on_node)
            .map(|e| e.map_or_else(Seen::Failed, |event| Seen::Pod(Box::new(event)))),
        watcher(Api::<v1::Namespace>::all(client.clone()), watcher::Config::default())
            .map(|e| e.map_or_else(Seen::Failed, |event| Seen::Namespace(Box::new(event)))),
    );
    let mut seen = pin!(seen);
    let (mut heard, pods, board) =
        (Heard::default(), Arc::new(Mutex::new(Pods::default())), Arc::new(Board::default()));
    let mut plugin = match &options.cni {
        Some(cni) => Some(serve_plugin(cni, client.clone(), (&pods, &board))?),
        None => None,
    };
    let (mut terminated, mut interrupted) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut listening = false;
    let mut pause = LOOK_FIRST;
    let mut look_at = Instant::now() + LOOK_ANYWAY;
    loop {
        tokio::select! {
            event = seen.next() => {
                let Some(event) = event else { anyhow::bail!("the watches have ended") };
                hear(&mut heard, event).await;
                // The rest of the burst.
                while let Ok(Some(event)) = tokio::time::timeout(QUIET, seen.next()).await {
                    hear(&mut heard, event).await;
                }
                pause = LOOK_FIRST;
            }
            () = sleep_until(look_at) => {}
            _ = terminated.recv() => return end(client, &options, plugin, (&pods, &board)).await,
            _ = interrupted.recv() => return Ok(()),
        }
        if !(heard.pods.is_complete && heard.namespaces.is_complete) {
            // What is not known yet would be taken for gone.
            continue;
        }
        let is_settled = look(&heard, &pods, &board).await?;
        look_at = Instant::now() + if is_settled { LOOK_ANYWAY } else { pause };
        pause = (pause * 2).min(LOOK_MAX);
        if let Some(Plugin { known, .. }) = &mut plugin {
            let pods = cni::lock(&pods);
            known.update(&pods);
            known.report_unasked(&pods);
        }
        if !std::mem::replace(&mut listening, true) {
            let listener = proxy::listen(&options.socket)?;
            let (board, node) = (Arc::clone(&board), options.node.clone());
            let thread = std::thread::Builder::new().name("proxies".into());
            thread.spawn(move || proxy::accept(&listener, &node, &board)).context("start a thread")?;
            tracing::info!(node = options.node, socket = %options.socket.display(), "ready");
        }
    }
}

/// Takes in what was heard, looks for network namespaces, and posts what should be served; whether all of them are known.
async fn look(heard: &Heard, pods: &Mutex<Pods>, board: &Board) -> Result<bool> {
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
    known: Known,
    keeper: conflist::Keeper,
}

/// Answers the CNI plugin from now on, and only then makes runtimes start it.
fn serve_plugin(cni: &CniOptions, client: Client, (pods, board): (&Arc<Mutex<Pods>>, &Arc<Board>)) -> Result<Plugin> {
    let desk = cni::Desk::new(client, Arc::clone(pods), Arc::clone(board), cni::host_netns()?);
    tokio::spawn(cni::serve(cni::listen(&cni.plugin.agent_socket)?, Arc::new(desk)));
    if let Some(bin_dir) = &cni.bin_dir {
        conflist::install_plugin(bin_dir).context("install the CNI plugin")?;
    }
    let keeper = conflist::Keeper::start(cni.conf_dir.clone(), cni.plugin.clone()).context("start a thread")?;
    Ok(Plugin { known: Known::read(cni.plugin.state_dir.clone()), keeper })
}

/// Ends. An agent that another one follows leaves everything as it is; the last one takes away what would keep pods waiting for
/// ever, and lets them go.
async fn end(
    client: Client,
    options: &Options,
    plugin: Option<Plugin>,
    (pods, board): (&Mutex<Pods>, &Arc<Board>),
) -> Result<()> {
    let is_last = match &options.owner {
        Some(owner) => owner.is_gone(client).await,
        None => false,
    };
    if !is_last {
        tracing::info!("told to end; pods of the mesh wait for the next agent");
        return Ok(());
    }
    tracing::info!("the mesh is uninstalled: its pods are let go");
    if let (Some(plugin), Some(cni)) = (plugin, &options.cni) {
        plugin.keeper.stop();
        conflist::uninstall(&cni.conf_dir, cni.bin_dir.as_deref(), &cni.plugin.state_dir)?;
    }
    board.post(BTreeMap::new(), cni::lock(pods).living());
    let (board, deadline) = (Arc::clone(board), std::time::Instant::now() + LET_GO_WITHIN);
    tokio::task::spawn_blocking(move || board.wait_until_told(deadline)).await.context("wait for the node proxies")
}

async fn hear(heard: &mut Heard, seen: Seen) {
    match seen {
        Seen::Pod(event) => heard.pods.take(*event, pod),
        Seen::Namespace(event) => heard.namespaces.take(*event, namespace),
        Seen::Failed(error) => {
            tracing::warn!(%error, "a watch failed and begins anew; what is known stays");
            sleep(RETRY).await;
        }
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
