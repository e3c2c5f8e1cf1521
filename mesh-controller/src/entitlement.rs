//! Which identities a node may ask certificates for.
//!
//! A node acts for the pods that run on it, and for nobody else: a node that was taken over gives its taker the
//! identities of its own workloads and no more.

use std::collections::BTreeSet;

use mesh_core::identity::{InvalidSpiffeId, SpiffeId};

/// Why an identity is not given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EntitlementRefusal {
    /// The request names none.
    #[error("the request names no identity: set ImpersonatedIdentity in its metadata")]
    Missing,
    /// It is not a SPIFFE ID.
    #[error(transparent)]
    Invalid(#[from] InvalidSpiffeId),
    /// It belongs to another mesh.
    #[error("{asked} is not of trust domain {ours}")]
    TrustDomain {
        /// What was asked for.
        asked: SpiffeId,
        /// Ours.
        ours: String,
    },
    /// No such workload runs there.
    #[error("no pod with identity {asked} runs on node {node}")]
    NotOnNode {
        /// What was asked for.
        asked: SpiffeId,
        /// Who asked.
        node: String,
    },
}

/// Decides on a request of a node, given the identities of the pods on it.
pub fn entitle(
    node: &str,
    asked: Option<&str>,
    trust_domain: &str,
    on_node: &BTreeSet<SpiffeId>,
) -> Result<SpiffeId, EntitlementRefusal> {
    let asked: SpiffeId = asked.ok_or(EntitlementRefusal::Missing)?.parse()?;
    if *asked.trust_domain != *trust_domain {
        return Err(EntitlementRefusal::TrustDomain { asked, ours: trust_domain.to_owned() });
    }
    if !on_node.contains(&asked) {
        return Err(EntitlementRefusal::NotOnNode { asked, node: node.to_owned() });
    }
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_identities_of_the_node_and_the_trust_domain() {
        let on_node = BTreeSet::from([SpiffeId::new("cluster.local", "shop", "web")]);
        let check = |asked: Option<&str>, expected: &str| {
            let got = match entitle("node-a", asked, "cluster.local", &on_node) {
                Ok(id) => id.to_string(),
                Err(refusal) => refusal.to_string(),
            };
            assert!(got.contains(expected), "{asked:?}: {got}");
        };
        check(Some("spiffe://cluster.local/ns/shop/sa/web"), "spiffe://cluster.local/ns/shop/sa/web");
        check(Some("spiffe://cluster.local/ns/shop/sa/db"), "no pod with identity");
        check(Some("spiffe://cluster.local/ns/default/sa/web"), "no pod with identity");
        check(Some("spiffe://evil.local/ns/shop/sa/web"), "not of trust domain cluster.local");
        check(Some("spiffe://Cluster.local/ns/shop/sa/web"), "is not spiffe://");
        check(Some("spiffe://cluster.local/ns/shop/sa/web/"), "is not spiffe://");
        check(Some("*"), "is not spiffe://");
        check(None, "names no identity");
    }
}
