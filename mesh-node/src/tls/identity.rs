//! Reading a SPIFFE ID out of a certificate.

use mesh_core::identity::SpiffeId;
use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::PeerRefused;

/// The one SPIFFE ID of a certificate (X.509-SVID 2: exactly one URI SAN; other kinds of SAN are ignored, and one that
/// cannot be read is not: it may be a second URI). Says nothing about whether the certificate may be believed.
pub fn spiffe_id_of(certificate: &CertificateDer<'_>) -> Result<SpiffeId, PeerRefused> {
    let parsed = parse(certificate)?;
    let names = parsed.subject_alternative_name().map_err(|_| malformed())?;
    let mut only = None;
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        match name {
            GeneralName::URI(uri) if only.is_none() => only = Some(*uri),
            GeneralName::URI(_) => return Err(PeerRefused::ManyUriSans),
            GeneralName::Invalid(..) => return Err(malformed()),
            GeneralName::OtherName(..)
            | GeneralName::RFC822Name(_)
            | GeneralName::DNSName(_)
            | GeneralName::X400Address(_)
            | GeneralName::DirectoryName(_)
            | GeneralName::EDIPartyName(_)
            | GeneralName::IPAddress(_)
            | GeneralName::RegisteredID(_) => {}
        }
    }
    only.ok_or(PeerRefused::NoUriSan)?.parse().map_err(PeerRefused::NotSpiffe)
}

/// Whether a key may sign certificates or revocation lists, which a workload's may not (X.509-SVID 4.3, 5.2).
pub(super) fn may_sign(certificate: &CertificateDer<'_>) -> Result<bool, PeerRefused> {
    let parsed = parse(certificate)?;
    let usage = parsed.key_usage().map_err(|_| malformed())?;
    Ok(usage.is_some_and(|usage| usage.value.key_cert_sign() || usage.value.crl_sign()))
}

/// A certificate, and nothing behind it.
pub(super) fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, PeerRefused> {
    match X509Certificate::from_der(certificate) {
        Ok(([], parsed)) => Ok(parsed),
        Ok(_) | Err(_) => Err(malformed()),
    }
}

fn malformed() -> PeerRefused {
    PeerRefused::Certificate(webpki::Error::BadDer)
}
