//! What an HBONE request asks for.
//!
//! The node proxy in a workload's namespace serves that workload only, so the `:authority` must name an address of the
//! workload, the one that the connection was made to. Names are for waypoints and gateways, which are not this proxy.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::flow::RESERVED_PORTS;
use crate::service::Service;
use crate::snapshot::Snapshot;
use crate::workload::Workload;

/// Longest `:authority` that is looked at, in bytes. `[IPv6]:port` needs 47.
pub const AUTHORITY_MAX_BYTES: usize = 64;

/// Why a CONNECT is answered with 400.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InboundRefusal {
    /// Not `IP:PORT`.
    #[error("authority is not an address and a port")]
    NotAnAddress,
    /// Another address than the connection's.
    #[error("authority {authority} differs from the connection's destination {connection}")]
    OtherDestination {
        /// What was asked for.
        authority: IpAddr,
        /// Where the connection was made to.
        connection: IpAddr,
    },
    /// Not an address of the workload that is served here.
    #[error("{0} is not an address of this workload")]
    NotThisWorkload(IpAddr),
    /// Port 0, or a port of the node proxy itself.
    #[error("port {0} cannot be a destination")]
    Port(u16),
}

/// The application's address that a CONNECT (or a captured plaintext connection, with its own destination as authority)
/// may be carried to.
pub fn inbound_target(
    destination: &Workload,
    connection_dst: IpAddr,
    authority: &str,
) -> Result<SocketAddr, InboundRefusal> {
    if authority.len() > AUTHORITY_MAX_BYTES || authority.contains('%') {
        return Err(InboundRefusal::NotAnAddress);
    }
    let asked: SocketAddr = authority.parse().map_err(|_| InboundRefusal::NotAnAddress)?;
    let target = SocketAddr::new(asked.ip().to_canonical(), asked.port());
    let connection = connection_dst.to_canonical();
    if target.ip() != connection {
        return Err(InboundRefusal::OtherDestination { authority: target.ip(), connection });
    }
    if !destination.addresses.iter().any(|a| a.to_canonical() == target.ip()) {
        return Err(InboundRefusal::NotThisWorkload(target.ip()));
    }
    if target.port() == 0 || RESERVED_PORTS.contains(&target.port()) {
        return Err(InboundRefusal::Port(target.port()));
    }
    Ok(target)
}

/// The service that a client says it addressed, if this workload is an endpoint of it. For telemetry: nothing is decided
/// by it, and it can only be one of the workload's own, however much a client says.
pub fn addressed_service<'a>(snapshot: &'a Snapshot, workload: &Workload, host: &str) -> Option<&'a Arc<Service>> {
    let key = workload.services.keys().find(|key| *key.hostname == *host)?;
    snapshot.service(key)
}
