//! Messages put together by field number: what istiod sends and ztunnel reads.

use std::sync::Arc;

use mesh_api::wds::{decode, encode};
use mesh_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use mesh_core::flow::HBONE_PORT;
use mesh_core::identity::SpiffeId;
use mesh_core::policy::{Action, PolicyScope, ServiceAccountMatch, StringMatch};
use mesh_core::service::{HealthPolicy, LbMode, Scope};
use mesh_core::snapshot::Change;
use mesh_core::workload::{AppProtocol, GatewayDestination, Health, NetworkMode, Tunnel, Workload, WorkloadType};

use crate::raw::{bytes, number};

fn workload(fields: &[Vec<u8>]) -> Arc<Workload> {
    match decode(ADDRESS_TYPE_URL, &bytes(1, &fields.concat())) {
        Ok(Change::UpsertWorkload(workload)) => workload,
        other => panic!("{other:?}"),
    }
}

/// `{service_port: 80, target_port: 8080, app_protocol: HTTP11}`.
fn port() -> Vec<u8> {
    [number(1, 80), number(2, 8080), number(3, 1)].concat()
}

#[test]
fn a_workload_by_its_field_numbers() {
    let services = [bytes(1, b"ns/web.ns.svc"), bytes(2, &bytes(1, &port()))].concat();
    let gateway = [bytes(2, &bytes(2, &[10, 0, 0, 5])), number(3, 15009)].concat();
    let locality = [bytes(1, b"region"), bytes(2, b"zone"), bytes(3, b"subzone")].concat();
    let w = workload(&[
        bytes(1, b"web-1"),
        bytes(2, b"ns"),
        bytes(3, &[10, 0, 0, 1]),
        bytes(3, &[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        bytes(4, b"network"),
        number(5, 1),
        bytes(6, b"td"),
        bytes(7, b"sa"),
        bytes(8, &gateway),
        bytes(9, b"node"),
        bytes(10, b"canonical"),
        bytes(11, b"v1"),
        number(12, 3),
        bytes(13, b"owner"),
        number(14, 1),
        bytes(16, b"ns/policy"),
        number(17, 1),
        bytes(18, b"cluster"),
        bytes(19, &bytes(1, &[bytes(1, b"gw-ns"), bytes(2, b"gw.host")].concat())),
        bytes(20, b"cluster//Pod/ns/web-1"),
        bytes(21, b"host"),
        bytes(22, &services),
        bytes(24, &locality),
        number(25, 1),
        bytes(27, &number(1, 7)),
    ]);
    assert_eq!(w.identity, SpiffeId::new("td", "ns", "sa"));
    assert_eq!(
        (&*w.uid.0, &*w.name, &*w.network, &*w.cluster),
        ("cluster//Pod/ns/web-1", "web-1", "network", "cluster")
    );
    assert_eq!(w.addresses, ["10.0.0.1", "fd00::1"].map(|ip| ip.parse::<std::net::IpAddr>().expect("address")));
    assert_eq!((w.tunnel, w.native_tunnel, w.network_mode), (Tunnel::Hbone, true, NetworkMode::HostNetwork));
    assert_eq!((&*w.node, &*w.hostname, &*w.workload_name), ("node", "host", "owner"));
    assert_eq!((&*w.canonical_name, &*w.canonical_revision), ("canonical", "v1"));
    assert_eq!((w.workload_type, w.health, w.capacity), (WorkloadType::Job, Health::Unhealthy, 7));
    assert_eq!((&*w.locality.region, &*w.locality.zone, &*w.locality.subzone), ("region", "zone", "subzone"));
    let waypoint = w.waypoint.as_ref().expect("field 8");
    assert_eq!(waypoint.hbone_port, 15009);
    assert!(
        matches!(&waypoint.destination, GatewayDestination::Address { address, .. } if address.to_string() == "10.0.0.5")
    );
    let gateway = w.network_gateway.as_ref().expect("field 19");
    assert_eq!(gateway.hbone_port, HBONE_PORT, "absent");
    assert!(matches!(&gateway.destination, GatewayDestination::Hostname(name) if name.to_string() == "gw-ns/gw.host"));
    assert_eq!(w.policies.iter().map(ToString::to_string).collect::<Vec<_>>(), ["ns/policy"]);
    let (service, ports) = w.services.iter().next().expect("field 22");
    assert_eq!((service.to_string(), ports[0].service_port, ports[0].target_port), ("ns/web.ns.svc".into(), 80, 8080));
    assert_eq!(ports[0].app_protocol, AppProtocol::Http11);
}

#[test]
fn what_a_workload_leaves_out_has_istios_defaults() {
    let w = workload(&[bytes(2, b"ns"), bytes(20, b"uid")]);
    assert_eq!(w.identity, SpiffeId::new("cluster.local", "ns", "default"));
    assert_eq!((w.tunnel, w.health, w.capacity), (Tunnel::None, Health::Healthy, 1));
    assert_eq!(w.workload_type, WorkloadType::Deployment);
    // And so they are left out again.
    let written = encode(&Change::UpsertWorkload(w)).content.expect("body").bytes;
    assert_eq!(written, bytes(1, &[bytes(2, b"ns"), bytes(20, b"uid")].concat()));
}

#[test]
fn a_service_by_its_field_numbers() {
    let message = [
        bytes(1, b"web"),
        bytes(2, b"ns"),
        bytes(3, b"web.ns.svc"),
        bytes(4, &[bytes(1, b"network"), bytes(2, &[10, 96, 0, 1])].concat()),
        bytes(5, &port()),
        bytes(6, b"spiffe://td/ns/a/sa/b"),
        bytes(7, &bytes(2, &bytes(2, &[10, 0, 0, 5]))),
        // Packed, as proto3 writes it: NETWORK, ZONE, NODE.
        bytes(8, &[bytes(1, &[6, 2, 4]), number(2, 1), number(3, 1)].concat()),
        number(9, 1),
    ];
    let Ok(Change::UpsertService(s)) = decode(ADDRESS_TYPE_URL, &bytes(2, &message.concat())) else { panic!() };
    assert_eq!((s.key.to_string(), &*s.name), ("ns/web.ns.svc".into(), "web"));
    assert_eq!(s.vips, [("network".into(), "10.96.0.1".parse::<std::net::IpAddr>().expect("address"))]);
    assert_eq!((s.ports[0].service_port, &*s.subject_alt_names[0]), (80, "spiffe://td/ns/a/sa/b"));
    assert!(s.waypoint.is_some());
    let lb = s.load_balancing.as_ref().expect("field 8");
    assert_eq!(lb.preference, [Scope::Network, Scope::Zone, Scope::Node]);
    assert_eq!((lb.mode, lb.health), (LbMode::Strict, HealthPolicy::AllowAll));
}

#[test]
fn an_address_range_is_no_virtual_address() {
    let vip = |length: u64| bytes(4, &[bytes(2, &[10, 96, 0, 1]), number(3, length)].concat());
    let message = [bytes(2, b"ns"), bytes(3, b"h"), vip(32), vip(24)].concat();
    let Ok(Change::UpsertService(s)) = decode(ADDRESS_TYPE_URL, &bytes(2, &message)) else { panic!() };
    assert_eq!(s.vips.len(), 1);
}

#[test]
fn a_policy_by_its_field_numbers() {
    let text = |kind: u32, value: &str| bytes(kind, value.as_bytes());
    let net = |address: &[u8], length: u64| [bytes(1, address), number(2, length)].concat();
    let account = [bytes(1, b"ns"), bytes(2, b"sa")].concat();
    let a_match = [
        bytes(1, &text(1, "exact")),
        bytes(2, &text(2, "prefix")),
        bytes(3, &text(3, "suffix")),
        bytes(4, &bytes(4, b"")),
        bytes(5, &net(&[10, 1, 0, 0], 16)),
        bytes(6, &net(&[10, 2, 3, 4], 32)),
        bytes(7, &net(&[0; 16], 0)),
        bytes(8, &net(&[0; 4], 0)),
        // Packed: 80, 300.
        bytes(9, &[80, 0xac, 2]),
        // Not packed, which a reader has to take as well.
        number(10, 443),
        bytes(11, &account),
        bytes(12, &account),
    ];
    let message = [
        bytes(1, b"p"),
        bytes(2, b"ns"),
        number(3, 2),
        number(4, 1),
        bytes(5, &bytes(1, &bytes(2, &a_match.concat()))),
        number(6, 1),
    ];
    let Ok(Change::UpsertPolicy(p)) = decode(AUTHORIZATION_TYPE_URL, &message.concat()) else { panic!() };
    assert_eq!(
        (p.name.to_string(), p.scope, p.action, p.dry_run),
        ("ns/p".into(), PolicyScope::Workload, Action::Deny, true)
    );
    let m = &p.rules[0].clauses[0].matches[0];
    assert_eq!(m.namespaces, [StringMatch::Exact("exact".into())]);
    assert_eq!(m.not_namespaces, [StringMatch::Prefix("prefix".into())]);
    assert_eq!(m.principals, [StringMatch::Suffix("suffix".into())]);
    assert_eq!(m.not_principals, [StringMatch::Presence]);
    assert_eq!(
        (m.source_ips[0].to_string(), m.not_source_ips[0].to_string()),
        ("10.1.0.0/16".into(), "10.2.3.4/32".into())
    );
    assert_eq!(
        (m.destination_ips[0].to_string(), m.not_destination_ips[0].to_string()),
        ("::/0".into(), "0.0.0.0/0".into())
    );
    assert_eq!((&*m.destination_ports, &*m.not_destination_ports), (&[80, 300][..], &[443][..]));
    let account = ServiceAccountMatch { namespace: "ns".into(), service_account: "sa".into() };
    assert_eq!((&m.service_accounts[0], &m.not_service_accounts[0]), (&account, &account));
}
