//! Connections that reach an enrolled workload: streams of a tunnel, or plain TCP.
//!
//! Both end the same way: the destination is checked, the connection is registered, judged, and only then is the
//! application dialled, with the client's own address.

mod refused;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{Method, Request, Response, StatusCode};
use mesh_core::flow::{InboundFlow, RESERVED_PORTS};
use mesh_core::identity::SpiffeId;
use mesh_core::inbound::{addressed_service, inbound_target};
use mesh_core::workload::Workload;
use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use self::refused::{InboundError, Refused};
use crate::accept;
use crate::connections::{Carrier, CloseReason, Description, Direction, Registered, Way};
use crate::dial::{Source, connect_application};
use crate::handshakes::Place;
use crate::hbone::HANDSHAKE_TIMEOUT;
use crate::hbone::head::{self, BAGGAGE};
use crate::hbone::server::{self, ResetBudget, ServeError};
use crate::hbone::windows::Share;
use crate::identity::{certificate, has_expired, identity_of};
use crate::metrics::{ResponseFlags, count};
use crate::relay::{self, RelayError, Stream, reset_on_close};
use crate::runtime::{CertifiedIdentity, RootStore, View};
use crate::tls::{self, PeerProof, PeerRole};
use crate::wire::TunnelSocket;
use crate::workers::{Serving, Worker};

/// How a listener shakes hands.
#[derive(Debug, Clone)]
struct Terms {
    config: Arc<ServerConfig>,
    /// What clients' certificates must chain to.
    roots: Arc<RootStore>,
}

/// The TLS configuration of one listener, made again when the certificate or the roots were replaced.
#[derive(Debug, Default)]
pub struct TlsConfigs {
    made: Option<(Arc<CertifiedIdentity>, Terms)>,
}

impl TlsConfigs {
    fn current(&mut self, worker: &Worker, serving: &Serving) -> Result<Terms, Refused> {
        let view = worker.shared.view.load();
        let identity = certificate(&view, &identity_of(&serving.enrolled, &worker.config.trust_domain))?;
        if let Some((cert, terms)) = &self.made
            && Arc::ptr_eq(cert, &identity)
            && Arc::ptr_eq(&terms.roots, &view.roots)
        {
            return Ok(terms.clone());
        }
        let config = tls::server_config(&identity, &view.roots, &worker.config.trust_domain)?;
        let terms = Terms { config, roots: Arc::clone(&view.roots) };
        self.made = Some((identity, terms.clone()));
        Ok(terms)
    }

    /// Starts the handshake of an accepted connection, or refuses it because we have no certificate.
    pub fn accept(
        &mut self,
        worker: &Arc<Worker>,
        serving: &Arc<Serving>,
        accepted: accept::Accepted,
        handshake: Place,
    ) {
        match self.current(worker, serving) {
            Ok(terms) => {
                let (worker, serving) = (Arc::clone(worker), Arc::clone(serving));
                tokio::spawn(Box::pin(tunnel(worker, serving, accepted, terms, handshake)));
            }
            Err(refused) => {
                complain(worker, accepted.peer.ip(), "certificate", &refused);
                count(&worker.metrics.counters.handshake_failures);
                reset_on_close(&accepted.tcp);
            }
        }
    }
}

/// What all streams of a tunnel have in common.
#[derive(Debug)]
struct Tunnel {
    client: Arc<PeerProof>,
    peer: SocketAddr,
    local: SocketAddr,
    /// The client is not believed any more: no further streams.
    distrusted: Notify,
}

