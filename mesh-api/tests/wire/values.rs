//! Everything that the domain types can hold and the wire can carry.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_core::identity::SpiffeId;
use mesh_core::policy::{
    Action, Clause, Match, Policy, PolicyName, PolicyScope, Rule, ServiceAccountMatch, StringMatch,
};
use mesh_core::service::{HealthPolicy, LbMode, LoadBalancing, Scope, Service};
use mesh_core::workload::{
    AppProtocol, GatewayAddress, GatewayDestination, Health, Locality, NetworkMode, PortMapping, ServiceName, Tunnel,
    Workload, WorkloadType, WorkloadUid,
};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::select;

/// Any text, often empty.
fn text() -> impl Strategy<Value = Arc<str>> {
    prop_oneof![2 => Just(String::new()), 3 => "[a-z0-9.-]{1,12}", 1 => "\\PC{0,8}"].prop_map(Arc::from)
}

/// A part of a SPIFFE ID; also those that the wire leaves out.
fn segment() -> impl Strategy<Value = Arc<str>> {
    prop_oneof![1 => Just("default".to_owned()), 1 => Just("cluster.local".to_owned()), 3 => "[a-z0-9][a-z0-9._-]{0,12}"]
        .prop_map(Arc::from)
}

fn ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<[u8; 4]>().prop_map(IpAddr::from),
        any::<[u8; 16]>().prop_map(IpAddr::from),
        any::<[u8; 4]>().prop_map(|v4| std::net::Ipv4Addr::from(v4).to_ipv6_mapped().into()),
    ]
}

fn net() -> impl Strategy<Value = IpNet> {
    (ip(), any::<u8>()).prop_map(|(ip, length)| {
        let longest = if ip.is_ipv4() { 32 } else { 128 };
        IpNet::new(ip, length % (longest + 1)).expect("short enough").trunc()
    })
}

fn service_name() -> impl Strategy<Value = ServiceName> {
    ("[a-z0-9-]{1,12}", "[a-z0-9.*-]{1,20}")
        .prop_map(|(namespace, hostname)| ServiceName { namespace: namespace.into(), hostname: hostname.into() })
}

fn policy_name() -> impl Strategy<Value = PolicyName> {
    ("[a-z0-9-]{0,12}", "[a-z0-9._-]{1,20}")
        .prop_map(|(namespace, name)| PolicyName { namespace: namespace.into(), name: name.into() })
}

fn gateway() -> impl Strategy<Value = GatewayAddress> {
    let by_address = (text(), ip()).prop_map(|(network, address)| GatewayDestination::Address { network, address });
    let destination = prop_oneof![by_address, service_name().prop_map(GatewayDestination::Hostname)];
    (destination, 1_u16..).prop_map(|(destination, hbone_port)| GatewayAddress { destination, hbone_port })
}

fn port() -> impl Strategy<Value = PortMapping> {
    let protocols = [
        AppProtocol::Unknown,
        AppProtocol::Http11,
        AppProtocol::Http2,
        AppProtocol::Grpc,
        AppProtocol::Tcp,
        AppProtocol::Tls,
    ];
    (any::<u16>(), any::<u16>(), select(protocols.to_vec()))
        .prop_map(|(service_port, target_port, app_protocol)| PortMapping { service_port, target_port, app_protocol })
}

prop_compose! {
    fn place()(
        network in text(), cluster in text(), node in text(), hostname in text(),
        region in text(), zone in text(), subzone in text(),
        waypoint in prop::option::of(gateway()), network_gateway in prop::option::of(gateway()),
    ) -> Workload {
        let id = SpiffeId::new("a", "b", "c");
        let mut workload = blank(id);
        workload.network = network;
        workload.cluster = cluster;
        workload.node = node;
        workload.hostname = hostname;
        workload.locality = Locality { region, zone, subzone };
        workload.waypoint = waypoint;
        workload.network_gateway = network_gateway;
        workload
    }
}

prop_compose! {
    pub(crate) fn workload()(
        place in place(),
        uid in "\\PC{1,30}",
        identity in (segment(), segment(), segment()),
        names in [text(), text(), text(), text()],
        addresses in vec(ip(), 0..4),
        tunnel in select(vec![Tunnel::None, Tunnel::Hbone]),
        native_tunnel in any::<bool>(),
        network_mode in select(vec![NetworkMode::Standard, NetworkMode::HostNetwork]),
        workload_type in select(vec![WorkloadType::Deployment, WorkloadType::CronJob, WorkloadType::Pod, WorkloadType::Job]),
        capacity in prop_oneof![Just(0), Just(1), any::<u32>()],
        health in select(vec![Health::Healthy, Health::Unhealthy]),
        (policies, services) in (vec(policy_name(), 0..4), btree_map(service_name(), vec(port(), 0..4), 0..4)),
    ) -> Workload {
        let (trust_domain, namespace, service_account) = identity;
        let [name, canonical_name, canonical_revision, workload_name] = names;
        Workload {
            uid: WorkloadUid(uid.into()),
            identity: SpiffeId { trust_domain, namespace, service_account },
            name, canonical_name, canonical_revision, workload_name,
            addresses, tunnel, native_tunnel, network_mode, workload_type, capacity, health, policies, services,
            ..place
        }
    }
}

