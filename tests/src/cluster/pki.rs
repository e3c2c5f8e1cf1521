//! The cluster's authority, the API server's certificate, and the key that signs service account tokens.

use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result};
use mesh_ctl::sandbox::files;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, RsaKeySize, SanType,
};

use super::addresses::Addresses;

/// Names of the API server, as pods and people call it.
const NAMES: [&str; 5] =
    ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost"];

/// Writes `ca.crt`, `ca.key`, `apiserver.crt`, `apiserver.key`, `sa.key` and `sa.pub`.
pub(super) fn write(directory: &Path, addresses: &Addresses) -> Result<()> {
    files::private_dir(directory)?;
    let put = |name: &str, text: String| files::replace(&directory.join(name), &text, 0o600);
    let key = || KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).context("make a key");
    let mut params = named("kubernetes");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let authority = CertifiedIssuer::self_signed(params, key()?).context("sign the cluster's authority")?;
    put("ca.crt", authority.pem())?;
    put("ca.key", authority.key().serialize_pem())?;

    let mut params = named("kube-apiserver");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    for name in NAMES {
        params.subject_alt_names.push(SanType::DnsName(name.try_into().context("a name of the API server")?));
    }
    let own: [IpAddr; 3] = [addresses.host().0.into(), addresses.host().1.into(), addresses.api_service().into()];
    params.subject_alt_names.extend(own.map(SanType::IpAddress));
    let server_key = key()?;
    let server = params.signed_by(&server_key, &authority).context("sign the API server's certificate")?;
    put("apiserver.crt", server.pem())?;
    put("apiserver.key", server_key.serialize_pem())?;

    // RSA: what clusters have, so it is what readers of tokens must take.
    let accounts = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).context("make a key for tokens")?;
    put("sa.key", accounts.serialize_pem())?;
    put("sa.pub", accounts.public_key_pem())
}

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}
