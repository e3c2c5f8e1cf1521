//! Why peers and connections are not let in, and how the client and the metrics hear of it.

use std::io;
use std::net::SocketAddr;

use http::{Method, StatusCode};
use mesh_core::flow::Refusal;
use mesh_core::identity::SpiffeId;
use mesh_core::inbound::InboundRefusal;

use crate::connections::CloseReason;
use crate::hbone::HANDSHAKE_TIMEOUT;
use crate::identity::NoCertificate;
use crate::metrics::ResponseFlags;
use crate::tls;

/// Why a peer was not served.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    /// We cannot prove who the workload is.
    #[error("{0}")]
    NoCertificate(#[from] NoCertificate),
    /// The configuration of TLS could not be made.
    #[error("TLS configuration: {0}")]
    Configuration(#[from] rustls::Error),
    /// The handshake failed: no certificate, a wrong one, another protocol.
    #[error("TLS handshake: {0}")]
    Handshake(#[from] io::Error),
    /// The handshake took too long.
    #[error("TLS handshake took longer than {} s", HANDSHAKE_TIMEOUT.as_secs())]
    Slow,
    /// It gave way to somebody else.
    #[error("TLS handshake was stuck while others waited for its place")]
    Crowd,
    /// Another protocol inside TLS.
    #[error("peer does not speak h2")]
    Protocol,
    /// The verified certificate has no usable identity.
    #[error("{0}")]
    Peer(#[from] tls::PeerRefused),
}

/// Why a verified or plain connection was not carried.
#[derive(Debug, thiserror::Error)]
pub(super) enum InboundError {
    /// Not CONNECT.
    #[error("method {0} is not CONNECT")]
    Method(Method),
    /// The destination cannot be served here.
    #[error("{0}")]
    Destination(#[from] InboundRefusal),
    /// The configuration does not know the workload yet.
    #[error("the configuration does not have this workload yet")]
    NotConfigured,
    /// Our certificate has run out since the tunnel was made.
    #[error("{0}")]
    NoCertificate(#[from] NoCertificate),
    /// So has the client's.
    #[error("certificate of {0}, the client, has expired")]
    ClientExpired(SpiffeId),
    /// The workload has too many connections.
    #[error("the workload has too many connections")]
    Full,
    /// Judged.
    #[error("{0}")]
    Refused(Refusal),
    /// Ended from outside while it was set up.
    #[error("{0}")]
    Closed(CloseReason),
    /// The application does not take it.
    #[error("dial {address}: {source}")]
    Dial {
        /// Where to.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The client gave up before the application was reached.
    #[error("reset by the client before it was connected")]
    GivenUp,
}

impl InboundError {
    /// A verdict on a connection that did not exist before.
    pub(super) fn not_admitted(reason: CloseReason) -> Self {
        match reason {
            CloseReason::Denied(refusal) => Self::Refused(refusal),
            reason @ (CloseReason::IdentityWithdrawn(_)
            | CloseReason::PeerDistrusted(_)
            | CloseReason::WorkloadStopped
            | CloseReason::Drained) => Self::Closed(reason),
        }
    }

    /// The answer to a CONNECT (ztunnel's: 400 for what cannot be right, 401 for policy, 503 for what may be later).
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Method(_) | Self::Destination(_) => StatusCode::BAD_REQUEST,
            Self::Refused(_)
            | Self::Closed(CloseReason::Denied(_) | CloseReason::PeerDistrusted(_))
            | Self::ClientExpired(_) => StatusCode::UNAUTHORIZED,
            Self::NotConfigured
            | Self::NoCertificate(_)
            | Self::Full
            | Self::Closed(_)
            | Self::Dial { .. }
            | Self::GivenUp => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    pub(super) fn flags(&self) -> ResponseFlags {
        match self {
            Self::Refused(refusal) | Self::Closed(CloseReason::Denied(refusal)) => refusal.into(),
            Self::Closed(CloseReason::IdentityWithdrawn(_) | CloseReason::PeerDistrusted(_))
            | Self::NoCertificate(_)
            | Self::ClientExpired(_) => ResponseFlags::IdentityError,
            Self::Method(_)
            | Self::Destination(_)
            | Self::NotConfigured
            | Self::Full
            | Self::Closed(_)
            | Self::Dial { .. }
            | Self::GivenUp => ResponseFlags::Connect,
        }
    }
}
