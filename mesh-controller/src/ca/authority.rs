//! The signer, its chain and the roots that peers trust: one immutable value, replaced whole on rotation.

use std::fmt;
use std::net::IpAddr;

use mesh_core::identity::SpiffeId;
use rand::RngCore;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Life of a self-made root (Istio's `CITADEL_SELF_SIGNED_CA_CERT_TTL`).
pub const ROOT_TTL: Duration = Duration::days(3650);
/// Life of a leaf when nobody says otherwise (Istio's `DEFAULT_WORKLOAD_CERT_TTL`).
pub const DEFAULT_LEAF_TTL: Duration = Duration::hours(24);
/// Longest life of a leaf (Istio's `MAX_WORKLOAD_CERT_TTL`).
pub const MAX_LEAF_TTL: Duration = Duration::days(90);
/// How far NotBefore lies in the past, for clocks that are behind.
pub const BACKDATE: Duration = Duration::minutes(2);
/// Bytes of a serial number: 127 random bits (RFC 5280, 4.1.2.2 allows 20 bytes).
const SERIAL_BYTES: usize = 16;

/// Signs certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// The signer and what lies between it and the root, as sent behind a leaf; empty for a self-signed signer.
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    not_after: OffsetDateTime,
}

/// A signed certificate.
#[derive(Debug, Clone)]
pub struct Issued {
    /// Leaf first, then the signer's chain, without roots.
    pub chain: Vec<CertificateDer<'static>>,
    /// End of validity.
    pub not_after: OffsetDateTime,
}

/// Why there is no certificate, or no authority.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A certificate cannot be read.
    #[error("{0} does not hold a PEM certificate")]
    NoCertificate(&'static str),
    /// A key cannot be read, or is of another type.
    #[error("{0} does not hold an ECDSA private key of P-256 or P-384, or an RSA one of 2048 to 8192 bits")]
    NoKey(&'static str),
    /// Key and certificate do not belong together.
    #[error("ca-key.pem is not the key of ca-cert.pem")]
    KeyMismatch,
    /// The signer's certificate may not sign.
    #[error("ca-cert.pem is not a CA certificate (basicConstraints CA:TRUE, keyUsage keyCertSign)")]
    NotACa,
    /// The signer's life is over or has not begun.
    #[error("the CA certificate is valid from {from} to {until}, and now is {now}")]
    OutsideValidity {
        /// NotBefore.
        from: OffsetDateTime,
        /// NotAfter.
        until: OffsetDateTime,
        /// Now.
        now: OffsetDateTime,
    },
    /// Peers could not verify what this signer signs.
    #[error("a certificate signed by ca-cert.pem does not lead to a root in root-cert.pem: {0}")]
    Untrusted(String),
    /// X.509 encoding or signing failed.
    #[error("make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("not_after", &self.not_after)
            .field("roots", &self.roots.len())
            .finish_non_exhaustive()
    }
}

/// The files of a signer, as text.
#[derive(Clone, PartialEq, Eq)]
pub struct SignerPem {
    /// `ca-cert.pem`.
    pub cert: String,
    /// `ca-key.pem`.
    pub key: String,
    /// `cert-chain.pem`: from the signer up; may be empty for a self-signed signer.
    pub chain: String,
    /// `root-cert.pem`: one root or, during rotation, several.
    pub roots: String,
}

