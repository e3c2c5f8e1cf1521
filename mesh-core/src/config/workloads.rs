//! Pods, WorkloadEntries and foreign endpoints to [`Workload`]s.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::inputs::{AuthorizationInput, Inputs, ServiceInput, foreign_endpoints, is_completed};
use super::objects::{
    EndpointSlice, Kind, Labels, Meta, Namespace, ObjectKey, Owner, PeerAuthentication, Pod, PodPhase, SliceEndpoint,
    WorkloadEntry,
};
use super::problem::{Code, Findings};
use super::{Settings, peer_authentication, services};
use crate::identity::SpiffeId;
use crate::policy::{PolicyName, PolicyScope};
use crate::workload::{
    Health, Locality, NetworkMode, PortMapping, ServiceName, Tunnel, Workload, WorkloadType, WorkloadUid,
};

const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
const INJECT: &str = "sidecar.istio.io/inject";
const INJECTION: &str = "istio-injection";
/// Written by a sidecar injector: the pod has a proxy of its own.
const SIDECAR_STATUS: &str = "sidecar.istio.io/status";
/// `http` on pods that terminate HBONE themselves (gateways, waypoints).
const TUNNEL: &str = "networking.istio.io/tunnel";
const NETWORK: &str = "topology.istio.io/network";

/// Whether a pod is in the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enrolment {
    /// The node proxy serves it.
    Enrolled,
    /// It speaks HBONE itself.
    Native,
    /// Left alone.
    Outside,
}

/// Whether a pod is in the mesh, by Istio's labels.
///
/// `istio.io/dataplane-mode` on the pod decides, then on the namespace. Where neither says, the sidecar's switches
/// count as a wish to be in the mesh (`sidecar.istio.io/inject` on the pod, as label or annotation; `istio-injection` on
/// the namespace). A pod that has a sidecar, or that uses the node's network, is left alone.
pub fn enrolment(namespace: Option<&Namespace>, pod: &Pod) -> Enrolment {
    if pod.host_network || pod.meta.annotations.contains_key(SIDECAR_STATUS) {
        return Enrolment::Outside;
    }
    if pod.meta.label(TUNNEL) == "http" {
        return Enrolment::Native;
    }
    let namespace_label = |key| namespace.map_or("", |n| n.meta.label(key));
    let enrolled = match (pod.meta.label(DATAPLANE_MODE), namespace_label(DATAPLANE_MODE)) {
        ("ambient", _) => true,
        ("none", _) => false,
        (_, "ambient") => true,
        // Without a word about ambient mode (or with another mesh's) the sidecar's switches remain.
        (_, _) => match pod.meta.label_or_annotation(INJECT) {
            Some("true") => true,
            Some("false") => false,
            Some(_) | None => namespace_label(INJECTION) == "enabled",
        },
    };
    if enrolled { Enrolment::Enrolled } else { Enrolment::Outside }
}

/// A workload and the policies whose selectors chose it.
pub(crate) struct Selected {
    pub(crate) workload: Option<Workload>,
    pub(crate) selectors: Selectors,
}

/// Objects whose selectors chose a workload.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Selectors {
    pub(crate) selected_by: Vec<ObjectKey>,
    /// PeerAuthentications among them that are ignored, each with the older one that counts.
    pub(crate) outranked: Vec<(ObjectKey, ObjectKey)>,
}

/// The identity that a pod runs under.
pub(crate) fn identity_of(pod: &Pod, settings: &Settings) -> SpiffeId {
    identity(&pod.meta.namespace, &pod.service_account, settings)
}

fn identity(namespace: &Arc<str>, service_account: &Arc<str>, settings: &Settings) -> SpiffeId {
    let service_account = if service_account.is_empty() { Arc::from("default") } else { service_account.clone() };
    SpiffeId { trust_domain: settings.trust_domain.clone(), namespace: namespace.clone(), service_account }
}

