//! Reading a SPIFFE ID out of a certificate.

use mesh_core::identity::SpiffeId;
use rustls_pki_types::CertificateDer;

use super::PeerRefused;

/// The one SPIFFE ID of a certificate (X.509-SVID 2: exactly one URI SAN; other kinds of SAN are ignored).
/// Says nothing about whether the certificate may be believed.
pub fn spiffe_id_of(certificate: &CertificateDer<'_>) -> Result<SpiffeId, PeerRefused> {
    let parsed = webpki::EndEntityCert::try_from(certificate).map_err(PeerRefused::Certificate)?;
    let mut uris = parsed.valid_uri_names();
    let uri = uris.next().ok_or(PeerRefused::NoUriSan)?;
    if uris.next().is_some() {
        return Err(PeerRefused::ManyUriSans);
    }
    uri.parse().map_err(PeerRefused::NotSpiffe)
}