impl Authority {
    /// Takes a signer into use, after checking that its certificates will be accepted.
    pub fn from_pem(pem: &SignerPem, now: OffsetDateTime) -> Result<Self, AuthorityError> {
        let key = signer_key(&pem.key).ok_or(AuthorityError::NoKey("ca-key.pem"))?;
        let cert = certificates(&pem.cert).into_iter().next().ok_or(AuthorityError::NoCertificate("ca-cert.pem"))?;
        let roots = certificates(&pem.roots);
        if roots.is_empty() {
            return Err(AuthorityError::NoCertificate("root-cert.pem"));
        }
        let (_, parsed) = X509Certificate::from_der(&cert).map_err(|_| AuthorityError::NoCertificate("ca-cert.pem"))?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(AuthorityError::KeyMismatch);
        }
        let may_sign = parsed.key_usage().ok().flatten().is_none_or(|usage| usage.value.key_cert_sign());
        if !parsed.is_ca() || !may_sign {
            return Err(AuthorityError::NotACa);
        }
        let (from, until) = (parsed.validity().not_before.to_datetime(), parsed.validity().not_after.to_datetime());
        if now < from || now >= until {
            return Err(AuthorityError::OutsideValidity { from, until, now });
        }
        let self_signed = parsed.issuer().as_raw() == parsed.subject().as_raw();
        let mut chain: Vec<_> = if self_signed { Vec::new() } else { vec![cert.clone()] };
        // Installers write the signer into cert-chain.pem, or leave it out; roots do not belong into a chain.
        chain.extend(certificates(&pem.chain).into_iter().filter(|c| *c != cert && !roots.contains(c)));
        let issuer = Issuer::from_ca_cert_der(&cert, key)?;
        let authority = Self { issuer, chain, roots, not_after: until };
        authority.prove(now)?;
        Ok(authority)
    }

    /// Signs for a workload. The life is at most [`MAX_LEAF_TTL`] and ends no later than the signer's.
    pub fn sign_workload(
        &self,
        identity: &SpiffeId,
        key: &impl PublicKeyData,
        ttl: Duration,
        now: OffsetDateTime,
        rng: &mut impl RngCore,
    ) -> Result<Issued, AuthorityError> {
        let name = SanType::URI(identity.to_string().try_into()?);
        self.sign(vec![name], key, ttl, now, rng)
    }

    /// Makes a key and certificate for the controller's own TLS server.
    pub fn issue_server(
        &self,
        names: &[String],
        ttl: Duration,
        now: OffsetDateTime,
        rng: &mut impl RngCore,
    ) -> Result<(Issued, PrivateKeyDer<'static>), AuthorityError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let names = names
            .iter()
            .map(|name| match name.parse::<IpAddr>() {
                Ok(ip) => Ok(SanType::IpAddress(ip)),
                Err(_) => Ok(SanType::DnsName(name.as_str().try_into()?)),
            })
            .collect::<Result<_, rcgen::Error>>()?;
        let issued = self.sign(names, &key, ttl, now, rng)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|_| AuthorityError::NoKey("a new key"))?;
        Ok((issued, key))
    }

    fn sign(
        &self,
        names: Vec<SanType>,
        key: &impl PublicKeyData,
        ttl: Duration,
        now: OffsetDateTime,
        rng: &mut impl RngCore,
    ) -> Result<Issued, AuthorityError> {
        let not_after = (now + ttl.clamp(Duration::SECOND, MAX_LEAF_TTL)).min(self.not_after);
        if not_after <= now {
            return Err(AuthorityError::OutsideValidity { from: now, until: self.not_after, now });
        }
        let mut params = CertificateParams::default();
        params.not_before = now - BACKDATE;
        params.not_after = not_after;
        params.serial_number = Some(random_serial(rng));
        params.subject_alt_names = names;
        // An empty subject makes the SAN critical (RFC 5280, 4.1.2.6).
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let leaf: Certificate = params.signed_by(key, &self.issuer)?;
        let mut chain = vec![leaf.der().clone()];
        chain.extend(self.chain.iter().cloned());
        Ok(Issued { chain, not_after })
    }

    /// Signs a certificate that nobody gets and verifies it as a peer would.
    fn prove(&self, now: OffsetDateTime) -> Result<(), AuthorityError> {
        let probe = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let identity = SpiffeId::new("probe", "probe", "probe");
        let mut rng = rand::rng();
        let issued = self.sign_workload(&identity, &probe, Duration::MINUTE, now, &mut rng)?;
        let untrusted = |e: webpki::Error| AuthorityError::Untrusted(e.to_string());
        let anchors: Vec<_> =
            self.roots.iter().map(webpki::anchor_from_trusted_cert).collect::<Result<_, _>>().map_err(untrusted)?;
        let leaf = webpki::EndEntityCert::try_from(&issued.chain[0]).map_err(untrusted)?;
        let at =
            UnixTime::since_unix_epoch(std::time::Duration::from_secs(now.unix_timestamp().try_into().unwrap_or(0)));
        let usage = webpki::KeyUsage::client_auth();
        let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.all;
        leaf.verify_for_usage(algorithms, &anchors, &issued.chain[1..], at, usage, None, None)
            .map(|_| ())
            .map_err(untrusted)
    }

    /// The trusted roots, as one PEM text.
    pub fn bundle_pem(&self) -> String {
        self.roots.iter().map(|root| to_pem(root)).collect()
    }

    /// The trusted roots.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// End of the signer's validity.
    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }
}

