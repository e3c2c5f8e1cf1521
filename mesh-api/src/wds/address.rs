//! `istio.workload.Address`: workloads and services.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::flow::HBONE_PORT;
use mesh_core::identity::SpiffeId;
use mesh_core::policy::PolicyName;
use mesh_core::service::{HealthPolicy, LbMode, LoadBalancing, Scope, Service};
use mesh_core::snapshot::Change;
use mesh_core::workload::{
    AppProtocol, GatewayAddress, GatewayDestination, Health, Locality, NetworkMode, PortMapping, ServiceName, Tunnel,
    Workload, WorkloadType, WorkloadUid,
};

use super::{WireError, authorization, invalid, message, service_name};
use crate::proto::workload as proto;

const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
const DEFAULT_SERVICE_ACCOUNT: &str = "default";

/// Decodes a workload or a service. Fields that this version does not know are ignored.
pub fn decode_address(bytes: &[u8]) -> Result<Change, WireError> {
    let address: proto::Address = message(bytes)?;
    match &address.r#type {
        Some(proto::address::Type::Workload(w)) => workload_from_proto(w).map(|w| Change::UpsertWorkload(w.into())),
        Some(proto::address::Type::Service(s)) => service_from_proto(s).map(|s| Change::UpsertService(s.into())),
        None => Err(WireError::Unknown { path: "type".into(), what: "kind of address".into() }),
    }
}

/// Message to workload.
pub fn workload_from_proto(w: &proto::Workload) -> Result<Workload, WireError> {
    if w.uid.is_empty() {
        return Err(invalid("uid", "is empty"));
    }
    let services = w
        .services
        .iter()
        .map(|(key, ports)| {
            let name =
                service_name(key).ok_or_else(|| invalid("services", format!("`{key}` is not NAMESPACE/HOST")))?;
            Ok((name, ports.ports.iter().map(port_from_proto).collect::<Result<Vec<_>, WireError>>()?))
        })
        .collect::<Result<_, WireError>>()?;
    let policies = w
        .authorization_policies
        .iter()
        .map(|name| {
            authorization::policy_name(name)
                .ok_or_else(|| invalid("authorization_policies", format!("`{name}` is not NAMESPACE/NAME")))
        })
        .collect::<Result<Vec<PolicyName>, WireError>>()?;
    let locality = w.locality.clone().unwrap_or_default();
    Ok(Workload {
        uid: WorkloadUid(text(&w.uid)),
        name: text(&w.name),
        identity: identity(w)?,
        addresses: w.addresses.iter().map(|a| ip_from_bytes("addresses", a)).collect::<Result<_, _>>()?,
        hostname: text(&w.hostname),
        network: text(&w.network),
        cluster: text(&w.cluster_id),
        node: text(&w.node),
        tunnel: tunnel(w)?,
        native_tunnel: w.native_tunnel,
        network_mode: match proto::NetworkMode::try_from(w.network_mode) {
            Ok(proto::NetworkMode::Standard) => NetworkMode::Standard,
            Ok(proto::NetworkMode::HostNetwork) => NetworkMode::HostNetwork,
            Err(_) => return Err(invalid("network_mode", format!("value {}", w.network_mode))),
        },
        canonical_name: text(&w.canonical_name),
        canonical_revision: text(&w.canonical_revision),
        workload_type: match proto::WorkloadType::try_from(w.workload_type) {
            Ok(proto::WorkloadType::Deployment) => WorkloadType::Deployment,
            Ok(proto::WorkloadType::Cronjob) => WorkloadType::CronJob,
            Ok(proto::WorkloadType::Job) => WorkloadType::Job,
            // Telemetry only; a kind of owner that is new to us is shown as a pod.
            Ok(proto::WorkloadType::Pod) | Err(_) => WorkloadType::Pod,
        },
        workload_name: text(&w.workload_name),
        locality: Locality {
            region: text(&locality.region),
            zone: text(&locality.zone),
            subzone: text(&locality.subzone),
        },
        capacity: w.capacity.unwrap_or(1),
        health: match proto::WorkloadStatus::try_from(w.status) {
            Ok(proto::WorkloadStatus::Healthy) => Health::Healthy,
            // A status that is new to us is not known to be good.
            Ok(proto::WorkloadStatus::Unhealthy) | Err(_) => Health::Unhealthy,
        },
        waypoint: w.waypoint.as_ref().map(|g| gateway_from_proto("waypoint", g)).transpose()?,
        network_gateway: w.network_gateway.as_ref().map(|g| gateway_from_proto("network_gateway", g)).transpose()?,
        policies,
        services,
    })
}

