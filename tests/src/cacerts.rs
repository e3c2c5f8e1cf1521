//! Plugged-in signers, as an operator writes them into Istio's four files: a root, and an intermediate that signs.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use rustls::pki_types::CertificateDer;

use crate::hostile::Ca;

/// A root and its intermediate.
pub struct PluggedCa {
    root_pem: String,
    signer_pem: String,
    signer_key_pem: String,
    signer: CertificateDer<'static>,
}

impl PluggedCa {
    /// Makes both. The intermediate's common name is `NAME signer`.
    ///
    /// # Panics
    /// No key can be made.
    pub fn new(name: &str) -> Self {
        let (root_key, signer_key) = (key(), key());
        let root = params(&format!("{name} root")).self_signed(&root_key).expect("sign");
        let issuer = Issuer::new(params(&format!("{name} root")), root_key);
        let signer = params(&format!("{name} signer")).signed_by(&signer_key, &issuer).expect("sign");
        Self {
            root_pem: root.pem(),
            signer_pem: signer.pem(),
            signer_key_pem: signer_key.serialize_pem(),
            signer: signer.der().clone(),
        }
    }

    /// Signs as the controller would with these files.
    ///
    /// # Panics
    /// Never: what it made can be read.
    pub fn ca(&self) -> Ca {
        let key = KeyPair::from_pem(&self.signer_key_pem).expect("key");
        let issuer = Issuer::from_ca_cert_pem(&self.signer_pem, key).expect("certificate");
        Ca::with(issuer, vec![self.signer.clone()])
    }

    /// Writes the files that sign.
    ///
    /// # Panics
    /// They cannot be written.
    pub fn write_signer(&self, dir: &Path) {
        for (file, text) in [
            ("cert-chain.pem", &self.signer_pem),
            ("ca-cert.pem", &self.signer_pem),
            ("ca-key.pem", &self.signer_key_pem),
        ] {
            std::fs::write(dir.join(file), text).expect("write");
        }
    }
}

/// Writes the file of roots.
///
/// # Panics
/// It cannot be written.
pub fn write_roots(dir: &Path, roots: &[&PluggedCa]) {
    let pem: String = roots.iter().map(|ca| ca.root_pem.as_str()).collect();
    std::fs::write(dir.join("root-cert.pem"), pem).expect("write");
}

fn key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("key")
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}
