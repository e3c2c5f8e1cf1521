//! Configuration from the controller: a delta stream of workloads, services and policies.
//!
//! Here: the stream, and when a configuration is put in force and stored; what is accepted and refused: [`held`]. What a
//! resource means is `mesh_api::wds`, what follows from it is `mesh_core`.

mod held;

mod metrics;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::proto::xds::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_api::proto::xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, MAX_DISCOVERY_REQUEST_BYTES};
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Streaming};

pub use self::metrics::{Termination, XdsMetrics};
use crate::controller::{ControllerConfig, FileError, explain};
use crate::runtime::Shared;
use crate::snapshot_store::{Storage, type_index};

use held::{Accepted, Held};

/// Called after the view was swapped.
pub type Changed = Arc<dyn Fn() + Send + Sync>;

/// The types, policies first: a workload must not be known before the policies that guard it.
const TYPES: [&str; 2] = [AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL];
/// Largest response, bytes: one holds the whole state of a type.
const MAX_RESPONSE_BYTES: usize = 256 << 20;
/// Requests that wait to be sent: an answer for each type, and room.
const REQUEST_QUEUE: usize = 16;
/// Wait before the first try to connect again; doubles up to [`BACKOFF_MAX`].
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// Longest wait between tries.
const BACKOFF_MAX: Duration = Duration::from_secs(15);
/// The configuration is stored at most this often.
const STORE_EVERY: Duration = Duration::from_secs(1);
/// A controller that could not be reached is complained about this often.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// Where the configuration in force comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ConfigSource {
    /// There is none.
    #[default]
    None,
    /// The last good one of an earlier process.
    Snapshot,
    /// The controller.
    Controller,
}

impl ConfigSource {
    /// As the admin interface shows it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Snapshot => "snapshot",
            Self::Controller => "controller",
        }
    }
}

/// How the stream is doing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct XdsStatus {
    /// The stream is up.
    pub connected: bool,
    /// Where the configuration in force comes from.
    pub source: ConfigSource,
    /// There is one.
    pub synced: bool,
    /// Why the stream ended last.
    pub last_error: Option<String>,
    /// Resources refused since the start.
    pub refused: u64,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("{0}")]
    File(#[from] FileError),
    #[error("{0}")]
    Channel(#[from] tonic::transport::Error),
    #[error("{}", explain(.0))]
    Rpc(#[from] tonic::Status),
    #[error("the controller ended the stream")]
    Ended,
}

impl StreamError {
    /// `connected`: the stream was up before.
    fn termination(&self, connected: bool) -> Termination {
        match self {
            Self::Ended => Termination::Reconnect,
            Self::File(_) | Self::Channel(_) | Self::Rpc(_) if !connected => Termination::ConnectionError,
            Self::File(_) | Self::Channel(_) | Self::Rpc(_) => Termination::Error,
        }
    }
}

/// The client, and what it holds.
pub struct XdsClient {
    controller: ControllerConfig,
    storage: Storage,
    shared: Arc<Shared>,
    changed: Changed,
    metrics: XdsMetrics,
    status: watch::Sender<XdsStatus>,
    held: Held,
    /// When the changed configuration will be stored.
    store_at: Option<Instant>,
    stored: Option<Instant>,
    complained: Option<Instant>,
}

impl std::fmt::Debug for XdsClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("XdsClient").field("controller", &self.controller.address).finish_non_exhaustive()
    }
}

impl XdsClient {
    /// A client that begins with what was stored, which is put in force at once.
    pub fn new(
        controller: ControllerConfig,
        state_dir: PathBuf,
        shared: Arc<Shared>,
        changed: Changed,
        metrics: XdsMetrics,
    ) -> (Self, watch::Receiver<XdsStatus>) {
        let (storage, stored) = Storage::open(state_dir);
        let stored = stored.unwrap_or_else(|error| {
            tracing::warn!(%error, "stored configuration cannot be used");
            None
        });
        let has_stored = stored.is_some();
        let held = Held::new(&controller.network, controller.root_namespace.clone(), stored);
        let (status, receiver) = watch::channel(XdsStatus::default());
        let client = Self {
            controller,
            storage,
            shared,
            changed,
            metrics,
            status,
            held,
            store_at: None,
            stored: None,
            complained: None,
        };
        if has_stored {
            client.publish(ConfigSource::Snapshot);
        }
        (client, receiver)
    }

