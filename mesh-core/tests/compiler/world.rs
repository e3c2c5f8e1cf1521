//! Random objects of a small world, in which names, labels and addresses often meet.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::config::Object;
use mesh_core::config::objects::{
    AuthorizationPolicy, Condition, ContainerPort, EndpointSlice, Kind, Labels, Meta, MtlsMode, Namespace, Node,
    ObjectKey, Operation, Origin, Owner, PeerAuthentication, Pod, PodPhase, PolicyAction, PolicyRule, Protocol,
    Service, ServiceAccount, ServiceKind, ServicePort, SliceEndpoint, SlicePort, Source, TargetPort, TargetRef, Values,
    WorkloadEntry,
};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

pub(crate) const NAMESPACES: &[&str] = &["default", "shop", "istio-system"];
pub(crate) const ADDRESSES: &[&str] = &["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "fd00::1", "fd00::2"];
const NAMES: &[&str] = &["a", "b", "c"];
const NODES: &[&str] = &["node-a", "node-b", ""];

/// What happens to a configuration.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// A new version that can be used.
    Good(Object),
    /// A new version that cannot.
    Bad(Object),
    Remove(ObjectKey),
}

pub(crate) fn step() -> impl Strategy<Value = Step> {
    let good = prop_oneof![
        3 => namespace(),
        1 => node(),
        8 => pod(),
        4 => service(),
        4 => slice(),
        1 => account(),
        2 => entry(),
        5 => peer_authentication(),
        3 => authorization(),
    ];
    prop_oneof![9 => good.prop_map(Step::Good), 1 => bad().prop_map(Step::Bad), 4 => key().prop_map(Step::Remove)]
}

fn key() -> impl Strategy<Value = ObjectKey> {
    let kinds = [
        Kind::Namespace,
        Kind::Node,
        Kind::Pod,
        Kind::Pod,
        Kind::Service,
        Kind::EndpointSlice,
        Kind::ServiceAccount,
        Kind::WorkloadEntry,
        Kind::PeerAuthentication,
        Kind::AuthorizationPolicy,
    ];
    (select(kinds.to_vec()), select(NAMESPACES), select(NAMES), select(NODES)).prop_map(|(kind, ns, name, node)| {
        match kind {
            Kind::Namespace => ObjectKey::new(kind, "", ns),
            Kind::Node => ObjectKey::new(kind, "", node),
            _ => ObjectKey::new(kind, ns, name),
        }
    })
}

fn meta(labels: impl Strategy<Value = Labels>) -> impl Strategy<Value = Meta> {
    let line = prop_oneof![3 => Just(1_u32), 1 => Just(2)];
    (select(NAMESPACES), select(NAMES), labels, 0_u64..3, line).prop_map(
        |(namespace, name, labels, created_secs, line)| Meta {
            namespace: namespace.into(),
            name: name.into(),
            labels,
            annotations: Labels::new(),
            created_secs,
            origin: Origin { file: "mesh.yaml".into(), line },
        },
    )
}

fn labels(pairs: &'static [(&'static str, &'static str)]) -> impl Strategy<Value = Labels> {
    subsequence(pairs, 0..=pairs.len()).prop_map(|pairs| pairs.into_iter().map(|(k, v)| (k.into(), v.into())).collect())
}

/// As a selector: none, one label or two.
fn selector() -> impl Strategy<Value = Labels> {
    labels(&[("app", "a"), ("version", "1")]).prop_flat_map(|labels| (Just(labels), any::<bool>())).prop_map(
        |(mut labels, other)| {
            if other && let Some(app) = labels.get_mut("app") {
                *app = "b".into();
            }
            labels
        },
    )
}

fn addresses() -> impl Strategy<Value = Vec<IpAddr>> {
    subsequence(ADDRESSES, 0..=2).prop_map(|list| list.into_iter().map(|ip| ip.parse().expect("address")).collect())
}

fn text(words: &'static [&'static str]) -> impl Strategy<Value = Arc<str>> {
    select(words).prop_map(Arc::from)
}

fn namespace() -> BoxedStrategy<Object> {
    // Few, so that one after the other often differs in one thing only.
    let labels = select(vec![
        &[][..],
        &[("istio.io/dataplane-mode", "ambient")],
        &[("istio-injection", "enabled"), ("istio.io/use-waypoint", "way")],
        &[("topology.istio.io/network", "net")],
    ]);
    let annotation = select(vec!["", "PreferClose", "PreferSameNode"]);
    (select(NAMESPACES), labels, annotation)
        .prop_map(|(name, labels, annotation)| {
            let key = "networking.istio.io/traffic-distribution";
            let annotations =
                [(key.into(), annotation.into())].into_iter().filter(|_| !annotation.is_empty()).collect();
            let labels = labels.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
            Object::Namespace(Namespace { meta: Meta { name: name.into(), labels, annotations, ..Meta::default() } })
        })
        .boxed()
}

