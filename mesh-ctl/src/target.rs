//! Where answers come from: a mesh that runs here or on Kubernetes, or a saved dump.

mod door;
mod kubernetes;
mod objects;
mod pod;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use futures_util::StreamExt;
use mesh_api::admin::{ControllerStatus, NodeStatus};
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use self::door::Door;
pub use self::kubernetes::ROOT_NAMESPACE;
pub(crate) use self::kubernetes::{client, explain};
pub use self::objects::Configuration;
use crate::cli::{Global, Saved};
use crate::exit::{BadInput, NoMesh, Unavailable, Usage};
use crate::render::OnNode;
use crate::sandbox::{Layout, State};

/// Nodes that are asked at once: some hundred are asked in seconds, and the API server has other things to do.
const ASKED_AT_ONCE: usize = 16;
/// Namespace of a name without one, where no context names another.
const DEFAULT_NAMESPACE: &str = "default";

/// A mesh to ask.
#[derive(Debug)]
pub enum Target {
    /// One that runs.
    Live(Mesh),
    /// What `node-config all -o json` wrote.
    Dump(Value),
}

/// Ways to the parts of a mesh.
#[derive(Debug)]
pub struct Mesh {
    /// In order; explicit ones have no name until they are asked.
    pub nodes: Vec<Node>,
    /// The controller; on Kubernetes there may be several.
    pub controllers: Vec<Door>,
    /// Kubernetes namespace of a name without one.
    pub namespace: String,
}

/// A node proxy.
#[derive(Debug)]
pub struct Node {
    /// Node, if known.
    pub name: Option<String>,
    /// Its pod on Kubernetes.
    pub proxy: Option<String>,
    /// Its admin interface.
    pub door: Door,
    /// Its access log.
    pub access_log: AccessLog,
}

/// Where a node proxy writes its access log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLog {
    /// Nobody said.
    Unknown,
    /// A file of this machine.
    File(PathBuf),
    /// Its container's output.
    Container,
}

/// A part of a node's state: where it is found on the admin socket and in a dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    /// Readiness and enrolled workloads.
    Status,
    /// Workloads.
    Workloads,
    /// Services.
    Services,
    /// Policies.
    Policies,
    /// Certificates.
    Certificates,
    /// Live connections.
    Connections,
    /// Kernel state.
    Bpf,
    /// Drops that the kernel reported.
    Events,
}

/// All sections, in the order of a dump.
pub const SECTIONS: [Section; 8] = [
    Section::Status,
    Section::Workloads,
    Section::Services,
    Section::Policies,
    Section::Certificates,
    Section::Connections,
    Section::Bpf,
    Section::Events,
];

/// Answers of the nodes that answered, and errors of those that did not.
#[derive(Debug)]
pub struct Gathered<T> {
    /// By node.
    pub answers: Vec<OnNode<T>>,
    /// One a node.
    pub errors: Vec<anyhow::Error>,
}

impl Section {
    /// Key in a dump; with a slash before it, the path.
    pub fn key(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Workloads => "workloads",
            Self::Services => "services",
            Self::Policies => "policies",
            Self::Certificates => "certificates",
            Self::Connections => "connections",
            Self::Bpf => "bpf",
            Self::Events => "events",
        }
    }
}

impl<T> Gathered<T> {
    /// The same about a part of each answer.
    pub fn map<U>(self, part: impl Fn(T) -> U) -> Gathered<U> {
        let answers = self.answers.into_iter().map(|a| OnNode { node: a.node, item: part(a.item) });
        Gathered { answers: answers.collect(), errors: self.errors }
    }
}

impl<T> Gathered<Vec<T>> {
    /// One element an item; errors go to stderr.
    pub fn rows(self) -> Listed<T> {
        let flat = |a: OnNode<Vec<T>>| {
            let node = a.node;
            a.item.into_iter().map(move |item| OnNode { node: node.clone(), item })
        };
        Listed { rows: self.answers.into_iter().flat_map(flat).collect(), errors: self.errors }
    }
}

