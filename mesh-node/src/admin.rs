//! The admin interface: what this node proxy knows and does, as JSON over a Unix socket that only root can use.
//!
//! Here: which page shows what. The JSON itself is `mesh_api::admin`. Nothing here changes what is decided; the log
//! level is the only thing that can be set.

pub mod events;
mod kernel;
pub mod metrics;
mod rows;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use http::{Method, StatusCode};
use mesh_api::admin::{AuthzAnswer, AuthzQuestion, NodeStatus};
use mesh_core::authorize::explain;
use mesh_core::flow::{InboundFlow, Verdict};
use mesh_core::identity::SpiffeId;
use mesh_core::inbound::inbound_target;
use serde_json::json;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::events::EventLog;
use crate::capture::Capture;
use crate::certificates::CertificatesHandle;
use crate::enrol::EnrolmentStatus;
use crate::http_server::{self, Answer, Request};
use crate::logging::LogHandle;
use crate::readiness::Readiness;
use crate::runtime::Shared;
use crate::workers::DataPath;
use crate::xds::XdsStatus;

/// What there is to ask for.
const PAGES: &str = "/status /workloads /services /policies /certificates /connections /bpf?map=NAME /events /version \
                     /config_dump /logging?level=FILTER /authz";

/// What the pages read.
pub struct AdminState {
    /// This node's name.
    pub node: Arc<str>,
    /// The controller's address.
    pub controller: String,
    /// This node's cluster.
    pub cluster: Arc<str>,
    /// The mesh's trust domain.
    pub trust_domain: Arc<str>,
    /// Configuration, enrolment, certificates.
    pub shared: Arc<Shared>,
    /// Live connections.
    pub datapath: Arc<DataPath>,
    /// Kernel programs.
    pub capture: Arc<Capture>,
    /// The controller's stream.
    pub xds: watch::Receiver<XdsStatus>,
    /// Enrolled workloads.
    pub enrolment: watch::Receiver<EnrolmentStatus>,
    /// Readiness.
    pub readiness: watch::Receiver<Readiness>,
    /// Certificates.
    pub certificates: CertificatesHandle,
    /// Drops and refusals in the kernel.
    pub events: Arc<EventLog>,
    /// Level of the log.
    pub log: LogHandle,
    /// When this process began.
    pub started: Instant,
}

impl std::fmt::Debug for AdminState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdminState").field("node", &self.node).finish_non_exhaustive()
    }
}

/// Serves until cancelled.
pub async fn serve(listener: UnixListener, state: Arc<AdminState>, cancel: CancellationToken) {
    let answer = move |request| {
        let state = Arc::clone(&state);
        async move { state.answer(request).await }
    };
    http_server::serve(listener, answer, cancel).await;
}