/// A pod's workload; none while it has no address and after its end.
pub(crate) fn of_pod(pod: &Pod, inputs: &Inputs, settings: &Settings, findings: &mut Findings) -> Selected {
    let meta = &pod.meta;
    let key = ObjectKey::new(Kind::Pod, &meta.namespace, &meta.name);
    let addresses = match (is_completed(pod), pod.host_network) {
        // Its address may be another's by now, which is nobody's fault.
        (true, _) => Vec::new(),
        (false, true) => pod.ips.clone(),
        (false, false) => owned(&pod.ips, &key, inputs, findings),
    };
    if addresses.is_empty() {
        return Selected { workload: None, selectors: Selectors::default() };
    }
    let namespace = inputs.namespace(&meta.namespace);
    let (workload_type, workload_name) = owner(pod);
    let (policies, selectors) = policies(&meta.namespace, &meta.labels, inputs, settings);
    let enrolment = enrolment(namespace.map(|n| &**n), pod);
    let (services, healthy_by_slice) = services_of_pod(pod, inputs);
    let ready = pod.ready.or(healthy_by_slice).unwrap_or(true);
    let healthy = ready && !pod.deleting && pod.phase == PodPhase::Running;
    let own_network = [meta.label(NETWORK), namespace.map_or("", |n| n.meta.label(NETWORK))];
    let workload = Workload {
        uid: WorkloadUid(format!("{}//Pod/{}/{}", settings.cluster, meta.namespace, meta.name).into()),
        name: meta.name.clone(),
        identity: identity_of(pod, settings),
        addresses,
        hostname: "".into(),
        network: own_network.into_iter().find(|n| !n.is_empty()).map_or(settings.network.clone(), Arc::from),
        cluster: settings.cluster.clone(),
        node: pod.node.clone(),
        tunnel: if enrolment == Enrolment::Outside { Tunnel::None } else { Tunnel::Hbone },
        native_tunnel: enrolment == Enrolment::Native,
        network_mode: if pod.host_network { NetworkMode::HostNetwork } else { NetworkMode::Standard },
        canonical_name: canonical_name(&meta.labels, &workload_name),
        canonical_revision: canonical_revision(&meta.labels),
        workload_type,
        workload_name,
        locality: locality_of_pod(pod, inputs),
        capacity: 1,
        health: if healthy { Health::Healthy } else { Health::Unhealthy },
        waypoint: services::waypoint(meta, None, settings),
        network_gateway: None,
        policies,
        services,
    };
    Selected { workload: Some(workload), selectors }
}

/// A WorkloadEntry's workload. It is in the mesh only when it says that it speaks HBONE.
pub(crate) fn of_entry(
    entry: &WorkloadEntry,
    inputs: &Inputs,
    settings: &Settings,
    findings: &mut Findings,
) -> Selected {
    let meta = &entry.meta;
    let key = ObjectKey::new(Kind::WorkloadEntry, &meta.namespace, &meta.name);
    let mut labels = meta.labels.clone();
    labels.extend(entry.labels.iter().map(|(k, v)| (k.clone(), v.clone())));
    let ip: Option<IpAddr> = entry.address.parse().ok();
    let addresses = owned(&Vec::from_iter(ip), &key, inputs, findings);
    if ip.is_some() && addresses.is_empty() {
        return Selected { workload: None, selectors: Selectors::default() };
    }
    let (policies, selectors) = policies(&meta.namespace, &labels, inputs, settings);
    let services = inputs
        .services_selecting(&meta.namespace, &labels)
        .map(|s| (s.key.clone(), services::ports_of_entry(&s.object, &entry.ports)))
        .collect();
    let native = labels.get(TUNNEL).is_some_and(|v| **v == *"http");
    let workload = Workload {
        uid: WorkloadUid(
            format!("{}/networking.istio.io/WorkloadEntry/{}/{}", settings.cluster, meta.namespace, meta.name).into(),
        ),
        name: meta.name.clone(),
        identity: identity(&meta.namespace, &entry.service_account, settings),
        addresses,
        hostname: if ip.is_some() { "".into() } else { entry.address.clone() },
        network: if entry.network.is_empty() { settings.network.clone() } else { entry.network.clone() },
        cluster: settings.cluster.clone(),
        node: "".into(),
        tunnel: if native { Tunnel::Hbone } else { Tunnel::None },
        native_tunnel: native,
        network_mode: NetworkMode::Standard,
        canonical_name: canonical_name(&labels, &meta.name),
        canonical_revision: canonical_revision(&labels),
        workload_type: WorkloadType::Pod,
        workload_name: meta.name.clone(),
        locality: parse_locality(&entry.locality),
        capacity: entry.weight.max(1),
        health: Health::Healthy,
        waypoint: services::waypoint(meta, None, settings),
        network_gateway: None,
        policies,
        services,
    };
    Selected { workload: Some(workload), selectors }
}

