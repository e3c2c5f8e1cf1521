//! `status`, `proxy-status` and `version`: the mesh at a glance.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use mesh_api::admin::{CertificateRow, ConnectionRow, ControllerStatus, NodeStatus, Problem};
use serde::Serialize;
use serde_json::json;

use super::{Output, finish, found, target};
use crate::cli::{Global, Saved};
use crate::exit::NoMesh;
use crate::render::{self, API_VERSION, Column, OnNode, Row, View, age};
use crate::target::{Section, Target};

/// Problems that the overview prints; all are in `-o json`.
const PROBLEMS_SHOWN: usize = 10;

/// What is wrong with the configuration.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(super) struct ProblemRow(pub(super) Problem);

impl Row for ProblemRow {
    const KIND: &'static str = "Problem";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("SEVERITY"),
        Column::Narrow("CODE"),
        Column::Narrow("WHERE"),
        Column::Narrow("OBJECT"),
        Column::Narrow("FIELD"),
        Column::Narrow("MESSAGE"),
        Column::Narrow("WHAT TO DO"),
    ];

    fn cells(&self) -> Vec<String> {
        let p = &self.0;
        let file = p.file.rsplit('/').next().unwrap_or_default();
        let place = if p.line == 0 { file.to_owned() } else { format!("{file}:{}", p.line) };
        vec![
            p.severity.clone(),
            p.code.clone(),
            place,
            p.object.clone(),
            p.field.clone(),
            p.message.clone(),
            p.hint.clone(),
        ]
    }
}

/// A node proxy and what the controller says about it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ProxyRow {
    name: String,
    kind: String,
    node: String,
    /// `connected` or `disconnected`.
    controller: String,
    controller_address: String,
    version: String,
    /// Workloads that are served, and all that are enrolled.
    enrolled: String,
    /// Whether it has acknowledged what the controller publishes.
    sync: String,
    /// The same by type.
    types: BTreeMap<String, String>,
    last_ack: String,
    error: String,
}

impl Row for ProxyRow {
    const KIND: &'static str = "Proxy";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("NAME"),
        Column::Narrow("KIND"),
        Column::Narrow("NODE"),
        Column::Narrow("CONTROLLER"),
        Column::Narrow("VERSION"),
        Column::Narrow("ENROLLED"),
        Column::Narrow("SYNC"),
        Column::Narrow("LAST-ACK"),
        Column::Narrow("ERR"),
        Column::Wide("ADDRESS"),
        Column::Wide("AUTHORIZATION"),
        Column::Wide("CONTROLLER ADDRESS"),
    ];

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.kind.clone(),
            self.node.clone(),
            self.controller.clone(),
            self.version.clone(),
            self.enrolled.clone(),
            self.sync.clone(),
            self.last_ack.clone(),
            self.error.clone(),
            self.types.get("Address").cloned().unwrap_or_default(),
            self.types.get("Authorization").cloned().unwrap_or_default(),
            self.controller_address.clone(),
        ]
    }
}

pub(super) async fn proxy_status(global: &Global, saved: &Saved) -> Output {
    let target = target(global, saved).await?;
    // What the nodes say is worth most when the controller says nothing.
    let (gathered, (controller, more)) =
        tokio::join!(target.gather::<NodeStatus>(Section::Status), target.controller());
    let errors: Vec<_> = gathered.errors.into_iter().chain(more).collect();
    let row = |node| proxy_row(&target, node, controller.as_ref());
    let mut rows: Vec<ProxyRow> = gathered.answers.iter().map(row).collect();
    // Nodes that the controller knows and that nobody here can ask.
    for known in controller.iter().flat_map(|c| &c.nodes) {
        let is_wanted = global.node.as_ref().is_none_or(|only| *only == known.node);
        if is_wanted && !rows.iter().any(|row| row.node == known.node) {
            rows.push(ProxyRow {
                name: target.proxy_of(&known.node),
                kind: "node".to_owned(),
                node: known.node.clone(),
                // It is, or the controller would not know it.
                controller: link(true),
                controller_address: String::new(),
                version: String::new(),
                enrolled: String::new(),
                sync: known.sync.clone(),
                types: known.types.clone(),
                last_ack: age(known.last_ack_secs),
                error: rejected(&known.rejected),
            });
        }
    }
    let bad = rows.iter().any(|row| row.sync != "SYNCED" || !row.error.is_empty());
    let text = render::list(&rows, View::of(global))?;
    if errors.is_empty() { found(text, bad) } else { finish(text, errors) }
}

