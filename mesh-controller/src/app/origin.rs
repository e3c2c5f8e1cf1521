//! Opens the place that configuration comes from, and what comes with it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use kube::Client;
use mesh_core::config::Settings;
use mesh_core::config::objects::Kind;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::ca::authority::Authority;
use crate::control::Verdicts;
use crate::door::Judge;
use crate::kubernetes::bundle::Bundle;
use crate::kubernetes::follow::{self, FOLLOWED, Followed, follow};
use crate::kubernetes::leader::Candidate;
use crate::kubernetes::review::{Account, Reviewer};
use crate::kubernetes::signer::ClusterSigner;
use crate::kubernetes::webhook::{ADMISSION, Webhook};
use crate::kubernetes::{self, conditions, roots};
use crate::metrics::Metrics;
use crate::server::{ServerCertificate, incoming, tls_acceptor};
use crate::source::cluster::{Cluster, SharedHeard};
use crate::source::watch::Watch;
use crate::source::{Notices, Source};
use crate::state_dir::StateDir;
use crate::token::TokenKey;

/// A stored configuration is served without the API server after this time.
const WITHOUT_IT_AFTER: Duration = Duration::from_secs(10);
/// Nodes are served after this time though the API server has not been told the webhook's roots.
const ASKED_WITHIN: Duration = Duration::from_secs(20);
/// How often the log says what is waited for.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// Where configuration comes from, and with it who knows the nodes and keeps the signer.
#[derive(Debug, Clone)]
pub enum Origin {
    /// Directories, the first has precedence. Nodes have tokens of our own, and the signer is in the state directory.
    Directories(Vec<PathBuf>),
    /// The Kubernetes API server that this pod or `KUBECONFIG` knows. It judges tokens, and keeps the signer in a Secret.
    Kubernetes {
        /// Service accounts of node proxies.
        node_accounts: Vec<Account>,
        /// Whether and how the API server asks about objects before it takes them.
        webhook: Option<Asked>,
        /// Name of this replica among others: its pod's.
        replica: String,
    },
}

/// How the API server asks.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Name of the ValidatingWebhookConfiguration.
    pub configuration: String,
    /// Where it asks.
    pub listen: SocketAddr,
}

/// An open origin.
pub(super) struct Opened {
    pub(super) source: Source,
    pub(super) notices: Notices,
    pub(super) judge: Judge,
    /// The API server, where there is one.
    pub(super) cluster: Option<ClusterSide>,
}

/// Opens it. What follows it for the life of the process becomes tasks.
pub(super) async fn open(
    origin: &Origin,
    dir: &StateDir,
    settings: &Settings,
    tasks: &mut JoinSet<&'static str>,
) -> anyhow::Result<Opened> {
    let (node_accounts, webhook, replica) = match origin {
        Origin::Directories(dirs) => {
            return Ok(Opened {
                source: Source::directories(dirs.clone()),
                notices: Notices::Directories(Watch::new(dirs)),
                judge: Judge::Own(TokenKey::open(dir)?),
                cluster: None,
            });
        }
        Origin::Kubernetes { node_accounts, webhook, replica } => (node_accounts, webhook, replica),
    };
    let (client, url) = kubernetes::client().await?;
    let signer = ClusterSigner::new(client.clone(), &settings.root_namespace);
    signer.bring(dir, &settings.trust_domain).await.context("the signer")?;
    let ca = dir.ca();
    tasks.spawn(async move {
        signer.follow(&ca).await;
        "signer's Secret"
    });
    let heard = SharedHeard::default();
    heard.lock().expect(FOLLOWED.map(Followed::kind));
    let (wake, notices) = follow::Notices::new();
    for what in FOLLOWED {
        let (client, heard, wake) = (client.clone(), heard.clone(), wake.clone());
        tasks.spawn(async move {
            follow(client, what, heard, wake).await;
            "watch"
        });
    }
    Ok(Opened {
        source: Source::Cluster(Cluster::new(url, heard.clone())),
        notices: Notices::Cluster(notices),
        judge: Judge::Cluster(Reviewer::new(client.clone(), node_accounts.clone())),
        cluster: Some(ClusterSide {
            client,
            heard,
            webhook: webhook.clone(),
            namespace: settings.root_namespace.clone(),
            me: replica.clone(),
        }),
    })
}

