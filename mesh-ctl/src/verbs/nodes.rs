//! `node-config`: what the node proxies have been told and what they do with it.

use anyhow::{Context, anyhow};
use mesh_api::admin::{CertificateInfo, CertificateRow, ConnectionRow, PolicyRow, ServiceRow, WorkloadRow};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Output, finish, listed, target};
use crate::cli::{Format, Global, NodeConfig, Saved};
use crate::exit::Usage;
use crate::render::{self, API_VERSION, Column, OnNode, Row, View, age, short_identity};
use crate::target::{Section, Target};

pub(super) async fn run(global: &Global, what: &NodeConfig) -> Output {
    match what {
        NodeConfig::Workload(saved) => {
            let rows = target(global, saved).await?.gather::<Vec<WorkloadRow>>(Section::Workloads).await.rows();
            listed(global, rows.filter(|w| in_namespace(global, &w.namespace)), WorkloadLine)
        }
        NodeConfig::Service(saved) => {
            let rows = target(global, saved).await?.gather::<Vec<ServiceRow>>(Section::Services).await.rows();
            listed(global, rows.filter(|s| in_namespace(global, &s.namespace)), |row| row)
        }
        NodeConfig::Policy(saved) => {
            let rows = target(global, saved).await?.gather::<Vec<PolicyRow>>(Section::Policies).await.rows();
            listed(global, rows.filter(|p| in_namespace(global, &p.namespace)), |row| row)
        }
        NodeConfig::Certificate(saved) => certificates(global, saved).await,
        NodeConfig::Connections(saved) => {
            let rows = target(global, saved).await?.gather::<Vec<ConnectionRow>>(Section::Connections).await.rows();
            let of = |c: &ConnectionRow| c.workload.rsplit_once('.').is_some_and(|(_, ns)| in_namespace(global, ns));
            listed(global, rows.filter(of), |row| row)
        }
        NodeConfig::Log { level } => log(global, level.as_deref()).await,
        NodeConfig::All(saved) => all(global, saved).await,
    }
}

fn in_namespace(global: &Global, namespace: &str) -> bool {
    global.namespace.as_deref().is_none_or(|only| only == namespace)
}

/// A workload as a node knows it. In a document `node` is who says so, as in all lists, and `runsOn` where it runs.
struct WorkloadLine(OnNode<WorkloadRow>);

impl Serialize for WorkloadLine {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut value = serde_json::to_value(&self.0.item).map_err(serde::ser::Error::custom)?;
        value["runsOn"] = value["node"].take();
        value["node"] = self.0.node.clone().into();
        value.serialize(serializer)
    }
}

impl Row for WorkloadLine {
    const KIND: &'static str = "Workload";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("NODE"),
        Column::Narrow("NAMESPACE"),
        Column::Narrow("POD NAME"),
        Column::Narrow("ADDRESS"),
        Column::Narrow("RUNS ON"),
        Column::Narrow("WAYPOINT"),
        Column::Narrow("PROTOCOL"),
        Column::Wide("STATUS"),
        Column::Wide("IDENTITY"),
        Column::Wide("POLICIES"),
        Column::Wide("SERVICES"),
    ];

    fn cells(&self) -> Vec<String> {
        let w = &self.0.item;
        vec![
            self.0.node.clone(),
            w.namespace.clone(),
            w.name.clone(),
            w.addresses.first().cloned().unwrap_or_default(),
            w.node.clone(),
            if w.waypoint.is_empty() { "None".to_owned() } else { w.waypoint.clone() },
            w.protocol.clone(),
            w.status.clone(),
            w.identity.clone(),
            w.policies.join(","),
            w.services.join(","),
        ]
    }
}

impl Row for OnNode<ServiceRow> {
    const KIND: &'static str = "Service";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("NODE"),
        Column::Narrow("NAMESPACE"),
        Column::Narrow("SERVICE NAME"),
        Column::Narrow("SERVICE VIP"),
        Column::Narrow("WAYPOINT"),
        Column::Narrow("ENDPOINTS"),
        Column::Wide("PORTS"),
        Column::Wide("ENDPOINT ADDRESSES"),
    ];

    fn cells(&self) -> Vec<String> {
        let s = &self.item;
        let ready = s.endpoints.iter().filter(|e| e.healthy).count();
        vec![
            self.node.clone(),
            s.namespace.clone(),
            s.name.clone(),
            s.vips.first().cloned().unwrap_or_else(|| "None".to_owned()),
            if s.waypoint.is_empty() { "None".to_owned() } else { s.waypoint.clone() },
            format!("{ready}/{}", s.endpoints.len()),
            s.ports.join(","),
            s.endpoints.iter().map(|e| e.address.as_str()).collect::<Vec<_>>().join(","),
        ]
    }
}

impl Row for OnNode<PolicyRow> {
    const KIND: &'static str = "Policy";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("NODE"),
        Column::Narrow("NAMESPACE"),
        Column::Narrow("POLICY NAME"),
        Column::Narrow("ACTION"),
        Column::Narrow("SCOPE"),
        Column::Wide("ENFORCED"),
        Column::Wide("RULES"),
    ];

    fn cells(&self) -> Vec<String> {
        let p = &self.item;
        vec![
            self.node.clone(),
            p.namespace.clone(),
            p.name.clone(),
            p.action.clone(),
            p.scope.clone(),
            if p.dry_run { "dry run" } else { "yes" }.to_owned(),
            p.rules.join("; "),
        ]
    }
}

