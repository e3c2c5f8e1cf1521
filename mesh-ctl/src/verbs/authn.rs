//! `mtls-check`: is it mutual TLS from one workload to another, as configured and as observed?

use std::collections::BTreeSet;

use mesh_api::admin::{ConnectionRow, ServiceRow, WorkloadRow};
use serde::Serialize;

use super::authz::{Client, ask, client};
use super::logs::{Ended, Recent, ended, recent};
use super::names::{Destination, Directory};
use super::{Output, finish, found, target};
use crate::cli::{Global, Saved, TlsCheckArgs};
use crate::render::{self, Column, OnNode, Row, View, short_identity};
use crate::target::{Section, Target};

/// A port that no policy names: what holds for all ports but those that are named.
const ANY_PORT: u16 = 1;

/// What is known about a pair.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Pair {
    source: String,
    destination: String,
    /// `OK`: both identities are verified, by mutual TLS between nodes. `PLAINTEXT`: one of them is not in the mesh, or
    /// plaintext was observed all the same. `REFUSED`: plaintext, and the server does not take it on any port.
    status: String,
    /// What the server demands: `STRICT`, `PERMISSIVE`, `MIXED` (not the same on all ports) or `NONE` (not in the mesh).
    server: String,
    /// How the client comes: `HBONE` or `TCP`.
    client: String,
    /// Connections that are live or ended in the last hour.
    observed: Observed,
    /// Identity that the client expects.
    identity: String,
}

/// Connections by what protected them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
struct Observed {
    /// In a tunnel between nodes.
    mtls: usize,
    /// On one node: both identities verified, no wire in between.
    local: usize,
    /// Without identities.
    plain: usize,
    /// Whether those count that ended in the last hour: where the access logs are known.
    with_ended: bool,
}

impl std::fmt::Display for Observed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self { mtls: 0, local: 0, plain: 0, with_ended: true } => f.write_str("nothing in the last hour"),
            Self { mtls: 0, local: 0, plain: 0, with_ended: false } => f.write_str("no live connection"),
            Self { mtls, local: 0, plain, .. } => write!(f, "mtls {mtls} / plain {plain}"),
            Self { mtls, local, plain, .. } => write!(f, "mtls {mtls} / one node {local} / plain {plain}"),
        }
    }
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
            self.observed.to_string(),
            short_identity(&self.identity),
        ]
    }
}

pub(super) async fn run(global: &Global, args: &TlsCheckArgs) -> Output {
    let target = target(global, &Saved::default()).await?;
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
    let (live, logs) = tokio::join!(target.gather::<Vec<ConnectionRow>>(Section::Connections), recent(target.live()?));
    let (live, (logs, unread)) = (live.rows(), logs?);
    let seen = Seen { live: &live.rows, logs: &logs };
    // A node that does not answer has no log either, and is named once.
    let (mut pairs, mut errors) = (Vec::new(), if live.errors.is_empty() { unread } else { live.errors });
    for workload in to {
        let ports = ports(&directory, workload);
        match pair(&target, (from, &source), (workload, &ports), &seen).await {
            Ok(pair) => pairs.push(pair),
            Err(error) => errors.push(error.context(format!("{}.{}", workload.name, workload.namespace))),
        }
    }
    let bad = pairs.iter().any(|pair| pair.status == "PLAINTEXT" || pair.status == "REFUSED");
    let text = render::list(&pairs, View::of(global))?;
    if errors.is_empty() { found(text, bad) } else { finish(text, errors) }
}

/// Ports for which the server may demand another thing: those that services lead to, and one for all others.
fn ports(directory: &Directory, server: &WorkloadRow) -> BTreeSet<u16> {
    let leads_here = |service: &&ServiceRow| service.endpoints.iter().any(|endpoint| endpoint.workload == server.uid);
    let services = directory.services.iter().filter(leads_here);
    services.flat_map(|service| service.ports.iter().filter_map(|port| target_port(port))).chain([ANY_PORT]).collect()
}

/// Of `port->targetPort/protocol`.
fn target_port(text: &str) -> Option<u16> {
    text.split_once("->")?.1.split('/').next()?.parse().ok()
}

/// Connections of the whole mesh.
struct Seen<'a> {
    live: &'a [OnNode<ConnectionRow>],
    logs: &'a Recent,
}

