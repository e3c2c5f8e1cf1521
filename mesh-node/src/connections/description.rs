//! What is known about a connection when it is registered, and why it may be ended from outside.

use std::net::SocketAddr;
use std::sync::Arc;

use mesh_core::authorize::authorize;
use mesh_core::flow::{InboundFlow, Refusal, Verdict};
use mesh_core::identity::SpiffeId;
use mesh_core::service::Service;
use mesh_core::workload::Workload;

use crate::metrics::{Labels, Party, Reporter, ResponseFlags};
use crate::runtime::{Enrolled, View};
use crate::tls::PeerProof;

/// Who started it, seen from the enrolled workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Somebody connects to the workload.
    Inbound,
    /// The workload connects.
    Outbound,
}

/// How it is carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// In a tunnel.
    Hbone,
    /// Between two workloads of this node, authorized by both identities.
    Local,
    /// Plain TCP.
    Tcp,
}

impl Carrier {
    /// As the admin interface shows it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hbone => "HBONE",
            Self::Local => "LOCAL",
            Self::Tcp => "TCP",
        }
    }
}

/// Why a live connection is ended from outside.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// A change of configuration took back the permission.
    #[error("closed after a policy change: {0}")]
    Denied(Refusal),
    /// The identity that carried it is no longer this node's.
    #[error("closed: certificate of {0} was withdrawn")]
    IdentityWithdrawn(SpiffeId),
    /// The peer's certificate chains only to a root that was removed.
    #[error("closed: certificate of {0}, the peer, leads to no trusted root any more")]
    PeerDistrusted(SpiffeId),
    /// The workload left this node.
    #[error("closed: workload stopped")]
    WorkloadStopped,
    /// The drain period is over.
    #[error("closed: drain deadline passed")]
    Drained,
}

impl CloseReason {
    pub(super) fn flags(&self) -> ResponseFlags {
        match self {
            Self::Denied(refusal) => refusal.into(),
            Self::IdentityWithdrawn(_) | Self::PeerDistrusted(_) => ResponseFlags::CertRevoked,
            Self::WorkloadStopped | Self::Drained => ResponseFlags::None,
        }
    }
}

/// What is known about a connection when it is registered.
#[derive(Debug)]
pub struct Description {
    /// Who started it.
    pub direction: Direction,
    /// How it is carried.
    pub carrier: Carrier,
    /// In whose namespace it was accepted.
    pub enrolled: Arc<Enrolled>,
    /// The destination's enrolment too, for a local one.
    pub local_destination: Option<Arc<Enrolled>>,
    /// Address of the end that started it.
    pub source_addr: SocketAddr,
    /// Address that the application is reached at.
    pub destination_addr: SocketAddr,
    /// Outbound: what the application asked for.
    pub target: Option<SocketAddr>,
    /// The tunnel's far end.
    pub hbone_addr: Option<SocketAddr>,
    /// Source workload.
    pub source: Option<Arc<Workload>>,
    /// Destination workload.
    pub destination: Option<Arc<Workload>>,
    /// Service addressed.
    pub service: Option<Arc<Service>>,
    /// Verified identities, client's and server's.
    pub identities: Option<(SpiffeId, SpiffeId)>,
    /// What the other end of the tunnel proved itself with.
    pub peer: Option<Arc<PeerProof>>,
    /// What to judge again on a change.
    pub judged: Option<InboundFlow>,
}

impl Description {
    pub(super) fn party_labels(&self, reporter: Reporter, flags: ResponseFlags, cluster: &Arc<str>) -> Labels {
        let (client, server) = self.identities.as_ref().map(|(c, s)| (c, s)).unzip();
        Labels {
            reporter,
            source: Party::new(self.source.as_deref(), client, cluster),
            destination: Party::new(self.destination.as_deref(), server, cluster),
            service: Labels::service_of(self.service.as_deref()),
            flags,
            mutual_tls: self.identities.is_some(),
        }
    }

    pub(super) fn reporters(&self) -> &'static [Reporter] {
        match (self.direction, self.carrier) {
            (Direction::Outbound, Carrier::Local) => &[Reporter::Source, Reporter::Destination],
            (Direction::Outbound, Carrier::Hbone | Carrier::Tcp) => &[Reporter::Source],
            (Direction::Inbound, _) => &[Reporter::Destination],
        }
    }

    /// Judges it by `view`: why such a connection must not be, if so.
    pub fn verdict(&self, view: &View) -> Option<CloseReason> {
        if let Some(lost) = self.own_identities().find(|id| !view.certs.contains_key(*id)) {
            return Some(CloseReason::IdentityWithdrawn(lost.clone()));
        }
        if let Some(peer) = self.peer.as_ref().filter(|peer| !peer.holds(&view.roots)) {
            return Some(CloseReason::PeerDistrusted(peer.id.clone()));
        }
        let flow = self.judged.as_ref()?;
        match judge(view, self.destination.as_deref(), flow) {
            Verdict::Allow(_) => None,
            Verdict::Deny(refusal) => Some(CloseReason::Denied(refusal)),
        }
    }

    /// Identities by which this node takes part.
    pub fn own_identities(&self) -> impl Iterator<Item = &SpiffeId> {
        let (client, server) = self.identities.as_ref().map(|(c, s)| (c, s)).unzip();
        let (source, destination) = match (self.direction, self.carrier) {
            (_, Carrier::Local) => (client, server),
            (Direction::Outbound, _) => (client, None),
            (Direction::Inbound, _) => (None, server),
        };
        source.into_iter().chain(destination)
    }
}

/// Authorizes a flow to the workload as the view has it now; a workload that is gone takes nothing.
fn judge(view: &View, destination: Option<&Workload>, flow: &InboundFlow) -> Verdict {
    match destination.and_then(|workload| view.snapshot.workload(&workload.uid)) {
        Some(workload) => authorize(&view.snapshot, workload, flow),
        None => Verdict::Deny(Refusal::UnknownWorkload(flow.destination.ip())),
    }
}
