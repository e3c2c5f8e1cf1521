//! The way to the controller: TLS with a verified server, this node's token in every call, and how we introduce ourselves.
//!
//! Roots and token are files that somebody else renews, so both are read again for each connection and each call.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use mesh_api::proto::xds::Node;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::tls;

/// Time for TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a quiet connection is asked whether it still lives, and how long it may take to answer.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(10));
/// Longest file of roots or token that is read, bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Where the controller is and how each end proves who it is.
#[derive(Debug, Clone)]
pub struct ControllerConfig {
    /// `HOST:PORT`.
    pub address: String,
    /// Name that the controller's certificate must have.
    pub server_name: String,
    /// Roots that it must chain to, PEM.
    pub root_cert: PathBuf,
    /// This node's token.
    pub token_file: PathBuf,
    /// This node's name.
    pub node: Arc<str>,
    /// This node's cluster.
    pub cluster: Arc<str>,
    /// The mesh's trust domain.
    pub trust_domain: Arc<str>,
    /// This node's network.
    pub network: Arc<str>,
    /// The namespace whose policies are mesh-wide.
    pub root_namespace: Arc<str>,
    /// The pod that this process is.
    pub pod: Pod,
}

/// The pod of a node proxy, for whoever lists the controller's clients.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Name; without Kubernetes the node's.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Address, where it is known.
    pub ip: Option<IpAddr>,
}

/// Why a file that the connection needs cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Not readable.
    #[error("{}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// No certificate in it, or a damaged one.
    #[error("{}: {reason}", path.display())]
    Content {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl ControllerConfig {
    /// A channel that connects when it is first used, and again whenever it must.
    pub fn channel(&self) -> Result<Channel, tonic::transport::Error> {
        let config = self.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let config = config.clone();
            async move { config.connect().await.map(TokioIo::new) }
        });
        // The URI is what requests carry as `:authority`; where to connect is the connector's business.
        let endpoint = Endpoint::from_shared(format!("https://{}:15012", self.server_name))?
            .http2_keep_alive_interval(KEEPALIVE.0)
            .keep_alive_timeout(KEEPALIVE.1)
            .keep_alive_while_idle(true);
        Ok(endpoint.connect_with_connector_lazy(connector))
    }

    /// Proves in the headers of a call which node this is, and says of which cluster.
    pub fn authenticate(&self, headers: &mut MetadataMap) -> Result<(), FileError> {
        let token = read(&self.token_file)?;
        let token = format!("Bearer {}", token.trim()).parse().map_err(|_| FileError::Content {
            path: self.token_file.clone(),
            reason: "a token has only printable ASCII characters".to_owned(),
        })?;
        headers.insert("authorization", token);
        // The flag takes nothing that a header could not hold.
        if let Ok(cluster) = self.cluster.parse() {
            headers.insert("clusterid", cluster);
        }
        Ok(())
    }

    /// This node as a client of the configuration stream, in ztunnel's form.
    pub fn node(&self) -> Node {
        let text = |value: &str| Value { kind: Some(Kind::StringValue(value.to_owned())) };
        let Pod { name, namespace, ip } = &self.pod;
        let ip_text = ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)).to_string();
        let fields = [
            ("NAME", name),
            ("NAMESPACE", namespace),
            ("NODE_NAME", &self.node),
            ("CLUSTER_ID", &self.cluster),
            ("NETWORK", &self.network),
        ];
        let mut fields: BTreeMap<_, _> = fields.map(|(key, value)| (key.to_owned(), text(value))).into();
        if ip.is_some() {
            fields.insert("INSTANCE_IPS".to_owned(), text(&ip_text));
        }
        Node {
            id: format!("ztunnel~{ip_text}~{name}.{namespace}~{namespace}.svc.cluster.local"),
            cluster: self.cluster.to_string(),
            metadata: Some(Struct { fields }),
        }
    }

    /// The roots in the file.
    pub fn roots(&self) -> Result<Vec<CertificateDer<'static>>, FileError> {
        let path = &self.root_cert;
        let content = |reason: String| FileError::Content { path: path.clone(), reason };
        let roots = parse_certificates(&read(path)?).map_err(content)?;
        if roots.is_empty() { Err(content("no certificate in it".to_owned())) } else { Ok(roots) }
    }

    async fn connect(&self) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let tls = self.tls()?;
        let name = ServerName::try_from(self.server_name.clone()).map_err(io::Error::other)?;
        let connect = async {
            let tcp = TcpStream::connect(&self.address).await?;
            tcp.set_nodelay(true)?;
            TlsConnector::from(tls).connect(name, tcp).await
        };
        let error = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", self.address));
        match timeout(CONNECT_TIMEOUT, connect).await {
            Ok(result) => result.map_err(error),
            Err(_) => Err(error(io::ErrorKind::TimedOut.into())),
        }
    }

    fn tls(&self) -> io::Result<Arc<ClientConfig>> {
        let mut store = RootCertStore::empty();
        for root in self.roots().map_err(io::Error::other)? {
            store.add(root).map_err(|e| io::Error::other(format!("{}: {e}", self.root_cert.display())))?;
        }
        tls::controller_client_config(store).map_err(io::Error::other)
    }
}

