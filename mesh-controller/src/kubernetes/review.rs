//! Node proxies' tokens on Kubernetes: projected service account tokens, judged by the API server (TokenReview).

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::Client;
use kube::api::{Api, PostParams};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::token::{AUDIENCE, MAX_TOKEN_BYTES, NodeToken, TokenRefusal};

/// A judgement is used again for this long, seconds; a token whose pod is gone works that long.
const FRESH_SECS: u64 = 30;
/// Judgements that are kept; the oldest goes first. Two for each of 5,000 nodes.
const MAX_KEPT: usize = 10_000;
/// The pod that a token is bound to runs there.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// A service account, `NAMESPACE/NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account(String);

impl std::str::FromStr for Account {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains(['/', ':']) => {
                Ok(Self(format!("system:serviceaccount:{namespace}:{name}")))
            }
            Some(_) | None => Err(format!("`{text}` is not NAMESPACE/NAME of a service account")),
        }
    }
}

/// Asks the API server about tokens.
pub struct Reviewer {
    client: Client,
    /// Whose pods are node proxies.
    accounts: Vec<Account>,
    kept: Mutex<BTreeMap<[u8; 32], Kept>>,
}

#[derive(Debug, Clone)]
struct Kept {
    token: NodeToken,
    at: u64,
}

impl std::fmt::Debug for Reviewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reviewer").field("accounts", &self.accounts).finish_non_exhaustive()
    }
}

impl Reviewer {
    /// One that lets in pods of these service accounts.
    pub fn new(client: Client, accounts: Vec<Account>) -> Self {
        Self { client, accounts, kept: Mutex::default() }
    }

    /// Who a token speaks for.
    pub async fn verify(&self, token: &str, now: u64) -> Result<NodeToken, TokenRefusal> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenRefusal::Malformed);
        }
        let digest: [u8; 32] = Sha256::digest(token).into();
        if let Some(kept) = self.lock().get(&digest).filter(|kept| now.saturating_sub(kept.at) < FRESH_SECS) {
            return if kept.token.valid_until > now { Ok(kept.token.clone()) } else { Err(TokenRefusal::Expired) };
        }
        let valid_until = expiry(token).ok_or(TokenRefusal::Malformed)?;
        let review = TokenReview {
            spec: TokenReviewSpec { token: Some(token.to_owned()), audiences: Some(vec![AUDIENCE.to_owned()]) },
            ..TokenReview::default()
        };
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let reviewed = reviews.create(&PostParams::default(), &review).await.map_err(|error| {
            tracing::warn!(%error, "a token cannot be reviewed");
            TokenRefusal::NotReviewed
        })?;
        let status = reviewed.status.ok_or(TokenRefusal::NotReviewed)?;
        let token = NodeToken { node: node_of(&status, &self.accounts)?, valid_until };
        let mut kept = self.lock();
        if kept.len() >= MAX_KEPT {
            kept.retain(|_, kept| now.saturating_sub(kept.at) < FRESH_SECS);
            let oldest = kept.iter().min_by_key(|(_, kept)| kept.at).map(|(digest, _)| *digest);
            oldest.filter(|_| kept.len() >= MAX_KEPT).map(|digest| kept.remove(&digest));
        }
        kept.insert(digest, Kept { token: token.clone(), at: now });
        Ok(token)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<[u8; 32], Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a token says about its end: believed after the API server has let it in, and checked there, too.
fn expiry(token: &str) -> Option<u64> {
    #[derive(Deserialize)]
    struct Claims {
        exp: u64,
    }
    jsonwebtoken::dangerous::insecure_decode::<Claims>(token).ok().map(|decoded| decoded.claims.exp)
}

/// The node of the pod that a token is bound to.
fn node_of(status: &TokenReviewStatus, accounts: &[Account]) -> Result<String, TokenRefusal> {
    let for_us = status.audiences.iter().flatten().any(|audience| audience == AUDIENCE);
    if status.authenticated != Some(true) || !for_us {
        return Err(TokenRefusal::NotAuthenticated);
    }
    let user = status.user.as_ref().ok_or(TokenRefusal::NotAuthenticated)?;
    let name = user.username.as_deref().unwrap_or_default();
    if !accounts.iter().any(|account| account.0 == name) {
        return Err(TokenRefusal::Account);
    }
    match user.extra.as_ref().and_then(|extra| extra.get(NODE_NAME)).map(Vec::as_slice) {
        Some([node]) if !node.is_empty() => Ok(node.clone()),
        Some(_) | None => Err(TokenRefusal::Unbound),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;

    #[test]
    fn only_a_token_for_us_of_a_node_proxys_pod_names_a_node() {
        let accounts = ["istio-system/mesh-node".parse::<Account>().unwrap()];
        let good = TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec!["istio-ca".into()]),
            error: None,
            user: Some(UserInfo {
                username: Some("system:serviceaccount:istio-system:mesh-node".into()),
                extra: Some([(NODE_NAME.to_owned(), vec!["node-a".to_owned()])].into()),
                ..UserInfo::default()
            }),
        };
        let check = |change: &dyn Fn(&mut TokenReviewStatus), expected: Result<&str, TokenRefusal>| {
            let mut status = good.clone();
            change(&mut status);
            assert_eq!(node_of(&status, &accounts), expected.map(str::to_owned), "{status:?}");
        };
        check(&|_| {}, Ok("node-a"));
        check(&|s| s.authenticated = None, Err(TokenRefusal::NotAuthenticated));
        check(&|s| s.authenticated = Some(false), Err(TokenRefusal::NotAuthenticated));
        check(&|s| s.audiences = None, Err(TokenRefusal::NotAuthenticated));
        check(
            &|s| s.audiences = Some(vec!["https://kubernetes.default.svc".into()]),
            Err(TokenRefusal::NotAuthenticated),
        );
        check(&|s| s.user = None, Err(TokenRefusal::NotAuthenticated));
        let name =
            |name: &'static str| move |s: &mut TokenReviewStatus| s.user.as_mut().unwrap().username = Some(name.into());
        check(&name("system:serviceaccount:shop:mesh-node"), Err(TokenRefusal::Account));
        check(&name("system:node:node-a"), Err(TokenRefusal::Account));
        let extra = |nodes: &'static [&'static str]| {
            move |s: &mut TokenReviewStatus| {
                let nodes = nodes.iter().map(|node| (*node).to_owned()).collect();
                s.user.as_mut().unwrap().extra = Some([(NODE_NAME.to_owned(), nodes)].into());
            }
        };
        check(&|s| s.user.as_mut().unwrap().extra = None, Err(TokenRefusal::Unbound));
        check(&extra(&[]), Err(TokenRefusal::Unbound));
        check(&extra(&[""]), Err(TokenRefusal::Unbound));
        check(&extra(&["node-a", "node-b"]), Err(TokenRefusal::Unbound));
    }

    #[test]
    fn an_account_is_a_namespace_and_a_name() {
        for bad in ["", "mesh-node", "/mesh-node", "istio-system/", "a/b/c", "a/b:c"] {
            assert!(bad.parse::<Account>().is_err(), "{bad}");
        }
    }
}