/// Whether a node proxy has its stream to the controller.
fn link(connected: bool) -> String {
    if connected { "connected" } else { "disconnected" }.to_owned()
}

/// Workloads that are served, and all that are enrolled.
fn enrolled(node: &NodeStatus) -> String {
    let ready = node.enrolled.iter().filter(|w| w.state == "ready").count();
    format!("{ready}/{}", node.enrolled.len())
}

fn proxy_row(target: &Target, node: &OnNode<NodeStatus>, controller: Option<&ControllerStatus>) -> ProxyRow {
    let known = controller.and_then(|c| c.nodes.iter().find(|known| known.node == node.node));
    ProxyRow {
        name: target.proxy_of(&node.node),
        kind: "node".to_owned(),
        node: node.node.clone(),
        controller: link(node.item.controller_connected),
        controller_address: node.item.controller.clone(),
        version: node.item.version.clone(),
        enrolled: enrolled(&node.item),
        types: known.map(|known| known.types.clone()).unwrap_or_default(),
        sync: known.map_or_else(|| "NOT CONNECTED".to_owned(), |known| known.sync.clone()),
        last_ack: known.map(|known| age(known.last_ack_secs)).unwrap_or_default(),
        error: known.map(|known| rejected(&known.rejected)).unwrap_or_default(),
    }
}

fn rejected(rejected: &BTreeMap<String, String>) -> String {
    rejected.iter().map(|(name, why)| format!("{name}: {why}")).collect::<Vec<_>>().join("; ")
}

/// A component's version.
#[derive(Debug, Serialize)]
struct VersionRow {
    component: String,
    version: String,
    count: usize,
    nodes: Vec<String>,
}

impl Row for VersionRow {
    const KIND: &'static str = "Version";
    const COLUMNS: &'static [Column] =
        &[Column::Narrow("COMPONENT"), Column::Narrow("VERSION"), Column::Narrow("COUNT"), Column::Wide("NODES")];

    fn cells(&self) -> Vec<String> {
        vec![self.component.clone(), self.version.clone(), self.count.to_string(), self.nodes.join(",")]
    }
}

/// Versions of what runs; only our own where nothing runs.
pub(super) async fn version(global: &Global, saved: &Saved) -> Output {
    let row = |component: &str, version: &str, nodes: Vec<String>| VersionRow {
        component: component.to_owned(),
        version: version.to_owned(),
        count: nodes.len().max(1),
        nodes,
    };
    let mut rows = vec![row("mesh-ctl", env!("CARGO_PKG_VERSION"), Vec::new())];
    let target = match target(global, saved).await {
        Ok(target) => target,
        Err(error) if error.is::<NoMesh>() => {
            eprintln!("mesh-ctl: no mesh to ask; this is the version of the client only");
            return Ok(render::list(&rows, View::of(global))?);
        }
        Err(error) => return finish(render::list(&rows, View::of(global))?, vec![error]),
    };
    let (gathered, (controller, mut errors)) =
        tokio::join!(target.gather::<NodeStatus>(Section::Status), target.controller());
    rows.extend(controller.map(|c| row("mesh-controller", &c.version, Vec::new())));
    let mut by_version: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for node in gathered.answers {
        by_version.entry(node.item.version).or_default().push(node.node);
    }
    rows.extend(by_version.into_iter().map(|(version, nodes)| row("mesh-node", &version, nodes)));
    errors.extend(gathered.errors);
    finish(render::list(&rows, View::of(global))?, errors)
}

