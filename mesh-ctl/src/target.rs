//! Where answers come from: a running mesh by its admin sockets, or a saved dump. Kubernetes will be one more variant.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use mesh_api::admin::{ControllerStatus, NodeStatus};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::admin;
use crate::cli::{Global, Saved};
use crate::exit::{BadInput, Unavailable, Usage};
use crate::render::OnNode;
use crate::sandbox::{Layout, State};

/// A mesh to ask.
#[derive(Debug)]
pub enum Target {
    /// Admin sockets of processes of this machine.
    Sockets(Sockets),
    /// What `node-config all -o json` wrote.
    Dump(Value),
}

/// Admin sockets and logs of a mesh on this machine.
#[derive(Debug, Default)]
pub struct Sockets {
    /// In order; explicit ones have no name until they are asked.
    pub nodes: Vec<NodeSocket>,
    /// The controller's.
    pub controller: Option<PathBuf>,
}

/// A node proxy's admin socket.
#[derive(Debug, Clone)]
pub struct NodeSocket {
    /// Node, if known.
    pub name: Option<String>,
    /// Socket.
    pub socket: PathBuf,
    /// Its access log, if it is a file here.
    pub access_log: Option<PathBuf>,
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
    /// There is no such sandbox or node, or the dump cannot be read.
    pub async fn of(global: &Global, saved: Option<&Saved>) -> Result<Self> {
        let only = global.node.as_deref();
        if let Some(file) = saved.and_then(|s| s.file.as_deref()) {
            let mut dump = read_dump(file)?;
            if let Some(node) = only {
                keep_node(&mut dump, node)?;
            }
            return Ok(Self::Dump(dump));
        }
        if global.admin_socket.is_empty() && global.controller_socket.is_none() {
            return Ok(Self::Sockets(sandbox(&global.sandbox, only)?));
        }
        let nodes = global.admin_socket.iter();
        let nodes = nodes.map(|s| NodeSocket { name: None, socket: s.clone(), access_log: None }).collect();
        let nodes = match only {
            Some(node) => nodes_named(nodes, node).await?,
            None => nodes,
        };
        Ok(Self::Sockets(Sockets { nodes, controller: global.controller_socket.clone() }))
    }

    /// One section of every node.
    pub async fn gather<T: DeserializeOwned>(&self, section: Section) -> Gathered<T> {
        self.gather_path(section, &format!("/{}", section.key())).await
    }

    /// A section by another path (`/bpf?map=NAME`); a dump has only the section.
    pub async fn gather_path<T: DeserializeOwned>(&self, section: Section, path: &str) -> Gathered<T> {
        let mut gathered = Gathered { answers: Vec::new(), errors: Vec::new() };
        match self {
            Self::Dump(dump) => {
                for item in dump["items"].as_array().into_iter().flatten() {
                    let node = item["node"].as_str().unwrap_or_default().to_string();
                    match serde_json::from_value(item[section.key()].clone()) {
                        Ok(item) => gathered.answers.push(OnNode { node, item }),
                        Err(e) => gathered
                            .errors
                            .push(anyhow!(BadInput(format!("dump of node {node}, {}: {e}", section.key())))),
                    }
                }
            }
            Self::Sockets(sockets) => {
                let asked = sockets.nodes.iter().map(|node| ask(node, path));
                for (node, answer) in sockets.nodes.iter().zip(futures_util::future::join_all(asked).await) {
                    match answer {
                        Ok(answer) => gathered.answers.push(answer),
                        Err(e) => gathered.errors.push(e.context(format!("node {}", node.label()))),
                    }
                }
            }
        }
        gathered
    }

