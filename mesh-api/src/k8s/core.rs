//! `v1`: Namespace, Node, ServiceAccount, Pod.

use std::sync::Arc;

use mesh_core::config::objects::{self, ContainerPort, Meta, Object, Owner, PodPhase, Protocol};
use serde::Deserialize;

use super::Convert;
use super::meta::{Metadata, address, optional_name, port};
use crate::yaml::FieldError;

macro_rules! metadata_only {
    ($($kind:ident),*) => {$(
        #[derive(Deserialize)]
        pub(super) struct $kind {
            metadata: Metadata,
        }

        impl Convert for $kind {
            fn metadata(&mut self) -> Metadata {
                std::mem::take(&mut self.metadata)
            }

            fn convert(self, meta: Meta) -> Result<Object, FieldError> {
                Ok(Object::$kind(objects::$kind { meta }))
            }
        }
    )*};
}

metadata_only!(Namespace, Node, ServiceAccount);

#[derive(Deserialize)]
pub(super) struct Pod {
    metadata: Metadata,
    #[serde(default)]
    spec: PodSpec,
    #[serde(default)]
    status: PodStatus,
    /// Taken out of the metadata before it is consumed.
    #[serde(skip)]
    fate: Fate,
}

#[derive(Default)]
struct Fate {
    deleting: bool,
    owner: Option<Owner>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    service_account_name: Option<String>,
    node_name: Option<String>,
    host_network: bool,
    containers: Vec<Container>,
    init_containers: Vec<Container>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Container {
    ports: Vec<WirePort>,
    restart_policy: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WirePort {
    #[serde(default)]
    name: Arc<str>,
    container_port: i64,
    #[serde(default)]
    protocol: WireProtocol,
}

/// `protocol` of a port.
#[derive(Deserialize, Default, Clone, Copy)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum WireProtocol {
    #[default]
    Tcp,
    Udp,
    Sctp,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PodStatus {
    phase: Option<WirePhase>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<PodIp>,
    conditions: Vec<PodCondition>,
}

#[derive(Deserialize)]
struct PodIp {
    ip: String,
}

#[derive(Deserialize)]
struct PodCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

#[derive(Deserialize, Clone, Copy)]
enum WirePhase {
    Pending,
    Running,
    Succeeded,
    Failed,
    Unknown,
}

impl Convert for Pod {
    fn metadata(&mut self) -> Metadata {
        let metadata = std::mem::take(&mut self.metadata);
        self.fate = Fate { deleting: metadata.is_deleting(), owner: metadata.controlling_owner() };
        metadata
    }

    fn convert(self, meta: Meta) -> Result<Object, FieldError> {
        let Self { spec, status, fate, .. } = self;
        let mut ports = container_ports("spec.containers", &spec.containers, |_| true)?;
        // A sidecar container is an init container that keeps running (Kubernetes 1.29).
        let is_sidecar = |c: &Container| c.restart_policy.as_deref() == Some("Always");
        ports.extend(container_ports("spec.initContainers", &spec.init_containers, is_sidecar)?);
        let ready = status.conditions.iter().find(|c| c.kind == "Ready").map(|c| c.status == "True");
        Ok(Object::Pod(objects::Pod {
            meta,
            service_account: optional_name("spec.serviceAccountName", spec.service_account_name)?,
            node: optional_name("spec.nodeName", spec.node_name)?,
            host_network: spec.host_network,
            ips: pod_ips(&status)?,
            phase: status.phase.map_or(PodPhase::default(), Into::into),
            ready,
            deleting: fate.deleting,
            ports,
            owner: fate.owner,
        }))
    }
}

fn pod_ips(status: &PodStatus) -> Result<Vec<std::net::IpAddr>, FieldError> {
    if status.pod_ips.is_empty() {
        return status.pod_ip.iter().map(|ip| address("status.podIP", ip)).collect();
    }
    let listed = status.pod_ips.iter().enumerate();
    listed.map(|(i, ip)| address(format!("status.podIPs[{i}].ip"), &ip.ip)).collect()
}

fn container_ports(
    path: &str,
    containers: &[Container],
    counts: impl Fn(&Container) -> bool,
) -> Result<Vec<ContainerPort>, FieldError> {
    let mut ports = Vec::new();
    for (c, container) in containers.iter().enumerate().filter(|(_, container)| counts(container)) {
        for (p, wire) in container.ports.iter().enumerate() {
            let number = port(format!("{path}[{c}].ports[{p}].containerPort"), wire.container_port)?;
            ports.push(ContainerPort { name: wire.name.clone(), port: number, protocol: wire.protocol.into() });
        }
    }
    Ok(ports)
}

impl From<WireProtocol> for Protocol {
    fn from(wire: WireProtocol) -> Self {
        match wire {
            WireProtocol::Tcp => Self::Tcp,
            WireProtocol::Udp => Self::Udp,
            WireProtocol::Sctp => Self::Sctp,
        }
    }
}

impl From<WirePhase> for PodPhase {
    fn from(wire: WirePhase) -> Self {
        match wire {
            WirePhase::Pending => Self::Pending,
            WirePhase::Running => Self::Running,
            WirePhase::Succeeded => Self::Succeeded,
            WirePhase::Failed => Self::Failed,
            WirePhase::Unknown => Self::Unknown,
        }
    }
}