/// Workloads for endpoints of a slice that are no pods, one per address.
pub(crate) fn of_slice(
    slice: &EndpointSlice,
    inputs: &Inputs,
    settings: &Settings,
    findings: &mut Findings,
) -> Vec<Workload> {
    let meta = &slice.meta;
    let key = ObjectKey::new(Kind::EndpointSlice, &meta.namespace, &meta.name);
    let service = inputs.services.get(&meta.namespace, &slice.service);
    let mut workloads = BTreeMap::new();
    for endpoint in foreign_endpoints(slice) {
        for ip in owned(&endpoint.addresses, &key, inputs, findings) {
            let workload = foreign(slice, endpoint, (ip, service), settings);
            workloads.insert(workload.uid.clone(), workload);
        }
    }
    workloads.into_values().collect()
}

fn foreign(
    slice: &EndpointSlice,
    endpoint: &SliceEndpoint,
    (ip, service): (IpAddr, Option<&Arc<ServiceInput>>),
    settings: &Settings,
) -> Workload {
    let meta = &slice.meta;
    let uid = format!("{}/discovery.k8s.io/EndpointSlice/{}/{}/{ip}", settings.cluster, meta.namespace, meta.name);
    let name: Arc<str> = format!("{}-{ip}", meta.name).into();
    Workload {
        uid: WorkloadUid(uid.into()),
        name: name.clone(),
        identity: identity(&meta.namespace, &"".into(), settings),
        addresses: vec![ip],
        hostname: "".into(),
        network: settings.network.clone(),
        cluster: settings.cluster.clone(),
        node: endpoint.node.clone(),
        tunnel: Tunnel::None,
        native_tunnel: false,
        network_mode: NetworkMode::Standard,
        canonical_name: slice.service.clone(),
        canonical_revision: "latest".into(),
        workload_type: WorkloadType::Pod,
        workload_name: name,
        locality: Locality { zone: endpoint.zone.clone(), ..Locality::default() },
        capacity: 1,
        health: if endpoint.ready { Health::Healthy } else { Health::Unhealthy },
        waypoint: None,
        network_gateway: None,
        policies: Vec::new(),
        services: service.map(|s| (s.key.clone(), services::ports_of_slice(&s.object, slice))).into_iter().collect(),
    }
}

/// Addresses that no stronger claimant has.
fn owned(ips: &[IpAddr], key: &ObjectKey, inputs: &Inputs, findings: &mut Findings) -> Vec<IpAddr> {
    let mut owned = Vec::with_capacity(ips.len());
    for ip in ips.iter().map(IpAddr::to_canonical) {
        match inputs.owner(ip) {
            Some(owner) if owner != key => findings.warn(
                Code::AddressTaken,
                "",
                format!("{ip} belongs to {owner}; nothing reaches this object there"),
                "give it an address of its own, or delete the object that is out of date",
            ),
            Some(_) | None => owned.push(ip),
        }
    }
    owned
}

/// Services that the pod is an endpoint of, and what slices say about its readiness.
///
/// A Service with slices has the endpoints that these list; one without has the pods that its selector matches. An
/// endpoint that its slice calls not ready while the pod calls itself ready is left out of that Service alone.
fn services_of_pod(pod: &Pod, inputs: &Inputs) -> (BTreeMap<ServiceName, Vec<PortMapping>>, Option<bool>) {
    let (ns, name) = (&pod.meta.namespace, &pod.meta.name);
    let mut services = BTreeMap::new();
    let mut ready_by_slice: Option<bool> = None;
    for service in inputs.services_selecting(ns, &pod.meta.labels) {
        if inputs.slices_of_service(ns, &service.object.meta.name).next().is_none() {
            services.insert(service.key.clone(), services::ports_of_pod(&service.object, pod));
        }
    }
    for slice in inputs.slices_of_pod(ns, name) {
        let Some(service) = inputs.services.get(ns, &slice.service) else { continue };
        let ready = slice.endpoints.iter().any(|e| e.pod.as_ref() == Some(name) && e.ready);
        if !service.object.publish_not_ready {
            ready_by_slice = Some(ready_by_slice.unwrap_or(false) || ready);
        }
        if ready || service.object.publish_not_ready || pod.ready != Some(true) {
            // A dual-stack service has a slice for each family, with the same ports.
            services.entry(service.key.clone()).or_insert_with(|| services::ports_of_slice(&service.object, slice));
        }
    }
    (services, ready_by_slice)
}

