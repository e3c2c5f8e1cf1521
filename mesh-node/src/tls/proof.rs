//! What a peer proved itself with, kept as long as connections live that were let in by it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use mesh_core::identity::SpiffeId;
use rustls_pki_types::{CertificateDer, UnixTime};

use super::verify::{PeerRefused, verify_chain};
use crate::runtime::RootStore;

/// Which end of the tunnel the peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerRole {
    /// It dialled.
    Client,
    /// It was dialled.
    Server,
}

impl PeerRole {
    fn usage(self) -> webpki::KeyUsage {
        match self {
            Self::Client => webpki::KeyUsage::client_auth(),
            Self::Server => webpki::KeyUsage::server_auth(),
        }
    }
}

/// The certificates of a completed handshake, and the roots that they were accepted by.
#[derive(Debug)]
pub struct PeerProof {
    /// Who the peer is.
    pub id: SpiffeId,
    /// End of its certificate, seconds since 1970. A tunnel may live longer.
    pub not_after_secs: u64,
    role: PeerRole,
    chain: Box<[CertificateDer<'static>]>,
    /// Time of the handshake. A certificate that has run out since then was a proof all the same.
    at: UnixTime,
    roots: Arc<RootStore>,
    /// The last other roots that it was held against, and whether it leads to one of them.
    held_against: Mutex<Option<(Arc<RootStore>, bool)>>,
}

impl PeerProof {
    /// Of a handshake that was just completed with `roots`.
    pub fn new(
        certificates: Option<&[CertificateDer<'static>]>,
        role: PeerRole,
        roots: Arc<RootStore>,
    ) -> Result<Self, PeerRefused> {
        let chain = certificates.unwrap_or_default();
        let leaf = chain.first().ok_or(PeerRefused::NoCertificate)?;
        let id = super::spiffe_id_of(leaf)?;
        let parsed = super::identity::parse(leaf)?;
        let not_after_secs = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or_default();
        let at = UnixTime::since_unix_epoch(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
        Ok(Self { id, not_after_secs, role, chain: chain.into(), at, roots, held_against: Mutex::default() })
    }

    /// Whether the handshake would have been accepted with these roots.
    ///
    /// Costs a comparison of pointers as long as the roots are those of the handshake, and one verification for each
    /// other set.
    pub fn holds(&self, roots: &Arc<RootStore>) -> bool {
        if Arc::ptr_eq(roots, &self.roots) {
            return true;
        }
        let mut held_against = self.held_against.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, holds)) = &*held_against
            && Arc::ptr_eq(roots, last)
        {
            return *holds;
        }
        let holds = self.verify(roots).is_ok();
        *held_against = Some((Arc::clone(roots), holds));
        holds
    }

    fn verify(&self, roots: &RootStore) -> Result<SpiffeId, PeerRefused> {
        let (leaf, intermediates) = self.chain.split_first().ok_or(PeerRefused::NoCertificate)?;
        verify_chain(roots, leaf, intermediates, self.at, self.role.usage())
    }
}
