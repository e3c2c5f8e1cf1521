//! `v1/Service` to [`Service`], and how each endpoint serves its ports.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::inputs::{Inputs, ServiceInput};
use super::objects::{self, Kind, Meta, ObjectKey, Pod, Protocol, ServiceKind, ServicePort, TargetPort};
use super::problem::{Code, Findings};
use super::{Settings, Waypoints};
use crate::flow::HBONE_PORT;
use crate::service::{HealthPolicy, LbMode, LoadBalancing, Scope, Service};
use crate::workload::{AppProtocol, GatewayAddress, GatewayDestination, PortMapping, ServiceName};

/// Annotation that says the same as `spec.trafficDistribution`, on a Service or its Namespace.
const TRAFFIC_DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";
const USE_WAYPOINT: &str = "istio.io/use-waypoint";
const USE_WAYPOINT_NAMESPACE: &str = "istio.io/use-waypoint-namespace";

/// `namespace/hostname` of a Service object.
pub(crate) fn key(meta: &Meta, settings: &Settings) -> ServiceName {
    ServiceName { namespace: meta.namespace.clone(), hostname: hostname(&meta.name, &meta.namespace, settings) }
}

fn hostname(name: &str, namespace: &str, settings: &Settings) -> Arc<str> {
    format!("{name}.{namespace}.svc.{}", settings.domain).into()
}

/// What makes a Service unusable.
pub(crate) fn findings(object: &objects::Service) -> Findings {
    let key = ObjectKey::new(Kind::Service, &object.meta.namespace, &object.meta.name);
    let mut findings = Findings::about(key, &object.meta);
    let mut seen = std::collections::BTreeSet::new();
    for (i, port) in object.ports.iter().enumerate() {
        if port.port == 0 {
            findings.error(format!("spec.ports[{i}].port"), "0 is not a port", "use 1 to 65535");
        }
        if port.target == TargetPort::Number(0) {
            findings.error(format!("spec.ports[{i}].targetPort"), "0 is not a port", "use 1 to 65535, or a name");
        }
        if !seen.insert((port.port, port.protocol as u8)) {
            let message = format!("port {} is there twice", port.port);
            findings.error(format!("spec.ports[{i}].port"), message, "remove one of them");
        }
    }
    findings
}

/// The service that node proxies see; none for an alias.
pub(crate) fn service(input: &ServiceInput, inputs: &Inputs, settings: &Settings) -> (Option<Service>, Findings) {
    let object = &input.object;
    let own = ObjectKey::new(Kind::Service, &object.meta.namespace, &object.meta.name);
    let mut findings = Findings::about(own.clone(), &object.meta);
    if object.kind == ServiceKind::ExternalName {
        return (None, findings);
    }
    let mut vips = Vec::new();
    for ip in &object.cluster_ips {
        match inputs.owner(ip.to_canonical()) {
            Some(owner) if *owner != own => findings.warn(
                Code::AddressTaken,
                "spec.clusterIPs",
                format!("{ip} belongs to {owner}; the service is not reachable there"),
                "give the service an address of its own",
            ),
            Some(_) | None => vips.push((settings.network.clone(), ip.to_canonical())),
        }
    }
    let ports = tcp_ports(object)
        .map(|port| PortMapping {
            service_port: port.port,
            target_port: match port.target {
                TargetPort::Number(number) => number,
                TargetPort::Name(_) => 0,
            },
            app_protocol: app_protocol(port),
        })
        .collect();
    let namespace = inputs.namespace(&object.meta.namespace).map(|n| &n.meta);
    let service = Service {
        key: input.key.clone(),
        name: object.meta.name.clone(),
        vips,
        ports,
        subject_alt_names: Vec::new(),
        waypoint: waypoint(&object.meta, namespace, settings),
        load_balancing: load_balancing(object, namespace, &mut findings),
    };
    (Some(service), findings)
}

/// Ports that the mesh carries.
fn tcp_ports(object: &objects::Service) -> impl Iterator<Item = &ServicePort> {
    object.ports.iter().filter(|p| p.protocol == Protocol::Tcp)
}

/// How a pod serves a Service that has no EndpointSlices: target ports by number, or by the pod's own port names.
pub(crate) fn ports_of_pod(service: &objects::Service, pod: &Pod) -> Vec<PortMapping> {
    mappings(service, |port| match &port.target {
        TargetPort::Number(number) => *number,
        TargetPort::Name(name) => {
            pod.ports.iter().find(|p| p.name == *name && p.protocol == Protocol::Tcp).map_or(0, |p| p.port)
        }
    })
}

