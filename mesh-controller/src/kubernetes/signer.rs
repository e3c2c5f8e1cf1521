//! The signer of a mesh on Kubernetes, in a Secret as Istio has it: all replicas of the controller sign with the same key.
//!
//! `cacerts` is the user's and goes first; `istio-ca-secret` is made by the first controller that finds neither. What is
//! found is written where [`SignerSource`](crate::ca::store::SignerSource) reads it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use time::OffsetDateTime;

use crate::ca::authority::make_root;
use crate::ca::store::{self, SignerPem};
use crate::state_dir::StateDir;

/// The user's Secret.
const PLUGGED: &str = "cacerts";
/// Ours.
const OWN: &str = "istio-ca-secret";
const OWN_TYPE: &str = "istio.io/ca-root";
/// How often the Secret is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// The signer of a cluster.
pub struct ClusterSigner {
    secrets: Api<Secret>,
    namespace: String,
}

impl ClusterSigner {
    /// Secrets are those of the root namespace.
    pub fn new(client: Client, namespace: &str) -> Self {
        Self { secrets: Api::namespaced(client, namespace), namespace: namespace.to_owned() }
    }

    /// Writes the signer to the state directory; makes one where there is none.
    pub async fn bring(&self, dir: &StateDir, trust_domain: &str) -> anyhow::Result<()> {
        let found = match self.find().await? {
            Some(found) => found,
            None => {
                self.create(trust_domain).await?;
                self.find().await?.with_context(|| format!("Secret {}/{OWN} went as it came", self.namespace))?
            }
        };
        store::write_signer(&dir.ca(), &found)?;
        Ok(())
    }

    /// Takes up what changes in the Secret, for ever. One that is gone or damaged changes nothing.
    pub async fn follow(&self, ca: &Path) {
        let mut complained = None;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let done = match self.find().await {
                Ok(Some(pem)) => store::write_signer(ca, &pem).map_err(anyhow::Error::from),
                Ok(None) => Err(anyhow::anyhow!("the Secrets {PLUGGED} and {OWN} are gone from {}", self.namespace)),
                Err(error) => Err(error),
            };
            let complaint = done.err().map(|error| format!("{error:#}"));
            if let Some(complaint) = complaint.as_ref().filter(|_| complained != complaint) {
                tracing::error!("the signer in force stays: {complaint}");
            }
            complained = complaint;
        }
    }

    async fn find(&self) -> anyhow::Result<Option<SignerPem>> {
        for name in [PLUGGED, OWN] {
            let found = self.secrets.get_opt(name).await;
            let found = found.with_context(|| format!("read Secret {}/{name}", self.namespace))?;
            if let Some(secret) = found {
                return Ok(Some(signer(name, &secret.data.unwrap_or_default())?));
            }
        }
        Ok(None)
    }

    async fn create(&self, trust_domain: &str) -> anyhow::Result<()> {
        let (cert, key) = make_root(trust_domain, OffsetDateTime::now_utc(), &mut rand::rng())?;
        let data =
            [("ca-cert.pem", cert.as_str()), ("ca-key.pem", &key), ("root-cert.pem", &cert), ("cert-chain.pem", "")];
        let data = data.map(|(name, text)| (name.to_owned(), ByteString(text.as_bytes().to_vec())));
        let secret = Secret {
            metadata: ObjectMeta { name: Some(OWN.to_owned()), ..ObjectMeta::default() },
            type_: Some(OWN_TYPE.to_owned()),
            data: Some(data.into()),
            ..Secret::default()
        };
        match self.secrets.create(&PostParams::default(), &secret).await {
            Ok(_) => {
                tracing::info!(namespace = self.namespace, secret = OWN, "a root of our own was made");
                Ok(())
            }
            // Another replica was first.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(error).with_context(|| format!("create Secret {}/{OWN}", self.namespace)),
        }
    }
}

/// The four files of a Secret. A self-signed signer is its own root where no other is given.
fn signer(name: &str, data: &BTreeMap<String, ByteString>) -> anyhow::Result<SignerPem> {
    let text = |file: &str| -> anyhow::Result<String> {
        let bytes = data.get(file).map(|bytes| bytes.0.clone()).unwrap_or_default();
        String::from_utf8(bytes).with_context(|| format!("Secret {name}: {file} is not text"))
    };
    let (cert, key, roots) = (text("ca-cert.pem")?, text("ca-key.pem")?, text("root-cert.pem")?);
    if cert.is_empty() || key.is_empty() {
        bail!("Secret {name} has no ca-cert.pem or no ca-key.pem: fill them in, or delete it");
    }
    let roots = if roots.trim().is_empty() { cert.clone() } else { roots };
    Ok(SignerPem { cert, key, chain: text("cert-chain.pem")?, roots })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(files: &[(&str, &str)]) -> BTreeMap<String, ByteString> {
        files.iter().map(|(name, text)| ((*name).to_owned(), ByteString(text.as_bytes().to_vec()))).collect()
    }

    #[test]
    fn a_self_signed_signer_is_its_own_root() {
        let found = signer("x", &data(&[("ca-cert.pem", "C"), ("ca-key.pem", "K"), ("root-cert.pem", "")])).unwrap();
        assert_eq!((&*found.cert, &*found.key, &*found.roots, &*found.chain), ("C", "K", "C", ""));
        let found = signer("x", &data(&[("ca-cert.pem", "C"), ("ca-key.pem", "K"), ("root-cert.pem", "R")])).unwrap();
        assert_eq!(found.roots, "R");
        let error = signer("cacerts", &data(&[("ca-cert.pem", "C")])).err().unwrap();
        assert!(error.to_string().contains("cacerts has no ca-cert.pem or no ca-key.pem"), "{error}");
    }
}
