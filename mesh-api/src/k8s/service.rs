//! `v1/Service` and `discovery.k8s.io/EndpointSlice`.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use mesh_core::config::objects::{self, Meta, Object, ServiceKind, ServicePort, SliceEndpoint, SlicePort, TargetPort};
use serde::de::{self, Deserialize, Deserializer, Visitor};

use super::Convert;
use super::core::WireProtocol;
use super::meta::{Metadata, address, optional_name, port};
use crate::yaml::FieldError;

/// Label by which a slice belongs to a service.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

#[derive(serde::Deserialize)]
pub(super) struct Service {
    metadata: Metadata,
    #[serde(default)]
    spec: ServiceSpec,
}

#[derive(serde::Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ServiceSpec {
    #[serde(rename = "type")]
    kind: WireKind,
    selector: BTreeMap<Arc<str>, Arc<str>>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Vec<String>,
    ports: Vec<WireServicePort>,
    publish_not_ready_addresses: bool,
    internal_traffic_policy: TrafficPolicy,
    traffic_distribution: Option<Arc<str>>,
}

#[derive(serde::Deserialize, Default)]
enum WireKind {
    #[default]
    ClusterIP,
    NodePort,
    LoadBalancer,
    ExternalName,
}

#[derive(serde::Deserialize, Default)]
enum TrafficPolicy {
    #[default]
    Cluster,
    Local,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireServicePort {
    #[serde(default)]
    name: Arc<str>,
    port: i64,
    #[serde(default)]
    target_port: Option<WireTarget>,
    #[serde(default)]
    protocol: WireProtocol,
    #[serde(default)]
    app_protocol: Option<Arc<str>>,
}

/// Kubernetes' IntOrString.
enum WireTarget {
    Number(i64),
    Name(Arc<str>),
}

impl<'de> Deserialize<'de> for WireTarget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IntOrString;
        impl Visitor<'_> for IntOrString {
            type Value = WireTarget;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port number or the name of a container port")
            }

            fn visit_i64<E: de::Error>(self, v: i64) -> Result<WireTarget, E> {
                Ok(WireTarget::Number(v))
            }

            fn visit_str<E: de::Error>(self, v: &str) -> Result<WireTarget, E> {
                Ok(WireTarget::Name(v.into()))
            }
        }
        deserializer.deserialize_any(IntOrString)
    }
}

impl Convert for Service {
    fn metadata(&mut self) -> Metadata {
        std::mem::take(&mut self.metadata)
    }

    fn convert(self, meta: Meta) -> Result<Object, FieldError> {
        let spec = self.spec;
        let ports = spec.ports.into_iter().enumerate().map(|(i, wire)| wire.convert(i)).collect::<Result<_, _>>()?;
        let ips: Vec<(String, &String)> = if spec.cluster_ips.is_empty() {
            spec.cluster_ip.iter().map(|ip| ("spec.clusterIP".to_owned(), ip)).collect()
        } else {
            spec.cluster_ips.iter().enumerate().map(|(i, ip)| (format!("spec.clusterIPs[{i}]"), ip)).collect()
        };
        let addressed = ips.into_iter().filter(|(_, ip)| !ip.is_empty() && *ip != "None");
        Ok(Object::Service(objects::Service {
            meta,
            kind: match spec.kind {
                WireKind::ClusterIP | WireKind::NodePort | WireKind::LoadBalancer => ServiceKind::Addressed,
                WireKind::ExternalName => ServiceKind::ExternalName,
            },
            selector: spec.selector,
            cluster_ips: addressed.map(|(path, ip)| address(path, ip)).collect::<Result<_, _>>()?,
            ports,
            publish_not_ready: spec.publish_not_ready_addresses,
            local_only: matches!(spec.internal_traffic_policy, TrafficPolicy::Local),
            traffic_distribution: spec.traffic_distribution,
        }))
    }
}