async fn pair(
    target: &Target,
    (from, source): (&WorkloadRow, &Client),
    (to, ports): (&WorkloadRow, &BTreeSet<u16>),
    seen: &Seen<'_>,
) -> anyhow::Result<Pair> {
    let in_mesh = |workload: &WorkloadRow| workload.protocol == "HBONE";
    let server = if in_mesh(to) {
        let plain = Client { identity: String::new(), ..client_of(from, source) };
        let mut strict = 0;
        for port in ports {
            let trace = ask(target, &plain, to, *port).await?.trace;
            // PeerAuthentication becomes a DENY for those without identity; any other refusal is authorization.
            strict +=
                usize::from(trace.iter().any(|t| t.matched && t.action == "DENY" && is_peer_authentication(&t.policy)));
        }
        match strict {
            0 => "PERMISSIVE",
            all if all == ports.len() => "STRICT",
            _ => "MIXED",
        }
    } else {
        "NONE"
    };
    let observed = observed(from, to, seen.live, ended(seen.logs, from, to));
    let status = match (in_mesh(from) && in_mesh(to), server) {
        (true, _) if observed.plain == 0 => "OK",
        (false, "STRICT") => "REFUSED",
        (true | false, _) => "PLAINTEXT",
    };
    Ok(Pair {
        source: source.label.clone(),
        destination: format!("{}.{}", to.name, to.namespace),
        status: status.to_owned(),
        server: server.to_owned(),
        client: if in_mesh(from) && in_mesh(to) { "HBONE" } else { "TCP" }.to_owned(),
        observed: Observed { with_ended: [from, to].iter().all(|end| seen.logs.contains_key(&end.node)), ..observed },
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

/// Connections from one to the other: live and ended ones as the client's node has them, else the server's.
fn observed(from: &WorkloadRow, to: &WorkloadRow, live: &[OnNode<ConnectionRow>], ended: [Ended; 2]) -> Observed {
    let [by_client, by_server] = ended;
    match count(live, (from, "outbound", to), by_client) {
        Observed { mtls: 0, local: 0, plain: 0, .. } => count(live, (to, "inbound", from), by_server),
        counted => counted,
    }
}

fn count(live: &[OnNode<ConnectionRow>], side: (&WorkloadRow, &str, &WorkloadRow), ended: Ended) -> Observed {
    let (workload, direction, other) = side;
    let key = format!("{}.{}", workload.name, workload.namespace);
    let addresses: BTreeSet<&str> = other.addresses.iter().map(String::as_str).collect();
    let remote = |row: &ConnectionRow| {
        row.remote.rsplit_once(':').is_some_and(|(ip, _)| addresses.contains(ip.trim_matches(['[', ']'])))
    };
    let rows = live.iter().map(|row| &row.item);
    let ours = rows.filter(|row| row.workload == key && row.direction == direction && remote(row));
    let ended = Observed { mtls: ended.tunnelled, local: ended.on_one_node, plain: ended.plain, with_ended: false };
    ours.fold(ended, |mut sum, row| {
        match row.protocol.as_str() {
            "HBONE" => sum.mtls += 1,
            "LOCAL" => sum.local += 1,
            // `TCP`, and what a later version may add without identities.
            _ => sum.plain += 1,
        }
        sum
    })
}

/// Whether a policy stands for PeerAuthentication: names under which the controller pushes it (Istio's).
fn is_peer_authentication(policy: &str) -> bool {
    let name = policy.split_once('/').map_or(policy, |(_, name)| name);
    name == "istio_converted_static_strict" || name.starts_with("converted_peer_authentication_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn observations_read_as_sentences_and_never_hide_plaintext() {
        let seen = |mtls, local, plain, with_ended| Observed { mtls, local, plain, with_ended }.to_string();
        assert_eq!(seen(0, 0, 0, true), "nothing in the last hour");
        assert_eq!(seen(0, 0, 0, false), "no live connection");
        assert_eq!(seen(3, 0, 0, true), "mtls 3 / plain 0");
        assert_eq!(seen(0, 0, 2, true), "mtls 0 / plain 2");
        assert_eq!(seen(0, 4, 1, true), "mtls 0 / one node 4 / plain 1");
    }

    #[test]
    fn services_name_the_ports_that_they_lead_to() {
        assert_eq!(target_port("80->8080/TCP"), Some(8080));
        assert_eq!(target_port("80"), None);
    }

    fn workload(name: &str, address: &str) -> WorkloadRow {
        WorkloadRow {
            uid: name.into(),
            name: name.into(),
            namespace: "default".into(),
            addresses: vec![address.into(), "fd00::7".into()],
            node: "n".into(),
            protocol: "HBONE".into(),
            identity: String::new(),
            status: String::new(),
            waypoint: String::new(),
            policies: Vec::new(),
            services: Vec::new(),
            locality: String::new(),
            capacity: 1,
        }
    }

    fn live(workload: &str, direction: &str, remote: &str, protocol: &str) -> OnNode<ConnectionRow> {
        let item = ConnectionRow {
            workload: workload.into(),
            direction: direction.into(),
            local: String::new(),
            remote: remote.into(),
            target: String::new(),
            protocol: protocol.into(),
            peer_identity: String::new(),
            age_secs: 0,
            bytes_sent: 0,
            bytes_received: 0,
        };
        OnNode { node: "n".into(), item }
    }

    #[test]
    fn the_client_is_believed_and_the_server_where_the_client_is_outside() {
        let (from, to) = (workload("a", "10.0.0.1"), workload("b", "10.0.0.2"));
        let rows = [
            live("a.default", "outbound", "10.0.0.2:80", "HBONE"),
            live("a.default", "outbound", "10.0.0.20:80", "TCP"),
            live("b.default", "inbound", "10.0.0.1:999", "TCP"),
        ];
        let none = [Ended::default(); 2];
        assert_eq!(observed(&from, &to, &rows, none), Observed { mtls: 1, ..Observed::default() });
        assert_eq!(observed(&from, &to, &rows[1..], none), Observed { plain: 1, ..Observed::default() });
        let ended = [Ended { on_one_node: 2, ..Ended::default() }, Ended { plain: 5, ..Ended::default() }];
        let both = Observed { mtls: 1, local: 2, ..Observed::default() };
        assert_eq!(observed(&from, &to, &rows, ended), both, "live and ended ones of the client's node add up");
        let by_v6 = [live("a.default", "outbound", "[fd00::7]:80", "LOCAL")];
        assert_eq!(observed(&from, &to, &by_v6, none), Observed { local: 1, ..Observed::default() });
    }
}
