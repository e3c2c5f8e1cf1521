//! Opens the place that configuration comes from, and what comes with it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use kube::Client;
use mesh_core::config::Settings;
use mesh_core::config::objects::Kind;
use tokio::task::JoinSet;

use crate::ca::authority::Authority;
use crate::door::Judge;
use crate::kubernetes::follow::{self, FOLLOWED, Followed, follow};
use crate::kubernetes::review::{Account, Reviewer};
use crate::kubernetes::signer::ClusterSigner;
use crate::kubernetes::{self, roots};
use crate::source::cluster::{Cluster, SharedHeard};
use crate::source::watch::Watch;
use crate::source::{Notices, Source};
use crate::state_dir::StateDir;
use crate::token::TokenKey;

/// A stored configuration is served without the API server after this time.
const WITHOUT_IT_AFTER: Duration = Duration::from_secs(10);
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
    },
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
    let node_accounts = match origin {
        Origin::Directories(dirs) => {
            return Ok(Opened {
                source: Source::directories(dirs.clone()),
                notices: Notices::Directories(Watch::new(dirs)),
                judge: Judge::Own(TokenKey::open(dir)?),
                cluster: None,
            });
        }
        Origin::Kubernetes { node_accounts } => node_accounts,
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
        cluster: Some(ClusterSide { client, heard }),
    })
}

/// Of a cluster: its API server, and what was heard of it.
pub(super) struct ClusterSide {
    client: Client,
    heard: SharedHeard,
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

    /// Hands the roots out, for the life of the process.
    pub(super) fn hand_out(&self, authority: Arc<ArcSwap<Authority>>, tasks: &mut JoinSet<&'static str>) {
        let client = self.client.clone();
        tasks.spawn(async move {
            roots::hand_out(client, authority).await;
            "roots"
        });
    }
}
