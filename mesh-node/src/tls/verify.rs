//! Whom to believe: chain to the mesh's roots, key usage, validity, exactly one SPIFFE ID, and whose it is.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::identity::{InvalidSpiffeId, SpiffeId};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::identity::{may_sign, spiffe_id_of};
use super::provider::provider;
use crate::runtime::RootStore;

/// By how much two nodes' clocks may differ: a certificate is good for this long outside of its validity.
pub const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// Certificates besides the leaf that a peer may send; Istio's plugged-in CAs have one to three.
const MAX_INTERMEDIATES: usize = 8;

/// Why a peer's certificate is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerRefused {
    /// The peer sent none.
    #[error("peer sent no certificate")]
    NoCertificate,
    /// Does not parse, does not chain to the mesh's roots, is outside of its validity, or is not for this use.
    #[error("peer certificate: {0}")]
    Certificate(webpki::Error),
    /// More intermediates than anybody needs.
    #[error("peer sent {0} intermediate certificates, at most {MAX_INTERMEDIATES} are looked at")]
    ChainTooLong(usize),
    /// A workload's key signs no certificates.
    #[error("peer certificate may sign others, which no workload's may")]
    MaySign,
    /// An X.509-SVID has one URI SAN.
    #[error("peer certificate has no URI SAN")]
    NoUriSan,
    /// An X.509-SVID has one URI SAN.
    #[error("peer certificate has more than one URI SAN")]
    ManyUriSans,
    /// The URI SAN is not of Istio's shape.
    #[error("peer certificate: {0}")]
    NotSpiffe(InvalidSpiffeId),
    /// The peer is of another mesh.
    #[error("peer {0} is not of trust domain {1}")]
    TrustDomain(SpiffeId, Arc<str>),
    /// The server is somebody, but not who was dialled.
    #[error("peer is {actual}, expected {expected}")]
    WrongIdentity {
        /// Who it is.
        actual: SpiffeId,
        /// Who it should be.
        expected: ExpectedServer,
    },
}

impl From<PeerRefused> for rustls::Error {
    fn from(refused: PeerRefused) -> Self {
        let error = match &refused {
            PeerRefused::Certificate(webpki::Error::CertExpired { .. }) => CertificateError::Expired,
            PeerRefused::Certificate(webpki::Error::CertNotValidYet { .. }) => CertificateError::NotValidYet,
            PeerRefused::Certificate(webpki::Error::UnknownIssuer) => CertificateError::UnknownIssuer,
            PeerRefused::NoCertificate
            | PeerRefused::Certificate(_)
            | PeerRefused::ChainTooLong(_)
            | PeerRefused::MaySign
            | PeerRefused::NoUriSan
            | PeerRefused::ManyUriSans
            | PeerRefused::NotSpiffe(_)
            | PeerRefused::TrustDomain(..)
            | PeerRefused::WrongIdentity { .. } => CertificateError::Other(OtherError(Arc::new(refused))),
        };
        Self::InvalidCertificate(error)
    }
}

/// Whom a client wants to meet: the workload's identity, or one of the service's alternative names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ExpectedServer {
    /// The workload's identity.
    pub identity: SpiffeId,
    /// `subject_alt_names` of the service that was addressed, as URIs.
    pub alternatives: Arc<[Arc<str>]>,
}

impl ExpectedServer {
    /// Exactly this identity.
    pub fn exactly(identity: SpiffeId) -> Self {
        Self { identity, alternatives: Arc::new([]) }
    }

    /// Whether `actual` is acceptable.
    pub fn accepts(&self, actual: &SpiffeId) -> bool {
        self.identity == *actual
            || self.alternatives.iter().any(|san| san.parse().is_ok_and(|id: SpiffeId| id == *actual))
    }
}

impl std::fmt::Display for ExpectedServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.identity)?;
        self.alternatives.iter().try_for_each(|san| write!(f, " or {san}"))
    }
}

/// Everything but whose identity it is.
pub(super) fn verify_chain(
    roots: &RootStore,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
    usage: webpki::KeyUsage,
) -> Result<SpiffeId, PeerRefused> {
    if intermediates.len() > MAX_INTERMEDIATES {
        return Err(PeerRefused::ChainTooLong(intermediates.len()));
    }
    let certificate = webpki::EndEntityCert::try_from(leaf).map_err(PeerRefused::Certificate)?;
    let algorithms = provider().signature_verification_algorithms;
    let at = |time: Duration| {
        certificate
            .verify_for_usage(
                algorithms.all,
                &roots.anchors,
                intermediates,
                UnixTime::since_unix_epoch(time),
                usage,
                None,
                None,
            )
            .map(|_| ())
    };
    let now = Duration::from_secs(now.as_secs());
    match at(now) {
        Err(webpki::Error::CertExpired { .. }) => at(now.saturating_sub(CLOCK_SKEW)),
        Err(webpki::Error::CertNotValidYet { .. }) => at(now + CLOCK_SKEW),
        result => result,
    }
    .map_err(PeerRefused::Certificate)?;
    if may_sign(leaf)? {
        return Err(PeerRefused::MaySign);
    }
    spiffe_id_of(leaf)
}

/// Judges clients.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    roots: Arc<RootStore>,
    trust_domain: Arc<str>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientVerifier {
    pub(super) fn new(roots: Arc<RootStore>, trust_domain: Arc<str>) -> Self {
        Self { roots, trust_domain, algorithms: provider().signature_verification_algorithms }
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let id = verify_chain(&self.roots, end_entity, intermediates, now, webpki::KeyUsage::client_auth())?;
        if id.trust_domain != self.trust_domain {
            return Err(PeerRefused::TrustDomain(id, Arc::clone(&self.trust_domain)).into());
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12_is_off())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Judges servers.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    roots: Arc<RootStore>,
    expected: ExpectedServer,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerVerifier {
    pub(super) fn new(roots: Arc<RootStore>, expected: ExpectedServer) -> Self {
        Self { roots, expected, algorithms: provider().signature_verification_algorithms }
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let actual = verify_chain(&self.roots, end_entity, intermediates, now, webpki::KeyUsage::server_auth())?;
        if !self.expected.accepts(&actual) {
            return Err(PeerRefused::WrongIdentity { actual, expected: self.expected.clone() }.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12_is_off())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn tls12_is_off() -> rustls::Error {
    rustls::PeerIncompatible::Tls12NotOfferedOrEnabled.into()
}

#[cfg(test)]
mod tests;