/// Serves one accepted connection of port 15008 to its end.
async fn tunnel(
    worker: Arc<Worker>,
    serving: Arc<Serving>,
    accepted: accept::Accepted,
    terms: Terms,
    handshake: Place,
) {
    let accept::Accepted { tcp, peer, permit: _permit } = accepted;
    let Some(place) = worker.tunnels_per_source.take(peer.ip()) else {
        count(&worker.metrics.counters.connections_shed);
        complain(&worker, peer.ip(), "tunnels", &"too many tunnels from one address");
        reset_on_close(&tcp);
        return;
    };
    let shaken = tokio::select! {
        shaken = Box::pin(shake_hands(tcp, peer, terms)) => shaken,
        () = handshake.lost() => Err(Refused::Crowd),
    };
    drop(handshake);
    let (io, tunnel) = match shaken {
        Ok(done) => done,
        Err(refused) => {
            count(&worker.metrics.counters.handshake_failures);
            complain(&worker, peer.ip(), "handshake", &refused);
            return;
        }
    };
    count(&worker.metrics.counters.tunnels_accepted);
    let tunnel = Arc::new(tunnel);
    let (phase, retired) = (serving.phase.subscribe(), tunnel.distrusted.notified());
    let served = server::serve(io, place.window, phase, retired, |request| {
        let (worker, serving, tunnel) = (Arc::clone(&worker), Arc::clone(&serving), Arc::clone(&tunnel));
        tokio::spawn(stream(worker, serving, tunnel, request));
    })
    .await;
    if let Err(error) = served {
        ended_badly(&worker, peer.ip(), &error);
    }
}

fn ended_badly(worker: &Worker, peer: IpAddr, error: &ServeError) {
    if matches!(error, ServeError::ResetFlood) {
        count(&worker.metrics.counters.reset_floods);
    }
    match error {
        // How most tunnels end: the other node proxy closes its socket.
        ServeError::Http2(error) if error.is_io() => tracing::debug!(%peer, %error, "tunnel ended"),
        error => complain(worker, peer, "tunnel", error),
    }
}

async fn shake_hands(
    tcp: TcpStream,
    peer: SocketAddr,
    terms: Terms,
) -> Result<(TlsStream<TunnelSocket>, Tunnel), Refused> {
    let local = tcp.local_addr()?;
    let accept = TlsAcceptor::from(terms.config).accept(TunnelSocket::new(tcp));
    let io = timeout(HANDSHAKE_TIMEOUT, accept).await.map_err(|_| Refused::Slow)?.map_err(tls::plainly)?;
    let session = io.get_ref().1;
    if session.alpn_protocol() != Some(tls::ALPN_H2) {
        return Err(Refused::Protocol);
    }
    let client = Arc::new(PeerProof::new(session.peer_certificates(), PeerRole::Client, terms.roots)?);
    Ok((io, Tunnel { client, peer, local, distrusted: Notify::new() }))
}

/// Carries one stream of a tunnel to its end.
async fn stream(worker: Arc<Worker>, serving: Arc<Serving>, tunnel: Arc<Tunnel>, accepted: server::Accepted) {
    let Ok(_permit) = Arc::clone(&serving.permits).try_acquire_owned() else {
        count(&worker.metrics.counters.connections_shed);
        answer(accepted.respond, InboundError::Full.status());
        return;
    };
    // Boxed, so that the memory of setting up is given back while the connection lives.
    let Some((registered, tcp, stream, resets)) = Box::pin(open_stream(&worker, &serving, &tunnel, accepted)).await
    else {
        return;
    };
    drop((worker, serving, tunnel));
    let result = relay::tcp_and_stream(tcp, stream, &registered.live, Way::ToClient).await;
    if matches!(result, Err(RelayError::Stream(_))) && registered.live.bytes() == (0, 0) {
        resets.spend(Instant::now());
    }
    registered.ended(result.err().map(|error| error.to_string()));
}

