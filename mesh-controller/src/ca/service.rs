//! The gRPC method that signs certificates (Istio's CSR API).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use mesh_api::proto::ca::istio_certificate_service_server::IstioCertificateService;
use mesh_api::proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use mesh_core::config::Compiler;
use mesh_core::identity::SpiffeId;
use prost_types::Struct;
use prost_types::value::Kind;
use time::{Duration, OffsetDateTime};
use tokio::sync::{RwLock, watch};
use tonic::{Request, Response, Status};

use super::authority::{Authority, AuthorityError, to_pem};
use super::csr;
use crate::door::Door;
use crate::entitlement::{EntitlementRefusal, entitle};
use crate::limit::RateLimit;
use crate::metrics::Metrics;
use crate::server::Peer;

/// Requests that a node may make at once: a node full of pods that restarts (110 is Kubernetes' default).
pub const BURST: u32 = 250;
/// Requests a second that a node may make in the long run.
pub const PER_SECOND: u32 = 20;
/// Bytes of a request: a CSR and its metadata.
pub const MAX_REQUEST_BYTES: usize = 64 << 10;

/// How long a request for an identity that is not known waits for the configuration to be read: a pod and its first
/// request set out at the same time, and the reader debounces.
const CONFIG_GRACE: std::time::Duration = std::time::Duration::from_millis(500);

/// The service.
#[derive(Debug)]
pub struct CertificateService {
    door: Arc<Door>,
    authority: Arc<ArcSwap<Authority>>,
    config: Config,
    metrics: Arc<Metrics>,
    settings: IssueSettings,
    limit: Mutex<RateLimit>,
    started: Instant,
}

/// The configuration in force.
#[derive(Debug, Clone)]
pub struct Config {
    /// Knows which pods run where.
    pub compiler: Arc<RwLock<Compiler>>,
    /// Counts the steps that it took.
    pub steps: watch::Receiver<u64>,
}

/// How certificates are issued.
#[derive(Debug, Clone)]
pub struct IssueSettings {
    /// The only trust domain.
    pub trust_domain: String,
    /// Life of a leaf, unless less is asked for.
    pub leaf_ttl: Duration,
}

impl CertificateService {
    /// A service over shared state.
    pub fn new(
        door: Arc<Door>,
        authority: Arc<ArcSwap<Authority>>,
        config: Config,
        metrics: Arc<Metrics>,
        settings: IssueSettings,
    ) -> Self {
        let limit = Mutex::new(RateLimit::new(BURST, PER_SECOND));
        Self { door, authority, config, metrics, settings, limit, started: Instant::now() }
    }

    fn admit_rate(&self, node: &str) -> bool {
        let now_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.limit.lock().unwrap_or_else(PoisonError::into_inner).admit(node, now_ms)
    }

    async fn entitle(&self, node: &str, asked: Option<&str>) -> Result<SpiffeId, EntitlementRefusal> {
        let mut steps = self.config.steps.clone();
        steps.mark_unchanged();
        let decide = async || {
            let on_node = self.config.compiler.read().await.identities_on(node);
            entitle(node, asked, &self.settings.trust_domain, &on_node)
        };
        match decide().await {
            Err(EntitlementRefusal::NotOnNode { .. }) => {
                let _ = tokio::time::timeout(CONFIG_GRACE, steps.changed()).await;
                decide().await
            }
            decided => decided,
        }
    }

    fn sign(&self, identity: &SpiffeId, request: &IstioCertificateRequest) -> Result<IstioCertificateResponse, Status> {
        let key = csr::check(&request.csr, identity).map_err(|refusal| {
            self.metrics.refuse("csr");
            Status::invalid_argument(refusal.to_string())
        })?;
        let ttl = match request.validity_duration {
            0 => self.settings.leaf_ttl,
            asked if asked > 0 => Duration::seconds(asked).min(self.settings.leaf_ttl),
            _ => return Err(Status::invalid_argument("validity_duration is negative")),
        };
        let authority = self.authority.load();
        let issued = authority.sign_workload(identity, &key, ttl, OffsetDateTime::now_utc(), &mut rand::rng());
        let issued = issued.map_err(|error| match error {
            AuthorityError::OutsideValidity { .. } => Status::unavailable(format!("the CA cannot sign: {error}")),
            // The other variants are about files, which were checked before they were taken into use.
            _ => Status::internal(error.to_string()),
        })?;
        let mut cert_chain: Vec<String> = issued.chain.iter().map(|cert| to_pem(cert)).collect();
        cert_chain.push(authority.bundle_pem());
        Ok(IstioCertificateResponse { cert_chain })
    }
}

#[tonic::async_trait]
impl IstioCertificateService for CertificateService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (token, peer) = self.door.admit(request.metadata(), request.extensions().get::<Peer>()).await?;
        if !self.admit_rate(&token.node) {
            self.metrics.refuse("rate");
            return Err(Status::resource_exhausted("too many certificate requests; try again later"));
        }
        let request = request.into_inner();
        let asked = request.metadata.as_ref().and_then(|metadata| text(metadata, "ImpersonatedIdentity"));
        let identity = self.entitle(&token.node, asked).await.map_err(|refusal| {
            self.metrics.refuse("csr");
            self.door.note(peer, &refusal.to_string());
            match refusal {
                EntitlementRefusal::Missing
                | EntitlementRefusal::TrustDomain { .. }
                | EntitlementRefusal::NotOnNode { .. } => Status::permission_denied(refusal.to_string()),
                EntitlementRefusal::Invalid(_) => Status::invalid_argument(refusal.to_string()),
            }
        })?;
        let response = self.sign(&identity, &request)?;
        self.metrics.certificates.inc();
        tracing::info!(node = token.node, %identity, "certificate issued");
        Ok(Response::new(response))
    }
}

fn text<'a>(metadata: &'a Struct, key: &str) -> Option<&'a str> {
    match metadata.fields.get(key)?.kind.as_ref()? {
        Kind::StringValue(text) => Some(text),
        Kind::NullValue(_) | Kind::NumberValue(_) | Kind::BoolValue(_) | Kind::StructValue(_) | Kind::ListValue(_) => {
            None
        }
    }
}