/// Reads certificates out of PEM text.
pub fn parse_certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().map_err(|e| e.to_string())
}

fn read(path: &Path) -> Result<String, FileError> {
    let error = |source| FileError::Read { path: path.to_owned(), source };
    let length = std::fs::metadata(path).map_err(error)?.len();
    if length > MAX_FILE_BYTES {
        let reason = format!("{length} bytes are too many");
        return Err(FileError::Content { path: path.to_owned(), reason });
    }
    std::fs::read_to_string(path).map_err(error)
}

/// What went wrong with a call, with all causes: tonic's own text is often only `transport error`.
pub fn explain(status: &tonic::Status) -> String {
    let mut text = status.to_string();
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(ip: Option<IpAddr>) -> ControllerConfig {
        ControllerConfig {
            address: String::new(),
            server_name: String::new(),
            root_cert: PathBuf::new(),
            token_file: PathBuf::new(),
            node: "node-a".into(),
            cluster: "Kubernetes".into(),
            trust_domain: "cluster.local".into(),
            network: "west".into(),
            root_namespace: "istio-system".into(),
            pod: Pod { name: "mesh-node-x7k".into(), namespace: "istio-system".into(), ip },
        }
    }

    /// The metadata as `KEY=VALUE`.
    fn metadata(node: &Node) -> Vec<String> {
        let fields = node.metadata.iter().flat_map(|metadata| &metadata.fields);
        fields
            .map(|(key, value)| match &value.kind {
                Some(Kind::StringValue(text)) => format!("{key}={text}"),
                other => format!("{key} is {other:?}"),
            })
            .collect()
    }

    #[test]
    fn the_node_introduces_itself_as_ztunnel_does() {
        let node = config(Some(IpAddr::from([10, 244, 1, 7]))).node();
        assert_eq!(node.id, "ztunnel~10.244.1.7~mesh-node-x7k.istio-system~istio-system.svc.cluster.local");
        assert_eq!(node.cluster, "Kubernetes");
        assert_eq!(
            metadata(&node),
            [
                "CLUSTER_ID=Kubernetes",
                "INSTANCE_IPS=10.244.1.7",
                "NAME=mesh-node-x7k",
                "NAMESPACE=istio-system",
                "NETWORK=west",
                "NODE_NAME=node-a",
            ]
        );
        let nowhere = config(None).node();
        assert!(nowhere.id.starts_with("ztunnel~0.0.0.0~"), "{}", nowhere.id);
        assert!(!metadata(&nowhere).iter().any(|field| field.starts_with("INSTANCE_IPS")));
    }
}
