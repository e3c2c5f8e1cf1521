//! A topology as a value: which nodes, workloads and services there are, and the addresses that follow from it.
//!
//! Nothing here touches the machine. [`super::plan`] turns a topology into steps, [`super::manifests`] into YAML.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// Namespace of workloads that name none.
pub const DEFAULT_NAMESPACE: &str = "default";
/// Most nodes of one sandbox: they are joined in pairs, so links grow with the square.
pub const MAX_NODES: usize = 16;
/// First host number given to a workload; those below belong to the node.
pub const FIRST_HOST: u16 = 10;
/// Last host number of a node's /24.
pub const LAST_HOST: u16 = 254;
/// Longest node name: `to-NAME` has to fit into the 15 bytes of an interface name.
pub const MAX_NODE_NAME: usize = 12;
/// Name of the namespace that the controller runs in; no node or workload may have it.
pub const CONTROLLER_HOST: &str = "controller";

/// Nodes, workloads and services of a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// In order: the order gives the addresses.
    pub nodes: Vec<Node>,
    /// In order of creation.
    pub workloads: Vec<Workload>,
    /// In order: the order gives the virtual addresses.
    pub services: Vec<Service>,
    /// Labels of Kubernetes namespaces. Those that workloads or services name are added without labels.
    pub namespaces: BTreeMap<String, BTreeMap<String, String>>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Name.
    pub name: String,
    /// `topology.kubernetes.io/region`, or empty.
    pub region: String,
    /// `topology.kubernetes.io/zone`, or empty.
    pub zone: String,
}

/// Whether a workload's traffic is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Enrolment {
    /// Announced to the node proxy.
    Mesh,
    /// Plain TCP, as a pod that is labelled `istio.io/dataplane-mode: none`.
    None,
}

/// A workload: one network namespace with one address of each family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Pod name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes service account.
    pub service_account: String,
    /// Node that it runs on.
    pub node: String,
    /// Pod labels.
    pub labels: BTreeMap<String, String>,
    /// Whether it is in the mesh.
    pub enrolment: Enrolment,
    /// What runs in it, argv. `mesh-ctl` as the first word means the binary in use. Empty: only its namespace.
    pub command: Vec<String>,
    /// TCP port that the command listens on when it is ready.
    pub ready_port: Option<u16>,
    /// Host part of its addresses; given out by [`Topology::workload`].
    pub host: u16,
    /// Pod UID; a workload created again under the same name has another. Filled in when it is created.
    pub uid: String,
}

/// A service with virtual addresses of both families.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Short name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Labels of the pods behind it.
    pub selector: BTreeMap<String, String>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Headless: no virtual address.
    pub headless: bool,
}

/// A port of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// Name, whose prefix declares the protocol (`http`, `tcp-...`).
    pub name: String,
    /// Port of the virtual address.
    pub port: u16,
    /// Port of the pods.
    pub target_port: u16,
}

/// Why a topology cannot be built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidTopology(pub String);

impl std::fmt::Display for InvalidTopology {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for InvalidTopology {}

impl Topology {
    /// Nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Two nodes, `client`, `web` on both, `db`, and `legacy` outside the mesh: what `sandbox up` builds.
    pub fn demo() -> Self {
        let serve = |args: &[&str]| {
            ["mesh-ctl", "sandbox", "serve"].iter().chain(args).map(ToString::to_string).collect::<Vec<_>>()
        };
        let web = |version: &str, node: &str| {
            Workload::new(&format!("web-{version}"), node)
                .account("web")
                .label("app", "web")
                .label("version", version)
                .runs(serve(&["http", "--port", "8080", "--workload", &format!("web-{version}"), "--version", version]))
                .ready_on(8080)
        };
        Self::new()
            .node("node-a")
            .node("node-b")
            .namespace(DEFAULT_NAMESPACE, &[("istio.io/dataplane-mode", "ambient")])
            .workload(Workload::new("client", "node-a").label("app", "client"))
            .workload(web("v1", "node-a"))
            .workload(web("v2", "node-b"))
            .workload(
                Workload::new("db", "node-b")
                    .label("app", "db")
                    .runs(serve(&["db", "--port", "5432", "--workload", "db"]))
                    .ready_on(5432),
            )
            .workload(Workload::new("legacy", "node-b").label("app", "legacy").outside_mesh())
            .service(Service::new("web").selects("app", "web").port("http", 80, 8080))
            .service(Service::new("db").selects("app", "db").port("tcp-db", 5432, 5432))
    }