impl AdminState {
    async fn answer(self: Arc<Self>, request: Request) -> Answer {
        // Reading the kernel's maps and building a large page block, and connections are carried by other threads anyway.
        match tokio::task::spawn_blocking(move || self.page(&request)).await {
            Ok(answer) => answer,
            Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, error),
        }
    }

    fn page(&self, request: &Request) -> Answer {
        match (&request.method, request.uri.path()) {
            (&Method::GET, "/status") => Answer::json(&self.status()),
            (&Method::GET, "/workloads") => Answer::json(&rows::workloads(&self.shared.view.load().snapshot)),
            (&Method::GET, "/services") => Answer::json(&rows::services(&self.shared.view.load())),
            (&Method::GET, "/policies") => Answer::json(&rows::policies(&self.shared.view.load().snapshot)),
            (&Method::GET, "/certificates") => Answer::json(&self.certificates.rows()),
            (&Method::GET, "/connections") => Answer::json(&self.datapath.connections()),
            (&Method::GET, "/bpf") => kernel::page(&self.capture, &self.shared.view.load(), request.parameter("map")),
            (&Method::GET, "/events") => Answer::json(&self.events.all()),
            (&Method::GET, "/version") => Answer::json(&json!({ "version": env!("CARGO_PKG_VERSION") })),
            (&Method::GET, "/config_dump") => self.config_dump(),
            (&Method::GET, "/logging") => Answer::json(&json!({ "level": self.log.filter() })),
            (&Method::PUT, "/logging") => self.set_log(request.parameter("level")),
            (&Method::POST, "/authz") => self.authz(&request.body),
            (&Method::GET, path) => Answer::text(StatusCode::NOT_FOUND, format_args!("no page {path}; try {PAGES}")),
            (method, path) => {
                Answer::text(StatusCode::METHOD_NOT_ALLOWED, format_args!("{path} does not take {method}"))
            }
        }
    }

    fn status(&self) -> NodeStatus {
        let (readiness, xds) = (self.readiness.borrow().clone(), self.xds.borrow().clone());
        NodeStatus {
            node: self.node.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            ready: readiness.is_ready(),
            waiting_for: readiness.waiting_for,
            controller: self.controller.clone(),
            controller_connected: xds.connected,
            config_source: xds.source.as_str().to_owned(),
            enrolled: self.enrolment.borrow().workloads.clone(),
            connections: self.datapath.connection_count(),
            refused_resources: xds.refused,
            suppressed_events: self.capture.suppressed_events().unwrap_or_else(|error| {
                tracing::warn!(%error, "status");
                0
            }),
            uptime_secs: self.started.elapsed().as_secs(),
        }
    }

    fn config_dump(&self) -> Answer {
        let view = self.shared.view.load();
        let bpf = match kernel::state(&self.capture, &view, None) {
            Ok(bpf) => json!(bpf),
            Err(error) => json!({ "error": error.to_string() }),
        };
        Answer::json(&json!({
            "status": self.status(),
            "workloads": rows::workloads(&view.snapshot),
            "services": rows::services(&view),
            "policies": rows::policies(&view.snapshot),
            "certificates": self.certificates.rows(),
            "connections": self.datapath.connections(),
            "bpf": bpf,
            "events": self.events.all(),
        }))
    }

    fn set_log(&self, level: Option<&str>) -> Answer {
        let Some(level) = level else {
            return Answer::text(StatusCode::BAD_REQUEST, "say what to log: PUT /logging?level=info,mesh_node=debug");
        };
        // A filter has `,` and `=`, which some clients escape.
        match self.log.set(&level.replace("%2C", ",").replace("%3D", "=")) {
            Ok(()) => {
                tracing::info!(level, "log level set");
                Answer::json(&json!({ "level": self.log.filter() }))
            }
            Err(error) => Answer::text(StatusCode::BAD_REQUEST, error),
        }
    }

    fn authz(&self, body: &[u8]) -> Answer {
        match self.judge(body) {
            Ok(answer) => Answer::json(&answer),
            Err(error) => Answer::text(StatusCode::BAD_REQUEST, error),
        }
    }

    fn judge(&self, body: &[u8]) -> Result<AuthzAnswer, String> {
        let question: AuthzQuestion = serde_json::from_slice(body).map_err(|e| e.to_string())?;
        let destination: SocketAddr =
            question.destination.parse().map_err(|e| format!("destination {}: {e}", question.destination))?;
        let source: IpAddr = question.source.parse().map_err(|e| format!("source {}: {e}", question.source))?;
        let client: Option<SpiffeId> = match question.client.as_str() {
            "" => None,
            id => Some(id.parse().map_err(|e: mesh_core::identity::InvalidSpiffeId| e.to_string())?),
        };
        let view = self.shared.view.load();
        let workload = view.snapshot.workload_at(destination.ip());
        let workload = workload.ok_or_else(|| format!("no workload at {}", destination.ip()))?;
        if let Err(refusal) = inbound_target(workload, destination.ip(), &destination.to_string()) {
            // No policy is asked about the proxy's own ports.
            let reason = refusal.to_string();
            return Ok(AuthzAnswer { decision: "deny".to_owned(), policy: String::new(), reason, trace: Vec::new() });
        }
        let (verdict, traces) = explain(&view.snapshot, workload, &InboundFlow { client, source, destination });
        let (decision, policy, reason) = match verdict {
            Verdict::Allow(Some(policy)) => ("allow", policy.to_string(), format!("allowed by policy {policy}")),
            Verdict::Allow(None) => ("allow", String::new(), "no allow policy concerns the workload".to_owned()),
            Verdict::Deny(refusal) => ("deny", rows::refusing_policy(&refusal), refusal.to_string()),
        };
        Ok(AuthzAnswer {
            decision: decision.to_owned(),
            policy,
            reason,
            trace: traces.into_iter().map(rows::trace).collect(),
        })
    }
}