/// Rows of the nodes that answered.
#[derive(Debug)]
pub struct Listed<T> {
    /// Rows.
    pub rows: Vec<OnNode<T>>,
    /// Errors of the others.
    pub errors: Vec<anyhow::Error>,
}

impl<T> Listed<T> {
    /// Only rows whose item is wanted.
    #[must_use]
    pub fn filter(mut self, wanted: impl Fn(&T) -> bool) -> Self {
        self.rows.retain(|row| wanted(&row.item));
        self
    }
}

impl Target {
    /// The mesh that the command line names, with only the node that it names, if it names one.
    ///
    /// # Errors
    /// There is no such mesh or node, or the dump cannot be read.
    pub async fn of(global: &Global, saved: Option<&Saved>) -> Result<Self> {
        let only = global.node.as_deref();
        if let Some(file) = saved.and_then(|s| s.file.as_deref()) {
            let mut dump = read_dump(file)?;
            if let Some(node) = only {
                keep_node(&mut dump, node)?;
            }
            return Ok(Self::Dump(dump));
        }
        let mut mesh = Mesh::of(global).await?;
        if let Some(node) = only {
            mesh.nodes = nodes_named(mesh.nodes, node).await?;
        }
        Ok(Self::Live(mesh))
    }

    /// One section of every node.
    pub async fn gather<T: DeserializeOwned>(&self, section: Section) -> Gathered<T> {
        self.gather_path(section, &format!("/{}", section.key())).await
    }

    /// A section by another path (`/bpf?map=NAME`); a dump has only the section.
    pub async fn gather_path<T: DeserializeOwned>(&self, section: Section, path: &str) -> Gathered<T> {
        match self {
            Self::Dump(dump) => of_dump(dump, section),
            Self::Live(mesh) => mesh.each(|node| node.ask(path)).await,
        }
    }

    /// What the controller says; none if the command line names no controller, the dump has none, or it does not answer.
    pub async fn controller(&self) -> (Option<ControllerStatus>, Vec<anyhow::Error>) {
        match self {
            Self::Dump(dump) if dump["controller"].is_null() => (None, Vec::new()),
            Self::Dump(dump) => {
                match serde_json::from_value(dump["controller"].clone()).context("dump of the controller") {
                    Ok(status) => (Some(status), Vec::new()),
                    Err(error) => (None, vec![error]),
                }
            }
            Self::Live(mesh) => {
                let asked = mesh.controllers.iter().map(|door| door.get::<ControllerStatus>("/status"));
                let (mut all, mut errors) = (Vec::new(), Vec::new());
                for answer in futures_util::future::join_all(asked).await {
                    match answer.context("controller") {
                        Ok(status) => all.push(status),
                        Err(error) => errors.push(error),
                    }
                }
                (all.into_iter().reduce(merged), errors)
            }
        }
    }

    /// The admin interface of a node.
    ///
    /// # Errors
    /// A dump has none, or the node is not known.
    pub async fn door_of(&self, node: &str) -> Result<&Door> {
        let mut silent = None;
        for candidate in &self.live()?.nodes {
            match candidate.name().await {
                Ok(name) if name == node => return Ok(&candidate.door),
                Ok(_) => {}
                // It may be the one; another may be, too.
                Err(error) => drop(silent.get_or_insert(error)),
            }
        }
        if let Some(error) = silent {
            return Err(error.context(format!("looking for node `{node}`")));
        }
        Err(anyhow!(Unavailable(format!("no node proxy of node `{node}` is known"))))
    }

    /// The mesh that runs.
    ///
    /// # Errors
    /// This is a dump.
    pub fn live(&self) -> Result<&Mesh> {
        match self {
            Self::Live(mesh) => Ok(mesh),
            Self::Dump(_) => Err(anyhow!(Usage("a saved dump cannot answer this: ask a running mesh".into()))),
        }
    }

