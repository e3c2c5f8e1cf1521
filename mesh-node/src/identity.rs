//! Which certificate proves a workload's identity now.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use mesh_core::identity::SpiffeId;

use crate::runtime::{CertifiedIdentity, Enrolled, View};
use crate::tls::CLOCK_SKEW;

/// Why an identity cannot be proved. Others are not affected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoCertificate {
    /// Not issued yet, or withdrawn.
    #[error("no certificate for {0}")]
    Missing(SpiffeId),
    /// Not renewed in time.
    #[error("certificate of {0} has expired")]
    Expired(SpiffeId),
}

/// The certificate of an identity, if it is still good.
pub fn certificate(view: &View, id: &SpiffeId) -> Result<Arc<CertifiedIdentity>, NoCertificate> {
    let found = view.certs.get(id).ok_or_else(|| NoCertificate::Missing(id.clone()))?;
    if has_expired(found.not_after_secs) {
        return Err(NoCertificate::Expired(id.clone()));
    }
    Ok(Arc::clone(found))
}

/// The identity of an enrolled workload: its service account, in the mesh's trust domain.
pub fn identity_of(enrolled: &Enrolled, trust_domain: &Arc<str>) -> SpiffeId {
    SpiffeId {
        trust_domain: Arc::clone(trust_domain),
        namespace: Arc::clone(&enrolled.namespace),
        service_account: Arc::clone(&enrolled.service_account),
    }
}

/// Whether a certificate that ends at `not_after_secs` (since 1970) is out of date, clocks that differ taken into account.
pub fn has_expired(not_after_secs: u64) -> bool {
    let now_secs = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    not_after_secs.saturating_add(CLOCK_SKEW.as_secs()) < now_secs
}