/// One screen.
pub(super) async fn status(global: &Global, saved: &Saved) -> Output {
    let target = target(global, saved).await?;
    let (nodes, (controller, mut errors)) =
        tokio::join!(target.gather::<NodeStatus>(Section::Status), target.controller());
    errors.extend(nodes.errors);
    let share = encrypted_share(&target).await;
    let expiry = soonest_expiry(&target).await;
    let view = View::of(global);
    let text = if view.is_table() {
        screen(controller.as_ref(), &nodes.answers, share, expiry.as_deref(), view)?
    } else {
        let items: Vec<_> = nodes.answers.iter().map(|node| json!(node)).collect();
        let document = json!({
            "apiVersion": API_VERSION, "kind": "Status", "controller": controller, "items": items,
            "connections": {"total": share.1, "authenticated": share.0}, "soonestCertificateExpiry": expiry,
        });
        render::document(&document, view.format)?
    };
    let problems = controller.iter().any(|c| c.problems.iter().any(|p| p.severity == "error"));
    let waiting = nodes.answers.iter().any(|node| !node.item.ready || !node.item.controller_connected);
    if errors.is_empty() { found(text, problems || waiting) } else { finish(text, errors) }
}

/// Live connections with a verified peer, and all.
async fn encrypted_share(target: &Target) -> (usize, usize) {
    let rows = target.gather::<Vec<ConnectionRow>>(Section::Connections).await.rows().rows;
    (rows.iter().filter(|row| !row.item.peer_identity.is_empty()).count(), rows.len())
}

async fn soonest_expiry(target: &Target) -> Option<String> {
    let rows = target.gather::<Vec<CertificateRow>>(Section::Certificates).await.rows().rows;
    let leaves = rows.into_iter().flat_map(|row| row.item.certificates).filter(|c| c.kind == "Leaf");
    leaves.map(|leaf| leaf.not_after).min()
}

fn screen(
    controller: Option<&ControllerStatus>,
    nodes: &[OnNode<NodeStatus>],
    (authenticated, connections): (usize, usize),
    expiry: Option<&str>,
    view: View,
) -> anyhow::Result<String> {
    let mut text = String::new();
    // Writing to a `String` cannot fail.
    match controller {
        Some(c) => {
            let resources: u64 = c.resources.values().sum();
            let _ = writeln!(
                text,
                "controller   {}   trust domain {}   {resources} resources   {} nodes connected   {} problems",
                c.version,
                c.trust_domain,
                c.nodes.len(),
                c.problems.len()
            );
        }
        None => {
            let _ = writeln!(text, "controller   not reachable");
        }
    }
    let _ = writeln!(text, "connections  {authenticated} of {connections} with verified identities");
    let _ = writeln!(text, "certificates soonest expiry {}\n", expiry.unwrap_or("-"));
    let rows: Vec<NodeLine> = nodes.iter().map(NodeLine::of).collect();
    text += &render::list(&rows, view)?;
    let problems: Vec<ProblemRow> = controller.iter().flat_map(|c| &c.problems).cloned().map(ProblemRow).collect();
    if !problems.is_empty() {
        text.push('\n');
        let more = problems.len().saturating_sub(PROBLEMS_SHOWN);
        text += &render::list(&problems[..problems.len() - more], view)?;
        if more > 0 {
            let _ = writeln!(text, "and {more} more; see `mesh-ctl status -o json`");
        }
    }
    Ok(text)
}

/// A node in the overview.
#[derive(Debug, Serialize)]
struct NodeLine {
    cells: Vec<String>,
}

impl NodeLine {
    fn of(node: &OnNode<NodeStatus>) -> Self {
        let n = &node.item;
        let state = if n.ready { "ready".to_owned() } else { format!("waiting for {}", n.waiting_for.join(", ")) };
        Self {
            cells: vec![
                node.node.clone(),
                state,
                link(n.controller_connected),
                n.config_source.clone(),
                enrolled(n),
                n.connections.to_string(),
                age(n.uptime_secs),
                n.version.clone(),
                n.pid.to_string(),
            ],
        }
    }
}

impl Row for NodeLine {
    const KIND: &'static str = "Node";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("NODE"),
        Column::Narrow("STATE"),
        Column::Narrow("CONTROLLER"),
        Column::Narrow("CONFIG FROM"),
        Column::Narrow("ENROLLED"),
        Column::Narrow("CONNECTIONS"),
        Column::Narrow("UPTIME"),
        Column::Wide("VERSION"),
        Column::Wide("PID"),
    ];

    fn cells(&self) -> Vec<String> {
        self.cells.clone()
    }
}