/// Policies that a workload must name, sorted, and the objects whose selectors chose it.
fn policies(
    namespace: &Arc<str>,
    labels: &Labels,
    inputs: &Inputs,
    settings: &Settings,
) -> (Vec<PolicyName>, Selectors) {
    let mut selected_by = Vec::new();
    let mut names = Vec::new();
    let mut add = |input: &AuthorizationInput| {
        let meta = &input.object.meta;
        selected_by.push(ObjectKey::new(Kind::AuthorizationPolicy, &meta.namespace, &meta.name));
        if let Some(policy) = &input.enforced.policy
            && policy.scope == PolicyScope::Workload
        {
            names.push(policy.name.clone());
        }
    };
    inputs.authorizations_selecting(namespace, labels).for_each(|p| add(p));
    let root = &settings.root_namespace;
    if namespace != root {
        inputs.authorizations_selecting(root, labels).for_each(|p| add(p));
    }
    let authentications: Vec<&Arc<PeerAuthentication>> =
        if namespace == root { Vec::new() } else { inputs.authentications_selecting(namespace, labels).collect() };
    let key = |p: &Arc<PeerAuthentication>| ObjectKey::new(Kind::PeerAuthentication, &p.meta.namespace, &p.meta.name);
    selected_by.extend(authentications.iter().map(|p| key(p)));
    let oldest = peer_authentication::oldest(authentications.iter().copied());
    let younger = authentications.iter().filter(|p| oldest.is_some_and(|oldest| oldest.meta.name != p.meta.name));
    let outranked = younger.filter_map(|p| Some((key(p), key(oldest?)))).collect();
    let inherited = inputs.namespace_refuses_plaintext(namespace, settings);
    names.extend(peer_authentication::policy_for(inherited, oldest.map(|p| &**p), root));
    names.sort_unstable();
    names.dedup();
    (names, Selectors { selected_by, outranked })
}

/// Kind and name of what a pod belongs to, for telemetry.
fn owner(pod: &Pod) -> (WorkloadType, Arc<str>) {
    let Some(Owner { kind, name }) = &pod.owner else { return (WorkloadType::Pod, pod.meta.name.clone()) };
    match &**kind {
        "ReplicaSet" => {
            let hash = pod.meta.label("pod-template-hash");
            let deployment = name.strip_suffix(hash).and_then(|n| n.strip_suffix('-')).filter(|_| !hash.is_empty());
            (WorkloadType::Deployment, deployment.map_or_else(|| name.clone(), Arc::from))
        }
        "Job" => match name.rsplit_once('-') {
            // A CronJob names its Jobs after the minute at which they were due.
            Some((cron, minute)) if minute.len() >= 8 && minute.bytes().all(|b| b.is_ascii_digit()) => {
                (WorkloadType::CronJob, cron.into())
            }
            Some(_) | None => (WorkloadType::Job, name.clone()),
        },
        "CronJob" => (WorkloadType::CronJob, name.clone()),
        // StatefulSets, DaemonSets and controllers of other makers count as Deployments in Istio's metrics.
        _ => (WorkloadType::Deployment, name.clone()),
    }
}

fn canonical_name(labels: &Labels, workload_name: &Arc<str>) -> Arc<str> {
    first_of(labels, &["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
        .unwrap_or_else(|| workload_name.clone())
}

fn canonical_revision(labels: &Labels) -> Arc<str> {
    first_of(labels, &["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"])
        .unwrap_or_else(|| "latest".into())
}

fn first_of(labels: &Labels, keys: &[&str]) -> Option<Arc<str>> {
    keys.iter().find_map(|key| labels.get(*key)).cloned()
}

/// The node's labels; where the node is not known, the same labels on the pod.
fn locality_of_pod(pod: &Pod, inputs: &Inputs) -> Locality {
    let meta: &Meta = inputs.nodes.get("", &pod.node).map_or(&pod.meta, |n| &n.meta);
    Locality {
        region: meta.label("topology.kubernetes.io/region").into(),
        zone: meta.label("topology.kubernetes.io/zone").into(),
        subzone: meta.label("topology.istio.io/subzone").into(),
    }
}

/// `region/zone/subzone`.
fn parse_locality(text: &str) -> Locality {
    let mut parts = text.splitn(3, '/').map(Arc::from);
    let mut next = || parts.next().unwrap_or_else(|| "".into());
    Locality { region: next(), zone: next(), subzone: next() }
}
