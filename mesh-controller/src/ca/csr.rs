//! What a certificate signing request (PKCS#10, RFC 2986) must be to be signed.
//!
//! Only the public key is taken from a request. Names and extensions never are: the identity is the one that was
//! authorized, and a request that names another one is refused rather than corrected.

use mesh_core::identity::SpiffeId;
use rcgen::SubjectPublicKeyInfo;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY};
use x509_parser::pem::parse_x509_pem;
use x509_parser::prelude::FromDer;

/// Bytes of a PEM request; one with a P-256 key and a SPIFFE ID has about 600.
pub const MAX_CSR_BYTES: usize = 16 * 1024;
/// An uncompressed point on P-256 (SEC 1, 2.3.3).
const P256_POINT_BYTES: usize = 65;

/// Why a request is not signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CsrRefusal {
    /// More than [`MAX_CSR_BYTES`].
    #[error("the request has {0} bytes, more than {MAX_CSR_BYTES}")]
    TooLarge(usize),
    /// Not one PEM block with one PKCS#10 request.
    #[error("the request is not one PEM block with a PKCS#10 request")]
    Malformed,
    /// Another key type.
    #[error("the key is not ECDSA P-256")]
    KeyType,
    /// The requester does not hold the key.
    #[error("the request is not signed by its own key")]
    Signature,
    /// A name that was not authorized.
    #[error("the request names {0}, which is not the identity asked for")]
    Name(String),
}

/// Checks a request for an identity and gives its public key.
pub fn check(pem: &str, identity: &SpiffeId) -> Result<SubjectPublicKeyInfo, CsrRefusal> {
    if pem.len() > MAX_CSR_BYTES {
        return Err(CsrRefusal::TooLarge(pem.len()));
    }
    let (rest, block) = parse_x509_pem(pem.as_bytes()).map_err(|_| CsrRefusal::Malformed)?;
    let is_request = matches!(block.label.as_str(), "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST");
    if !is_request || !rest.iter().all(u8::is_ascii_whitespace) {
        return Err(CsrRefusal::Malformed);
    }
    let (rest, request) = X509CertificationRequest::from_der(&block.contents).map_err(|_| CsrRefusal::Malformed)?;
    if !rest.is_empty() {
        return Err(CsrRefusal::Malformed);
    }
    let key = &request.certification_request_info.subject_pki;
    let curve = key.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok());
    let is_p256 = key.algorithm.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY
        && curve.is_some_and(|oid| oid == OID_EC_P256)
        && key.subject_public_key.data.len() == P256_POINT_BYTES;
    if !is_p256 {
        return Err(CsrRefusal::KeyType);
    }
    request.verify_signature().map_err(|_| CsrRefusal::Signature)?;
    check_names(&request, identity)?;
    SubjectPublicKeyInfo::from_der(key.raw).map_err(|_| CsrRefusal::KeyType)
}

/// A request may name nothing, or exactly the identity, as a URI.
fn check_names(request: &X509CertificationRequest<'_>, identity: &SpiffeId) -> Result<(), CsrRefusal> {
    let expected = identity.to_string();
    let mut seen = 0;
    for extension in request.requested_extensions().into_iter().flatten() {
        let ParsedExtension::SubjectAlternativeName(names) = extension else { continue };
        for name in &names.general_names {
            seen += 1;
            match name {
                GeneralName::URI(uri) if *uri == expected && seen == 1 => {}
                // Every other kind of name, and a second one.
                other => return Err(CsrRefusal::Name(other.to_string().chars().take(256).collect())),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    const ID: &str = "spiffe://cluster.local/ns/default/sa/web";

    fn request(key: &KeyPair, uris: &[&str], dns: &[&str]) -> String {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .chain(dns.iter().map(|name| SanType::DnsName((*name).try_into().unwrap())))
            .collect();
        params.serialize_request(key).unwrap().pem().unwrap()
    }

    fn p256() -> KeyPair {
        KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap()
    }

    fn refused(pem: &str) -> CsrRefusal {
        check(pem, &ID.parse().unwrap()).expect_err("refused")
    }

    #[test]
    fn the_identity_or_no_name_passes() {
        for uris in [&[ID][..], &[]] {
            check(&request(&p256(), uris, &[]), &ID.parse().unwrap()).unwrap();
        }
    }

    #[test]
    fn other_names_are_refused() {
        let other = "spiffe://cluster.local/ns/default/sa/admin";
        let cases: [(&[&str], &[&str]); 5] =
            [(&[other], &[]), (&[ID, other], &[]), (&[ID, ID], &[]), (&[ID], &["web.default.svc"]), (&[], &["*"])];
        for (uris, dns) in cases {
            assert!(matches!(refused(&request(&p256(), uris, dns)), CsrRefusal::Name(_)), "{uris:?} {dns:?}");
        }
    }

    #[test]
    fn other_keys_are_refused() {
        for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519, &rcgen::PKCS_RSA_SHA256] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            assert_eq!(refused(&request(&key, &[ID], &[])), CsrRefusal::KeyType);
        }
    }

    #[test]
    fn garbage_is_refused() {
        let good = request(&p256(), &[ID], &[]);
        assert_eq!(refused(""), CsrRefusal::Malformed);
        assert_eq!(
            refused("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"),
            CsrRefusal::Malformed
        );
        assert_eq!(refused(&good.replace("CERTIFICATE REQUEST", "CERTIFICATE")), CsrRefusal::Malformed);
        assert_eq!(refused(&format!("{good}{good}")), CsrRefusal::Malformed);
        assert_eq!(refused(&"A".repeat(MAX_CSR_BYTES + 1)), CsrRefusal::TooLarge(MAX_CSR_BYTES + 1));
    }

    /// Bits around the signed part may say nothing (unused bits of a BIT STRING); none of it may change.
    #[test]
    fn no_changed_request_gives_another_key() {
        let pem = request(&p256(), &[ID], &[]);
        let key = check(&pem, &ID.parse().unwrap()).unwrap();
        let (_, block) = parse_x509_pem(pem.as_bytes()).unwrap();
        let (_, parsed) = X509CertificationRequest::from_der(&block.contents).unwrap();
        let signed = parsed.certification_request_info.raw;
        let start = block.contents.windows(signed.len()).position(|part| part == signed).unwrap();
        let signed = start..start + signed.len();
        for at in 0..block.contents.len() {
            for bit in 0..8 {
                let mut der = block.contents.clone();
                der[at] ^= 1 << bit;
                let text = pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der));
                let checked = check(&text, &ID.parse().unwrap());
                let is_harmless = !signed.contains(&at) && checked == Ok(key.clone());
                assert!(checked.is_err() || is_harmless, "byte {at} bit {bit}");
            }
        }
    }
}
