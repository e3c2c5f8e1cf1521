//! `mtls-check`: is it mutual TLS from one workload to another, as configured and as observed?

use std::collections::BTreeSet;

use mesh_api::admin::{ConnectionRow, WorkloadRow};
use serde::Serialize;

use super::authz::{Client, ask, client};
use super::names::{Destination, Directory};
use super::{Output, found, target};
use crate::cli::{Global, Saved, TlsCheckArgs};
use crate::render::{self, Column, OnNode, Row, View, short_identity};
use crate::target::{Section, Target};

/// A port that no policy names, to ask what plaintext may do where no port was given.
const ANY_PORT: u16 = 1;

/// What is known about a pair.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Pair {
    source: String,
    destination: String,
    /// `OK`: mutual TLS always. `OPEN`: mutual TLS between these, but the server takes plaintext from others too.
    /// `PLAINTEXT`: one of them is not in the mesh. `REFUSED`: plaintext, and the server does not take it.
    status: String,
    /// What the server demands: `STRICT`, `PERMISSIVE` or `NONE` (not in the mesh).
    server: String,
    /// How the client comes: `HBONE` or `TCP`.
    client: String,
    /// Live connections with verified identities, and without.
    observed: String,
    /// Identity that the client expects.
    identity: String,
}

impl Row for Pair {
    const KIND: &'static str = "TlsCheck";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("SOURCE"),
        Column::Narrow("DESTINATION"),
        Column::Narrow("STATUS"),
        Column::Narrow("SERVER"),
        Column::Narrow("CLIENT"),
        Column::Narrow("OBSERVED"),
        Column::Narrow("IDENTITY"),
    ];

    fn cells(&self) -> Vec<String> {
        vec![
            self.source.clone(),
            self.destination.clone(),
            self.status.clone(),
            self.server.clone(),
            self.client.clone(),
            self.observed.clone(),
            short_identity(&self.identity),
        ]
    }
}

pub(super) async fn run(global: &Global, args: &TlsCheckArgs) -> Output {
    let target = target(global, &Saved::default())?;
    let directory = Directory::of(&target, global).await?;
    let from = directory.workload(&args.source)?;
    let source = client(&directory, &args.source)?;
    let to: Vec<&WorkloadRow> = match &args.destination {
        None => directory.workloads.iter().filter(|w| w.uid != from.uid).collect(),
        Some(text) => match directory.destination(text)? {
            Destination::Workload(workload) => vec![workload],
            Destination::Service(service) => {
                service.endpoints.iter().filter_map(|endpoint| directory.endpoint(endpoint)).collect()
            }
        },
    };
    let live = target.gather::<Vec<ConnectionRow>>(Section::Connections).await.rows().rows;
    let mut pairs = Vec::new();
    for workload in to {
        pairs.push(pair(&target, from, &source, workload, &live).await?);
    }
    let bad = pairs.iter().any(|pair| pair.status == "PLAINTEXT" || pair.status == "REFUSED");
    found(render::list(&pairs, View::of(global))?, bad)
}

async fn pair(
    target: &Target,
    from: &WorkloadRow,
    source: &Client,
    to: &WorkloadRow,
    live: &[OnNode<ConnectionRow>],
) -> anyhow::Result<Pair> {
    let in_mesh = |workload: &WorkloadRow| workload.protocol == "HBONE";
    let server = if in_mesh(to) {
        let plain = Client { identity: String::new(), ..client_of(from, source) };
        let answer = ask(target, &plain, to, ANY_PORT).await?;
        // PeerAuthentication becomes a DENY for those without identity; any other refusal is authorization.
        let strict = answer.trace.iter().any(|t| t.matched && t.action == "DENY" && is_peer_authentication(&t.policy));
        if strict { "STRICT" } else { "PERMISSIVE" }
    } else {
        "NONE"
    };
    let status = match (in_mesh(from) && in_mesh(to), server) {
        (true, "STRICT") => "OK",
        (true, _) => "OPEN",
        (false, "STRICT") => "REFUSED",
        (false, _) => "PLAINTEXT",
    };
    let (verified, plain) = observed(from, to, live);
    Ok(Pair {
        source: source.label.clone(),
        destination: format!("{}.{}", to.name, to.namespace),
        status: status.to_owned(),
        server: server.to_owned(),
        client: if in_mesh(from) && in_mesh(to) { "HBONE" } else { "TCP" }.to_owned(),
        observed: match (verified, plain) {
            (0, 0) => "no live connection".to_owned(),
            (verified, plain) => format!("mtls {verified} / plain {plain}"),
        },
        identity: if in_mesh(to) { to.identity.clone() } else { String::new() },
    })
}

fn client_of(from: &WorkloadRow, source: &Client) -> Client {
    Client {
        label: format!("{}.{}", from.name, from.namespace),
        identity: source.identity.clone(),
        address: source.address.clone(),
    }
}

/// Live connections from one to the other as the client's node has them, else the server's: with identity, without.
fn observed(from: &WorkloadRow, to: &WorkloadRow, live: &[OnNode<ConnectionRow>]) -> (usize, usize) {
    let count = |workload: &WorkloadRow, direction: &str, other: &WorkloadRow| {
        let key = format!("{}.{}", workload.name, workload.namespace);
        let addresses: BTreeSet<&str> = other.addresses.iter().map(String::as_str).collect();
        let remote = |row: &ConnectionRow| {
            row.remote.rsplit_once(':').is_some_and(|(ip, _)| addresses.contains(ip.trim_matches(['[', ']'])))
        };
        let rows = live.iter().map(|row| &row.item);
        let ours = rows.filter(|row| row.workload == key && row.direction == direction && remote(row));
        ours.fold(
            (0, 0),
            |(verified, plain), row| {
                if row.peer_identity.is_empty() { (verified, plain + 1) } else { (verified + 1, plain) }
            },
        )
    };
    match count(from, "outbound", to) {
        (0, 0) => count(to, "inbound", from),
        counted => counted,
    }
}

/// Whether a policy stands for PeerAuthentication: names under which the controller pushes it (Istio's).
fn is_peer_authentication(policy: &str) -> bool {
    let name = policy.split_once('/').map_or(policy, |(_, name)| name);
    name == "istio_converted_static_strict" || name.starts_with("converted_peer_authentication_")
}