/// Names that Kubernetes would not give are refused, because identities are put together from them.
fn identity(w: &proto::Workload) -> Result<SpiffeId, WireError> {
    let or = |value: &str, default: &'static str| if value.is_empty() { default.into() } else { value.to_owned() };
    let id = format!(
        "spiffe://{}/ns/{}/sa/{}",
        or(&w.trust_domain, DEFAULT_TRUST_DOMAIN),
        w.namespace,
        or(&w.service_account, DEFAULT_SERVICE_ACCOUNT)
    );
    id.parse().map_err(|e: mesh_core::identity::InvalidSpiffeId| invalid("service_account", e.to_string()))
}

fn tunnel(w: &proto::Workload) -> Result<Tunnel, WireError> {
    match proto::TunnelProtocol::try_from(w.tunnel_protocol) {
        Ok(proto::TunnelProtocol::Hbone) => Ok(Tunnel::Hbone),
        // A sidecar that takes Istio's TLS takes plain TCP as well, unless it is STRICT; it cannot be reached by HBONE.
        Ok(proto::TunnelProtocol::None | proto::TunnelProtocol::LegacyIstioMtls) => Ok(Tunnel::None),
        // Sending in clear to a workload that wants a tunnel would be wrong.
        Err(_) => Err(invalid("tunnel_protocol", format!("value {}", w.tunnel_protocol))),
    }
}

/// Message to service.
pub fn service_from_proto(s: &proto::Service) -> Result<Service, WireError> {
    if s.hostname.is_empty() || s.namespace.is_empty() {
        return Err(invalid("hostname", "namespace or hostname is empty"));
    }
    let vip = |a: &proto::NetworkAddress| Ok((text(&a.network), ip_from_bytes("addresses", &a.address)?));
    Ok(Service {
        key: ServiceName { namespace: text(&s.namespace), hostname: text(&s.hostname) },
        name: text(&s.name),
        // An address with a prefix length stands for a range, which needs a waypoint; it is not a VIP.
        vips: s.addresses.iter().filter(|a| is_host(a)).map(vip).collect::<Result<_, _>>()?,
        ports: s.ports.iter().map(port_from_proto).collect::<Result<_, _>>()?,
        subject_alt_names: s.subject_alt_names.iter().map(|n| text(n)).collect(),
        waypoint: s.waypoint.as_ref().map(|g| gateway_from_proto("waypoint", g)).transpose()?,
        load_balancing: s.load_balancing.as_ref().and_then(load_balancing_from_proto),
    })
}

fn is_host(address: &proto::NetworkAddress) -> bool {
    let bits = u32::try_from(address.address.len() * 8).unwrap_or(u32::MAX);
    address.length.is_none_or(|length| length == bits)
}

fn port_from_proto(port: &proto::Port) -> Result<PortMapping, WireError> {
    let number = |field, value: u32| u16::try_from(value).map_err(|_| invalid(field, format!("{value} is not a port")));
    Ok(PortMapping {
        service_port: number("ports.service_port", port.service_port)?,
        target_port: number("ports.target_port", port.target_port)?,
        app_protocol: match proto::AppProtocol::try_from(port.app_protocol) {
            Ok(proto::AppProtocol::Http11) => AppProtocol::Http11,
            Ok(proto::AppProtocol::Http2) => AppProtocol::Http2,
            Ok(proto::AppProtocol::Grpc) => AppProtocol::Grpc,
            Ok(proto::AppProtocol::Tcp) => AppProtocol::Tcp,
            Ok(proto::AppProtocol::Tls) => AppProtocol::Tls,
            // The node proxy carries bytes; the protocol is a hint.
            Ok(proto::AppProtocol::Unknown) | Err(_) => AppProtocol::Unknown,
        },
    })
}

fn gateway_from_proto(field: &'static str, g: &proto::GatewayAddress) -> Result<GatewayAddress, WireError> {
    use proto::gateway_address::Destination;
    let destination = match &g.destination {
        Some(Destination::Hostname(h)) => {
            GatewayDestination::Hostname(ServiceName { namespace: text(&h.namespace), hostname: text(&h.hostname) })
        }
        Some(Destination::Address(a)) => {
            GatewayDestination::Address { network: text(&a.network), address: ip_from_bytes(field, &a.address)? }
        }
        // Ignoring it would send traffic around the gateway.
        None => return Err(invalid(field, "has no destination")),
    };
    let hbone_port = match g.hbone_mtls_port {
        0 => HBONE_PORT,
        port => u16::try_from(port).map_err(|_| invalid(field, format!("{port} is not a port")))?,
    };
    Ok(GatewayAddress { destination, hbone_port })
}

