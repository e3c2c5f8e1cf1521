//! What the controller has to do with a Kubernetes API server: objects are read there ([`follow`]), node proxies' tokens
//! are judged there ([`review`]), the signer is kept there ([`signer`]), and its roots are handed out there ([`roots`],
//! [`bundle`]). It asks about objects before it takes them ([`webhook`], [`bodies`],
//! [`admission`]), and keeps what became of them
//! ([`conditions`]), if it leads ([`leader`]).
//!
//! Not here: what objects mean (`mesh_api::k8s`) and what follows from them (`mesh_core::config`).

pub mod admission;
pub mod bodies;
pub mod bundle;
pub mod conditions;
pub mod follow;
pub mod leader;
pub mod review;
pub mod roots;
pub mod signer;
pub mod webhook;

use std::time::Duration;

use anyhow::Context;
use kube::{Client, Config};

/// Longest time for the API server to answer a request that is not a watch.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// A client as this pod's service account, or as `KUBECONFIG` says; and where the API server is.
pub async fn client() -> anyhow::Result<(Client, String)> {
    let mut config =
        Config::infer().await.context("find a Kubernetes API server (neither a pod's, nor by KUBECONFIG)")?;
    config.connect_timeout = Some(ANSWER_WITHIN);
    let url = config.cluster_url.to_string();
    let client = Client::try_from(config).with_context(|| format!("make a client of {url}"))?;
    Ok((client, url))
}