/// The key that signs, in PKCS#8 or the older forms that openssl writes. Leaves are P-256, whatever signs them.
fn signer_key(pem: &str) -> Option<KeyPair> {
    let signs = [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_RSA_SHA256];
    let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).ok()?;
    KeyPair::try_from(&key).ok().filter(|key| signs.contains(&key.algorithm()))
}

/// A new self-signed root: certificate and key as PEM.
pub fn make_root(
    trust_domain: &str,
    now: OffsetDateTime,
    rng: &mut impl RngCore,
) -> Result<(String, String), AuthorityError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.not_before = now - BACKDATE;
    params.not_after = now + ROOT_TTL;
    params.serial_number = Some(random_serial(rng));
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, trust_domain);
    // A name of its own keeps two roots apart while both are trusted.
    subject.push(DnType::CommonName, format!("{trust_domain} root {}", now.unix_timestamp()));
    params.distinguished_name = subject;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let cert = params.self_signed(&key)?;
    Ok((to_pem(cert.der()), key.serialize_pem()))
}

/// Certificates of a PEM text; what is none is left out.
pub fn certificates(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).filter_map(Result::ok).collect()
}

/// One certificate as PEM.
pub fn to_pem(der: &CertificateDer<'_>) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE", der.as_ref()), config)
}

