//! What the CA hears of a node that asks for a certificate.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use mesh_api::proto::ca::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use mesh_api::proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use mesh_core::identity::SpiffeId;
use mesh_node::ca_client::{self, CaError};
use mesh_node::controller::{ControllerConfig, Pod};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::metadata::MetadataMap;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status};

/// A CA that listens and refuses.
#[derive(Clone, Default)]
struct Listening(Arc<Mutex<Option<(MetadataMap, IstioCertificateRequest)>>>);

#[tonic::async_trait]
impl IstioCertificateService for Listening {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (headers, _extensions, body) = request.into_parts();
        *self.0.lock().unwrap() = Some((headers, body));
        Err(Status::permission_denied("heard enough"))
    }
}

struct TempFile(PathBuf);

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[tokio::test]
async fn a_request_names_the_cluster_beside_the_token() {
    let token = TempFile(std::env::temp_dir().join(format!("mesh-token-{}", std::process::id())));
    std::fs::write(&token.0, "a.b.c\n").unwrap();
    let ca = Listening::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder().add_service(IstioCertificateServiceServer::new(ca.clone()));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let config = ControllerConfig {
        address: address.to_string(),
        server_name: "istiod.istio-system.svc".into(),
        root_cert: PathBuf::new(),
        token_file: token.0.clone(),
        node: "node-a".into(),
        cluster: "east".into(),
        trust_domain: "cluster.local".into(),
        network: "".into(),
        root_namespace: "istio-system".into(),
        pod: Pod { name: "mesh-node-1".into(), namespace: "istio-system".into(), ip: None },
    };
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    let id = SpiffeId::new("cluster.local", "default", "web");
    let refused = ca_client::request(&config, channel, &id).await.unwrap_err();
    assert!(matches!(&refused, CaError::Rpc(status) if status.message() == "heard enough"), "{refused}");
    let (headers, request) = ca.0.lock().unwrap().take().unwrap();
    assert_eq!(headers.get("clusterid").unwrap(), "east");
    assert_eq!(headers.get("authorization").unwrap(), "Bearer a.b.c");
    assert!(request.metadata.unwrap().fields.contains_key("ImpersonatedIdentity"));
}