/// Of a cluster: its API server, and what was heard of it.
pub(super) struct ClusterSide {
    client: Client,
    heard: SharedHeard,
    webhook: Option<Asked>,
    /// The root namespace.
    namespace: Arc<str>,
    /// Name of this replica.
    me: String,
}

/// What the webhook's server needs beside the cluster.
pub(super) struct Judging {
    pub(super) settings: Settings,
    pub(super) authority: Arc<ArcSwap<Authority>>,
    pub(super) certificate: Arc<ServerCertificate>,
    pub(super) metrics: Arc<Metrics>,
}

impl ClusterSide {
    /// Waits until everything in the cluster is known, or, where an earlier configuration is stored, long enough.
    pub(super) async fn complete(&self, notices: &mut Notices, is_stored: bool) {
        let complete = async {
            while !self.heard.lock().is_complete() {
                if tokio::time::timeout(SAY_EVERY, notices.changed()).await.is_err() {
                    let open = FOLLOWED
                        .map(Followed::kind)
                        .into_iter()
                        .filter(|kind| self.heard.lock().state(*kind) == crate::source::cluster::KindState::Unheard);
                    let open: Vec<&str> = open.map(Kind::as_str).collect();
                    tracing::warn!(kinds = open.join(", "), "waiting for the API server's lists");
                }
            }
        };
        if !is_stored {
            complete.await;
        } else if tokio::time::timeout(WITHOUT_IT_AFTER, complete).await.is_err() {
            tracing::warn!("the API server does not say what there is: the stored configuration is served");
        }
    }

    /// Hands the roots out, and, as the leader, tells authors of policies what became of them, for the life of the process.
    pub(super) fn write(
        &self,
        authority: Arc<ArcSwap<Authority>>,
        verdicts: watch::Receiver<Verdicts>,
        down: watch::Receiver<bool>,
        tasks: &mut JoinSet<&'static str>,
    ) {
        let client = self.client.clone();
        tasks.spawn(async move {
            roots::hand_out(client, authority).await;
            "roots"
        });
        let client = self.client.clone();
        let (leads, is_leader) = watch::channel(false);
        tasks.spawn(async move {
            conditions::keep(client, verdicts, is_leader).await;
            "conditions"
        });
        let candidate = Candidate::new(self.client.clone(), &self.namespace, self.me.clone());
        tasks.spawn(async move {
            candidate.run(leads, down).await;
            super::LEADER_TASK
        });
    }

    /// Answers the API server's questions about objects, for the life of the process. Returns when it has what it knows us
    /// by, or after [`ASKED_WITHIN`]: it may be away, and nodes are served without it.
    pub(super) async fn answer(&self, judging: Judging, tasks: &mut JoinSet<&'static str>) -> anyhow::Result<()> {
        let Some(Asked { configuration, listen }) = self.webhook.clone() else { return Ok(()) };
        let listener = super::listen(listen, "--webhook-listen").await?;
        let Judging { settings, authority, certificate, metrics } = judging;
        let acceptor = tls_acceptor(certificate, ADMISSION)?;
        let connections = incoming(listener, acceptor, ADMISSION, metrics.clone());
        tasks.spawn(async move {
            Webhook::new(settings, metrics).serve(connections).await;
            "webhook"
        });
        let bundle = Bundle::new(self.client.clone(), configuration, authority);
        let (settled, mut is_settled) = watch::channel(false);
        tasks.spawn(async move {
            bundle.keep(settled).await;
            "webhook's caBundle"
        });
        if tokio::time::timeout(ASKED_WITHIN, is_settled.wait_for(|settled| *settled)).await.is_err() {
            tracing::error!(
                "the API server does not know the webhook by its roots: it refuses our kinds until it does"
            );
        }
        Ok(())
    }
}