    /// The controller's status; none if the command line names no controller or the dump has none.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn controller(&self) -> Result<Option<ControllerStatus>> {
        match self {
            Self::Dump(dump) if dump["controller"].is_null() => Ok(None),
            Self::Dump(dump) => {
                Ok(Some(serde_json::from_value(dump["controller"].clone()).context("dump of the controller")?))
            }
            Self::Sockets(Sockets { controller: None, .. }) => Ok(None),
            Self::Sockets(Sockets { controller: Some(socket), .. }) => {
                Ok(Some(admin::get(socket, "/status").await.context("controller")?))
            }
        }
    }

    /// The admin socket of a node.
    ///
    /// # Errors
    /// A dump has none, or the node is not known.
    pub async fn socket_of(&self, node: &str) -> Result<PathBuf> {
        let Self::Sockets(sockets) = self else {
            return Err(anyhow!(Usage("a saved dump cannot answer this: ask a running mesh".into())));
        };
        let mut silent = None;
        for candidate in &sockets.nodes {
            let name = match &candidate.name {
                Some(name) => Ok(name.clone()),
                None => admin::get::<NodeStatus>(&candidate.socket, "/status").await.map(|status| status.node),
            };
            match name {
                Ok(name) if name == node => return Ok(candidate.socket.clone()),
                Ok(_) => {}
                // It may be the one; another may be, too.
                Err(error) => drop(silent.get_or_insert(error)),
            }
        }
        if let Some(error) = silent {
            return Err(anyhow::Error::from(error).context(format!("looking for node `{node}`")));
        }
        Err(anyhow!(Unavailable(format!("no admin socket of node `{node}` is known; name it with --admin-socket"))))
    }

    /// Access logs of the nodes, where they are files of this machine.
    pub fn access_logs(&self) -> BTreeMap<String, PathBuf> {
        let Self::Sockets(sockets) = self else { return BTreeMap::new() };
        let known = |n: &NodeSocket| Some((n.label(), n.access_log.clone()?));
        sockets.nodes.iter().filter_map(known).collect()
    }
}

impl NodeSocket {
    /// Its node's name, or its path.
    pub fn label(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.socket.display().to_string())
    }
}

