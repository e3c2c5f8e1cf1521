//! A peer that is not a node proxy of the mesh: it proves what a test wants, with the mesh's own CA if need be, and says
//! what a test wants.

pub mod application;
pub mod frames;
pub mod raw;
pub mod scene;
pub mod upstream;

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use mesh_node::capture::in_netns;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use time::OffsetDateTime;
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// A peer that says nothing by then is not going to.
const PATIENCE: Duration = Duration::from_secs(5);

/// Frames of a flood: a hundred thousand, or a million in the long form.
pub fn many() -> u32 {
    if std::env::var_os("MESH_TEST_LONG").is_some() { 1_000_000 } else { 100_000 }
}

/// What a certificate says of its holder.
#[derive(Debug, Clone)]
pub struct Claim {
    /// URI SANs.
    pub uris: Vec<String>,
    /// DNS SANs.
    pub names: Vec<String>,
    /// Validity, from now.
    pub from: time::Duration,
    /// Validity, from now.
    pub until: time::Duration,
    /// May be used by clients.
    pub client: bool,
    /// May sign others.
    pub is_ca: bool,
}

impl Claim {
    /// A good certificate of an identity.
    pub fn of(uri: &str) -> Self {
        Self {
            uris: vec![uri.to_owned()],
            names: Vec::new(),
            from: -time::Duration::hours(1),
            until: time::Duration::hours(1),
            client: true,
            is_ca: false,
        }
    }
}

/// A signer of certificates.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    /// Certificates from the signer up to, but without, a root.
    chain: Vec<CertificateDer<'static>>,
}

/// A certificate with its key.
pub type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

impl Ca {
    /// The mesh's own, whose key only the controller and root can read.
    ///
    /// # Panics
    /// The file is not there or not a certificate with its key.
    pub fn of_the_mesh(controller_state: &Path) -> Self {
        let pem = std::fs::read_to_string(controller_state.join("ca/signer.pem")).expect("the mesh's signer");
        let at = pem.find("-----BEGIN PRIVATE KEY").expect("key");
        let key = KeyPair::from_pem(&pem[at..]).expect("key");
        Self::with(Issuer::from_ca_cert_pem(&pem, key).expect("certificate"), Vec::new())
    }

    /// A signer, and the certificates that its own come with.
    pub fn with(issuer: Issuer<'static, KeyPair>, chain: Vec<CertificateDer<'static>>) -> Self {
        Self { issuer, chain }
    }

    /// Somebody else's.
    ///
    /// # Panics
    /// No key can be made.
    pub fn foreign() -> Self {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self::with(Issuer::new(params, key), Vec::new())
    }