impl Row for OnNode<ConnectionRow> {
    const KIND: &'static str = "Connection";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("NODE"),
        Column::Narrow("WORKLOAD"),
        Column::Narrow("DIRECTION"),
        Column::Narrow("LOCAL"),
        Column::Narrow("REMOTE"),
        Column::Narrow("PROTOCOL"),
        Column::Narrow("PEER"),
        Column::Wide("REMOTE TARGET"),
        Column::Wide("AGE"),
        Column::Wide("SENT"),
        Column::Wide("RECEIVED"),
    ];

    fn cells(&self) -> Vec<String> {
        let c = &self.item;
        vec![
            self.node.clone(),
            c.workload.clone(),
            c.direction.clone(),
            c.local.clone(),
            c.remote.clone(),
            c.protocol.clone(),
            short_identity(&c.peer_identity),
            c.target.clone(),
            age(c.age_secs),
            c.bytes_sent.to_string(),
            c.bytes_received.to_string(),
        ]
    }
}

/// One certificate of an identity's chain, as istioctl lists them.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct CertificateLine {
    node: String,
    identity: String,
    state: String,
    renew_at: String,
    #[serde(flatten)]
    certificate: CertificateInfo,
}

impl Row for CertificateLine {
    const KIND: &'static str = "Certificate";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("NODE"),
        Column::Narrow("CERTIFICATE NAME"),
        Column::Narrow("TYPE"),
        Column::Narrow("STATUS"),
        Column::Narrow("VALID CERT"),
        Column::Wide("SERIAL NUMBER"),
        Column::Narrow("NOT AFTER"),
        Column::Wide("NOT BEFORE"),
        Column::Wide("RENEWED AT"),
    ];

    fn cells(&self) -> Vec<String> {
        let c = &self.certificate;
        let valid = if c.serial.is_empty() { String::new() } else { c.valid.to_string() };
        vec![
            self.node.clone(),
            self.identity.clone(),
            c.kind.clone(),
            self.state.clone(),
            valid,
            c.serial.clone(),
            c.not_after.clone(),
            c.not_before.clone(),
            self.renew_at.clone(),
        ]
    }
}

async fn certificates(global: &Global, saved: &Saved) -> Output {
    let rows = target(global, saved).await?.gather::<Vec<CertificateRow>>(Section::Certificates).await.rows();
    let none = |state: &str| CertificateInfo {
        kind: "Leaf".to_owned(),
        serial: String::new(),
        not_before: String::new(),
        not_after: String::new(),
        valid: false,
        pem: state.to_owned(),
    };
    let lines: Vec<CertificateLine> = rows
        .rows
        .into_iter()
        .flat_map(|OnNode { node, item }| {
            let certificates =
                if item.certificates.is_empty() { vec![none(&item.state)] } else { item.certificates.clone() };
            certificates.into_iter().map(move |certificate| CertificateLine {
                node: node.clone(),
                identity: item.identity.clone(),
                state: item.state.clone(),
                renew_at: item.renew_at.clone(),
                certificate,
            })
        })
        .collect();
    finish(render::list(&lines, View::of(global))?, rows.errors)
}

/// A node's log level.
#[derive(Debug, Serialize)]
struct LogLevel {
    level: String,
}

impl Row for OnNode<LogLevel> {
    const KIND: &'static str = "LogLevel";
    const COLUMNS: &'static [Column] = &[Column::Narrow("NODE"), Column::Narrow("LEVEL")];

    fn cells(&self) -> Vec<String> {
        vec![self.node.clone(), self.item.level.clone()]
    }
}

async fn log(global: &Global, level: Option<&str>) -> Output {
    // It goes into a URI as it is; what it may say is the node's business.
    if let Some(level) = level.filter(|level| !level.bytes().all(|b| b.is_ascii_alphanumeric() || b"_:,=".contains(&b)))
    {
        return Err(anyhow!(Usage(format!("`{level}` is not a list of LEVEL and MODULE=LEVEL"))).into());
    }
    let target = target(global, &Saved::default()).await?;
    let (method, path) = match level {
        Some(level) => ("PUT", format!("/logging?level={level}")),
        None => ("GET", "/logging".to_owned()),
    };
    let path = path.as_str();
    let gathered = target.live()?.each(|node| async move {
        let body = node.door.send(method, path, Vec::new()).await?;
        let value: Value = serde_json::from_slice(&body).context("log level")?;
        let level = value["level"].as_str().unwrap_or_default().to_owned();
        Ok(OnNode { node: node.label(), item: LogLevel { level } })
    });
    let gathered = gathered.await;
    finish(render::list(&gathered.answers, View::of(global))?, gathered.errors)
}

async fn all(global: &Global, saved: &Saved) -> Output {
    let target = target(global, saved).await?;
    let format = if global.output == Format::Yaml { Format::Yaml } else { Format::Json };
    if let Target::Dump(dump) = &target {
        return Ok(render::document(dump, format)?);
    }
    let gathered = target.gather_path::<Value>(Section::Status, "/config_dump").await;
    let items: Vec<Value> = gathered
        .answers
        .into_iter()
        .map(|OnNode { node, mut item }| {
            item["node"] = node.into();
            item
        })
        .collect();
    // What the nodes said is wanted most when the controller is away.
    let (controller, more) = target.controller().await;
    let errors = gathered.errors.into_iter().chain(more).collect();
    let dump = json!({"apiVersion": API_VERSION, "kind": "Dump", "controller": controller, "items": items});
    finish(render::document(&dump, format)?, errors)
}
