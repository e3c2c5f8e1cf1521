//! May this connection reach this workload? DENY before ALLOW, no ALLOW policy means yes.
//!
//! Names, fields and results are Istio's at L4 (`security/v1beta1/authorization_policy.proto`). Where upstream's node
//! proxy fails open, this one does not:
//!
//! - A workload that names a policy which has not arrived refuses; upstream skips the policy.
//! - An empty match inside a clause is what is left of a rule whose HTTP fields were taken out. Under ALLOW it never
//!   matches, as upstream. Under DENY it matches everything; upstream lets such a rule never fire.
//! - A client of another trust domain is refused, policy or not, as upstream.
//!
//! A client without an identity (plaintext) matches no positive `principals`, `namespaces` or `serviceAccounts`, and
//! every `not` form of them. Under DENY this is how STRICT is written down. Under ALLOW it would let plaintext in
//! through `notPrincipals` and `notNamespaces`; that is decided where policies are compiled
//! ([`crate::config::authorization`]: the rule is given `principals: ["*"]` unless upstream's behaviour is asked for), so
//! that this function reads one policy language whoever wrote the policy.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::flow::{InboundFlow, Refusal, Verdict};
use crate::identity::SpiffeId;
use crate::policy::{Action, Clause, Match, Policy, PolicyName, Rule, ServiceAccountMatch, StringMatch};
use crate::snapshot::Snapshot;
use crate::workload::Workload;

/// What one policy said about a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// Which policy.
    pub policy: PolicyName,
    /// What it does when it matches; none when it has not arrived.
    pub action: Option<Action>,
    /// Whether it matched.
    pub matched: bool,
    /// The rule that matched, or what kept each rule from matching.
    pub detail: String,
}

/// Decides whether the flow may reach the workload.
pub fn authorize(snapshot: &Snapshot, destination: &Workload, flow: &InboundFlow) -> Verdict {
    if let Some(refusal) = foreign(destination, flow) {
        return Verdict::Deny(refusal);
    }
    let peer = Peer::of(flow);
    let mut missing: Option<&PolicyName> = None;
    let mut allow_concerns = false;
    let mut allowed_by: Option<&PolicyName> = None;
    for policy in snapshot.policies_for(destination) {
        let policy = match policy {
            Ok(policy) if policy.dry_run => continue,
            Ok(policy) => policy,
            Err(name) => {
                missing = missing.or(Some(name));
                continue;
            }
        };
        match policy.action {
            Action::Deny if peer.matches_policy(policy) => {
                return Verdict::Deny(Refusal::Denied(policy.name.clone()));
            }
            Action::Deny => {}
            Action::Allow => {
                allow_concerns = true;
                if allowed_by.is_none() && peer.matches_policy(policy) {
                    allowed_by = Some(&policy.name);
                }
            }
        }
    }
    match (missing, allow_concerns, allowed_by) {
        (Some(name), _, _) => Verdict::Deny(Refusal::PolicyMissing(name.clone())),
        (None, true, None) => Verdict::Deny(Refusal::NoAllowMatched),
        (None, _, allowed_by) => Verdict::Allow(allowed_by.cloned()),
    }
}

/// The same verdict, and what every policy that concerns the workload said, in the order of evaluation.
pub fn explain(snapshot: &Snapshot, destination: &Workload, flow: &InboundFlow) -> (Verdict, Vec<Trace>) {
    let peer = Peer::of(flow);
    let mut traces: Vec<Trace> = snapshot
        .policies_for(destination)
        .map(|policy| match policy {
            Ok(policy) => trace(&peer, policy),
            Err(name) => Trace {
                policy: name.clone(),
                action: None,
                matched: false,
                detail: "has not arrived; the workload refuses until it does".into(),
            },
        })
        .collect();
    // Evaluation order: DENY, then what is missing, then ALLOW.
    traces.sort_by_key(|t| match t.action {
        Some(Action::Deny) => 0,
        None => 1,
        Some(Action::Allow) => 2,
    });
    (authorize(snapshot, destination, flow), traces)
}

/// Client and destination in the form that matches compare with.
struct Peer<'a> {
    client: Option<&'a SpiffeId>,
    /// Without `spiffe://`; empty without an identity.
    principal: String,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
}

impl<'a> Peer<'a> {
    fn of(flow: &'a InboundFlow) -> Self {
        let principal = flow.client.as_ref().map_or_else(String::new, principal_of);
        Self {
            client: flow.client.as_ref(),
            principal,
            source: flow.source.to_canonical(),
            destination: flow.destination.ip().to_canonical(),
            port: flow.destination.port(),
        }
    }

    fn matches_policy(&self, policy: &Policy) -> bool {
        policy.rules.iter().any(|rule| self.matches_rule(rule, policy.action))
    }

    fn matches_rule(&self, rule: &Rule, action: Action) -> bool {
        rule.clauses.iter().all(|clause| self.matches_clause(clause, action))
    }

    fn matches_clause(&self, clause: &Clause, action: Action) -> bool {
        clause.matches.is_empty() || clause.matches.iter().any(|m| self.mismatch(m, action).is_none())
    }