/// Preferences that are new to us are left out: endpoints are then chosen worse, not wrongly.
fn load_balancing_from_proto(lb: &proto::LoadBalancing) -> Option<LoadBalancing> {
    use proto::load_balancing as wire;
    let scope = |scope: &i32| match wire::Scope::try_from(*scope) {
        Ok(wire::Scope::Region) => Some(Scope::Region),
        Ok(wire::Scope::Zone) => Some(Scope::Zone),
        Ok(wire::Scope::Subzone) => Some(Scope::Subzone),
        Ok(wire::Scope::Node) => Some(Scope::Node),
        Ok(wire::Scope::Cluster) => Some(Scope::Cluster),
        Ok(wire::Scope::Network) => Some(Scope::Network),
        Ok(wire::Scope::UnspecifiedScope) | Err(_) => None,
    };
    let preference: Vec<Scope> = lb.routing_preference.iter().filter_map(scope).collect();
    let health = match wire::HealthPolicy::try_from(lb.health_policy) {
        Ok(wire::HealthPolicy::AllowAll) => HealthPolicy::AllowAll,
        Ok(wire::HealthPolicy::OnlyHealthy) | Err(_) => HealthPolicy::OnlyHealthy,
    };
    let mode = match wire::Mode::try_from(lb.mode) {
        Ok(wire::Mode::Strict) => LbMode::Strict,
        Ok(wire::Mode::Passthrough) => LbMode::Passthrough,
        Ok(wire::Mode::Failover | wire::Mode::UnspecifiedMode) | Err(_) => LbMode::Failover,
    };
    let says_nothing = mode == LbMode::Failover && preference.is_empty() && health == HealthPolicy::OnlyHealthy;
    (!says_nothing).then_some(LoadBalancing { preference, mode, health })
}

/// Workload to message.
pub fn workload_to_proto(w: &Workload) -> proto::Workload {
    let ports = |list: &Vec<PortMapping>| proto::PortList { ports: list.iter().map(port_to_proto).collect() };
    let empty_locality = w.locality == Locality::default();
    proto::Workload {
        name: w.name.to_string(),
        namespace: w.identity.namespace.to_string(),
        addresses: w.addresses.iter().map(|ip| ip_to_bytes(*ip)).collect(),
        network: w.network.to_string(),
        tunnel_protocol: match w.tunnel {
            Tunnel::None => proto::TunnelProtocol::None,
            Tunnel::Hbone => proto::TunnelProtocol::Hbone,
        }
        .into(),
        trust_domain: or_empty(&w.identity.trust_domain, DEFAULT_TRUST_DOMAIN),
        service_account: or_empty(&w.identity.service_account, DEFAULT_SERVICE_ACCOUNT),
        waypoint: w.waypoint.as_ref().map(gateway_to_proto),
        node: w.node.to_string(),
        canonical_name: w.canonical_name.to_string(),
        canonical_revision: w.canonical_revision.to_string(),
        workload_type: match w.workload_type {
            WorkloadType::Deployment => proto::WorkloadType::Deployment,
            WorkloadType::CronJob => proto::WorkloadType::Cronjob,
            WorkloadType::Pod => proto::WorkloadType::Pod,
            WorkloadType::Job => proto::WorkloadType::Job,
        }
        .into(),
        workload_name: w.workload_name.to_string(),
        native_tunnel: w.native_tunnel,
        authorization_policies: w.policies.iter().map(ToString::to_string).collect(),
        status: match w.health {
            Health::Healthy => proto::WorkloadStatus::Healthy,
            Health::Unhealthy => proto::WorkloadStatus::Unhealthy,
        }
        .into(),
        cluster_id: w.cluster.to_string(),
        network_gateway: w.network_gateway.as_ref().map(gateway_to_proto),
        uid: w.uid.to_string(),
        hostname: w.hostname.to_string(),
        services: w.services.iter().map(|(key, list)| (key.to_string(), ports(list))).collect(),
        application_tunnel: None,
        locality: (!empty_locality).then(|| proto::Locality {
            region: w.locality.region.to_string(),
            zone: w.locality.zone.to_string(),
            subzone: w.locality.subzone.to_string(),
        }),
        network_mode: match w.network_mode {
            NetworkMode::Standard => proto::NetworkMode::Standard,
            NetworkMode::HostNetwork => proto::NetworkMode::HostNetwork,
        }
        .into(),
        extensions: Vec::new(),
        capacity: (w.capacity != 1).then_some(w.capacity),
    }
}

