//! Connections that an enrolled workload starts: one plan, carried out.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::flow::{InboundFlow, OutboundFlow, Plan, RESERVED_PORTS, Refusal, Upstream};
use mesh_core::plan::{PlanContext, plan_outbound};
use mesh_core::workload::{Workload, WorkloadUid};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::accept::Accepted;
use crate::connections::{Carrier, CloseReason, Description, Direction, Registered};
use crate::dial::{Source, connect, connect_application, keep_alive};
use crate::hbone::client::{DialError, OpenError, Opened, Target};
use crate::hbone::head::Head;
use crate::hbone::pool::PoolKey;
use crate::identity::{NoCertificate, certificate, identity_of};
use crate::metrics::{ResponseFlags, count};
use crate::relay::{self, RelayError, reset_on_close};
use crate::runtime::View;
use crate::tls::ExpectedServer;
use crate::workers::{Serving, Worker};

/// Endpoints tried for one connection.
const MAX_ATTEMPTS: usize = 3;
/// Time for all of them.
const SETUP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection waits for workloads that are entering the mesh or leaving it. The configuration, each node's
/// enrolment and the certificate come on their own ways, and until the last of them is there nothing can be carried.
const SETTLE_WITHIN: Duration = Duration::from_secs(2);
/// First pause before it is tried again; doubles.
const SETTLE_PAUSE_FIRST: Duration = Duration::from_millis(10);
/// Longest pause: as much as a connection waits in vain.
const SETTLE_PAUSE_MAX: Duration = Duration::from_millis(100);

