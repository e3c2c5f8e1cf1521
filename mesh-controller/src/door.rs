//! Who is asking: every call is let in by its token, and by nothing else (no address is trusted).

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tonic::Status;
use tonic::metadata::MetadataMap;

use crate::kubernetes::review::Reviewer;
use crate::limit::QuietLog;
use crate::metrics::Metrics;
use crate::server::Peer;
use crate::token::{NodeToken, TokenKey, TokenRefusal};

/// Who judges tokens.
#[derive(Debug)]
pub enum Judge {
    /// We have issued them ourselves (`mesh-controller token NODE`).
    Own(TokenKey),
    /// The API server of the cluster has.
    Cluster(Reviewer),
}

impl Judge {
    async fn verify(&self, token: &str, now: u64) -> Result<NodeToken, TokenRefusal> {
        match self {
            Self::Own(key) => key.verify(token, now),
            Self::Cluster(reviewer) => reviewer.verify(token, now).await,
        }
    }
}

/// Checks tokens, counts refusals and logs them once per peer and minute.
#[derive(Debug)]
pub struct Door {
    judge: Judge,
    metrics: Arc<Metrics>,
    quiet: Mutex<QuietLog>,
}

impl Door {
    /// A door that opens for tokens that this judge lets in.
    pub fn new(judge: Judge, metrics: Arc<Metrics>) -> Self {
        Self { judge, metrics, quiet: Mutex::default() }
    }

    /// The node that a call comes from.
    pub async fn admit(&self, metadata: &MetadataMap, peer: Option<&Peer>) -> Result<(NodeToken, SocketAddr), Status> {
        // Absent only if the service were mounted behind another listener.
        let peer = peer.ok_or_else(|| Status::internal("the connection has no peer address"))?;
        let mut tokens = metadata.get_all("authorization").iter();
        let token = match (tokens.next(), tokens.next()) {
            (Some(only), None) => only.to_str().ok().and_then(|text| text.strip_prefix("Bearer ")),
            // Of two tokens none is more right than the other.
            (None | Some(_), _) => None,
        };
        let verified = match token {
            Some(token) => self.judge.verify(token.trim(), unix_now()).await,
            None => Err(TokenRefusal::Missing),
        };
        match verified {
            Ok(token) => {
                peer.introduce();
                Ok((token, peer.address))
            }
            Err(refusal) => {
                self.metrics.refuse("token");
                self.note(peer.address, &refusal.to_string());
                Err(match refusal {
                    TokenRefusal::NotReviewed => Status::unavailable(refusal.to_string()),
                    _ => Status::unauthenticated(refusal.to_string()), // What it is about is the token itself.
                })
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