async fn open_stream(
    worker: &Arc<Worker>,
    serving: &Arc<Serving>,
    tunnel: &Tunnel,
    accepted: server::Accepted,
) -> Option<(Registered, TcpStream, Stream, Arc<ResetBudget>)> {
    let server::Accepted { request, mut respond, resets, pressure } = accepted;
    let (target, workload) = match requested(worker, serving, tunnel, &request) {
        Ok(requested) => requested,
        Err(error) => {
            if error.status() == StatusCode::BAD_REQUEST {
                count(&worker.metrics.counters.bad_requests);
            }
            complain(worker, tunnel.peer.ip(), "request", &error);
            answer(respond, error.status());
            return None;
        }
    };
    let mut description = describe(worker, serving, Carrier::Hbone, Ends { peer: tunnel.peer, target }, &workload);
    description.hbone_addr = Some(tunnel.local);
    description.service = head::said_service(request.headers())
        .and_then(|said| addressed_service(&worker.shared.view.load().snapshot, &workload, said).cloned());
    let server = identity_of(&serving.enrolled, &worker.config.trust_domain);
    description.identities = Some((tunnel.client.id.clone(), server));
    description.peer = Some(Arc::clone(&tunnel.client));
    let dialled = tokio::select! {
        dialled = admit(worker, serving, description, Some(&tunnel.client.id)) => dialled,
        _ = std::future::poll_fn(|cx| respond.poll_reset(cx)) => {
            resets.spend(Instant::now());
            return None;
        }
    };
    let (mut registered, tcp) = match dialled {
        Ok(admitted) => admitted,
        Err((registered, error)) => {
            if matches!(error, InboundError::Closed(CloseReason::PeerDistrusted(_))) {
                tunnel.distrusted.notify_one();
            }
            registered.failed(error.flags(), &error);
            answer(respond, error.status());
            return None;
        }
    };
    let mut response = Response::new(());
    head::insert(response.headers_mut(), BAGGAGE, &head::baggage(&workload, &worker.config.cluster));
    let Ok(send) = respond.send_response(response, false) else {
        resets.spend(Instant::now());
        reset_on_close(&tcp);
        registered.failed(ResponseFlags::Connect, &InboundError::GivenUp);
        return None;
    };
    registered.opened();
    let stream = Stream { send, recv: request.into_body(), share: Share::new(pressure) };
    Some((registered, tcp, stream, resets))
}

/// What a CONNECT asks for.
fn requested(
    worker: &Worker,
    serving: &Serving,
    tunnel: &Tunnel,
    request: &Request<RecvStream>,
) -> Result<(SocketAddr, Arc<Workload>), InboundError> {
    if request.method() != Method::CONNECT {
        return Err(InboundError::Method(request.method().clone()));
    }
    let view = worker.shared.view.load();
    certificate(&view, &identity_of(&serving.enrolled, &worker.config.trust_domain))?;
    if has_expired(tunnel.client.not_after_secs) {
        return Err(InboundError::ClientExpired(tunnel.client.id.clone()));
    }
    let workload = view.workload_of(&serving.enrolled.uid).ok_or(InboundError::NotConfigured)?;
    let authority = request.uri().authority().map_or("", |authority| authority.as_str());
    let target = inbound_target(workload, tunnel.local.ip(), authority)?;
    Ok((target, Arc::clone(workload)))
}

/// Registers a connection, judges it, dials the application. `client` is its verified identity, if it has one.
async fn admit(
    worker: &Arc<Worker>,
    serving: &Arc<Serving>,
    mut description: Description,
    client: Option<&SpiffeId>,
) -> Result<(Registered, TcpStream), (Registered, InboundError)> {
    let (source, address) = (description.source_addr.ip(), description.destination_addr);
    description.judged = Some(InboundFlow { client: client.cloned(), source, destination: address });
    // Registered before it is judged and dialled: a change in between finds it.
    let registered = worker.connections.register(description);
    let reason = if serving.is_stopped() {
        Some(CloseReason::WorkloadStopped)
    } else {
        registered.live.verdict(&worker.shared.view.load())
    };
    if let Some(reason) = reason {
        return Err((registered, InboundError::not_admitted(reason)));
    }
    let carried = match client {
        Some(_) => Source::Client(source),
        None => Source::ClientOfCaptured(source, &serving.captured),
    };
    let dialled = connect_application(&worker.namespaces, serving.enrolled.netns.as_fd(), carried, address).await;
    match (dialled, registered.live.must_close().cloned()) {
        (Ok(tcp), None) => Ok((registered, tcp)),
        (Ok(tcp), Some(reason)) => {
            reset_on_close(&tcp);
            Err((registered, InboundError::Closed(reason)))
        }
        (Err(source), _) => Err((registered, InboundError::Dial { address, source })),
    }
}

