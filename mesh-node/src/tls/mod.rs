//! Mutual TLS between node proxies: configurations and whom to believe.
//!
//! TLS 1.3 only, ALPN `h2`, no SNI, no resumption: every connection proves both identities anew. No sockets here.

mod identity;
mod proof;
mod provider;
mod verify;

use std::io;
use std::sync::Arc;

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, ClientConfig, ServerConfig, SignatureScheme};

pub use identity::spiffe_id_of;
pub use proof::{PeerProof, PeerRole};
pub use verify::{CLOCK_SKEW, ExpectedServer, PeerRefused};

use crate::runtime::{CertifiedIdentity, RootStore};

/// The only application protocol (RFC 7540 3.3).
pub const ALPN_H2: &[u8] = b"h2";

/// Configuration of an HBONE server that proves `identity` and asks clients for a certificate of `trust_domain`.
pub fn server_config(
    identity: &CertifiedIdentity,
    roots: &Arc<RootStore>,
    trust_domain: &Arc<str>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let verifier = verify::ClientVerifier::new(Arc::clone(roots), Arc::clone(trust_domain));
    let mut config = ServerConfig::builder_with_provider(provider::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(OneIdentity(Arc::clone(&identity.key))));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Configuration of an HBONE client that proves `identity` and accepts only a server that is `expected`.
pub fn client_config(
    identity: &CertifiedIdentity,
    roots: &Arc<RootStore>,
    expected: ExpectedServer,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let verifier = verify::ServerVerifier::new(Arc::clone(roots), expected);
    let mut config = ClientConfig::builder_with_provider(provider::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(OneIdentity(Arc::clone(&identity.key))));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// Configuration of a client of the controller, whose server certificate must chain to `roots`.
pub fn controller_client_config(roots: rustls::RootCertStore) -> Result<Arc<ClientConfig>, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(provider::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    Ok(Arc::new(config))
}

/// Builds what proves an identity out of a chain and its PKCS#8 key.
pub fn certified_key(
    chain: Vec<rustls_pki_types::CertificateDer<'static>>,
    key: &rustls_pki_types::PrivateKeyDer<'static>,
) -> Result<Arc<CertifiedKey>, rustls::Error> {
    let key = provider::provider().key_provider.load_private_key(key.clone_key())?;
    let certified = CertifiedKey::new(chain, key);
    match certified.keys_match() {
        // `Unknown` is what a signer that cannot export its public key says; all of ours can.
        Ok(()) => Ok(Arc::new(certified)),
        Err(error) => Err(error),
    }
}

/// A failed handshake in the words of who refused the peer: rustls shows what it wraps as a data structure.
pub fn plainly(error: io::Error) -> io::Error {
    let rustls = error.get_ref().and_then(|inner| inner.downcast_ref());
    match rustls {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(other))) => {
            match other.0.downcast_ref::<PeerRefused>() {
                Some(refused) => io::Error::new(error.kind(), refused.clone()),
                None => error,
            }
        }
        Some(_) | None => error,
    }
}

/// Always the same certificate, whatever the peer says: the listener's namespace chose it.
#[derive(Debug)]
struct OneIdentity(Arc<CertifiedKey>);

impl ResolvesServerCert for OneIdentity {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

impl ResolvesClientCert for OneIdentity {
    fn resolve(&self, _root_hint_subjects: &[&[u8]], _sigschemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}
