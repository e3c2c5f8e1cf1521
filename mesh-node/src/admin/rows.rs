//! The configuration as the admin interface shows it.

use std::fmt::Display;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_api::admin::{EndpointRow, PolicyRow, PolicyTrace, ServiceRow, WorkloadRow};
use mesh_core::authorize::Trace;
use mesh_core::flow::Refusal;
use mesh_core::plan::rank;
use mesh_core::policy::{Action, Clause, Match, Policy, PolicyScope, Rule, ServiceAccountMatch, StringMatch};
use mesh_core::service::{HealthPolicy, Service};
use mesh_core::snapshot::Snapshot;
use mesh_core::workload::{
    AppProtocol, GatewayAddress, GatewayDestination, Health, Locality, PortMapping, Tunnel, Workload,
};

use crate::runtime::View;

pub(super) fn workloads(snapshot: &Snapshot) -> Vec<WorkloadRow> {
    snapshot.workloads().map(|workload| workload_row(snapshot, workload)).collect()
}

fn workload_row(snapshot: &Snapshot, workload: &Workload) -> WorkloadRow {
    WorkloadRow {
        uid: workload.uid.to_string(),
        name: workload.name.to_string(),
        namespace: workload.namespace().to_string(),
        addresses: texts(&workload.addresses),
        node: workload.node.to_string(),
        protocol: match workload.tunnel {
            Tunnel::Hbone => "HBONE".to_owned(),
            Tunnel::None => "TCP".to_owned(),
        },
        identity: workload.identity.to_string(),
        status: match workload.health {
            Health::Healthy => "healthy".to_owned(),
            Health::Unhealthy => "unhealthy".to_owned(),
        },
        waypoint: waypoint(workload.waypoint.as_ref()),
        policies: snapshot
            .policies_for(workload)
            .map(|policy| match policy {
                Ok(policy) => policy.name.to_string(),
                Err(missing) => format!("{missing} (missing)"),
            })
            .collect(),
        services: workload.services.keys().map(ToString::to_string).collect(),
        locality: locality(&workload.locality),
        capacity: workload.capacity,
    }
}

/// Endpoints are ranked as the first workload that is enrolled here sees them.
pub(super) fn services(view: &View) -> Vec<ServiceRow> {
    let here = view.enrolled.keys().find_map(|uid| view.workload_of(uid));
    view.snapshot.services().map(|service| service_row(&view.snapshot, service, here)).collect()
}

fn service_row(snapshot: &Snapshot, service: &Service, here: Option<&Arc<Workload>>) -> ServiceRow {
    let all = service.load_balancing.as_ref().is_some_and(|lb| lb.health == HealthPolicy::AllowAll);
    let endpoints = snapshot.endpoints(&service.key).iter().map(|endpoint| EndpointRow {
        workload: endpoint.uid.to_string(),
        address: endpoint.addresses.first().map(IpAddr::to_string).unwrap_or_default(),
        node: endpoint.node.to_string(),
        healthy: all || endpoint.health == Health::Healthy,
        rank: here.and_then(|here| rank(service.load_balancing.as_ref(), here, endpoint)).unwrap_or_default(),
        weight: endpoint.capacity,
    });
    ServiceRow {
        name: service.name.to_string(),
        namespace: service.key.namespace.to_string(),
        hostname: service.key.hostname.to_string(),
        vips: service.vips.iter().map(|(_, vip)| vip.to_string()).collect(),
        ports: service.ports.iter().map(port).collect(),
        waypoint: waypoint(service.waypoint.as_ref()),
        endpoints: endpoints.collect(),
    }
}

fn port(port: &PortMapping) -> String {
    let protocol = match port.app_protocol {
        AppProtocol::Http11 => "HTTP",
        AppProtocol::Http2 => "HTTP2",
        AppProtocol::Grpc => "GRPC",
        AppProtocol::Tls => "TLS",
        AppProtocol::Tcp | AppProtocol::Unknown => "TCP",
    };
    match port.target_port {
        0 => format!("{}->named/{protocol}", port.service_port),
        target => format!("{}->{target}/{protocol}", port.service_port),
    }
}

fn waypoint(waypoint: Option<&GatewayAddress>) -> String {
    waypoint
        .map(|gateway| match &gateway.destination {
            GatewayDestination::Address { address, .. } => format!("{address}:{}", gateway.hbone_port),
            GatewayDestination::Hostname(name) => format!("{name}:{}", gateway.hbone_port),
        })
        .unwrap_or_default()
}