fn blank(identity: SpiffeId) -> Workload {
    Workload {
        uid: WorkloadUid("".into()),
        name: "".into(),
        identity,
        addresses: Vec::new(),
        hostname: "".into(),
        network: "".into(),
        cluster: "".into(),
        node: "".into(),
        tunnel: Tunnel::None,
        native_tunnel: false,
        network_mode: NetworkMode::Standard,
        canonical_name: "".into(),
        canonical_revision: "".into(),
        workload_type: WorkloadType::Pod,
        workload_name: "".into(),
        locality: Locality::default(),
        capacity: 1,
        health: Health::Healthy,
        waypoint: None,
        network_gateway: None,
        policies: Vec::new(),
        services: [].into(),
    }
}

fn load_balancing() -> impl Strategy<Value = LoadBalancing> {
    let scopes = [Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node, Scope::Cluster, Scope::Network];
    let modes = [LbMode::Strict, LbMode::Failover, LbMode::Passthrough];
    let health = [HealthPolicy::OnlyHealthy, HealthPolicy::AllowAll];
    (vec(select(scopes.to_vec()), 0..4), select(modes.to_vec()), select(health.to_vec()))
        .prop_map(|(preference, mode, health)| LoadBalancing { preference, mode, health })
        // Which says nothing, and is written by leaving it out.
        .prop_filter("a wish", |lb| {
            !(lb.preference.is_empty() && lb.mode == LbMode::Failover && lb.health == HealthPolicy::OnlyHealthy)
        })
}

prop_compose! {
    pub(crate) fn service()(
        key in service_name(),
        name in text(),
        vips in vec((text(), ip()), 0..4),
        ports in vec(port(), 0..4),
        subject_alt_names in vec(text(), 0..3),
        waypoint in prop::option::of(gateway()),
        load_balancing in prop::option::of(load_balancing()),
    ) -> Service {
        Service { key, name, vips, ports, subject_alt_names, waypoint, load_balancing }
    }
}

fn string_match() -> impl Strategy<Value = StringMatch> {
    prop_oneof![
        text().prop_map(StringMatch::Exact),
        text().prop_map(StringMatch::Prefix),
        text().prop_map(StringMatch::Suffix),
        Just(StringMatch::Presence),
    ]
}

fn account() -> impl Strategy<Value = ServiceAccountMatch> {
    (text(), text()).prop_map(|(namespace, service_account)| ServiceAccountMatch { namespace, service_account })
}

prop_compose! {
    fn one_match()(
        namespaces in vec(string_match(), 0..3), not_namespaces in vec(string_match(), 0..3),
        principals in vec(string_match(), 0..3), not_principals in vec(string_match(), 0..3),
        service_accounts in vec(account(), 0..3), not_service_accounts in vec(account(), 0..3),
        source_ips in vec(net(), 0..3), not_source_ips in vec(net(), 0..3),
        destination_ips in vec(net(), 0..3), not_destination_ips in vec(net(), 0..3),
        (destination_ports, not_destination_ports) in (vec(any::<u16>(), 0..3), vec(any::<u16>(), 0..3)),
    ) -> Match {
        Match {
            namespaces, not_namespaces, principals, not_principals, service_accounts, not_service_accounts,
            source_ips, not_source_ips, destination_ips, not_destination_ips, destination_ports, not_destination_ports,
        }
    }
}

prop_compose! {
    pub(crate) fn policy()(
        name in policy_name(),
        scope in select(vec![PolicyScope::Global, PolicyScope::Namespace, PolicyScope::Workload]),
        action in select(vec![Action::Allow, Action::Deny]),
        dry_run in any::<bool>(),
        rules in vec(vec(vec(one_match(), 0..3), 0..3), 0..3),
    ) -> Policy {
        let clause = |matches| Clause { matches };
        let rule = |clauses: Vec<Vec<Match>>| Rule { clauses: clauses.into_iter().map(clause).collect() };
        Policy { name, scope, action, dry_run, rules: rules.into_iter().map(rule).collect() }
    }
}