fn node() -> BoxedStrategy<Object> {
    let labels = labels(&[("topology.kubernetes.io/region", "r"), ("topology.kubernetes.io/zone", "z")]);
    (select(&NODES[..2]), labels)
        .prop_map(|(name, labels)| Object::Node(Node { meta: Meta { name: name.into(), labels, ..Meta::default() } }))
        .boxed()
}

fn account() -> BoxedStrategy<Object> {
    meta(Just(Labels::new())).prop_map(|meta| Object::ServiceAccount(ServiceAccount { meta })).boxed()
}

fn pod() -> BoxedStrategy<Object> {
    let labels = labels(&[
        ("app", "a"),
        ("version", "1"),
        ("istio.io/dataplane-mode", "none"),
        ("topology.kubernetes.io/zone", "own"),
        ("networking.istio.io/tunnel", "http"),
    ]);
    let place = (text(NODES), prop::bool::weighted(0.1), addresses());
    let phases = vec![PodPhase::Running, PodPhase::Running, PodPhase::Running, PodPhase::Pending, PodPhase::Succeeded];
    let life = (select(phases), prop::option::of(any::<bool>()), prop::bool::weighted(0.1));
    let ports = subsequence(vec![("http", 8080), ("admin", 9090)], 0..=2);
    let owner = prop::option::weighted(0.3, Just(Owner { kind: "StatefulSet".into(), name: "set".into() }));
    (meta(labels), text(&["", "sa-1", "sa-2"]), place, life, ports, owner, any::<bool>())
        .prop_map(
            |(mut meta, service_account, (node, host_network, ips), (phase, ready, deleting), ports, owner, is_b)| {
                if is_b && let Some(app) = meta.labels.get_mut("app") {
                    *app = "b".into();
                }
                let port =
                    |(name, port): (&str, u16)| ContainerPort { name: name.into(), port, protocol: Protocol::Tcp };
                let ports = ports.into_iter().map(port).collect();
                Object::Pod(Pod {
                    meta,
                    service_account,
                    node,
                    host_network,
                    ips,
                    phase,
                    ready,
                    deleting,
                    ports,
                    owner,
                })
            },
        )
        .boxed()
}

fn service_ports() -> impl Strategy<Value = Vec<ServicePort>> {
    let target = prop_oneof![Just(TargetPort::Number(8080)), Just(TargetPort::Name("http".into()))];
    let port = move |name: &'static str, port: u16| {
        target.clone().prop_map(move |target| ServicePort {
            name: name.into(),
            port,
            target,
            protocol: Protocol::Tcp,
            app_protocol: None,
        })
    };
    (port("http", 80), port("admin", 81), 0_usize..=2)
        .prop_map(|(first, second, count)| [first, second].into_iter().take(count).collect())
}

fn service() -> BoxedStrategy<Object> {
    let labels = labels(&[("istio.io/use-waypoint", "own")]);
    let kind = prop_oneof![9 => Just(ServiceKind::Addressed), 1 => Just(ServiceKind::ExternalName)];
    let distribution = prop::option::of(text(&["PreferClose", "PreferSameNode", "Sideways"]));
    let flags = (prop::bool::weighted(0.2), prop::bool::weighted(0.2));
    (meta(labels), kind, selector(), addresses(), service_ports(), flags, distribution)
        .prop_map(
            |(meta, kind, selector, cluster_ips, ports, (publish_not_ready, local_only), traffic_distribution)| {
                Object::Service(Service {
                    meta,
                    kind,
                    selector,
                    cluster_ips,
                    ports,
                    publish_not_ready,
                    local_only,
                    traffic_distribution,
                })
            },
        )
        .boxed()
}

fn slice() -> BoxedStrategy<Object> {
    let endpoint = (addresses(), any::<bool>(), prop::option::weighted(0.7, text(NAMES)), text(NODES))
        .prop_map(|(addresses, ready, pod, node)| SliceEndpoint { addresses, ready, pod, node, zone: "z".into() });
    let ports = subsequence(vec![("http", 8080), ("admin", 9090)], 0..=2);
    (meta(Just(Labels::new())), text(NAMES), ports, prop::collection::vec(endpoint, 0..3))
        .prop_map(|(meta, service, ports, endpoints)| {
            let port = |(name, port): (&str, u16)| SlicePort { name: name.into(), port, protocol: Protocol::Tcp };
            Object::EndpointSlice(EndpointSlice {
                meta,
                service,
                ports: ports.into_iter().map(port).collect(),
                endpoints,
            })
        })
        .boxed()
}