impl WireServicePort {
    fn convert(self, index: usize) -> Result<ServicePort, FieldError> {
        let number = port(format!("spec.ports[{index}].port"), self.port)?;
        let target = match self.target_port {
            None => TargetPort::Number(number),
            Some(WireTarget::Number(target)) => {
                TargetPort::Number(port(format!("spec.ports[{index}].targetPort"), target)?)
            }
            Some(WireTarget::Name(name)) => TargetPort::Name(name),
        };
        Ok(ServicePort {
            name: self.name,
            port: number,
            target,
            protocol: self.protocol.into(),
            app_protocol: self.app_protocol,
        })
    }
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EndpointSlice {
    metadata: Metadata,
    address_type: AddressType,
    #[serde(default)]
    endpoints: Vec<WireEndpoint>,
    #[serde(default)]
    ports: Vec<WireSlicePort>,
}

#[derive(serde::Deserialize)]
enum AddressType {
    IPv4,
    IPv6,
    #[serde(rename = "FQDN")]
    Fqdn,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireEndpoint {
    addresses: Vec<String>,
    #[serde(default)]
    conditions: Conditions,
    #[serde(default)]
    target_ref: Option<SliceTarget>,
    #[serde(default)]
    node_name: Option<String>,
    #[serde(default)]
    zone: Arc<str>,
}

#[derive(serde::Deserialize, Default)]
#[serde(default)]
struct Conditions {
    ready: Option<bool>,
}

#[derive(serde::Deserialize, Default)]
#[serde(default)]
struct SliceTarget {
    kind: String,
    name: Arc<str>,
}

#[derive(serde::Deserialize)]
struct WireSlicePort {
    #[serde(default)]
    name: Arc<str>,
    #[serde(default)]
    port: Option<i64>,
    #[serde(default)]
    protocol: WireProtocol,
}

impl Convert for EndpointSlice {
    fn metadata(&mut self) -> Metadata {
        std::mem::take(&mut self.metadata)
    }

    fn convert(self, meta: Meta) -> Result<Object, FieldError> {
        if matches!(self.address_type, AddressType::Fqdn) {
            return Err(
                FieldError::new("addressType", "endpoints by name (FQDN) are not read").hint("use IPv4 or IPv6")
            );
        }
        let mut ports = Vec::new();
        for (i, wire) in self.ports.into_iter().enumerate() {
            // A port without a number says nothing that could be dialled.
            let Some(number) = wire.port else { continue };
            let number = port(format!("ports[{i}].port"), number)?;
            ports.push(SlicePort { name: wire.name, port: number, protocol: wire.protocol.into() });
        }
        let is_v4 = matches!(self.address_type, AddressType::IPv4);
        let endpoints =
            self.endpoints.into_iter().enumerate().map(|(i, wire)| wire.convert(i, is_v4)).collect::<Result<_, _>>()?;
        let service = meta.labels.get(SERVICE_NAME_LABEL).cloned().unwrap_or_default();
        Ok(Object::EndpointSlice(objects::EndpointSlice { meta, service, ports, endpoints }))
    }
}

impl WireEndpoint {
    fn convert(self, index: usize, is_v4: bool) -> Result<SliceEndpoint, FieldError> {
        let mut addresses = Vec::new();
        for (i, text) in self.addresses.iter().enumerate() {
            let path = format!("endpoints[{index}].addresses[{i}]");
            let ip = address(path.as_str(), text)?;
            if ip.is_ipv4() != is_v4 {
                return Err(FieldError::new(path, format!("{ip} is not of the slice's addressType"))
                    .hint("put IPv4 and IPv6 endpoints into slices of their own"));
            }
            addresses.push(ip);
        }
        Ok(SliceEndpoint {
            addresses,
            // Absent means ready (EndpointConditions of the Kubernetes API).
            ready: self.conditions.ready.unwrap_or(true),
            pod: self.target_ref.filter(|target| target.kind == "Pod").map(|target| target.name),
            node: optional_name(&format!("endpoints[{index}].nodeName"), self.node_name)?,
            zone: self.zone,
        })
    }
}