    /// Name of a node's proxy: its pod's, where it has one.
    pub fn proxy_of(&self, node: &str) -> String {
        let known = match self {
            Self::Live(mesh) => mesh.nodes.iter().find(|known| known.name.as_deref() == Some(node)),
            Self::Dump(_) => None,
        };
        known.and_then(|known| known.proxy.clone()).unwrap_or_else(|| format!("mesh-node.{node}"))
    }

    /// Kubernetes namespace of a name without one.
    pub fn namespace(&self) -> &str {
        match self {
            Self::Live(mesh) => &mesh.namespace,
            Self::Dump(_) => DEFAULT_NAMESPACE,
        }
    }
}

impl Mesh {
    /// What the command line names; if it names nothing, the sandbox that is up, else what the kubeconfig says.
    async fn of(global: &Global) -> Result<Self> {
        let is_on_kubernetes = global.kubeconfig.is_some() || global.context.is_some();
        if !is_on_kubernetes {
            if !global.admin_socket.is_empty() || global.controller_socket.is_some() {
                return Ok(by_sockets(global));
            }
            if let Some(mesh) = sandbox(global.sandbox_name())? {
                return Ok(mesh);
            }
            if let Some(name) = &global.sandbox {
                return Err(anyhow!(NoMesh(format!(
                    "no sandbox `{name}` runs here; make one with `mesh-ctl sandbox up`"
                ))));
            }
        }
        match kubernetes::client(global).await? {
            Some(client) => kubernetes::find(global, client).await,
            None => Err(anyhow!(NoMesh(
                "no sandbox runs here, and no kubeconfig names a cluster: make one with `mesh-ctl sandbox up`, or name a mesh \
                 with --kubeconfig or --admin-socket"
                    .to_owned()
            ))),
        }
    }

    /// Asks every node something, some at once.
    pub async fn each<'a, T, F>(&'a self, ask: impl Fn(&'a Node) -> F) -> Gathered<T>
    where
        F: Future<Output = Result<OnNode<T>>>,
    {
        let ask = &ask;
        let asked = self.nodes.iter().map(|node| async move {
            let context = || format!("node {}", node.label());
            ask(node).await.with_context(context)
        });
        let mut asked = futures_util::stream::iter(asked).buffered(ASKED_AT_ONCE);
        let mut gathered = Gathered { answers: Vec::new(), errors: Vec::new() };
        while let Some(answer) = asked.next().await {
            match answer {
                Ok(answer) => gathered.answers.push(answer),
                Err(error) => gathered.errors.push(error),
            }
        }
        gathered
    }
}

impl Node {
    fn by_socket(name: Option<String>, socket: PathBuf, access_log: AccessLog) -> Self {
        Self { name, proxy: None, door: Door::Socket(socket), access_log }
    }

    /// Its node's name, or what else tells it from others.
    pub fn label(&self) -> String {
        match (&self.name, &self.door) {
            (Some(name), _) => name.clone(),
            (None, Door::Socket(socket)) => socket.display().to_string(),
            (None, Door::Pod(_) | Door::Shut(_)) => "without a name".to_owned(),
        }
    }

    async fn name(&self) -> Result<String> {
        match &self.name {
            Some(name) => Ok(name.clone()),
            None => Ok(self.door.get::<NodeStatus>("/status").await?.node),
        }
    }