fn entry() -> BoxedStrategy<Object> {
    let address = prop_oneof![4 => select(ADDRESSES), 1 => Just("host.example")];
    let labels = || labels(&[("app", "a"), ("version", "1")]);
    (meta(labels()), address, labels(), 0_u32..3, text(&["", "sa-1"]), prop::option::of(Just(7070_u16)))
        .prop_map(|(meta, address, labels, weight, service_account, port)| {
            let ports: BTreeMap<Arc<str>, u16> = port.map(|port| ("http".into(), port)).into_iter().collect();
            Object::WorkloadEntry(WorkloadEntry {
                meta,
                address: address.into(),
                labels,
                ports,
                weight,
                service_account,
                ..WorkloadEntry::default()
            })
        })
        .boxed()
}

fn mode() -> impl Strategy<Value = MtlsMode> {
    select(vec![MtlsMode::Unset, MtlsMode::Disable, MtlsMode::Permissive, MtlsMode::Strict])
}

fn peer_authentication() -> BoxedStrategy<Object> {
    let ports = prop::collection::btree_map(select(vec![80_u16, 8080]), mode(), 0..3);
    (meta(Just(Labels::new())), selector(), mode(), ports)
        .prop_map(|(meta, selector, mode, ports)| {
            let port_modes = if selector.is_empty() { BTreeMap::new() } else { ports };
            Object::PeerAuthentication(PeerAuthentication { meta, selector, mode, port_modes })
        })
        .boxed()
}

fn is(values: &[&str]) -> Values {
    Values { is: values.iter().map(|value| Arc::from(*value)).collect(), not: Vec::new() }
}

fn rule() -> impl Strategy<Value = PolicyRule> {
    let from = Source { namespaces: is(&["shop"]), ..Source::default() };
    let to = Operation { ports: is(&["80"]), ..Operation::default() };
    let http = Operation { methods: is(&["GET"]), ..Operation::default() };
    let when = Condition { key: "source.ip".into(), values: is(&["10.0.0.0/8"]) };
    select(vec![
        PolicyRule::default(),
        PolicyRule { from: Some(vec![from.clone()]), ..PolicyRule::default() },
        PolicyRule { to: Some(vec![to, http.clone()]), ..PolicyRule::default() },
        PolicyRule { from: Some(vec![from]), to: Some(vec![http]), when: vec![when] },
    ])
}

fn authorization() -> BoxedStrategy<Object> {
    let actions = vec![PolicyAction::Allow, PolicyAction::Deny, PolicyAction::Audit, PolicyAction::Custom];
    let waypoint = prop::bool::weighted(0.1);
    (meta(Just(Labels::new())), selector(), select(actions), prop::collection::vec(rule(), 0..3), waypoint)
        .prop_map(|(meta, selector, action, rules, waypoint)| {
            let target = TargetRef { kind: "Service".into(), name: "a".into(), ..TargetRef::default() };
            let target_refs = waypoint.then_some(target).into_iter().collect();
            let selector = if waypoint { Labels::new() } else { selector };
            Object::AuthorizationPolicy(AuthorizationPolicy {
                meta,
                selector,
                target_refs,
                action,
                provider: "".into(),
                rules,
            })
        })
        .boxed()
}

/// Objects that must not be applied.
fn bad() -> impl Strategy<Value = Object> {
    let policy = authorization().prop_map(|object| match object {
        Object::AuthorizationPolicy(mut policy) => {
            let to = Some(vec![Operation { ports: is(&["http"]), ..Operation::default() }]);
            policy.rules.push(PolicyRule { to, ..PolicyRule::default() });
            Object::AuthorizationPolicy(policy)
        }
        other => other,
    });
    let peer = peer_authentication().prop_map(|object| match object {
        Object::PeerAuthentication(mut policy) => {
            policy.port_modes.insert(0, MtlsMode::Strict);
            Object::PeerAuthentication(policy)
        }
        other => other,
    });
    let service = service().prop_map(|object| match object {
        Object::Service(mut service) => {
            service.ports.push(ServicePort {
                name: "zero".into(),
                port: 0,
                target: TargetPort::Number(1),
                protocol: Protocol::Tcp,
                app_protocol: None,
            });
            Object::Service(service)
        }
        other => other,
    });
    prop_oneof![policy, peer, service]
}