    /// Keeps a stream up until cancelled.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut backoff = BACKOFF_FIRST;
        loop {
            let error = tokio::select! {
                () = cancel.cancelled() => break,
                error = self.stream(&mut backoff) => error,
            };
            self.metrics.ended(error.termination(self.status.borrow().connected));
            self.status.send_modify(|status| {
                status.connected = false;
                status.last_error = Some(error.to_string());
            });
            self.complain(&error);
            let wait = backoff.mul_f64(rand::random_range(0.5..1.0));
            backoff = (backoff * 2).min(BACKOFF_MAX);
            tokio::select! {
                () = cancel.cancelled() => break,
                () = self.wait_and_store(wait) => {}
            }
        }
        self.metrics.ended(Termination::Complete);
        if self.store_at.take().is_some() {
            self.store().await;
        }
    }

    fn complain(&mut self, error: &StreamError) {
        let again = self.complained.is_none_or(|last| last.elapsed() >= COMPLAIN_EVERY);
        if again {
            self.complained = Some(Instant::now());
            tracing::warn!(controller = self.controller.address, %error, "no configuration stream; trying again");
        } else {
            tracing::debug!(controller = self.controller.address, %error, "no configuration stream");
        }
    }

    async fn wait_and_store(&mut self, wait: Duration) {
        let end = Instant::now() + wait;
        if let Some(at) = self.store_at.filter(|at| *at <= end) {
            sleep_until(at).await;
            self.store_at = None;
            self.store().await;
        }
        sleep_until(end).await;
    }

    /// One stream, until it ends.
    async fn stream(&mut self, backoff: &mut Duration) -> StreamError {
        match self.open().await {
            Ok((requests, responses)) => match self.follow(requests, responses, backoff).await {
                Ok(()) => StreamError::Ended,
                Err(error) => error,
            },
            Err(error) => error,
        }
    }

    async fn open(
        &mut self,
    ) -> Result<(mpsc::Sender<DeltaDiscoveryRequest>, Streaming<DeltaDiscoveryResponse>), StreamError> {
        let mut client = AggregatedDiscoveryServiceClient::new(self.controller.channel()?)
            .max_decoding_message_size(MAX_RESPONSE_BYTES)
            .max_encoding_message_size(MAX_DISCOVERY_REQUEST_BYTES);
        let (requests, receiver) = mpsc::channel(REQUEST_QUEUE);
        for (position, type_url) in TYPES.into_iter().enumerate() {
            let node = (position == 0).then(|| self.controller.node());
            let request = DeltaDiscoveryRequest { node, ..self.held.opening(type_url) };
            // The queue has room for more than the types.
            let _ = requests.try_send(request);
        }
        let mut request = Request::new(ReceiverStream::new(receiver));
        self.controller.authenticate(request.metadata_mut())?;
        let responses = client.delta_aggregated_resources(request).await?.into_inner();
        Ok((requests, responses))
    }

    async fn follow(
        &mut self,
        requests: mpsc::Sender<DeltaDiscoveryRequest>,
        mut responses: Streaming<DeltaDiscoveryResponse>,
        backoff: &mut Duration,
    ) -> Result<(), StreamError> {
        tracing::info!(controller = self.controller.address, "configuration stream is up");
        self.status.send_modify(|status| {
            status.connected = true;
            status.last_error = None;
        });
        loop {
            let store_at = self.store_at;
            let response = tokio::select! {
                response = responses.message() => response?,
                () = async { sleep_until(store_at.unwrap_or_else(Instant::now)).await }, if store_at.is_some() => {
                    self.store_at = None;
                    self.store().await;
                    continue;
                }
            };
            let Some(response) = response else { return Ok(()) };
            self.metrics.message(&response.type_url, response.encoded_len());
            *backoff = BACKOFF_FIRST;
            self.complained = None;
            let answer = self.accept(response);
            if requests.send(answer).await.is_err() {
                return Ok(());
            }
        }
    }

    /// Takes a response, and puts in force and stores what follows from it.
    fn accept(&mut self, response: DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
        let (was_complete, is_asked_for) = (self.held.is_complete(), type_index(&response.type_url).is_some());
        let Accepted { answer, is_changed, refused } = self.held.accept(response);
        if refused > 0 {
            self.status.send_modify(|status| status.refused += refused as u64);
        }
        let complete = self.held.is_complete() && is_asked_for;
        if complete && (is_changed || !was_complete) {
            // The first one at once: a crash right after it must not find an empty disk.
            let now = Instant::now();
            self.store_at.get_or_insert(self.stored.map_or(now, |last| now.max(last + STORE_EVERY)));
        }
        let from_controller = self.status.borrow().source == ConfigSource::Controller;
        if complete && (is_changed || !was_complete || !from_controller) {
            self.publish(ConfigSource::Controller);
        }
        answer
    }

    fn publish(&self, source: ConfigSource) {
        self.shared.update(|view| view.with_snapshot(Arc::clone(&self.held.snapshot), true));
        (self.changed)();
        self.status.send_modify(|status| {
            status.source = source;
            status.synced = true;
        });
    }

    async fn store(&mut self) {
        if !self.held.is_complete() {
            return;
        }
        self.stored = Some(Instant::now());
        let (storage, snapshot) = (self.storage.clone(), Arc::clone(&self.held.snapshot));
        let versions = self.held.versions.clone();
        let saved = tokio::task::spawn_blocking(move || storage.save(&snapshot, &versions)).await;
        if let Err(error) = saved.unwrap_or_else(|panicked| Err(std::io::Error::other(panicked))) {
            tracing::warn!(dir = %self.storage.dir.display(), %error, "configuration not stored; trying again");
            self.store_at = Some(Instant::now() + COMPLAIN_EVERY);
        }
    }
}