    /// Adds a node in a region and zone of its own name.
    #[must_use]
    pub fn node(self, name: &str) -> Self {
        self.node_at(name, "local", name)
    }

    /// Adds a node with its place.
    #[must_use]
    pub fn node_at(mut self, name: &str, region: &str, zone: &str) -> Self {
        self.nodes.push(Node { name: name.into(), region: region.into(), zone: zone.into() });
        self
    }

    /// Labels a Kubernetes namespace.
    #[must_use]
    pub fn namespace(mut self, name: &str, labels: &[(&str, &str)]) -> Self {
        let entry = self.namespaces.entry(name.into()).or_default();
        entry.extend(labels.iter().map(|(k, v)| (k.to_string(), v.to_string())));
        self
    }

    /// Adds a workload under the lowest host number that is free on its node.
    #[must_use]
    pub fn workload(mut self, workload: Workload) -> Self {
        self.push_workload(workload);
        self
    }

    /// Adds a workload in place; returns it with its host number.
    pub fn push_workload(&mut self, mut workload: Workload) -> Workload {
        let taken: BTreeSet<u16> = self.workloads.iter().filter(|w| w.node == workload.node).map(|w| w.host).collect();
        if workload.host == 0 {
            workload.host = (FIRST_HOST..=LAST_HOST).find(|h| !taken.contains(h)).unwrap_or(0);
        }
        self.workloads.push(workload.clone());
        workload
    }

    /// Adds a service.
    #[must_use]
    pub fn service(mut self, service: Service) -> Self {
        self.services.push(service);
        self
    }

    /// The workload of this name: `NAME`, or `NAME.NAMESPACE`.
    pub fn find(&self, name: &str) -> Option<&Workload> {
        self.workloads.iter().find(|w| w.key() == name || format!("{}.{}", w.name, w.namespace) == name)
    }

    /// Every Kubernetes namespace that is named, with its labels.
    pub fn all_namespaces(&self) -> BTreeMap<String, BTreeMap<String, String>> {
        let mut all = self.namespaces.clone();
        let named = self.workloads.iter().map(|w| &w.namespace).chain(self.services.iter().map(|s| &s.namespace));
        for namespace in named {
            all.entry(namespace.clone()).or_default();
        }
        all
    }

    /// Workloads behind a service.
    pub fn endpoints<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = &'a Workload> {
        self.workloads.iter().filter(move |w| {
            w.namespace == service.namespace
                && !service.selector.is_empty()
                && service.selector.iter().all(|(k, v)| w.labels.get(k) == Some(v))
        })
    }

    /// Position of a node, from 1.
    pub fn node_number(&self, node: &str) -> Option<u8> {
        let index = self.nodes.iter().position(|n| n.name == node)?;
        u8::try_from(index + 1).ok()
    }