/// Those of the sockets that are of this node. Each says itself whose it is.
async fn nodes_named(sockets: Vec<NodeSocket>, node: &str) -> Result<Vec<NodeSocket>> {
    let (mut others, mut failed) = (Vec::new(), None);
    let mut found = Vec::new();
    for socket in sockets {
        match admin::get::<NodeStatus>(&socket.socket, "/status").await {
            Ok(status) if status.node == node => found.push(NodeSocket { name: Some(status.node), ..socket }),
            Ok(status) => others.push(status.node),
            Err(error) => failed = failed.or(Some(anyhow!(error).context(format!("node {}", socket.label())))),
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

async fn ask<T: DeserializeOwned>(node: &NodeSocket, path: &str) -> Result<OnNode<T>> {
    let name = match &node.name {
        Some(name) => name.clone(),
        None => admin::get::<NodeStatus>(&node.socket, "/status").await?.node,
    };
    Ok(OnNode { node: name, item: admin::get(&node.socket, path).await? })
}

fn sandbox(name: &str, only: Option<&str>) -> Result<Sockets> {
    let layout = Layout::of(name)?;
    let Some(state) = State::load(&layout)? else {
        return Err(anyhow!(Unavailable(format!(
            "no sandbox `{name}` runs here; make one with `mesh-ctl sandbox up`, or name a mesh with --admin-socket"
        ))));
    };
    if let Some(node) = only.filter(|n| state.topology.node_number(n).is_none()) {
        let all: Vec<_> = state.topology.nodes.iter().map(|n| n.name.clone()).collect();
        return Err(no_node(node, &all));
    }
    let nodes = state.topology.nodes.iter().filter(|n| only.is_none_or(|o| o == n.name));
    let socket = |name: &str| NodeSocket {
        name: Some(name.to_string()),
        socket: layout.node_admin(name),
        access_log: Some(layout.node(name).join("access.log")),
    };
    let nodes = nodes.map(|n| socket(&n.name)).collect();
    Ok(Sockets { nodes, controller: Some(layout.controller_admin()) })
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
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    use serde_json::json;

    use super::*;

    /// A directory that goes away with the value.
    struct TempDir(PathBuf);

    impl TempDir {
        fn new(test: &str) -> Self {
            let path = std::env::temp_dir().join(format!("mesh-ctl-{test}-{}", std::process::id()));
            std::fs::create_dir(&path).expect("a fresh name");
            Self(path)
        }
    }

    impl Drop for TempDir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn status(node: &str) -> Value {
        json!({
            "node": node, "version": "1", "pid": 1, "ready": true, "waitingFor": [], "controller": "c:1",
            "controllerConnected": true, "configSource": "controller", "enrolled": [], "connections": 0, "uptimeSecs": 1,
        })
    }

    /// An admin socket that says it is of this node, as long as the process lives.
    fn serve(dir: &TempDir, node: &'static str) -> PathBuf {
        let path = dir.0.join(node);
        let listener = UnixListener::bind(&path).expect("binds");
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let body = status(node).to_string();
                let head = BufReader::new(&stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
                head.for_each(drop);
                let length = body.len();
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
                let _ = (&stream).write_all(answer.as_bytes());
            }
        });
        path
    }

    async fn nodes(global: &Global, saved: Option<&Saved>) -> Result<Vec<String>> {
        let gathered = Target::of(global, saved).await?.gather::<NodeStatus>(Section::Status).await;
        assert!(gathered.errors.is_empty(), "{:?}", gathered.errors);
        Ok(gathered.answers.into_iter().map(|answer| answer.item.node).collect())
    }

    fn of_node(node: &str) -> Global {
        Global { node: Some(node.to_owned()), ..Global::default() }
    }

    #[tokio::test]
    async fn one_node_of_those_whose_sockets_are_named() {
        let dir = TempDir::new("sockets");
        let sockets = ["node-a", "node-b"].map(|node| serve(&dir, node));
        let global = |node| Global { admin_socket: sockets.to_vec(), ..of_node(node) };
        assert_eq!(nodes(&global("node-b"), None).await.expect("is there"), ["node-b"]);
        let error = nodes(&global("node-c"), None).await.expect_err("is not there");
        assert_eq!(
            (error.to_string().as_str(), crate::exit::code(&error)),
            ("no node `node-c`; there are node-a, node-b", crate::exit::USAGE,)
        );
        // A change is made on this node alone.
        let Target::Sockets(found) = Target::of(&global("node-a"), None).await.expect("is there") else { panic!() };
        assert_eq!(found.nodes.iter().map(|n| &n.socket).collect::<Vec<_>>(), [&sockets[0]]);

        // One that does not answer may be the one, or not matter.
        let silent = Global { admin_socket: vec![dir.0.join("nobody"), sockets[1].clone()], ..of_node("node-b") };
        assert_eq!(nodes(&silent, None).await.expect("is there"), ["node-b"]);
        let error = nodes(&Global { node: Some("node-a".into()), ..silent }, None).await.expect_err("who knows");
        assert_eq!(crate::exit::code(&error), crate::exit::UNAVAILABLE, "{error:#}");
    }

    #[tokio::test]
    async fn one_node_of_a_saved_dump() {
        let dir = TempDir::new("dump");
        let file = dir.0.join("dump.json");
        let item = |node: &str| json!({"node": node, "status": status(node)});
        let dump = json!({"kind": "Dump", "controller": null, "items": [item("node-a"), item("node-b")]});
        std::fs::write(&file, dump.to_string()).expect("writes");
        let saved = Saved { file: Some(file) };
        assert_eq!(nodes(&Global::default(), Some(&saved)).await.expect("both"), ["node-a", "node-b"]);
        assert_eq!(nodes(&of_node("node-b"), Some(&saved)).await.expect("is there"), ["node-b"]);
        let error = nodes(&of_node("node-c"), Some(&saved)).await.expect_err("is not there");
        assert_eq!(error.to_string(), "no node `node-c`; there are node-a, node-b");
    }
}