fn locality(locality: &Locality) -> String {
    let parts = [&locality.region, &locality.zone, &locality.subzone];
    parts.iter().take_while(|part| !part.is_empty()).map(|part| &***part).collect::<Vec<_>>().join("/")
}

pub(super) fn policies(snapshot: &Snapshot) -> Vec<PolicyRow> {
    snapshot.policies().map(|policy| policy_row(policy)).collect()
}

fn policy_row(policy: &Policy) -> PolicyRow {
    PolicyRow {
        name: policy.name.name.to_string(),
        namespace: policy.name.namespace.to_string(),
        action: action(policy.action).to_owned(),
        scope: match policy.scope {
            PolicyScope::Global => "Global",
            PolicyScope::Namespace => "Namespace",
            PolicyScope::Workload => "WorkloadSelector",
        }
        .to_owned(),
        dry_run: policy.dry_run,
        rules: policy.rules.iter().map(rule).collect(),
    }
}

fn action(action: Action) -> &'static str {
    match action {
        Action::Allow => "ALLOW",
        Action::Deny => "DENY",
    }
}

fn rule(rule: &Rule) -> String {
    if rule.clauses.is_empty() {
        return "always".to_owned();
    }
    rule.clauses.iter().map(clause).collect::<Vec<_>>().join(" and ")
}

fn clause(clause: &Clause) -> String {
    match clause.matches.as_slice() {
        [] => "anything".to_owned(),
        [one] => one_match(one),
        many => format!("({})", many.iter().map(one_match).collect::<Vec<_>>().join(" or ")),
    }
}

fn one_match(m: &Match) -> String {
    let fields = [
        field("namespace", &m.namespaces, string_match),
        field("not namespace", &m.not_namespaces, string_match),
        field("principal", &m.principals, string_match),
        field("not principal", &m.not_principals, string_match),
        field("service account", &m.service_accounts, service_account),
        field("not service account", &m.not_service_accounts, service_account),
        field("source IP", &m.source_ips, ToString::to_string),
        field("not source IP", &m.not_source_ips, ToString::to_string),
        field("destination IP", &m.destination_ips, ToString::to_string),
        field("not destination IP", &m.not_destination_ips, ToString::to_string),
        field("port", &m.destination_ports, ToString::to_string),
        field("not port", &m.not_destination_ports, ToString::to_string),
    ];
    let fields: Vec<String> = fields.into_iter().flatten().collect();
    if fields.is_empty() { "HTTP fields only".to_owned() } else { fields.join(", ") }
}

fn field<T>(name: &str, values: &[T], text: impl Fn(&T) -> String) -> Option<String> {
    let values: Vec<String> = values.iter().map(text).collect();
    (!values.is_empty()).then(|| format!("{name} {}", values.join("|")))
}

fn string_match(value: &StringMatch) -> String {
    match value {
        StringMatch::Exact(text) => text.to_string(),
        StringMatch::Prefix(text) => format!("{text}*"),
        StringMatch::Suffix(text) => format!("*{text}"),
        StringMatch::Presence => "*".to_owned(),
    }
}

fn service_account(account: &ServiceAccountMatch) -> String {
    format!("{}/{}", account.namespace, account.service_account)
}

pub(super) fn trace(trace: Trace) -> PolicyTrace {
    PolicyTrace {
        policy: trace.policy.to_string(),
        action: trace.action.map(action).unwrap_or_default().to_owned(),
        matched: trace.matched,
        detail: trace.detail,
    }
}

/// The policy that a refusal names, if one does.
pub(super) fn refusing_policy(refusal: &Refusal) -> String {
    match refusal {
        Refusal::Denied(policy) | Refusal::PolicyMissing(policy) => policy.to_string(),
        Refusal::NoAllowMatched
        | Refusal::UnknownWorkload(_)
        | Refusal::NoEndpoint(_)
        | Refusal::NoPort(..)
        | Refusal::ReservedPort(_)
        | Refusal::WaypointNotReady(_)
        | Refusal::ForeignTrustDomain(_)
        | Refusal::SourceUnknown => String::new(),
    }
}

fn texts(values: &[impl Display]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}