    /// Addresses of a workload, IPv4 first. None if its node is not in the topology.
    pub fn addresses(&self, workload: &Workload) -> Option<[IpAddr; 2]> {
        let node = self.node_number(&workload.node)?;
        let low = u8::try_from(workload.host).ok()?;
        Some([
            Ipv4Addr::new(10, 244, node, low).into(),
            Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, workload.host).into(),
        ])
    }

    /// Address of the node on the pods' bridge: the pods' default route.
    pub fn gateway(node_number: u8) -> [IpAddr; 2] {
        [
            Ipv4Addr::new(10, 244, node_number, 1).into(),
            Ipv6Addr::new(0xfd00, 0x10, 0x244, node_number.into(), 0, 0, 0, 1).into(),
        ]
    }

    /// Pod networks of a node with their prefix lengths.
    pub fn pod_networks(node_number: u8) -> [(IpAddr, u8); 2] {
        [
            (Ipv4Addr::new(10, 244, node_number, 0).into(), 24),
            (Ipv6Addr::new(0xfd00, 0x10, 0x244, node_number.into(), 0, 0, 0, 0).into(), 64),
        ]
    }

    /// Addresses of a host (0: the controller, else the node's number) on its links to the other hosts.
    pub fn host_addresses(number: u8) -> [IpAddr; 2] {
        [
            Ipv4Addr::new(172, 30, 0, number + 1).into(),
            Ipv6Addr::new(0xfd00, 0x172, 0x30, 0, 0, 0, 0, u16::from(number) + 1).into(),
        ]
    }

    /// Virtual addresses of a service, IPv4 first; none if it is headless or not in the topology.
    pub fn vips(&self, service: &Service) -> Vec<IpAddr> {
        let position = self.services.iter().position(|s| s.name == service.name && s.namespace == service.namespace);
        let Some(number) = position.and_then(|p| u16::try_from(p + 10).ok()).filter(|_| !service.headless) else {
            return Vec::new();
        };
        let [high, low] = number.to_be_bytes();
        vec![Ipv4Addr::new(10, 96, high, low).into(), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number).into()]
    }

    /// Checks names, references and bounds.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self) -> Result<(), InvalidTopology> {
        let fail = |why: String| Err(InvalidTopology(why));
        if self.nodes.is_empty() || self.nodes.len() > MAX_NODES {
            return fail(format!("{} nodes: there must be 1 to {MAX_NODES}", self.nodes.len()));
        }
        let mut names = BTreeSet::from([CONTROLLER_HOST.to_string()]);
        for node in &self.nodes {
            if !is_label(&node.name) || node.name.len() > MAX_NODE_NAME {
                return fail(format!("node `{}`: a DNS label of at most {MAX_NODE_NAME} bytes is needed", node.name));
            }
            if !names.insert(node.name.clone()) {
                return fail(format!("name `{}` is used twice", node.name));
            }
        }
        for workload in &self.workloads {
            self.check_workload(workload)?;
            if !names.insert(workload.key()) {
                return fail(format!("name `{}` is used twice", workload.key()));
            }
        }
        for service in &self.services {
            if !is_label(&service.name) || !is_label(&service.namespace) || service.ports.is_empty() {
                return fail(format!(
                    "service `{}`: a DNS label as name and at least one port are needed",
                    service.name
                ));
            }
        }
        Ok(())
    }

    fn check_workload(&self, workload: &Workload) -> Result<(), InvalidTopology> {
        let key = workload.key();
        let why = if ![&workload.name, &workload.namespace, &workload.service_account].iter().all(|s| is_label(s)) {
            "name, namespace and service account must be DNS labels".to_string()
        } else if self.node_number(&workload.node).is_none() {
            format!("node `{}` is not in the topology", workload.node)
        } else if !(FIRST_HOST..=LAST_HOST).contains(&workload.host) {
            format!("no address is left on {} (at most {} workloads)", workload.node, LAST_HOST - FIRST_HOST + 1)
        } else {
            return Ok(());
        };
        Err(InvalidTopology(format!("workload `{key}`: {why}")))
    }
}

impl Workload {
    /// In the mesh, in the default namespace, with a service account of its own name, running nothing.
    pub fn new(name: &str, node: &str) -> Self {
        Self {
            name: name.into(),
            namespace: DEFAULT_NAMESPACE.into(),
            service_account: name.into(),
            node: node.into(),
            labels: BTreeMap::new(),
            enrolment: Enrolment::Mesh,
            command: Vec::new(),
            ready_port: None,
            host: 0,
            uid: String::new(),
        }
    }

    /// Sets the Kubernetes namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// Sets the service account.
    #[must_use]
    pub fn account(mut self, name: &str) -> Self {
        self.service_account = name.into();
        self
    }

    /// Adds a pod label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// Sets the command.
    #[must_use]
    pub fn runs<S: Into<String>>(mut self, argv: impl IntoIterator<Item = S>) -> Self {
        self.command = argv.into_iter().map(Into::into).collect();
        self
    }

    /// It is ready when this TCP port listens.
    #[must_use]
    pub fn ready_on(mut self, port: u16) -> Self {
        self.ready_port = Some(port);
        self
    }

