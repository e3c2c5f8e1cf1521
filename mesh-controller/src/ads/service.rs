//! The gRPC method of delta ADS: drives one [`Session`] per stream.
//!
//! A stream is polled by its connection and needs no task of its own: a client that does not read is not written to.

use std::pin::Pin;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use futures_util::Stream as FuturesStream;
use futures_util::stream;
use mesh_api::proto::xds::aggregated_discovery_service_server::AggregatedDiscoveryService;
use mesh_api::proto::xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use prost_types::value::Kind;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::{Request, Response, Status, Streaming};

use super::catalogue::{Catalogue, ResourceType};
use super::nodes::{MAX_STREAMS_PER_NODE, Nodes, Stream};
use super::session::{Heard, Session, SessionError};
use crate::door::{Door, unix_now};
use crate::metrics::{Metrics, TypeLabel};
use crate::server::Peer;

/// Streams at once; a mesh of a thousand nodes with a proxy upgrade on each has two thousand.
pub const MAX_STREAMS: usize = 4096;

/// The service.
#[derive(Debug)]
pub struct Ads {
    shared: Arc<Shared>,
    streams: Arc<Semaphore>,
}

/// What streams read.
#[derive(Debug)]
pub struct Shared {
    /// Who may connect.
    pub door: Arc<Door>,
    /// What is published.
    pub catalogue: Arc<RwLock<Catalogue>>,
    /// Generation of the catalogue; changes wake the streams.
    pub generation: watch::Receiver<u64>,
    /// Turns true when the process ends.
    pub shutdown: watch::Receiver<bool>,
    /// Status.
    pub nodes: Arc<Nodes>,
    /// Counters.
    pub metrics: Arc<Metrics>,
}

impl Ads {
    /// A service over shared state.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, streams: Arc::new(Semaphore::new(MAX_STREAMS)) }
    }
}

type Responses = Pin<Box<dyn FuturesStream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type DeltaAggregatedResourcesStream = Responses;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Responses>, Status> {
        let (token, peer) = self.shared.door.admit(request.metadata(), request.extensions().get::<Peer>()).await?;
        let permit = self.streams.clone().try_acquire_owned();
        let permit = permit.map_err(|_| Status::resource_exhausted("too many streams; try again later"))?;
        let entry = self.shared.nodes.connect(&token.node, peer);
        let entry = entry.ok_or_else(|| {
            Status::resource_exhausted(format!("node {} has {MAX_STREAMS_PER_NODE} streams already", token.node))
        })?;
        let lifetime = Duration::from_secs(token.valid_until.saturating_sub(unix_now()));
        self.shared.metrics.connected.inc();
        tracing::info!(node = token.node, %peer, "node connected");
        let driver = Driver {
            entry,
            generation: self.shared.generation.clone(),
            shutdown: self.shared.shutdown.clone(),
            shared: self.shared.clone(),
            node: token.node,
            requests: request.into_inner(),
            session: Session::default(),
            expires: tokio::time::Instant::now() + lifetime,
            _permit: permit,
        };
        let responses = stream::unfold(Some(driver), |driver| async move {
            let mut driver = driver?;
            match driver.next().await {
                Ok(Some(response)) => Some((Ok(response), Some(driver))),
                Ok(None) => None,
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(Response::new(Box::pin(responses)))
    }
}

struct Driver {
    shared: Arc<Shared>,
    node: String,
    entry: Stream,
    requests: Streaming<DeltaDiscoveryRequest>,
    generation: watch::Receiver<u64>,
    shutdown: watch::Receiver<bool>,
    session: Session,
    expires: tokio::time::Instant,
    _permit: OwnedSemaphorePermit,
}

impl Driver {
    /// The next response; none when the client has ended the stream.
    async fn next(&mut self) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        loop {
            self.generation.mark_unchanged();
            let (response, seen) = {
                let catalogue = self.shared.catalogue.read().map_err(|_| Status::internal("the catalogue is lost"))?;
                (self.session.next(&catalogue).map_err(|error| status(&error))?, catalogue.generation())
            };
            self.entry.note(self.session.sync(), self.session.sync_by_type(), seen);
            if let Some(response) = response {
                self.count(&response);
                return Ok(Some(response));
            }
            let shutdown = &mut self.shutdown;
            // The value must be let go of before anything else of the stream is used.
            let down = async { drop(shutdown.wait_for(|down| *down).await) };
            tokio::select! {
                request = self.requests.message() => match request? {
                    Some(request) => self.hear(request)?,
                    None => return Ok(None),
                },
                changed = self.generation.changed() => changed.map_err(|_| Status::unavailable("shutting down"))?,
                () = down => {
                    return Err(Status::unavailable("the controller is shutting down; reconnect"));
                }
                () = tokio::time::sleep_until(self.expires) => {
                    return Err(Status::unauthenticated("the token of this stream has expired; reconnect with a new one"));
                }
            }
        }
    }

    fn hear(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        if let Some(claimed) = request.node.as_ref().and_then(claimed_node).filter(|claimed| *claimed != self.node) {
            let reason = format!("the stream says that it is node {claimed}, and its token is of node {}", self.node);
            return Err(Status::permission_denied(reason));
        }
        match self.session.hear(request).map_err(|error| status(&error))? {
            Heard::Subscribed(_) | Heard::Stale(_) => {}
            Heard::Ack(_) => self.entry.answered(self.session.rejected(), Instant::now()),
            Heard::Nack(kind, refused) => {
                self.shared.metrics.rejects.inc();
                let (resource, reason) = refused.iter().next().map_or(("", ""), |(n, r)| (n, r));
                tracing::warn!(
                    node = self.node,
                    ?kind,
                    count = refused.len(),
                    resource,
                    reason,
                    "node refused resources"
                );
                self.entry.answered(self.session.rejected(), Instant::now());
            }
        }
        Ok(())
    }

    fn count(&self, response: &DeltaDiscoveryResponse) {
        let kind = match ResourceType::from_type_url(&response.type_url) {
            Some(ResourceType::Authorization) => "Authorization",
            Some(ResourceType::Address) | None => "Address",
        };
        self.shared.metrics.pushes.get_or_create(&TypeLabel { r#type: kind }).inc();
        tracing::debug!(
            node = self.node,
            kind,
            resources = response.resources.len(),
            removed = response.removed_resources.len(),
            "pushed"
        );
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.shared.metrics.connected.dec();
        tracing::info!(node = self.node, "node disconnected");
    }
}

/// `NODE_NAME` of the node's metadata.
fn claimed_node(node: &Node) -> Option<&str> {
    match node.metadata.as_ref()?.fields.get("NODE_NAME")?.kind.as_ref()? {
        Kind::StringValue(name) => Some(name),
        Kind::NullValue(_) | Kind::NumberValue(_) | Kind::BoolValue(_) | Kind::StructValue(_) | Kind::ListValue(_) => {
            None
        }
    }
}

fn status(error: &SessionError) -> Status {
    let message = error.to_string();
    match error {
        SessionError::Type(_) => Status::invalid_argument(message),
        SessionError::TooManyNames => Status::resource_exhausted(message),
        SessionError::TooFarBehind(_) => Status::aborted(message),
    }
}
