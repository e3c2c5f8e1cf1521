//! Certificates as the admin interface shows them.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_api::admin::{CertificateInfo, CertificateRow};
use mesh_core::certs::{CertSchedule, CertState};
use mesh_core::identity::SpiffeId;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::runtime::{CertifiedIdentity, RootStore};

/// What rows are made from.
#[derive(Debug, Clone, Default)]
pub(super) struct Source {
    pub(super) schedule: CertSchedule,
    pub(super) held: BTreeMap<SpiffeId, Arc<CertifiedIdentity>>,
    pub(super) errors: BTreeMap<SpiffeId, String>,
    pub(super) roots: Arc<RootStore>,
}

impl Source {
    pub(super) fn rows(&self, now_secs: u64) -> Vec<CertificateRow> {
        let ids: std::collections::BTreeSet<&SpiffeId> = self.held.keys().chain(self.errors.keys()).collect();
        ids.into_iter().map(|id| self.row(id, now_secs)).collect()
    }

    fn row(&self, id: &SpiffeId, now_secs: u64) -> CertificateRow {
        let error = self.errors.get(id);
        let (state, renew_at) = match self.schedule.state(id, now_secs) {
            Some(CertState::Available { renew_at_secs, .. }) => ("Available".to_owned(), rfc3339(renew_at_secs)),
            Some(CertState::Expired { .. }) => {
                let why = error.map_or("it was not renewed", String::as_str);
                (format!("Unavailable: expired, {why}"), String::new())
            }
            Some(CertState::Initializing { .. }) | None => match error {
                Some(error) => (format!("Unavailable: {error}"), String::new()),
                None => ("Initializing".to_owned(), String::new()),
            },
        };
        let chain = self.held.get(id).map(|held| held.chain.as_slice()).unwrap_or_default();
        let kinds = std::iter::once("Leaf").chain(std::iter::repeat("Intermediate"));
        let mut certificates: Vec<_> = chain.iter().zip(kinds).map(|(der, kind)| info(der, kind, now_secs)).collect();
        certificates.extend(self.roots.certificates.iter().map(|der| info(der, "Root", now_secs)));
        CertificateRow { identity: id.to_string(), state, certificates, renew_at }
    }
}

fn info(der: &CertificateDer<'_>, kind: &str, now_secs: u64) -> CertificateInfo {
    let mut info = CertificateInfo {
        kind: kind.to_owned(),
        serial: String::new(),
        not_before: String::new(),
        not_after: String::new(),
        valid: false,
        pem: pem(der),
    };
    // What is held was parsed before it was taken; should it not parse now, the PEM is still shown.
    if let Ok((_, parsed)) = X509Certificate::from_der(der) {
        let seconds = |time: i64| u64::try_from(time).unwrap_or(0);
        let from = seconds(parsed.validity().not_before.timestamp());
        let until = seconds(parsed.validity().not_after.timestamp());
        info.serial = parsed.raw_serial_as_string().replace(':', "");
        (info.not_before, info.not_after) = (rfc3339(from), rfc3339(until));
        info.valid = (from..until).contains(&now_secs);
    }
    info
}

/// Seconds since 1970 as RFC 3339.
fn rfc3339(secs: u64) -> String {
    let time = i64::try_from(secs).ok().and_then(|secs| OffsetDateTime::from_unix_timestamp(secs).ok());
    time.and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}

/// A certificate as PEM.
pub(super) fn pem(der: &CertificateDer<'_>) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", der.as_ref()))
}