    /// Leaves it out of the mesh.
    #[must_use]
    pub fn outside_mesh(mut self) -> Self {
        self.enrolment = Enrolment::None;
        self
    }

    /// Name of its namespace file, cgroup and directory: `NAME`, outside the default namespace `NAME.NAMESPACE`.
    pub fn key(&self) -> String {
        if self.namespace == DEFAULT_NAMESPACE {
            self.name.clone()
        } else {
            format!("{}.{}", self.name, self.namespace)
        }
    }
}

impl Service {
    /// In the default namespace, selecting nothing.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            namespace: DEFAULT_NAMESPACE.into(),
            selector: BTreeMap::new(),
            ports: Vec::new(),
            headless: false,
        }
    }

    /// Sets the Kubernetes namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// Selects pods by label.
    #[must_use]
    pub fn selects(mut self, key: &str, value: &str) -> Self {
        self.selector.insert(key.into(), value.into());
        self
    }

    /// Adds a port.
    #[must_use]
    pub fn port(mut self, name: &str, port: u16, target_port: u16) -> Self {
        self.ports.push(ServicePort { name: name.into(), port, target_port });
        self
    }

    /// Without virtual address.
    #[must_use]
    pub fn headless(mut self) -> Self {
        self.headless = true;
        self
    }
}

/// RFC 1123 label.
pub(crate) fn is_label(s: &str) -> bool {
    let ends = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    s.len() <= 63
        && ends(s.bytes().next())
        && ends(s.bytes().last())
        && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demo_is_valid_and_web_runs_on_both_nodes() {
        let demo = Topology::demo();
        demo.check().unwrap();
        let web = demo.services.iter().find(|s| s.name == "web").unwrap();
        let nodes: Vec<_> = demo.endpoints(web).map(|w| w.node.as_str()).collect();
        assert_eq!(nodes, ["node-a", "node-b"]);
    }

    #[test]
    fn no_two_things_share_an_address() {
        let demo = Topology::demo();
        let mut all: Vec<IpAddr> = demo.workloads.iter().flat_map(|w| demo.addresses(w).unwrap()).collect();
        all.extend(demo.services.iter().flat_map(|s| demo.vips(s)));
        for n in 0..=2 {
            all.extend(Topology::host_addresses(n));
            all.extend(Topology::gateway(n));
        }
        let distinct: BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len(), "{all:?}");
    }

    #[test]
    fn host_number_of_a_removed_workload_is_used_again() {
        let mut t = Topology::new().node("n1").workload(Workload::new("a", "n1")).workload(Workload::new("b", "n1"));
        t.workloads.retain(|w| w.name != "a");
        assert_eq!(t.push_workload(Workload::new("c", "n1")).host, FIRST_HOST);
        assert_eq!(t.push_workload(Workload::new("d", "n1")).host, FIRST_HOST + 2);
    }

    #[test]
    fn what_cannot_be_built_is_named() {
        let check = |t: Topology, expected: &str| {
            let error = t.check().unwrap_err().to_string();
            assert!(error.contains(expected), "expected `{expected}` in `{error}`");
        };
        check(Topology::new(), "0 nodes");
        check(Topology::new().node("a-name-too-long"), "at most 12");
        check(Topology::new().node("n").node("n"), "`n` is used twice");
        check(Topology::new().node("n").workload(Workload::new("w", "m")), "node `m` is not in the topology");
        check(Topology::new().node("n").workload(Workload::new("n", "n")), "`n` is used twice");
        check(Topology::new().node("n").workload(Workload::new("controller", "n")), "used twice");
        check(Topology::new().node("n").workload(Workload::new("W", "n")), "DNS labels");
        check(Topology::new().node("n").service(Service::new("s")), "at least one port");
    }

    #[test]
    fn a_full_node_takes_no_more() {
        let mut t = Topology::new().node("n");
        for i in 0..=u32::from(LAST_HOST - FIRST_HOST) {
            t.push_workload(Workload::new(&format!("w{i}"), "n"));
        }
        t.check().unwrap();
        t.push_workload(Workload::new("one-more", "n"));
        assert!(t.check().unwrap_err().0.contains("no address is left on n"));
    }
}