/// Service to message.
pub fn service_to_proto(s: &Service) -> proto::Service {
    let v4 = s.vips.iter().any(|(_, ip)| ip.is_ipv4());
    let v6 = s.vips.iter().any(|(_, ip)| ip.is_ipv6());
    let address = |(network, ip): &(Arc<str>, IpAddr)| proto::NetworkAddress {
        network: network.to_string(),
        address: ip_to_bytes(*ip),
        length: None,
    };
    proto::Service {
        name: s.name.to_string(),
        namespace: s.key.namespace.to_string(),
        hostname: s.key.hostname.to_string(),
        addresses: s.vips.iter().map(address).collect(),
        ports: s.ports.iter().map(port_to_proto).collect(),
        subject_alt_names: s.subject_alt_names.iter().map(ToString::to_string).collect(),
        waypoint: s.waypoint.as_ref().map(gateway_to_proto),
        load_balancing: s.load_balancing.as_ref().map(load_balancing_to_proto),
        ip_families: match (v4, v6) {
            (true, true) => proto::IpFamilies::Dual,
            (true, false) => proto::IpFamilies::Ipv4Only,
            (false, true) => proto::IpFamilies::Ipv6Only,
            (false, false) => proto::IpFamilies::Automatic,
        }
        .into(),
        ..proto::Service::default()
    }
}

fn port_to_proto(port: &PortMapping) -> proto::Port {
    proto::Port {
        service_port: port.service_port.into(),
        target_port: port.target_port.into(),
        app_protocol: match port.app_protocol {
            AppProtocol::Unknown => proto::AppProtocol::Unknown,
            AppProtocol::Http11 => proto::AppProtocol::Http11,
            AppProtocol::Http2 => proto::AppProtocol::Http2,
            AppProtocol::Grpc => proto::AppProtocol::Grpc,
            AppProtocol::Tcp => proto::AppProtocol::Tcp,
            AppProtocol::Tls => proto::AppProtocol::Tls,
        }
        .into(),
    }
}

fn gateway_to_proto(g: &GatewayAddress) -> proto::GatewayAddress {
    use proto::gateway_address::Destination;
    let destination = match &g.destination {
        GatewayDestination::Hostname(key) => Destination::Hostname(proto::NamespacedHostname {
            namespace: key.namespace.to_string(),
            hostname: key.hostname.to_string(),
        }),
        GatewayDestination::Address { network, address } => Destination::Address(proto::NetworkAddress {
            network: network.to_string(),
            address: ip_to_bytes(*address),
            length: None,
        }),
    };
    proto::GatewayAddress { destination: Some(destination), hbone_mtls_port: g.hbone_port.into() }
}

fn load_balancing_to_proto(lb: &LoadBalancing) -> proto::LoadBalancing {
    use proto::load_balancing as wire;
    let scope = |scope: &Scope| {
        match scope {
            Scope::Region => wire::Scope::Region,
            Scope::Zone => wire::Scope::Zone,
            Scope::Subzone => wire::Scope::Subzone,
            Scope::Node => wire::Scope::Node,
            Scope::Cluster => wire::Scope::Cluster,
            Scope::Network => wire::Scope::Network,
        }
        .into()
    };
    proto::LoadBalancing {
        routing_preference: lb.preference.iter().map(scope).collect(),
        mode: match lb.mode {
            LbMode::Strict => wire::Mode::Strict,
            LbMode::Failover => wire::Mode::Failover,
            LbMode::Passthrough => wire::Mode::Passthrough,
        }
        .into(),
        health_policy: match lb.health {
            HealthPolicy::OnlyHealthy => wire::HealthPolicy::OnlyHealthy,
            HealthPolicy::AllowAll => wire::HealthPolicy::AllowAll,
        }
        .into(),
    }
}

/// 4 or 16 bytes, network byte order.
pub(super) fn ip_from_bytes(field: &'static str, bytes: &[u8]) -> Result<IpAddr, WireError> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        Ok(v4.into())
    } else if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        Ok(v6.into())
    } else {
        Err(invalid(field, format!("address of {} bytes", bytes.len())))
    }
}

pub(super) fn ip_to_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn text(s: &str) -> Arc<str> {
    s.into()
}

fn or_empty(value: &str, default: &str) -> String {
    if value == default { String::new() } else { value.to_owned() }
}