/// The two ends of a connection: its peer's address, and the application's.
struct Ends {
    peer: SocketAddr,
    target: SocketAddr,
}

fn describe(
    worker: &Worker,
    serving: &Serving,
    carrier: Carrier,
    Ends { peer, target }: Ends,
    workload: &Arc<Workload>,
) -> Description {
    let view: &View = &worker.shared.view.load();
    let source_addr = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    Description {
        direction: Direction::Inbound,
        carrier,
        enrolled: Arc::clone(&serving.enrolled),
        local_destination: None,
        source_addr,
        destination_addr: target,
        target: None,
        hbone_addr: None,
        source: view.snapshot.workload_at(source_addr.ip()).cloned(),
        destination: Some(Arc::clone(workload)),
        service: None,
        identities: None,
        peer: None,
        judged: None,
    }
}

/// Answers a request that is not carried. The stream may be gone already, which is as good. When the request is dropped
/// too, h2 resets the stream with NO_ERROR behind the answer (RFC 9113 8.1); a reset of ours would overtake the answer.
fn answer(mut respond: SendResponse<Bytes>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    if let Err(error) = respond.send_response(response, true) {
        tracing::debug!(%error, "answer to a request that is gone");
    }
}

/// Carries one captured plain connection to its end.
pub async fn plaintext(worker: Arc<Worker>, serving: Arc<Serving>, accepted: accept::Accepted) {
    let accept::Accepted { tcp, peer, permit: _permit } = accepted;
    // A connection that is gone already has no addresses, and is not carried.
    let _entry = tcp.local_addr().map(|dialled| serving.captured.enter(peer, dialled));
    let Some((registered, application)) = Box::pin(open_plaintext(&worker, &serving, &tcp, peer)).await else {
        reset_on_close(&tcp);
        return;
    };
    drop((worker, serving));
    let result = relay::tcp_and_tcp(tcp, application, &registered.live).await;
    registered.ended(result.err().map(|error| error.to_string()));
}

async fn open_plaintext(
    worker: &Arc<Worker>,
    serving: &Arc<Serving>,
    tcp: &TcpStream,
    peer: SocketAddr,
) -> Option<(Registered, TcpStream)> {
    let target = tcp.local_addr().ok()?;
    if RESERVED_PORTS.contains(&target.port()) {
        count(&worker.metrics.counters.direct_dials);
        complain(worker, peer.ip(), "port", &format_args!("port {} belongs to the node proxy", target.port()));
        return None;
    }
    let workload = worker.shared.view.load().workload_of(&serving.enrolled.uid).cloned();
    let checked = workload.ok_or(InboundError::NotConfigured).and_then(|workload| {
        let target = inbound_target(&workload, target.ip(), &target.to_string())?;
        Ok((workload, target))
    });
    let (workload, target) = match checked {
        Ok(checked) => checked,
        Err(error) => {
            complain(worker, peer.ip(), "destination", &error);
            return None;
        }
    };
    let description = describe(worker, serving, Carrier::Tcp, Ends { peer, target }, &workload);
    match admit(worker, serving, description, None).await {
        Ok((mut registered, application)) => {
            registered.opened();
            Some((registered, application))
        }
        Err((registered, error)) => {
            registered.failed(error.flags(), &error);
            None
        }
    }
}

/// Logs what a peer did wrong, once per peer, kind and minute.
fn complain(worker: &Worker, peer: IpAddr, kind: &'static str, error: &dyn std::fmt::Display) {
    if worker.logged.first(peer, kind, worker.started.elapsed().as_secs()) {
        tracing::warn!(%peer, %error, "refused");
    } else {
        tracing::debug!(%peer, %error, "refused");
    }
}
