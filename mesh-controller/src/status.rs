//! What the admin socket and the metrics port answer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Instant;

use arc_swap::ArcSwap;
use mesh_api::admin::{ControllerStatus, Problem};
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::admin::{Answer, Pages};
use crate::ads::catalogue::{Catalogue, ResourceType};
use crate::ads::nodes::Nodes;
use crate::ca::authority::Authority;
use crate::metrics::Metrics;

/// Version of this build.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What status is made of.
#[derive(Debug)]
pub struct StatusPages {
    /// Trust domain.
    pub trust_domain: String,
    /// Configuration sources.
    pub sources: Vec<String>,
    /// Published resources.
    pub catalogue: Arc<RwLock<Catalogue>>,
    /// Connected nodes.
    pub nodes: Arc<Nodes>,
    /// What is wrong with the configuration.
    pub problems: Arc<ArcSwap<Vec<Problem>>>,
    /// The CA.
    pub authority: Arc<ArcSwap<Authority>>,
    /// Whether the first configuration is published and the port is open.
    pub ready: Arc<AtomicBool>,
}

impl StatusPages {
    fn status(&self) -> ControllerStatus {
        let (resources, generation) = self.catalogue.read().map_or_else(
            |_| Default::default(),
            |catalogue| {
                let counts = ResourceType::ALL.iter().map(|t| (t.type_url().to_owned(), catalogue.len(*t) as u64));
                (counts.collect(), catalogue.generation())
            },
        );
        ControllerStatus {
            version: VERSION.into(),
            trust_domain: self.trust_domain.clone(),
            sources: self.sources.clone(),
            resources,
            nodes: self.nodes.rows(generation, Instant::now()),
            problems: self.problems.load().to_vec(),
            roots: self.authority.load().roots().iter().map(|root| fingerprint(root)).collect(),
        }
    }

    /// Names and versions of everything published.
    fn resources(&self) -> Value {
        let Ok(catalogue) = self.catalogue.read() else { return Value::Null };
        let versions = |kind| catalogue.all(kind).map(|r| (r.name.to_string(), json!(*r.version))).collect();
        let by_type = ResourceType::ALL.iter().map(|t| (t.type_url().to_owned(), Value::Object(versions(*t))));
        Value::Object(by_type.collect())
    }
}

impl Pages for StatusPages {
    async fn get(&self, path: &str) -> Answer {
        match path {
            "/ready" => readiness(&self.ready),
            "/status" => as_json(&self.status()),
            "/problems" => as_json(&**self.problems.load()),
            "/version" => as_json(&json!({ "component": "mesh-controller", "version": VERSION })),
            "/config_dump" => as_json(&json!({ "status": self.status(), "resources": self.resources() })),
            _ => Answer::NotFound("/ready /status /problems /version /config_dump"),
        }
    }
}

/// What the monitoring port has: Prometheus' page, and readiness for an orchestrator.
#[derive(Debug)]
pub struct MetricsPages {
    /// Of the whole process.
    pub metrics: Arc<Metrics>,
    /// Whether the first configuration is published.
    pub ready: Arc<AtomicBool>,
}

impl Pages for MetricsPages {
    async fn get(&self, path: &str) -> Answer {
        match path {
            "/metrics" | "/stats/prometheus" => Answer::Text(self.metrics.text()),
            "/ready" => readiness(&self.ready),
            _ => Answer::NotFound("/metrics /ready"),
        }
    }
}

fn readiness(ready: &AtomicBool) -> Answer {
    if ready.load(Ordering::Acquire) {
        return Answer::Text("ready\n".into());
    }
    Answer::Unavailable(
        "not ready: no configuration is published, or the webhook is not set up; /problems and the log may say why"
            .into(),
    )
}

fn as_json(value: &impl Serialize) -> Answer {
    serde_json::to_string(value).map_or_else(|e| Answer::Unavailable(e.to_string()), Answer::Json)
}

/// SHA-256 of a certificate, hexadecimal.
fn fingerprint(der: &[u8]) -> String {
    Sha256::digest(der).iter().map(|byte| format!("{byte:02x}")).collect()
}