    /// The first field that does not match, by its name in the YAML.
    fn mismatch(&self, m: &Match, action: Action) -> Option<&'static str> {
        if *m == Match::default() {
            return match action {
                Action::Allow => Some("HTTP fields"),
                Action::Deny => None,
            };
        }
        let namespace = self.client.map(|id| &*id.namespace);
        let principal = self.client.map(|_| &*self.principal);
        let identity = [
            ("namespaces", one(&m.namespaces, |v| matches_string(v, namespace))),
            ("notNamespaces", none(&m.not_namespaces, |v| matches_string(v, namespace))),
            ("principals", one(&m.principals, |v| matches_string(v, principal))),
            ("notPrincipals", none(&m.not_principals, |v| matches_string(v, principal))),
            ("serviceAccounts", one(&m.service_accounts, |v| self.has_account(v))),
            ("notServiceAccounts", none(&m.not_service_accounts, |v| self.has_account(v))),
        ];
        let network = [
            ("ipBlocks", one(&m.source_ips, |net| contains(net, self.source))),
            ("notIpBlocks", none(&m.not_source_ips, |net| contains(net, self.source))),
            ("destination.ip", one(&m.destination_ips, |net| contains(net, self.destination))),
            ("not destination.ip", none(&m.not_destination_ips, |net| contains(net, self.destination))),
            ("ports", one(&m.destination_ports, |port| *port == self.port)),
            ("notPorts", none(&m.not_destination_ports, |port| *port == self.port)),
        ];
        identity.into_iter().chain(network).find(|(_, matches)| !matches).map(|(field, _)| field)
    }

    fn has_account(&self, wanted: &ServiceAccountMatch) -> bool {
        self.client.is_some_and(|id| id.namespace == wanted.namespace && id.service_account == wanted.service_account)
    }
}

fn foreign(destination: &Workload, flow: &InboundFlow) -> Option<Refusal> {
    let client: &Arc<str> = &flow.client.as_ref()?.trust_domain;
    (*client != destination.identity.trust_domain).then(|| Refusal::ForeignTrustDomain(client.clone()))
}

fn principal_of(id: &SpiffeId) -> String {
    format!("{}/ns/{}/sa/{}", id.trust_domain, id.namespace, id.service_account)
}

/// A positive field: absent, or one value matches.
fn one<T>(values: &[T], matches: impl Fn(&T) -> bool) -> bool {
    values.is_empty() || values.iter().any(matches)
}

/// A `not` field: no value matches.
fn none<T>(values: &[T], matches: impl Fn(&T) -> bool) -> bool {
    !values.iter().any(matches)
}

/// Byte for byte; what does not exist matches nothing.
fn matches_string(wanted: &StringMatch, value: Option<&str>) -> bool {
    let Some(value) = value else { return false };
    match wanted {
        StringMatch::Exact(exact) => *value == **exact,
        StringMatch::Prefix(prefix) => value.starts_with(&**prefix),
        StringMatch::Suffix(suffix) => value.ends_with(&**suffix),
        StringMatch::Presence => !value.is_empty(),
    }
}

/// Membership; an IPv4 network written as IPv4-mapped IPv6 means the IPv4 addresses.
fn contains(net: &IpNet, ip: IpAddr) -> bool {
    if net.contains(&ip) {
        return true;
    }
    match (net, ip) {
        (IpNet::V6(net), IpAddr::V4(ip)) if net.prefix_len() >= 96 => net.contains(&ip.to_ipv6_mapped()),
        (IpNet::V6(_) | IpNet::V4(_), IpAddr::V4(_) | IpAddr::V6(_)) => false,
    }
}

fn trace(peer: &Peer<'_>, policy: &Policy) -> Trace {
    let hit = policy.rules.iter().position(|rule| peer.matches_rule(rule, policy.action));
    let mut detail = match hit {
        Some(index) => format!("rule {index} matches"),
        None if policy.rules.is_empty() => "has no rules and never matches".to_owned(),
        None => policy
            .rules
            .iter()
            .enumerate()
            .map(|(index, rule)| format!("rule {index}: {}", why_not(peer, rule, policy.action)))
            .collect::<Vec<_>>()
            .join("; "),
    };
    if policy.dry_run {
        detail.push_str(" (dry run: not enforced)");
    }
    Trace { policy: policy.name.clone(), action: Some(policy.action), matched: hit.is_some(), detail }
}

/// What keeps a rule from matching: the fields that differ in its first clause that does not match.
fn why_not(peer: &Peer<'_>, rule: &Rule, action: Action) -> String {
    let Some(clause) = rule.clauses.iter().find(|c| !peer.matches_clause(c, action)) else {
        return "matches".into();
    };
    let mut fields: Vec<&str> = clause.matches.iter().filter_map(|m| peer.mismatch(m, action)).collect();
    fields.dedup();
    let identity = match &peer.client {
        Some(_) => peer.principal.clone(),
        None => "no identity (plaintext)".into(),
    };
    format!("{} does not match client {identity} from {} to port {}", fields.join(", "), peer.source, peer.port)
}
