//! Which endpoint of a service takes a connection.
//!
//! Only endpoints that can be used count; of these the nearest rank that has any; of these one by weight. Not here:
//! waypoints, tunnels, and retries (the caller excludes endpoints whose dial failed and asks again).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rand::Rng;

use crate::flow::Upstream;
use crate::plan::PlanContext;
use crate::service::{HealthPolicy, LbMode, LoadBalancing, Scope, Service};
use crate::workload::{Health, Workload};

/// An endpoint of `service` for `source`, which dialled `vip` at the service's `port`; none when no endpoint may be
/// used now.
pub(crate) fn choose(
    ctx: &PlanContext<'_>,
    source: &Workload,
    service: &Arc<Service>,
    (vip, port): (IpAddr, u16),
    rng: &mut impl Rng,
) -> Option<Upstream> {
    let health = service.load_balancing.as_ref().map_or(HealthPolicy::OnlyHealthy, |lb| lb.health);
    let mut nearest = u32::MAX;
    let mut candidates: Vec<(&Arc<Workload>, SocketAddr)> = Vec::new();
    for workload in ctx.snapshot.endpoints(&service.key) {
        let usable = workload.capacity > 0
            && (workload.health == Health::Healthy || health == HealthPolicy::AllowAll)
            && ctx.snapshot.is_local_network(&workload.network)
            && !ctx.excluded.contains(&workload.uid);
        if !usable {
            continue;
        }
        let Some(address) = endpoint_address(service, workload, vip, port) else { continue };
        let Some(rank) = rank(service.load_balancing.as_ref(), source, workload) else { continue };
        if rank < nearest {
            nearest = rank;
            candidates.clear();
        }
        if rank == nearest {
            candidates.push((workload, address));
        }
    }
    let (workload, address) = by_weight(&candidates, rng)?;
    Some(Upstream { workload: workload.clone(), address, service: Some(service.clone()) })
}

/// Where the endpoint serves the service's port, in the family of the virtual address where it has both.
fn endpoint_address(service: &Service, workload: &Workload, vip: IpAddr, port: u16) -> Option<SocketAddr> {
    let target = target_port(service, workload, port)?;
    let same_family = workload.addresses.iter().find(|a| a.is_ipv4() == vip.is_ipv4());
    let ip = same_family.or(workload.addresses.first())?;
    Some(SocketAddr::new(*ip, target))
}

/// The workload's port behind a service's port: what the endpoint says, else what the service says.
fn target_port(service: &Service, workload: &Workload, port: u16) -> Option<u16> {
    let of_endpoint = workload.services.get(&service.key)?.iter().find(|m| m.service_port == port);
    let of_service = service.ports.iter().find(|m| m.service_port == port);
    let target = match of_endpoint {
        Some(mapping) => mapping.target_port,
        None => of_service?.target_port,
    };
    (target != 0).then_some(target)
}

/// How far an endpoint is; 0 is nearest, none means out of bounds. Scopes count in their order of importance: one that
/// differs ends the comparison.
pub fn rank(balancing: Option<&LoadBalancing>, source: &Workload, endpoint: &Workload) -> Option<u32> {
    let Some(balancing) = balancing else { return Some(0) };
    let shared = balancing.preference.iter().take_while(|scope| shares(**scope, source, endpoint)).count();
    let missing = u32::try_from(balancing.preference.len() - shared).unwrap_or(u32::MAX);
    match balancing.mode {
        LbMode::Strict => (missing == 0).then_some(0),
        LbMode::Failover => Some(missing),
        LbMode::Passthrough => Some(0),
    }
}

fn shares(scope: Scope, a: &Workload, b: &Workload) -> bool {
    match scope {
        Scope::Region => a.locality.region == b.locality.region,
        Scope::Zone => a.locality.zone == b.locality.zone,
        Scope::Subzone => a.locality.subzone == b.locality.subzone,
        // Two workloads whose nodes are not known are not known to share one.
        Scope::Node => !a.node.is_empty() && a.node == b.node,
        Scope::Cluster => a.cluster == b.cluster,
        Scope::Network => a.network == b.network,
    }
}

fn by_weight<'a>(
    candidates: &[(&'a Arc<Workload>, SocketAddr)],
    rng: &mut impl Rng,
) -> Option<(&'a Arc<Workload>, SocketAddr)> {
    let total: u64 = candidates.iter().map(|(w, _)| u64::from(w.capacity)).sum();
    if total == 0 {
        return None;
    }
    let mut ticket = rng.random_range(0..total);
    for candidate in candidates {
        let weight = u64::from(candidate.0.capacity);
        if ticket < weight {
            return Some(*candidate);
        }
        ticket -= weight;
    }
    None
}