fn random_serial(rng: &mut impl RngCore) -> SerialNumber {
    let mut bytes = [0; SERIAL_BYTES];
    rng.fill_bytes(&mut bytes);
    // Positive, and never zero.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use x509_parser::extensions::{GeneralName, ParsedExtension};

    use super::*;

    fn now() -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(1_700_000_000).unwrap()
    }

    fn self_signed() -> SignerPem {
        let (cert, key) = make_root("cluster.local", now(), &mut StdRng::seed_from_u64(1)).unwrap();
        SignerPem { roots: cert.clone(), cert, key, chain: String::new() }
    }

    fn id() -> SpiffeId {
        SpiffeId::new("cluster.local", "default", "web")
    }

    fn leaf(authority: &Authority, ttl: Duration, at: OffsetDateTime) -> Issued {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        authority.sign_workload(&id(), &key, ttl, at, &mut StdRng::seed_from_u64(2)).unwrap()
    }

    #[test]
    fn a_leaf_is_an_svid() {
        let authority = Authority::from_pem(&self_signed(), now()).unwrap();
        let issued = leaf(&authority, DEFAULT_LEAF_TTL, now());
        assert_eq!(issued.chain.len(), 1, "a self-signed signer is not sent");
        let (_, cert) = X509Certificate::from_der(&issued.chain[0]).unwrap();
        assert_eq!(cert.subject().iter().count(), 0);
        assert_eq!(cert.validity().not_before.to_datetime(), now() - BACKDATE);
        assert_eq!(cert.validity().not_after.to_datetime(), now() + DEFAULT_LEAF_TTL);
        assert!(!cert.is_ca());
        let san = cert.subject_alternative_name().unwrap().unwrap();
        assert!(san.critical);
        assert_eq!(san.value.general_names, [GeneralName::URI("spiffe://cluster.local/ns/default/sa/web")]);
        let usage = cert.key_usage().unwrap().unwrap();
        assert_eq!(usage.value.flags, 0b101, "digitalSignature and keyEncipherment");
        let eku = cert.extended_key_usage().unwrap().unwrap().value;
        assert!(eku.server_auth && eku.client_auth && !eku.any && eku.other.is_empty());
        let constraints = cert.basic_constraints().unwrap().unwrap();
        assert!(constraints.critical && !constraints.value.ca);
        let aki =
            cert.iter_extensions().any(|e| matches!(e.parsed_extension(), ParsedExtension::AuthorityKeyIdentifier(_)));
        assert!(aki);
    }

    #[test]
    fn lives_are_bounded_by_the_signer_and_by_the_maximum() {
        let authority = Authority::from_pem(&self_signed(), now()).unwrap();
        let end = authority.not_after();
        assert_eq!(end, now() + ROOT_TTL);
        assert_eq!(leaf(&authority, Duration::days(4000), now()).not_after, now() + MAX_LEAF_TTL);
        assert_eq!(leaf(&authority, DEFAULT_LEAF_TTL, end - Duration::HOUR).not_after, end);
        let key = KeyPair::generate().unwrap();
        let late = authority.sign_workload(&id(), &key, DEFAULT_LEAF_TTL, end, &mut StdRng::seed_from_u64(3));
        assert!(matches!(late, Err(AuthorityError::OutsideValidity { .. })));
    }

    fn plugged() -> SignerPem {
        plugged_with(&KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap().serialize_pem())
    }

    /// A signer below a root.
    fn plugged_with(key: &str) -> SignerPem {
        let root = self_signed();
        let root_key = KeyPair::from_pem(&root.key).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&root.cert, root_key).unwrap();
        let cert = ca_params().signed_by(&signer_key(key).expect(key), &issuer).unwrap().pem();
        let chain = format!("{cert}{}", root.cert);
        SignerPem { cert, key: key.to_owned(), chain, roots: root.roots }
    }

    fn ca_params() -> CertificateParams {
        let mut params = CertificateParams::default();
        (params.not_before, params.not_after) = (now() - BACKDATE, now() + Duration::days(30));
        params.distinguished_name.push(DnType::CommonName, "intermediate");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    }

    #[test]
    fn an_intermediate_is_sent_once_and_without_its_root() {
        let plugged = plugged();
        let authority = Authority::from_pem(&plugged, now()).unwrap();
        let issued = leaf(&authority, Duration::days(60), now());
        assert_eq!(issued.chain.len(), 2);
        assert_eq!(issued.chain[1], certificates(&plugged.cert)[0]);
        assert_eq!(issued.not_after, now() + Duration::days(30));
        assert_eq!(authority.bundle_pem(), plugged.roots);
    }

    #[test]
    fn a_plugged_signer_may_have_any_usual_key() {
        let keys = [
            ("P-256 behind its parameters", include_str!("../../tests/data/keys/p256-with-parameters.pem")),
            ("P-384", include_str!("../../tests/data/keys/p384-sec1.pem")),
            ("RSA, PKCS#1", include_str!("../../tests/data/keys/rsa-pkcs1.pem")),
            ("RSA, PKCS#8", include_str!("../../tests/data/keys/rsa-pkcs8.pem")),
        ];
        for (name, key) in keys {
            let below_a_root = plugged_with(key);
            let cert = ca_params().self_signed(&signer_key(key).unwrap()).unwrap().pem();
            let itself = SignerPem { roots: cert.clone(), cert, key: key.to_owned(), chain: String::new() };
            for (pem, length) in [(below_a_root, 2), (itself, 1)] {
                let authority = Authority::from_pem(&pem, now()).unwrap_or_else(|e| panic!("{name}: {e}"));
                let issued = leaf(&authority, DEFAULT_LEAF_TTL, now());
                assert_eq!(issued.chain.len(), length, "{name}");
                let (_, cert) = X509Certificate::from_der(&issued.chain[0]).unwrap();
                let p256 = "1.2.840.10045.3.1.7";
                let curve = cert.public_key().algorithm.parameters.as_ref().unwrap().as_oid().unwrap();
                assert_eq!(curve.to_id_string(), p256, "{name}: a leaf is P-256");
            }
        }
    }

    #[test]
    fn files_that_do_not_fit_are_refused_by_name() {
        let good = plugged();
        let refuse = |change: &dyn Fn(&mut SignerPem), expected: &str| {
            let mut pem = good.clone();
            change(&mut pem);
            let error = Authority::from_pem(&pem, now()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}, not {expected}");
        };
        let other = self_signed();
        refuse(&|p| p.cert.clear(), "ca-cert.pem does not hold");
        refuse(&|p| p.key = "junk".into(), "ca-key.pem does not hold");
        refuse(&|p| p.key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap().serialize_pem(), "P-256");
        refuse(&|p| p.key = include_str!("../../tests/data/keys/rsa-1024.pem").into(), "RSA one of 2048");
        refuse(&|p| p.key = include_str!("../../tests/data/keys/p521.pem").into(), "P-256 or P-384");
        refuse(&|p| p.key = other.key.clone(), "not the key of");
        refuse(&|p| p.roots.clear(), "root-cert.pem does not hold");
        refuse(&|p| p.roots = other.roots.clone(), "does not lead to a root");
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::default().self_signed(&key).unwrap().pem();
        refuse(&|p| (p.cert, p.key) = (leaf.clone(), key.serialize_pem()), "is not a CA certificate");
        let late = Authority::from_pem(&good, now() + Duration::days(31)).unwrap_err();
        assert!(matches!(late, AuthorityError::OutsideValidity { .. }));
    }
}