    async fn ask<T: DeserializeOwned>(&self, path: &str) -> Result<OnNode<T>> {
        Ok(OnNode { node: self.name().await?, item: self.door.get(path).await? })
    }
}

/// What two controllers of one mesh say: each knows the nodes that are connected to it.
fn merged(mut one: ControllerStatus, other: ControllerStatus) -> ControllerStatus {
    for node in other.nodes {
        match one.nodes.iter_mut().find(|known| known.node == node.node) {
            // Of a stream that moved, the one that was used last.
            Some(known) if known.last_ack_secs > node.last_ack_secs => *known = node,
            Some(_) => {}
            None => one.nodes.push(node),
        }
    }
    one.nodes.sort_by(|a, b| a.node.cmp(&b.node));
    one
}

fn of_dump<T: DeserializeOwned>(dump: &Value, section: Section) -> Gathered<T> {
    let mut gathered = Gathered { answers: Vec::new(), errors: Vec::new() };
    for item in dump["items"].as_array().into_iter().flatten() {
        let node = item["node"].as_str().unwrap_or_default().to_string();
        match serde_json::from_value(item[section.key()].clone()) {
            Ok(item) => gathered.answers.push(OnNode { node, item }),
            Err(e) => {
                let bad = BadInput(format!("dump of node {node}, {}: {e}", section.key()));
                gathered.errors.push(anyhow!(bad));
            }
        }
    }
    gathered
}

/// Those of the nodes that have this name. One whose name is not known is asked.
async fn nodes_named(nodes: Vec<Node>, node: &str) -> Result<Vec<Node>> {
    let (mut others, mut failed) = (Vec::new(), None);
    let mut found = Vec::new();
    for candidate in nodes {
        match candidate.name().await {
            Ok(name) if name == node => found.push(Node { name: Some(name), ..candidate }),
            Ok(name) => others.push(name),
            Err(error) => failed = failed.or(Some(error.context(format!("node {}", candidate.label())))),
        }
    }
    match failed {
        // It may have been the one.
        Some(error) if found.is_empty() => Err(error),
        Some(_) | None if found.is_empty() => Err(no_node(node, &others)),
        Some(_) | None => Ok(found),
    }
}

/// Leaves only what one node said.
fn keep_node(dump: &mut Value, node: &str) -> Result<()> {
    let Some(items) = dump["items"].as_array_mut() else { return Err(no_node(node, &[])) };
    let names = items.iter().map(|item| item["node"].as_str().unwrap_or_default().to_owned()).collect::<Vec<_>>();
    items.retain(|item| item["node"] == node);
    if items.is_empty() { Err(no_node(node, &names)) } else { Ok(()) }
}

fn no_node(node: &str, known: &[String]) -> anyhow::Error {
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    anyhow!(Usage(format!("no node `{node}`; there are {known}")))
}

fn by_sockets(global: &Global) -> Mesh {
    let nodes = global.admin_socket.iter().map(|socket| Node::by_socket(None, socket.clone(), AccessLog::Unknown));
    let controllers = global.controller_socket.iter().cloned().map(Door::Socket);
    Mesh { nodes: nodes.collect(), controllers: controllers.collect(), namespace: DEFAULT_NAMESPACE.to_owned() }
}

/// The mesh of a sandbox, if there is one of this name.
fn sandbox(name: &str) -> Result<Option<Mesh>> {
    let layout = Layout::of(name)?;
    let Some(state) = State::load(&layout)? else { return Ok(None) };
    let node = |name: &str| {
        let access_log = AccessLog::File(layout.node(name).join("access.log"));
        Node::by_socket(Some(name.to_owned()), layout.node_admin(name), access_log)
    };
    let nodes = state.topology.nodes.iter().map(|n| node(&n.name)).collect();
    let controllers = vec![Door::Socket(layout.controller_admin())];
    Ok(Some(Mesh { nodes, controllers, namespace: DEFAULT_NAMESPACE.to_owned() }))
}

fn read_dump(file: &Path) -> Result<Value> {
    let bad = |why: String| anyhow!(BadInput(format!("{}: {why}", file.display())));
    let text = std::fs::read_to_string(file).map_err(|e| bad(e.to_string()))?;
    let dump: Value = match serde_json::from_str(&text) {
        Ok(dump) => dump,
        Err(json) => {
            serde_saphyr::from_str(&text).map_err(|yaml| bad(format!("neither JSON ({json}) nor YAML ({yaml})")))?
        }
    };
    if dump["kind"] != "Dump" {
        return Err(bad("no dump; write one with `mesh-ctl node-config all -o json`".into()));
    }
    Ok(dump)
}

#[cfg(test)]
mod tests;
