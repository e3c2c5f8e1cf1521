//! The `caBundle` of our ValidatingWebhookConfiguration: the roots that the API server knows the webhook's server by.
//!
//! It is looked at again and again rather than watched: whoever may watch one configuration by its name may list it only by a
//! field selector, and what somebody else writes there is repaired within [`LOOK_EVERY`] and [`LOOK_WITHIN`] either way. All replicas sign with
//! one signer, so they write the same.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::ca::authority::Authority;

/// How often the configuration is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Time for a look. An API server that has gone without a word does not end the connection to it.
const LOOK_WITHIN: Duration = Duration::from_secs(10);

/// The configuration, and the roots that belong into it.
pub struct Bundle {
    configurations: Api<ValidatingWebhookConfiguration>,
    name: String,
    authority: Arc<ArcSwap<Authority>>,
}

/// What a look at the configuration has led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Looked {
    /// It has the roots.
    AsItShould,
    /// They were written.
    Written,
    /// There is none: nobody asks.
    NotThere,
    /// Somebody wrote it meanwhile, perhaps another replica the same.
    Overtaken,
}

impl Bundle {
    /// The configuration is the one of this name.
    pub fn new(client: Client, name: String, authority: Arc<ArcSwap<Authority>>) -> Self {
        Self { configurations: Api::all(client), name, authority }
    }

    /// Keeps the bundle as it should be, for ever; says in `settled` when it is so for the first time.
    pub async fn keep(self, settled: watch::Sender<bool>) {
        let (mut last, mut complained) = (None, None);
        loop {
            let complaint = match tokio::time::timeout(LOOK_WITHIN, self.look()).await {
                Ok(Ok(Looked::Overtaken)) => None,
                Ok(Ok(looked)) => {
                    if last != Some(looked) {
                        self.say(looked);
                    }
                    last = Some(looked);
                    settled.send_replace(true);
                    None
                }
                Ok(Err(error)) => Some(error.to_string()),
                Err(_) => Some("the API server does not answer".to_owned()),
            };
            if let Some(error) = complaint.as_ref().filter(|_| complained != complaint) {
                tracing::error!(configuration = self.name, error, "the webhook's caBundle is not kept; trying again");
            }
            complained = complaint;
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn say(&self, looked: Looked) {
        let configuration = &self.name;
        match looked {
            Looked::Written => tracing::info!(configuration, "the webhook's caBundle was written"),
            Looked::NotThere => tracing::warn!(
                configuration,
                "there is no such ValidatingWebhookConfiguration: objects are not judged before they are written"
            ),
            Looked::AsItShould | Looked::Overtaken => {}
        }
    }

    async fn look(&self) -> kube::Result<Looked> {
        let Some(found) = self.configurations.get_opt(&self.name).await? else { return Ok(Looked::NotThere) };
        let roots = self.authority.load().bundle_pem();
        let Some(patch) = correction(&found, &roots) else { return Ok(Looked::AsItShould) };
        match self.configurations.patch(&self.name, &PatchParams::default(), &Patch::Strategic(patch)).await {
            Ok(_) => Ok(Looked::Written),
            // Deleted meanwhile.
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(Looked::NotThere),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(Looked::Overtaken),
            Err(error) => Err(error),
        }
    }
}

/// The patch that gives each webhook of a configuration these roots; none if all have them. It holds for the version that
/// was looked at: one that was written since is looked at again.
fn correction(found: &ValidatingWebhookConfiguration, roots: &str) -> Option<Value> {
    let webhooks = found.webhooks.iter().flatten();
    let has_others =
        |bundle: Option<&k8s_openapi::ByteString>| bundle.is_none_or(|bundle| bundle.0 != roots.as_bytes());
    let wrong = webhooks.filter(|webhook| has_others(webhook.client_config.ca_bundle.as_ref()));
    let bundle = k8s_openapi::ByteString(roots.as_bytes().to_vec());
    let patches: Vec<Value> =
        wrong.map(|webhook| json!({"name": webhook.name, "clientConfig": {"caBundle": bundle}})).collect();
    let version = &found.metadata.resource_version;
    (!patches.is_empty()).then(|| json!({"metadata": {"resourceVersion": version}, "webhooks": patches}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_webhooks_with_other_roots_are_written_and_only_in_the_version_that_was_seen() {
        let configuration = |bundles: &[Option<&str>]| -> ValidatingWebhookConfiguration {
            let webhooks = bundles.iter().enumerate().map(|(i, bundle)| {
                let config = match bundle {
                    Some(base64) => json!({"caBundle": base64}),
                    None => json!({}),
                };
                let name = format!("w{i}");
                json!({"name": name, "clientConfig": config, "sideEffects": "None", "admissionReviewVersions": ["v1"]})
            });
            let webhooks: Vec<Value> = webhooks.collect();
            serde_json::from_value(json!({"metadata": {"name": "x", "resourceVersion": "7"}, "webhooks": webhooks}))
                .unwrap()
        };
        // `roots` and `other`.
        let (right, other) = (Some("cm9vdHM="), Some("b3RoZXI="));
        assert_eq!(correction(&configuration(&[right, right]), "roots"), None);
        assert_eq!(correction(&configuration(&[]), "roots"), None);
        let written = |name: &str| json!({"name": name, "clientConfig": {"caBundle": "cm9vdHM="}});
        assert_eq!(
            correction(&configuration(&[right, other, None]), "roots"),
            Some(json!({"metadata": {"resourceVersion": "7"}, "webhooks": [written("w1"), written("w2")]}))
        );
    }
}