    /// A certificate that claims something.
    ///
    /// # Panics
    /// The claim cannot be written into a certificate.
    pub fn issue(&self, claim: &Claim) -> Identity {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::default();
        let uris = claim.uris.iter().map(|uri| SanType::URI(uri.as_str().try_into().expect("URI")));
        let names = claim.names.iter().map(|name| SanType::DnsName(name.as_str().try_into().expect("name")));
        params.subject_alt_names = uris.chain(names).collect();
        params.not_before = OffsetDateTime::now_utc() + claim.from;
        params.not_after = OffsetDateTime::now_utc() + claim.until;
        let usage =
            if claim.client { ExtendedKeyUsagePurpose::ClientAuth } else { ExtendedKeyUsagePurpose::ServerAuth };
        params.extended_key_usages = vec![usage];
        if claim.is_ca {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        let certificate = params.signed_by(&key, &self.issuer).expect("sign");
        let chain = std::iter::once(certificate.der()).chain(&self.chain).cloned().collect();
        (chain, PrivateKeyDer::try_from(key.serialize_der()).expect("key"))
    }
}

/// Believes every server: what is tested is whom the server believes.
#[derive(Debug)]
struct Credulous;

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// How a peer presents itself.
pub struct Approach {
    /// Its certificate; `None`: it sends none.
    pub identity: Option<Identity>,
    /// The protocol that it asks for inside TLS.
    pub alpn: &'static [u8],
}

impl Approach {
    /// As a node proxy does it.
    pub fn with(identity: Identity) -> Self {
        Self { identity: Some(identity), alpn: b"h2" }
    }
}

/// Connects from inside a namespace.
///
/// # Errors
/// What the kernel said.
pub async fn dial(netns: &Path, to: SocketAddr) -> io::Result<TcpStream> {
    let file = File::open(netns)?;
    let tcp = in_netns(file.as_fd(), || std::net::TcpStream::connect_timeout(&to, PATIENCE))??;
    tcp.set_nonblocking(true)?;
    tcp.set_nodelay(true)?;
    TcpStream::from_std(tcp)
}

/// As [`dial`], from one of several addresses of the namespace.
///
/// # Errors
/// What the kernel said.
pub async fn dial_from(netns: &Path, from: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let file = File::open(netns)?;
    let make = || if from.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = in_netns(file.as_fd(), make)??;
    socket.bind(SocketAddr::new(from, 0))?;
    tokio::time::timeout(PATIENCE, socket.connect(to)).await?
}

/// The TLS of a peer, which believes every server.
///
/// # Panics
/// Its key cannot be used.
pub fn client_config(approach: Approach) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Credulous));
    let mut config = match approach.identity {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).expect("certificate and key"),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![approach.alpn.to_vec()];
    Arc::new(config)
}

/// Shakes hands, whoever the server is.
///
/// # Errors
/// The server does not want it.
pub async fn shake_hands(netns: &Path, to: SocketAddr, approach: Approach) -> Result<TlsStream<TcpStream>, String> {
    let tcp = dial(netns, to).await.map_err(|error| format!("connect: {error}"))?;
    let connecting = TlsConnector::from(client_config(approach)).connect(ServerName::from(to.ip()), tcp);
    within(connecting).await?.map_err(|error| format!("TLS: {error}"))
}

/// The certificates that a server shows, its own first.
///
/// # Errors
/// The handshake fails.
pub async fn shown(netns: &Path, to: SocketAddr, approach: Approach) -> Result<Vec<CertificateDer<'static>>, String> {
    let tls = shake_hands(netns, to, approach).await?;
    Ok(tls.get_ref().1.peer_certificates().unwrap_or_default().iter().map(|c| c.clone().into_owned()).collect())
}

/// Opens a tunnel; an error says at what it failed. In TLS 1.3 the client's side is done before the server has looked at
/// the certificate, so a refusal may show only at the first request.
///
/// # Errors
/// The server does not want it.
pub async fn tunnel(netns: &Path, to: SocketAddr, approach: Approach) -> Result<SendRequest<Bytes>, String> {
    let tls = shake_hands(netns, to, approach).await?;
    let (send, driver) = within(h2::client::handshake(tls)).await?.map_err(|error| format!("HTTP/2: {error}"))?;
    tokio::spawn(async move {
        // Its end shows in the requests.
        let _ended = driver.await;
    });
    Ok(send)
}

/// Sends the head of a request; the answer's status.
///
/// # Errors
/// There is no answer.
pub async fn ask(send: &SendRequest<Bytes>, method: Method, authority: &str) -> Result<StatusCode, String> {
    let mut send = within(send.clone().ready()).await?.map_err(|error| error.to_string())?;
    let request = Request::builder().method(method).uri(authority).body(()).map_err(|error| error.to_string())?;
    let (response, _body) = send.send_request(request, false).map_err(|error| error.to_string())?;
    Ok(within(response).await?.map_err(|error| error.to_string())?.status())
}

async fn within<T>(future: impl Future<Output = T>) -> Result<T, String> {
    tokio::time::timeout(PATIENCE, future).await.map_err(|_| "no answer".to_owned())
}
