//! `authz why`: asks the destination's node whether it would let a connection in, and why.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, anyhow};
use mesh_api::admin::{AuthzAnswer, AuthzQuestion, EndpointRow, PolicyTrace, ServiceRow, WorkloadRow};
use serde::Serialize;
use serde_json::json;

use super::names::{Destination, Directory};
use super::{Output, target};
use crate::cli::{Global, Saved, WhyArgs};
use crate::exit::{Unavailable, Usage};
use crate::render::{self, API_VERSION, Column, Row, View};
use crate::target::Target;

/// Who connects.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) label: String,
    /// Empty: no identity.
    pub(super) identity: String,
    pub(super) address: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Trace {
    #[serde(flatten)]
    trace: PolicyTrace,
}

impl Row for Trace {
    const KIND: &'static str = "PolicyTrace";
    const COLUMNS: &'static [Column] =
        &[Column::Narrow("ACTION"), Column::Narrow("POLICY"), Column::Narrow("MATCHED"), Column::Narrow("WHY")];

    fn cells(&self) -> Vec<String> {
        let t = &self.trace;
        vec![t.action.clone(), t.policy.clone(), if t.matched { "yes" } else { "no" }.to_owned(), t.detail.clone()]
    }
}

pub(super) async fn run(global: &Global, args: &WhyArgs) -> Output {
    let target = target(global, &Saved::default()).await?;
    let directory = Directory::of(&target, global).await?;
    let client = client(&directory, &args.source)?;
    let (server, port) = endpoint(&directory, &args.destination, args.port)?;
    let (answer, by) = if server.protocol == "HBONE" {
        (ask(&target, &client, server, port).await?, format!("node {}", server.node))
    } else {
        (outside(server), "nobody".to_owned())
    };
    let view = View::of(global);
    if !view.is_table() {
        let document = json!({"apiVersion": API_VERSION, "kind": "AuthzDecision", "items": [answer]});
        return Ok(render::document(&document, view.format)?);
    }
    let mut text = String::new();
    let identity = if client.identity.is_empty() { "no identity (plaintext)" } else { &client.identity };
    // Writing to a `String` cannot fail.
    let _ = writeln!(
        text,
        "{}: {} ({identity}) to {}.{} port {port}, decided by {by}\nreason: {}",
        answer.decision, client.label, server.name, server.namespace, answer.reason
    );
    let rows: Vec<Trace> = answer.trace.into_iter().map(|trace| Trace { trace }).collect();
    if rows.is_empty() {
        text += "no policy concerns the workload\n";
    } else {
        text.push('\n');
        text += &render::list(&rows, view)?;
    }
    Ok(text)
}

/// No node looks at connections to a workload that is not enrolled, whatever policies say.
fn outside(server: &WorkloadRow) -> AuthzAnswer {
    AuthzAnswer {
        decision: "allow".to_owned(),
        policy: String::new(),
        reason: format!("{}.{} is not in the mesh: no policy is enforced there", server.name, server.namespace),
        trace: Vec::new(),
    }
}

/// A workload with its identity if it is in the mesh, or an address without one.
pub(super) fn client(directory: &Directory, text: &str) -> Result<Client> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(Client { label: text.to_owned(), identity: String::new(), address: address.to_string() });
    }
    let workload = directory.workload(text)?;
    Ok(Client {
        label: format!("{}.{}", workload.name, workload.namespace),
        identity: if workload.protocol == "HBONE" { workload.identity.clone() } else { String::new() },
        address: workload.addresses.first().cloned().unwrap_or_default(),
    })
}

/// The workload that would be asked, and its port: of a service the first ready endpoint.
fn endpoint<'a>(directory: &'a Directory, text: &str, port: u16) -> Result<(&'a WorkloadRow, u16)> {
    match directory.destination(text)? {
        Destination::Workload(workload) => Ok((workload, port)),
        Destination::Service(service) => {
            let ready = service.endpoints.iter().find(|endpoint| endpoint.healthy);
            let workload = ready.and_then(|endpoint: &EndpointRow| directory.endpoint(endpoint));
            let workload = workload.ok_or_else(|| anyhow!(Unavailable(format!("{text} has no ready endpoint"))))?;
            Ok((workload, target_port(service, port)?))
        }
    }
}

/// The port behind a service's port, out of `80->8080/TCP`. A named one differs by endpoint and must be given by pod.
fn target_port(service: &ServiceRow, port: u16) -> Result<u16> {
    let rest = service.ports.iter().find_map(|p| p.strip_prefix(&format!("{port}->")));
    let known =
        || anyhow!(Usage(format!("svc/{} has no port {port}; it has {}", service.name, service.ports.join(", "))));
    let target = rest.and_then(|rest| rest.split('/').next()).ok_or_else(known)?;
    target.parse().map_err(|_| {
        anyhow!(Usage(format!("port {port} of svc/{} is a named port: name a pod and its port", service.name)))
    })
}

/// Asks the node of the destination.
pub(super) async fn ask(target: &Target, client: &Client, server: &WorkloadRow, port: u16) -> Result<AuthzAnswer> {
    let same_family = |address: &&String| address.contains(':') == client.address.contains(':');
    let address = server.addresses.iter().find(same_family).or(server.addresses.first());
    let address: IpAddr = address
        .and_then(|a| a.parse().ok())
        .ok_or_else(|| anyhow!(Unavailable(format!("{}.{} has no address", server.name, server.namespace))))?;
    let question = AuthzQuestion {
        client: client.identity.clone(),
        source: client.address.clone(),
        destination: SocketAddr::new(address, port).to_string(),
    };
    let door = target.door_of(&server.node).await?;
    door.post("/authz", &question).await.with_context(|| format!("node {}", server.node))
}
