//! A large configuration: namespaces with services, ten pods behind each, slices for half of them, policies.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use mesh_core::config::objects::{
    AuthorizationPolicy, ContainerPort, EndpointSlice, Labels, Meta, MtlsMode, Namespace, Node, Operation,
    PeerAuthentication, Pod, PolicyRule, Protocol, Service, ServicePort, SliceEndpoint, SlicePort, Source, TargetPort,
    Values,
};
use mesh_core::config::{Delta, Object};

/// Services of a namespace.
const SERVICES_PER_NAMESPACE: usize = 100;
pub(crate) const PODS_PER_SERVICE: usize = 10;
const PODS_PER_NODE: usize = 100;

/// Everything there is with so many services.
pub(crate) fn everything(services: usize) -> Vec<Delta> {
    let mut objects = Vec::new();
    for number in 0..services.div_ceil(SERVICES_PER_NAMESPACE) {
        objects.extend(of_namespace(number));
    }
    for number in 0..(services * PODS_PER_SERVICE).div_ceil(PODS_PER_NODE) {
        let labels = labels(&[
            ("topology.kubernetes.io/region", "r"),
            ("topology.kubernetes.io/zone", &format!("z{}", number % 3)),
        ]);
        objects.push(Object::Node(Node {
            meta: Meta { name: format!("node-{number}").into(), labels, ..Meta::default() },
        }));
    }
    let strict = PeerAuthentication {
        meta: meta("istio-system", "mesh"),
        mode: MtlsMode::Strict,
        ..PeerAuthentication::default()
    };
    objects.push(Object::PeerAuthentication(strict));
    for service in 0..services {
        objects.push(Object::Service(service_of(service)));
        if service % 2 == 0 {
            objects.push(Object::EndpointSlice(slice_of(service)));
        }
        let pods = service * PODS_PER_SERVICE..(service + 1) * PODS_PER_SERVICE;
        objects.extend(pods.map(|number| Object::Pod(pod(number))));
    }
    objects.into_iter().map(Delta::Upsert).collect()
}

/// Pod number so and so, as it is at first.
pub(crate) fn pod(number: usize) -> Pod {
    let service = number / PODS_PER_SERVICE;
    let app = format!("app-{service}");
    let labels = labels(&[("app", &app), ("version", "v1"), ("pod-template-hash", "5d9c"), ("team", "blue")]);
    Pod {
        meta: Meta { labels, created_secs: 1_000, ..meta(&namespace_of(service), &format!("{app}-{number}")) },
        service_account: app.into(),
        node: format!("node-{}", number / PODS_PER_NODE).into(),
        ips: vec![address(10, number)],
        ready: Some(true),
        ports: vec![ContainerPort { name: "http".into(), port: 8080, protocol: Protocol::Tcp }],
        ..Pod::default()
    }
}

/// The first is a network's number.
pub(crate) fn address(network: u8, number: usize) -> IpAddr {
    let [_, a, b, c] = u32::try_from(number + 1).expect("few").to_be_bytes();
    Ipv4Addr::new(network, a, b, c).into()
}

fn of_namespace(number: usize) -> Vec<Object> {
    let name = format!("ns-{number}");
    let labels = labels(&[("istio.io/dataplane-mode", "ambient")]);
    let from = Source { namespaces: values(&name), ..Source::default() };
    let to = Operation { ports: values("8080"), ..Operation::default() };
    let rules = vec![PolicyRule { from: Some(vec![from]), to: Some(vec![to]), ..PolicyRule::default() }];
    let wide =
        AuthorizationPolicy { meta: meta(&name, "neighbours"), rules: rules.clone(), ..AuthorizationPolicy::default() };
    let first = format!("app-{}", number * SERVICES_PER_NAMESPACE);
    let selector = self::labels(&[("app", &first)]);
    let selecting =
        AuthorizationPolicy { meta: meta(&name, "first"), selector, rules, ..AuthorizationPolicy::default() };
    vec![
        Object::Namespace(Namespace { meta: Meta { name: name.into(), labels, ..Meta::default() } }),
        Object::AuthorizationPolicy(wide),
        Object::AuthorizationPolicy(selecting),
    ]
}

fn namespace_of(service: usize) -> String {
    format!("ns-{}", service / SERVICES_PER_NAMESPACE)
}

fn service_of(number: usize) -> Service {
    let port = ServicePort {
        name: "http".into(),
        port: 80,
        target: TargetPort::Name("http".into()),
        protocol: Protocol::Tcp,
        app_protocol: None,
    };
    Service {
        meta: meta(&namespace_of(number), &format!("svc-{number}")),
        selector: labels(&[("app", &format!("app-{number}"))]),
        cluster_ips: vec![address(172, number)],
        ports: vec![port],
        ..Service::default()
    }
}

fn slice_of(service: usize) -> EndpointSlice {
    let endpoint = |number: usize| {
        let pod = pod(number);
        SliceEndpoint { addresses: pod.ips, ready: true, pod: Some(pod.meta.name), node: pod.node, zone: "".into() }
    };
    EndpointSlice {
        meta: meta(&namespace_of(service), &format!("svc-{service}-x")),
        service: format!("svc-{service}").into(),
        ports: vec![SlicePort { name: "http".into(), port: 8080, protocol: Protocol::Tcp }],
        endpoints: (service * PODS_PER_SERVICE..(service + 1) * PODS_PER_SERVICE).map(endpoint).collect(),
    }
}

fn meta(namespace: &str, name: &str) -> Meta {
    Meta { namespace: namespace.into(), name: name.into(), ..Meta::default() }
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| (Arc::from(*key), Arc::from(*value))).collect()
}

fn values(one: &str) -> Values {
    Values { is: vec![one.into()], not: Vec::new() }
}