/// Why a connection was not carried.
#[derive(Debug, thiserror::Error)]
pub enum OutboundError {
    /// Decided.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// No key to prove the workload's identity with.
    #[error("{0}")]
    NoCertificate(#[from] NoCertificate),
    /// No tunnel, or no stream on it.
    #[error("{0}")]
    Tunnel(#[from] OpenError),
    /// Plain TCP.
    #[error("dial {address}: {source}")]
    Dial {
        /// Where to.
        address: SocketAddr,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A name from the configuration cannot be put into a request.
    #[error("request: {0}")]
    Request(#[from] http::Error),
    /// Ended from outside while it was set up.
    #[error("{0}")]
    Closed(CloseReason),
    /// All attempts together took too long.
    #[error("not connected within {} s", SETUP_TIMEOUT.as_secs())]
    Slow,
}

impl OutboundError {
    fn flags(&self) -> ResponseFlags {
        match self {
            Self::Refused(refusal) => refusal.into(),
            Self::NoCertificate(_) => ResponseFlags::IdentityError,
            Self::Tunnel(error) => error.flags(),
            Self::Dial { .. } | Self::Request(_) | Self::Closed(_) | Self::Slow => ResponseFlags::Connect,
        }
    }

    /// Whether this is what a workload looks like that is entering the mesh or leaving it: in the configuration and not
    /// with its node, or the other way round. Nothing has been sent by then.
    fn may_settle(&self) -> bool {
        match self {
            Self::Refused(refusal) => matches!(refusal, Refusal::SourceUnknown),
            Self::NoCertificate(missing) => matches!(missing, NoCertificate::Missing(_)),
            Self::Tunnel(OpenError::Dial(error)) => match &**error {
                DialError::Connect { source, .. } => source.kind() == std::io::ErrorKind::ConnectionRefused,
                DialError::NoCertificate(missing) => matches!(missing, NoCertificate::Missing(_)),
                DialError::Outdated { .. } => true,
                DialError::Tls { .. }
                | DialError::Http2 { .. }
                | DialError::Slow { .. }
                | DialError::Unwilling { .. }
                | DialError::Abandoned => false,
            },
            Self::Tunnel(OpenError::Answer(_) | OpenError::Lost(_) | OpenError::Refusing | OpenError::Full)
            | Self::Dial { .. }
            | Self::Request(_)
            | Self::Closed(_)
            | Self::Slow => false,
        }
    }

    fn try_elsewhere(&self) -> bool {
        match self {
            Self::Tunnel(error) => error.try_elsewhere(),
            Self::Dial { .. } => true,
            Self::Refused(_) | Self::NoCertificate(_) | Self::Request(_) | Self::Closed(_) | Self::Slow => false,
        }
    }
}

/// The other end, ready.
enum Connected {
    Stream(Opened),
    Tcp(TcpStream),
}

/// Carries one accepted connection to its end.
pub async fn carry(worker: Arc<Worker>, serving: Arc<Serving>, accepted: Accepted) {
    let Accepted { tcp, peer, permit: _permit } = accepted;
    // Boxed, so that the memory of setting up is given back while the connection lives.
    let Some((mut registered, connected)) = Box::pin(set_up(&worker, &serving, peer)).await else {
        reset_on_close(&tcp);
        return;
    };
    registered.opened();
    let result = match connected {
        Connected::Stream(Opened { stream, lease, server: _ }) => {
            let result = relay::tcp_and_stream(tcp, stream, &registered.live, crate::connections::Way::ToServer).await;
            drop(lease);
            result
        }
        Connected::Tcp(upstream) => relay::tcp_and_tcp(tcp, upstream, &registered.live).await,
    };
    registered.ended(result.err().map(|error: RelayError| error.to_string()));
}

async fn set_up(worker: &Arc<Worker>, serving: &Arc<Serving>, peer: SocketAddr) -> Option<(Registered, Connected)> {
    let Some(target) = (worker.original_dst)(serving.enrolled.cookie, peer) else {
        // Nobody is captured to here: a process in the namespace dialled the proxy's own port.
        count(&worker.metrics.counters.direct_dials);
        tracing::debug!(workload = %serving.enrolled.name, %peer, "connection to the outbound port was not captured");
        return None;
    };
    let mut attempt =
        Attempt { worker, serving, peer, target, excluded: Vec::new(), last: None, recorded: false, untunnelled: None };
    let error = match timeout(SETUP_TIMEOUT, attempt.run()).await {
        Ok(Ok(connected)) => return Some(connected),
        Ok(Err(error)) => error,
        Err(_) => OutboundError::Slow,
    };
    if attempt.recorded {
        return None;
    }
    let description =
        attempt.last.take().unwrap_or_else(|| attempt.describe(&worker.shared.view.load(), Carrier::Tcp, None));
    worker.connections.failed(&description, error.flags(), &error);
    None
}

struct Attempt<'a> {
    worker: &'a Arc<Worker>,
    serving: &'a Arc<Serving>,
    peer: SocketAddr,
    target: SocketAddr,
    excluded: Vec<WorkloadUid>,
    /// What the latest attempt was, for the record of a failure.
    last: Option<Description>,
    /// The failure has its record already.
    recorded: bool,
    /// Why the tunnel was not to be had that was planned before.
    untunnelled: Option<OutboundError>,
}

impl Attempt<'_> {
    /// Tries, each time by what is known then, until it is connected or will not be. What a workload needs is never less
    /// than its configuration says: one that is to be reached by a tunnel is reached by a tunnel.
    async fn run(&mut self) -> Result<(Registered, Connected), OutboundError> {
        let deadline = Instant::now() + SETTLE_WITHIN;
        let mut pause = SETTLE_PAUSE_FIRST;
        loop {
            let error = match self.endpoints().await {
                Ok(connected) => return Ok(connected),
                Err(error) => error,
            };
            if self.recorded || !error.may_settle() || Instant::now() + pause > deadline {
                return Err(error);
            }
            count(&self.worker.metrics.counters.dial_retries);
            tracing::debug!(target = %self.target, %error, "trying again");
            sleep(pause).await;
            pause = (pause * 2).min(SETTLE_PAUSE_MAX);
            self.excluded.clear();
            self.untunnelled = matches!(error, OutboundError::Tunnel(_)).then_some(error);
        }
    }

    /// One endpoint after the other.
    async fn endpoints(&mut self) -> Result<(Registered, Connected), OutboundError> {
        loop {
            let view = self.worker.shared.view.load_full();
            let plan = self.plan(&view);
            // One that was to be reached by a tunnel and is gone is no destination that the mesh has never known.
            if let (Ok(Plan::Passthrough { upstream: None, .. }), Some(error)) = (&plan, self.untunnelled.take()) {
                return Err(error);
            }
            let endpoint = match &plan {
                Ok(
                    Plan::Tunnel(upstream) | Plan::Local(upstream) | Plan::Passthrough { upstream: Some(upstream), .. },
                ) => upstream.service.is_some().then(|| upstream.workload.uid.clone()),
                Ok(Plan::Waypoint { gateway, .. }) => Some(gateway.workload.uid.clone()),
                Ok(Plan::Passthrough { upstream: None, .. } | Plan::Refuse(_)) | Err(_) => None,
            };
            let error = match self.execute(&view, plan).await {
                Ok(connected) => return Ok(connected),
                Err(error) => error,
            };
            match endpoint {
                Some(endpoint) if error.try_elsewhere() && self.excluded.len() + 1 < MAX_ATTEMPTS => {
                    count(&self.worker.metrics.counters.dial_retries);
                    tracing::debug!(%endpoint, %error, "trying another endpoint");
                    self.excluded.push(endpoint);
                    // When nothing else is left, the dial's error says more than `no endpoint`.
                    if let Ok(Plan::Refuse(Refusal::NoEndpoint(_))) = self.plan(&view) {
                        return Err(error);
                    }
                }
                Some(_) | None => return Err(error),
            }
        }
    }

    fn plan(&self, view: &View) -> Result<Plan, OutboundError> {
        let source = view.workload_of(&self.serving.enrolled.uid).ok_or(Refusal::SourceUnknown)?;
        let flow = OutboundFlow { source: Arc::clone(source), destination: self.target };
        let context = PlanContext {
            snapshot: &view.snapshot,
            local_node: &self.worker.config.node,
            enrolled: &|uid| view.enrolment_of(uid).is_some(),
            force_tunnel: self.worker.config.force_tunnel,
            excluded: &self.excluded,
        };
        Ok(plan_outbound(&context, &flow, &mut rand::rng()))
    }

    async fn execute(
        &mut self,
        view: &View,
        plan: Result<Plan, OutboundError>,
    ) -> Result<(Registered, Connected), OutboundError> {
        self.last = None;
        match plan {
            Ok(Plan::Passthrough { destination, upstream }) => self.pass_through(view, destination, upstream).await,
            Ok(Plan::Tunnel(upstream)) => {
                let hbone = Workload::hbone_addr(upstream.address.ip());
                let authority = upstream.address;
                self.tunnel(view, upstream, hbone, authority).await
            }
            Ok(Plan::Waypoint { gateway, authority }) => {
                let hbone = gateway.address;
                self.tunnel(view, gateway, hbone, authority).await
            }
            Ok(Plan::Local(upstream)) => self.local(view, upstream).await,
            Ok(Plan::Refuse(refusal)) => {
                self.last = Some(self.describe(view, Carrier::Tcp, None));
                Err(refusal.into())
            }
            Err(error) => Err(error),
        }
    }

    async fn pass_through(
        &mut self,
        view: &View,
        destination: SocketAddr,
        upstream: Option<Upstream>,
    ) -> Result<(Registered, Connected), OutboundError> {
        let mut description = self.describe(view, Carrier::Tcp, upstream);
        description.destination_addr = destination;
        let dial_error = |source| OutboundError::Dial { address: destination, source };
        let dialled = async {
            let socket = self.worker.namespaces.socket(self.serving.enrolled.netns.as_fd(), destination.ip())?;
            keep_alive(&SockRef::from(&socket))?;
            connect(socket, destination).await
        };
        match dialled.await {
            Ok(tcp) => self.register(description).map(|registered| (registered, Connected::Tcp(tcp))),
            Err(error) => {
                self.last = Some(description);
                Err(dial_error(error))
            }
        }
    }

    async fn tunnel(
        &mut self,
        view: &View,
        upstream: Upstream,
        hbone: SocketAddr,
        authority: SocketAddr,
    ) -> Result<(Registered, Connected), OutboundError> {
        let source_identity = identity_of(&self.serving.enrolled, &self.worker.config.trust_domain);
        let expected = ExpectedServer {
            identity: upstream.workload.identity.clone(),
            alternatives: upstream.service.as_ref().map(|s| s.subject_alt_names.clone().into()).unwrap_or_default(),
        };
        let destination = upstream.workload.uid.clone();
        let host = upstream.service.as_ref().map(|s| Arc::clone(&s.key.hostname));
        let mut description = self.describe(view, Carrier::Hbone, Some(upstream));
        description.hbone_addr = Some(hbone);
        description.destination_addr = authority;
        let opened = async {
            certificate(view, &source_identity)?;
            let source = description.source.as_deref().ok_or(Refusal::SourceUnknown)?;
            let head = Head {
                authority: &authority.to_string(),
                source,
                cluster: &self.worker.config.cluster,
                client: description.source_addr,
                service_host: host.as_deref(),
            };
            let request = head.request(&mut rand::rng())?;
            let target = Target {
                key: Arc::new(PoolKey {
                    source_identity: source_identity.clone(),
                    source: self.serving.enrolled.uid.clone(),
                    destination,
                    expected,
                    address: hbone,
                }),
                source: Arc::clone(&self.serving.enrolled),
            };
            Ok::<_, OutboundError>(self.worker.tunnels.open(&target, &request).await?)
        };
        match opened.await {
            Ok(opened) => {
                description.identities = Some((source_identity, opened.server.id.clone()));
                description.peer = Some(Arc::clone(&opened.server));
                self.register(description).map(|registered| (registered, Connected::Stream(opened)))
            }
            Err(error) => {
                self.last = Some(description);
                Err(error)
            }
        }
    }

    async fn local(&mut self, view: &View, upstream: Upstream) -> Result<(Registered, Connected), OutboundError> {
        let address = upstream.address;
        if RESERVED_PORTS.contains(&address.port()) {
            return Err(Refusal::ReservedPort(address.port()).into());
        }
        let client = identity_of(&self.serving.enrolled, &self.worker.config.trust_domain);
        let server = upstream.workload.identity.clone();
        let uid = upstream.workload.uid.clone();
        let mut description = self.describe(view, Carrier::Local, Some(upstream));
        let source = description.source_addr.ip();
        let prepared = (|| {
            certificate(view, &client)?;
            certificate(view, &server)?;
            let enrolled = view.enrolment_of(&uid).ok_or(Refusal::UnknownWorkload(address.ip()))?;
            Ok::<_, OutboundError>(Arc::clone(enrolled))
        })();
        let enrolled = match prepared {
            Ok(enrolled) => enrolled,
            Err(error) => {
                self.last = Some(description);
                return Err(error);
            }
        };
        description.local_destination = Some(Arc::clone(&enrolled));
        description.identities = Some((client.clone(), server));
        description.judged = Some(InboundFlow { client: Some(client), source, destination: address });
        // Registered before it is judged and dialled: a change in between finds it.
        let registered = self.register(description)?;
        // When time is up in the middle of this dial, what is registered is dropped, and that writes its record.
        self.recorded = true;
        let dialled =
            connect_application(&self.worker.namespaces, enrolled.netns.as_fd(), Source::Client(source), address).await;
        match dialled {
            Ok(tcp) => Ok((registered, Connected::Tcp(tcp))),
            Err(source) => {
                self.last = Some(self.describe(view, Carrier::Local, None));
                self.recorded = false;
                registered.superseded();
                Err(OutboundError::Dial { address, source })
            }
        }
    }

    /// Enters the connection and judges it by the view of that moment.
    fn register(&mut self, description: Description) -> Result<Registered, OutboundError> {
        let registered = self.worker.connections.register(description);
        let reason = if self.serving.is_stopped() {
            Some(CloseReason::WorkloadStopped)
        } else {
            registered.live.verdict(&self.worker.shared.view.load())
        };
        let Some(reason) = reason else { return Ok(registered) };
        let error = match reason {
            CloseReason::Denied(refusal) => OutboundError::Refused(refusal),
            reason @ (CloseReason::IdentityWithdrawn(_)
            | CloseReason::PeerDistrusted(_)
            | CloseReason::WorkloadStopped
            | CloseReason::Drained) => OutboundError::Closed(reason),
        };
        registered.failed(error.flags(), &error);
        self.recorded = true;
        Err(error)
    }

    fn describe(&self, view: &View, carrier: Carrier, upstream: Option<Upstream>) -> Description {
        let source = view.workload_of(&self.serving.enrolled.uid).cloned();
        let (destination, address, service) = match upstream {
            Some(Upstream { workload, address, service }) => (Some(workload), address, service),
            None => (None, self.target, None),
        };
        let ip = source.as_ref().and_then(|workload| own_address(workload, address.ip()));
        Description {
            direction: Direction::Outbound,
            carrier,
            enrolled: Arc::clone(&self.serving.enrolled),
            local_destination: None,
            source_addr: SocketAddr::new(ip.unwrap_or(self.peer.ip()), self.peer.port()),
            destination_addr: address,
            target: Some(self.target),
            hbone_addr: None,
            source,
            destination,
            service,
            identities: None,
            peer: None,
            judged: None,
        }
    }
}

/// The workload's address of the family that the other end has; capture hides it behind a loopback address.
fn own_address(workload: &Workload, like: IpAddr) -> Option<IpAddr> {
    workload.addresses.iter().map(IpAddr::to_canonical).find(|ip| ip.is_ipv4() == like.is_ipv4())
}
