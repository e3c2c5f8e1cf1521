//! A mesh in a few lines, and the plans that a connect in it may come to.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use mesh_core::config::objects::{
    ContainerPort, Labels, Meta, Namespace, Node, Pod, Protocol, Service, ServicePort, TargetPort,
};
use mesh_core::config::{Compiler, Delta, Object, Settings, Waypoints};
use mesh_core::flow::{OutboundFlow, Plan, Upstream};
use mesh_core::plan::{PlanContext, plan_outbound};
use mesh_core::snapshot::{Change, Snapshot};
use mesh_core::workload::{Workload, WorkloadUid};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// Chances given to each plan; with three of them one that is possible stays away once in 10^52 times.
const CHANCES: u64 = 300;

/// Objects, and the proxy that looks at them.
pub(crate) struct World {
    pub(crate) objects: Vec<Object>,
    /// What the compiler does not make.
    pub(crate) changes: Vec<Change>,
    pub(crate) settings: Settings,
    pub(crate) local_node: &'static str,
    pub(crate) network: &'static str,
    /// Pods that this proxy serves.
    pub(crate) enrolled: Vec<&'static str>,
    pub(crate) force_tunnel: bool,
    /// Pods whose dial failed.
    pub(crate) excluded: Vec<String>,
}

impl World {
    /// `client` on node a, zone 1, with address 10.0.0.9, in an ambient namespace, with nodes in two zones.
    pub(crate) fn new() -> Self {
        let ambient = labels(&[("istio.io/dataplane-mode", "ambient")]);
        let namespace = Namespace { meta: Meta { name: "default".into(), labels: ambient, ..Meta::default() } };
        let node = |name: &str, zone: &str| {
            let zone = labels(&[("topology.kubernetes.io/region", "r"), ("topology.kubernetes.io/zone", zone)]);
            Object::Node(Node { meta: Meta { name: name.into(), labels: zone, ..Meta::default() } })
        };
        let nodes = [node("a", "1"), node("b", "1"), node("c", "2")];
        Self {
            objects: [Object::Namespace(namespace)].into_iter().chain(nodes).chain([client()]).collect(),
            changes: Vec::new(),
            settings: Settings { waypoints: Waypoints::Required, ..Settings::default() },
            local_node: "a",
            network: "",
            enrolled: vec!["client"],
            force_tunnel: false,
            excluded: Vec::new(),
        }
    }

    pub(crate) fn with(mut self, object: Object) -> Self {
        self.objects.push(object);
        self
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let deltas: Vec<Delta> = self.objects.iter().cloned().map(Delta::Upsert).collect();
        let compiled = Compiler::new(self.settings.clone()).compile(&deltas);
        Snapshot::in_network(self.network).apply(&compiled.changes).apply(&self.changes)
    }

    /// The plan for one roll of the dice.
    pub(crate) fn plan(&self, snapshot: &Snapshot, (source, target): (&str, SocketAddr), seed: u64) -> Plan {
        let source = named(snapshot, source);
        let serves = |uid: &WorkloadUid| self.enrolled.iter().any(|name| named(snapshot, name).uid == *uid);
        let excluded: Vec<WorkloadUid> = self.excluded.iter().map(|name| named(snapshot, name).uid.clone()).collect();
        let context = PlanContext {
            snapshot,
            local_node: self.local_node,
            enrolled: &serves,
            force_tunnel: self.force_tunnel,
            excluded: &excluded,
        };
        let flow = OutboundFlow { source: source.clone(), destination: target };
        plan_outbound(&context, &flow, &mut StdRng::seed_from_u64(seed))
    }

    /// All that a connect from `client` may come to.
    #[track_caller]
    pub(crate) fn check(&self, target: &str, expected: &[&str]) {
        self.check_from("client", target, expected);
    }

    #[track_caller]
    pub(crate) fn check_from(&self, source: &str, target: &str, expected: &[&str]) {
        let snapshot = self.snapshot();
        let target_addr: SocketAddr = target.parse().expect("ADDRESS:PORT");
        let plans: BTreeSet<String> =
            (0..CHANCES).map(|seed| words(&self.plan(&snapshot, (source, target_addr), seed))).collect();
        let expected: BTreeSet<String> = expected.iter().map(|plan| (*plan).to_owned()).collect();
        assert_eq!(plans, expected, "{source} -> {target}");
    }
}

pub(crate) fn named<'a>(snapshot: &'a Snapshot, name: &str) -> &'a Arc<Workload> {
    snapshot.workloads().find(|w| *w.name == *name).unwrap_or_else(|| panic!("no workload {name}"))
}

/// A plan in a few words.
pub(crate) fn words(plan: &Plan) -> String {
    let to = |upstream: &Upstream| format!("{} {}", upstream.workload.name, upstream.address);
    match plan {
        Plan::Passthrough { destination, upstream: None } => format!("pass {destination}"),
        Plan::Passthrough { destination, upstream: Some(upstream) } => {
            assert_eq!(*destination, upstream.address);
            format!("pass {}", to(upstream))
        }
        Plan::Tunnel(upstream) => format!("tunnel {}", to(upstream)),
        Plan::Local(upstream) => format!("local {}", to(upstream)),
        Plan::Waypoint { gateway, authority } => format!("waypoint {} for {authority}", to(gateway)),
        Plan::Refuse(refusal) => format!("refuse: {refusal}"),
    }
}

pub(crate) fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| (Arc::from(*key), Arc::from(*value))).collect()
}

pub(crate) fn meta(name: &str) -> Meta {
    Meta { namespace: "default".into(), name: name.into(), ..Meta::default() }
}

fn client() -> Object {
    pod("client", "client", "a", "10.0.0.9")
}

/// A ready pod with a port named `http`, 8080.
pub(crate) fn pod(name: &str, app: &str, node: &str, ip: &str) -> Object {
    pod_with(name, app, node, ip, |_| {})
}

pub(crate) fn pod_with(name: &str, app: &str, node: &str, ip: &str, change: impl FnOnce(&mut Pod)) -> Object {
    let mut pod = Pod {
        meta: Meta { labels: labels(&[("app", app)]), ..meta(name) },
        node: node.into(),
        ips: vec![ip.parse().expect("address")],
        ready: Some(true),
        ports: vec![container_port("http", 8080)],
        ..Pod::default()
    };
    change(&mut pod);
    Object::Pod(pod)
}

pub(crate) fn container_port(name: &str, port: u16) -> ContainerPort {
    ContainerPort { name: name.into(), port, protocol: Protocol::Tcp }
}

/// A Service `web` at 10.96.0.1 that selects `app: web`; 80 goes to the port named `http`.
pub(crate) fn web() -> Object {
    service_with("web", "10.96.0.1", |_| {})
}

pub(crate) fn service_with(app: &str, vip: &str, change: impl FnOnce(&mut Service)) -> Object {
    let mut service = Service {
        meta: meta(app),
        selector: labels(&[("app", app)]),
        cluster_ips: vec![vip.parse().expect("address")],
        ports: vec![service_port("http", 80, TargetPort::Name("http".into()))],
        ..Service::default()
    };
    change(&mut service);
    Object::Service(service)
}

pub(crate) fn service_port(name: &str, port: u16, target: TargetPort) -> ServicePort {
    ServicePort { name: name.into(), port, target, protocol: Protocol::Tcp, app_protocol: None }
}
