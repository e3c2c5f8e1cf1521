//! The configuration that a mesh is made from: objects of an API server, or the directory of a sandbox.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, anyhow};
use kube::Api;
use kube::api::{DynamicObject, ListParams};
use kube::core::{ApiResource, GroupVersionKind};
use mesh_api::k8s::{Item, from_api_server};
use serde_json::Value;

use super::kubernetes::{client, explain};
use crate::cli::Global;
use crate::exit::{NoMesh, Unavailable};
use crate::sandbox::{Layout, State};

/// Objects a page.
const PAGE: u32 = 500;
/// A page may take this long.
const PAGE_WITHIN: Duration = Duration::from_secs(30);

/// Every kind that the mesh reads: group, versions with the best first, kind, plural.
const KINDS: [(&str, &[&str], &str, &str); 9] = [
    ("", &["v1"], "Namespace", "namespaces"),
    ("", &["v1"], "Node", "nodes"),
    ("", &["v1"], "Pod", "pods"),
    ("", &["v1"], "Service", "services"),
    ("", &["v1"], "ServiceAccount", "serviceaccounts"),
    ("discovery.k8s.io", &["v1"], "EndpointSlice", "endpointslices"),
    ("networking.istio.io", &["v1", "v1beta1"], "WorkloadEntry", "workloadentries"),
    ("security.istio.io", &["v1", "v1beta1"], "PeerAuthentication", "peerauthentications"),
    ("security.istio.io", &["v1", "v1beta1"], "AuthorizationPolicy", "authorizationpolicies"),
];

/// Where the configuration is.
#[derive(Debug)]
pub enum Configuration {
    /// A sandbox reads this directory.
    Directory(PathBuf),
    /// An API server holds these.
    Objects {
        /// As they are read.
        items: Vec<Item>,
        /// Kinds that it does not know.
        missing: Vec<&'static str>,
        /// Namespace of the context.
        namespace: String,
    },
}

impl Configuration {
    /// That of the mesh that the command line means.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub async fn of(global: &Global) -> Result<Self> {
        if global.kubeconfig.is_none() && global.context.is_none() {
            let layout = Layout::of(global.sandbox_name())?;
            if State::load(&layout)?.is_some() {
                return Ok(Self::Directory(layout.config()));
            }
        }
        let none =
            || NoMesh("no sandbox runs here, and no kubeconfig names a cluster; --offline looks at files alone".into());
        let (client, namespace) = client(global).await?.ok_or_else(|| anyhow!(none()))?;
        let (mut items, mut missing) = (Vec::new(), Vec::new());
        for (group, versions, kind, plural) in KINDS {
            match list(&client, (group, versions), (kind, plural)).await? {
                Some(found) => items.extend(found),
                None => missing.push(kind),
            }
        }
        Ok(Self::Objects { items, missing, namespace })
    }
}

/// All objects of a kind in the best version that the API server has; none if it has none.
async fn list(
    client: &kube::Client,
    (group, versions): (&str, &[&str]),
    (kind, plural): (&str, &str),
) -> Result<Option<Vec<Item>>> {
    for version in versions {
        let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
        if let Some(found) = pages(client.clone(), &resource).await? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

async fn pages(client: kube::Client, resource: &ApiResource) -> Result<Option<Vec<Item>>> {
    let api = Api::<DynamicObject>::all_with(client, resource);
    let doing = format!("list {} of all namespaces", resource.plural);
    let mut parameters = ListParams::default().limit(PAGE);
    let mut found = Vec::new();
    loop {
        let page = match tokio::time::timeout(PAGE_WITHIN, api.list(&parameters)).await {
            Ok(Ok(page)) => page,
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => return Ok(None),
            Ok(Err(error)) => return Err(explain(error, &doing)),
            Err(_) => return Err(anyhow!(Unavailable(format!("cannot {doing}: nothing within {PAGE_WITHIN:?}")))),
        };
        for object in page.items {
            let mut value = serde_json::to_value(&object)?;
            // Objects of a list do not say it.
            value["apiVersion"] = Value::from(resource.api_version.as_str());
            value["kind"] = Value::from(resource.kind.as_str());
            found.push(from_api_server(value));
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters = parameters.continue_token(&token),
            None => return Ok(Some(found)),
        }
    }
}