/// How the endpoints of a slice serve its Service; a slice names the service's ports.
pub(crate) fn ports_of_slice(service: &objects::Service, slice: &objects::EndpointSlice) -> Vec<PortMapping> {
    mappings(service, |port| {
        slice.ports.iter().find(|p| p.name == port.name && p.protocol == Protocol::Tcp).map_or(0, |p| p.port)
    })
}

/// How a WorkloadEntry serves a Service: its own number for the port's name, else the target port.
pub(crate) fn ports_of_entry(service: &objects::Service, ports: &BTreeMap<Arc<str>, u16>) -> Vec<PortMapping> {
    mappings(service, |port| {
        let named = ports.get(&port.name).copied();
        named.unwrap_or_else(|| match &port.target {
            TargetPort::Number(number) => *number,
            TargetPort::Name(name) => ports.get(name).copied().unwrap_or(0),
        })
    })
}

fn mappings(service: &objects::Service, target: impl Fn(&ServicePort) -> u16) -> Vec<PortMapping> {
    tcp_ports(service)
        .map(|port| PortMapping {
            service_port: port.port,
            target_port: target(port),
            app_protocol: app_protocol(port),
        })
        .collect()
}

/// `appProtocol`, else the part of the port's name before `-` (Istio's protocol selection).
fn app_protocol(port: &ServicePort) -> AppProtocol {
    let declared = port.app_protocol.as_deref().unwrap_or_else(|| port.name.split('-').next().unwrap_or_default());
    match declared.to_ascii_lowercase().as_str() {
        "http" | "kubernetes.io/ws" => AppProtocol::Http11,
        "http2" | "kubernetes.io/h2c" => AppProtocol::Http2,
        "grpc" | "grpc-web" => AppProtocol::Grpc,
        "tcp" | "mongo" | "mysql" | "redis" => AppProtocol::Tcp,
        "https" | "tls" | "kubernetes.io/wss" => AppProtocol::Tls,
        // Any other word is somebody else's protocol; it is carried as bytes.
        _ => AppProtocol::Unknown,
    }
}

fn load_balancing(
    object: &objects::Service,
    namespace: Option<&Meta>,
    findings: &mut Findings,
) -> Option<LoadBalancing> {
    let health = if object.publish_not_ready { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
    if object.local_only {
        return Some(LoadBalancing { preference: vec![Scope::Node], mode: LbMode::Strict, health });
    }
    let annotated = |meta: &Meta| meta.annotations.get(TRAFFIC_DISTRIBUTION).cloned();
    let distribution = object
        .traffic_distribution
        .clone()
        .or_else(|| annotated(&object.meta))
        .or_else(|| namespace.and_then(annotated));
    let preference = match distribution.as_deref() {
        None | Some("" | "Any") => Vec::new(),
        Some("PreferClose" | "PreferSameZone") => vec![Scope::Network, Scope::Region, Scope::Zone],
        Some("PreferSameNode") => vec![Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node],
        Some("PreferSameNetwork") => vec![Scope::Network],
        Some("PreferSameRegion") => vec![Scope::Network, Scope::Region],
        Some(other) => {
            findings.warn(
                Code::UnknownValue,
                "spec.trafficDistribution",
                format!("`{other}` is not known; endpoints are chosen without regard to place"),
                "use PreferSameZone or PreferSameNode",
            );
            Vec::new()
        }
    };
    match (preference.is_empty(), health) {
        (true, HealthPolicy::OnlyHealthy) => None,
        (_, health) => Some(LoadBalancing { preference, mode: LbMode::Failover, health }),
    }
}

/// The waypoint that the object's label names, else its namespace's. A waypoint that is not there is a name without
/// endpoints: clients refuse rather than go around it.
pub(crate) fn waypoint(object: &Meta, namespace: Option<&Meta>, settings: &Settings) -> Option<GatewayAddress> {
    if settings.waypoints == Waypoints::Ignored {
        return None;
    }
    let meta = [Some(object), namespace].into_iter().flatten().find(|m| m.labels.contains_key(USE_WAYPOINT))?;
    let name = meta.label(USE_WAYPOINT);
    if name.is_empty() || name == "none" || name == "#none" {
        return None;
    }
    let namespace = match meta.label(USE_WAYPOINT_NAMESPACE) {
        "" => object.namespace.clone(),
        other => other.into(),
    };
    let hostname = hostname(name, &namespace, settings);
    let destination = GatewayDestination::Hostname(ServiceName { namespace, hostname });
    Some(GatewayAddress { destination, hbone_port: HBONE_PORT })
}
