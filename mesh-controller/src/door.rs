//! Who is asking: every call is let in by its node token, and by nothing else (no address is trusted).

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tonic::{Request, Status};

use crate::limit::QuietLog;
use crate::metrics::Metrics;
use crate::server::Peer;
use crate::token::{NodeToken, TokenKey, TokenRefusal};

/// Checks tokens, counts refusals and logs them once per peer and minute.
#[derive(Debug)]
pub struct Door {
    key: TokenKey,
    metrics: Arc<Metrics>,
    quiet: Mutex<QuietLog>,
}

impl Door {
    /// A door that opens for tokens of this key.
    pub fn new(key: TokenKey, metrics: Arc<Metrics>) -> Self {
        Self { key, metrics, quiet: Mutex::default() }
    }

    /// The node that a call comes from.
    pub fn admit<T>(&self, request: &Request<T>) -> Result<(NodeToken, SocketAddr), Status> {
        let peer = request.extensions().get::<Peer>();
        // Absent only if the service were mounted behind another listener.
        let peer = peer.ok_or_else(|| Status::internal("the connection has no peer address"))?;
        let mut tokens = request.metadata().get_all("authorization").iter();
        let token = match (tokens.next(), tokens.next()) {
            (Some(only), None) => only.to_str().ok().and_then(|text| text.strip_prefix("Bearer ")),
            // Of two tokens none is more right than the other.
            (None | Some(_), _) => None,
        };
        let verified = token.ok_or(TokenRefusal::Missing).and_then(|token| self.key.verify(token.trim(), unix_now()));
        match verified {
            Ok(token) => {
                peer.introduce();
                Ok((token, peer.address))
            }
            Err(refusal) => {
                self.metrics.refuse("token");
                self.note(peer.address, &refusal.to_string());
                Err(Status::unauthenticated(refusal.to_string()))
            }
        }
    }

    /// Logs a refusal, at most once a minute for each peer address.
    pub fn note(&self, peer: SocketAddr, reason: &str) {
        let due = self.quiet.lock().unwrap_or_else(PoisonError::into_inner).is_due(&peer.ip().to_string(), unix_now());
        if due {
            tracing::warn!(peer = %peer.ip(), reason, "refused");
        }
    }
}

/// Seconds since 1970; 0 with a clock before that.
pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
