//! What becomes of a captured connect.
//!
//! [`plan_outbound`] looks at one snapshot and answers at once. Not here: dialling, pools, retries; a caller whose dial
//! failed asks again with the endpoint in [`PlanContext::excluded`].

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rand::Rng;

use crate::balance;
pub use crate::balance::rank;
use crate::flow::{OutboundFlow, Plan, RESERVED_PORTS, Refusal, Upstream};
use crate::service::{LbMode, Service};
use crate::snapshot::{Addressee, Snapshot};
use crate::workload::{GatewayAddress, GatewayDestination, Tunnel, Workload, WorkloadUid};

/// What a plan depends on beside the flow.
#[derive(Clone, Copy)]
pub struct PlanContext<'a> {
    /// Configuration in force.
    pub snapshot: &'a Snapshot,
    /// Name of the node that this proxy serves.
    pub local_node: &'a str,
    /// Whether this proxy serves the workload.
    pub enrolled: &'a dyn Fn(&WorkloadUid) -> bool,
    /// Use the tunnel between workloads of one node too (mesh-wide switch).
    pub force_tunnel: bool,
    /// Endpoints whose dial failed in this connection attempt.
    pub excluded: &'a [WorkloadUid],
}

/// Decides how to carry a connection. `rng` picks among endpoints of equal rank.
pub fn plan_outbound(ctx: &PlanContext<'_>, flow: &OutboundFlow, rng: &mut impl Rng) -> Plan {
    let destination = SocketAddr::new(flow.destination.ip().to_canonical(), flow.destination.port());
    if RESERVED_PORTS.contains(&destination.port()) {
        return Plan::Refuse(Refusal::ReservedPort(destination.port()));
    }
    if owns(&flow.source, destination.ip()) {
        let upstream = Upstream { workload: flow.source.clone(), address: destination, service: None };
        return Plan::Passthrough { destination, upstream: Some(upstream) };
    }
    match ctx.snapshot.addressee(destination.ip()) {
        Some(Addressee::Workload(workload)) => to_workload(ctx, &flow.source, workload, destination, rng),
        Some(Addressee::Service(service)) => to_service(ctx, &flow.source, service, destination, rng),
        None => Plan::Passthrough { destination, upstream: None },
    }
}

/// A workload that was dialled by its own address.
fn to_workload(
    ctx: &PlanContext<'_>,
    source: &Workload,
    workload: &Arc<Workload>,
    destination: SocketAddr,
    rng: &mut impl Rng,
) -> Plan {
    if let Some(waypoint) = &workload.waypoint
        && !is_waypoint(ctx, source, waypoint)
        && !is_waypoint(ctx, workload, waypoint)
    {
        return match waypoint_upstream(ctx, source, waypoint, rng) {
            Some(gateway) => Plan::Waypoint { gateway, authority: destination },
            None => Plan::Refuse(Refusal::WaypointNotReady(workload.uid.0.clone())),
        };
    }
    let upstream = Upstream { workload: workload.clone(), address: destination, service: None };
    to_upstream(ctx, upstream)
}

fn to_service(
    ctx: &PlanContext<'_>,
    source: &Workload,
    service: &Arc<Service>,
    destination: SocketAddr,
    rng: &mut impl Rng,
) -> Plan {
    let port = destination.port();
    if !service.ports.iter().any(|m| m.service_port == port) {
        return Plan::Refuse(Refusal::NoPort(service.key.clone(), port));
    }
    if let Some(waypoint) = &service.waypoint
        && !is_waypoint(ctx, source, waypoint)
    {
        return match waypoint_upstream(ctx, source, waypoint, rng) {
            Some(gateway) => Plan::Waypoint { gateway, authority: destination },
            None => Plan::Refuse(Refusal::WaypointNotReady(service.key.to_string().into())),
        };
    }
    if service.load_balancing.as_ref().is_some_and(|lb| lb.mode == LbMode::Passthrough) {
        return Plan::Passthrough { destination, upstream: None };
    }
    match balance::choose(ctx, source, service, (destination.ip(), port), rng) {
        Some(upstream) => to_upstream(ctx, upstream),
        None => Plan::Refuse(Refusal::NoEndpoint(service.key.clone())),
    }
}

/// How to reach a chosen endpoint.
fn to_upstream(ctx: &PlanContext<'_>, upstream: Upstream) -> Plan {
    let workload = &upstream.workload;
    if RESERVED_PORTS.contains(&upstream.address.port()) {
        return Plan::Refuse(Refusal::ReservedPort(upstream.address.port()));
    }
    match workload.tunnel {
        Tunnel::None => Plan::Passthrough { destination: upstream.address, upstream: Some(upstream) },
        Tunnel::Hbone => {
            let here = !ctx.local_node.is_empty() && *workload.node == *ctx.local_node && (ctx.enrolled)(&workload.uid);
            if here && !ctx.force_tunnel && !workload.native_tunnel {
                Plan::Local(upstream)
            } else {
                Plan::Tunnel(upstream)
            }
        }
    }
}

/// The waypoint workload to dial; its address carries the HBONE port.
fn waypoint_upstream(
    ctx: &PlanContext<'_>,
    source: &Workload,
    waypoint: &GatewayAddress,
    rng: &mut impl Rng,
) -> Option<Upstream> {
    let port = waypoint.hbone_port;
    match gateway(ctx, waypoint)? {
        Addressee::Workload(workload) => {
            let address = SocketAddr::new(*workload.addresses.first()?, port);
            let usable = workload.health == crate::workload::Health::Healthy && !ctx.excluded.contains(&workload.uid);
            usable.then(|| Upstream { workload: workload.clone(), address, service: None })
        }
        Addressee::Service(service) => {
            let vip = service.vips.first().map_or(IpAddr::from([0, 0, 0, 0]), |(_, ip)| *ip);
            balance::choose(ctx, source, service, (vip, port), rng)
        }
    }
}

fn gateway<'a>(ctx: &PlanContext<'a>, waypoint: &GatewayAddress) -> Option<Addressee<'a>> {
    match &waypoint.destination {
        GatewayDestination::Address { network, address } => {
            ctx.snapshot.is_local_network(network).then(|| ctx.snapshot.addressee(*address)).flatten()
        }
        GatewayDestination::Hostname(key) => ctx.snapshot.service(key).map(Addressee::Service),
    }
}

/// A waypoint reaches what is behind it directly.
fn is_waypoint(ctx: &PlanContext<'_>, workload: &Workload, waypoint: &GatewayAddress) -> bool {
    match gateway(ctx, waypoint) {
        Some(Addressee::Workload(gateway)) => gateway.uid == workload.uid,
        Some(Addressee::Service(service)) => workload.services.contains_key(&service.key),
        None => false,
    }
}

fn owns(workload: &Workload, ip: IpAddr) -> bool {
    workload.addresses.iter().any(|a| a.to_canonical() == ip)
}
