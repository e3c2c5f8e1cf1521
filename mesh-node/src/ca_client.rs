//! One certificate from the CA: a fresh key, a request, and a close look at the answer.

use mesh_api::proto::ca::IstioCertificateRequest;
use mesh_api::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use mesh_core::identity::SpiffeId;
use prost_types::Struct;
use prost_types::value::Kind;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::Arc;
use tonic::Request;
use tonic::transport::Channel;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::controller::{ControllerConfig, FileError, explain, parse_certificates};
use crate::runtime::CertifiedIdentity;
use crate::tls::{self, PeerRefused};

/// Key of the identity in the request's metadata (Istio's).
const IMPERSONATED: &str = "ImpersonatedIdentity";
/// Largest answer, bytes: a chain and a bundle of roots.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// Token or roots cannot be read.
    #[error("{0}")]
    File(#[from] FileError),
    /// The request could not be made.
    #[error("certificate request: {0}")]
    Request(#[from] rcgen::Error),
    /// The CA refused, or could not be reached.
    #[error("{}", explain(.0))]
    Rpc(#[from] tonic::Status),
    /// The answer cannot be used.
    #[error("the CA's answer: {0}")]
    Answer(String),
    /// No answer in time.
    #[error("the CA did not answer in time")]
    Slow,
}

/// An issued certificate, and the roots that came with it.
#[derive(Debug)]
pub struct Issued {
    /// Chain and key.
    pub identity: CertifiedIdentity,
    /// What is trusted, as the CA says.
    pub roots: Vec<CertificateDer<'static>>,
    /// Chain and key as PEM: what is kept for the next process.
    pub pem: String,
}

/// Requests a certificate for `id`.
pub async fn request(config: &ControllerConfig, channel: Channel, id: &SpiffeId) -> Result<Issued, CaError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
    let identity = prost_types::Value { kind: Some(Kind::StringValue(id.to_string())) };
    let mut request = Request::new(IstioCertificateRequest {
        csr: params.serialize_request(&key)?.pem()?,
        validity_duration: 0,
        metadata: Some(Struct { fields: [(IMPERSONATED.to_owned(), identity)].into() }),
    });
    config.authenticate(request.metadata_mut())?;
    let mut client = IstioCertificateServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
    let answer = client.create_certificate(request).await?.into_inner();
    // The last element is the bundle of roots; each of the others is one certificate.
    let (roots, chain) = match answer.cert_chain.as_slice() {
        [chain @ .., roots] if !chain.is_empty() => (roots, chain),
        few => return Err(CaError::Answer(format!("{} certificates, at least 2 are needed", few.len()))),
    };
    let mut pem = String::new();
    for certificate in chain {
        pem.push_str(certificate.trim_end());
        pem.push('\n');
    }
    pem.push_str(&key.serialize_pem());
    let roots = parse_certificates(roots).map_err(CaError::Answer)?;
    if roots.is_empty() {
        return Err(CaError::Answer("no root certificate".to_owned()));
    }
    Ok(Issued { identity: read_identity(id, &pem)?, roots, pem })
}

/// Reads what [`Issued::pem`] holds.
pub fn read_identity(id: &SpiffeId, pem: &str) -> Result<CertifiedIdentity, CaError> {
    let answer = |what: String| CaError::Answer(what);
    let chain = parse_certificates(pem).map_err(answer)?;
    let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|e| answer(e.to_string()))?;
    let leaf = chain.first().ok_or_else(|| answer("no certificate".to_owned()))?;
    match tls::spiffe_id_of(leaf) {
        Ok(actual) if actual == *id => {}
        Ok(actual) => return Err(answer(format!("a certificate of {actual}, {id} was asked for"))),
        Err(error) => return Err(answer(PeerRefused::to_string(&error))),
    }
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|e| answer(e.to_string()))?;
    let seconds = |time: i64| u64::try_from(time).unwrap_or(0);
    let validity = parsed.validity();
    let (not_before_secs, not_after_secs) =
        (seconds(validity.not_before.timestamp()), seconds(validity.not_after.timestamp()));
    let serial = parsed.raw_serial_as_string().replace(':', "");
    let certified: Arc<_> = tls::certified_key(chain.clone(), &key).map_err(|e| answer(e.to_string()))?;
    Ok(CertifiedIdentity { id: id.clone(), chain, key: certified, not_before_secs, not_after_secs, serial })
}
