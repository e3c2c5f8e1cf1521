//! PeerAuthentication: when does a workload refuse plaintext?
//!
//! A port's mode (only in a policy with a selector) beats the workload's, that the namespace's, that the mesh's, and
//! without any it is PERMISSIVE. UNSET inherits. Of several policies at one level the oldest counts. The answer goes to
//! node proxies as DENY policies that match clients without an identity, under the names that upstream gives them:
//! `istio_converted_static_strict` and `converted_peer_authentication_NAME`.
//!
//! DISABLE and PERMISSIVE mean the same for a server (mTLS is always possible in the mesh). Upstream forgets a port's
//! DISABLE below an inherited STRICT; here it counts.

use std::sync::Arc;

use super::objects::{Kind, MtlsMode, ObjectKey, PeerAuthentication};
use super::problem::{Code, Findings, Problem};
use crate::policy::{Action, Clause, Match, Policy, PolicyName, PolicyScope, Rule, StringMatch};

/// Name of the policy that refuses all plaintext, in the root namespace.
pub const STATIC_STRICT: &str = "istio_converted_static_strict";
/// What the name of a converted PeerAuthentication begins with.
pub const CONVERTED_PREFIX: &str = "converted_peer_authentication_";

/// The policy that a workload names when plaintext is refused on all its ports.
pub fn static_strict(root_namespace: &Arc<str>) -> Policy {
    let name = PolicyName { namespace: root_namespace.clone(), name: STATIC_STRICT.into() };
    deny(name, vec![no_identity()])
}

/// What is wrong with the object, with errors that keep it from being applied.
pub(crate) fn findings(policy: &PeerAuthentication, root_namespace: &str) -> Findings {
    let key = ObjectKey::new(Kind::PeerAuthentication, &policy.meta.namespace, &policy.meta.name);
    let mut findings = Findings::about(key, &policy.meta);
    if policy.selector.is_empty() && !policy.port_modes.is_empty() {
        findings.error(
            "spec.portLevelMtls",
            "ports are those of workloads, so portLevelMtls needs a selector",
            "add spec.selector.matchLabels, or remove portLevelMtls",
        );
    }
    for port in policy.port_modes.keys().filter(|p| **p == 0) {
        findings.error(format!("spec.portLevelMtls.{port}"), "0 is not a port", "use 1 to 65535");
    }
    if *policy.meta.namespace == *root_namespace && !policy.selector.is_empty() {
        findings.warn(
            Code::NotEffective,
            "spec.selector",
            "a PeerAuthentication with a selector in the root namespace is ignored",
            "move it to the workload's namespace, or remove the selector to make it mesh-wide",
        );
    }
    findings
}

/// A warning for one that an older one of the same level hides.
pub(crate) fn hidden_by(policy: &PeerAuthentication, winner: &PeerAuthentication) -> Problem {
    let key = ObjectKey::new(Kind::PeerAuthentication, &policy.meta.namespace, &policy.meta.name);
    let mut findings = Findings::about(key, &policy.meta);
    findings.warn(
        Code::NotEffective,
        "",
        format!("{} is older and has no selector either; this one is ignored", winner.meta.name),
        "keep one PeerAuthentication without selector in a namespace",
    );
    findings.into_problems().remove(0)
}

/// A warning for one with a selector that is ignored on workloads that an older one selects, too.
pub(crate) fn outranked_by(policy: &PeerAuthentication, older: &str, workloads: usize) -> Problem {
    let key = ObjectKey::new(Kind::PeerAuthentication, &policy.meta.namespace, &policy.meta.name);
    let mut findings = Findings::about(key, &policy.meta);
    findings.warn(
        Code::NotEffective,
        "spec.selector",
        format!(
            "on {workloads} of its workloads {older} counts, which is older or sorts first; this one is ignored there"
        ),
        "merge the two, or change the selectors so that each workload has one PeerAuthentication",
    );
    findings.into_problems().remove(0)
}

/// Which of several at one level counts: the oldest, of the same age the one whose name sorts first.
pub(crate) fn oldest<'a>(
    policies: impl Iterator<Item = &'a Arc<PeerAuthentication>>,
) -> Option<&'a Arc<PeerAuthentication>> {
    policies.min_by(|a, b| (a.meta.created_secs, &a.meta.name).cmp(&(b.meta.created_secs, &b.meta.name)))
}

/// Whether plaintext is refused, given the mode of one level and what the level above says.
pub fn refuses_plaintext(mode: MtlsMode, inherited: bool) -> bool {
    match mode {
        MtlsMode::Unset => inherited,
        MtlsMode::Strict => true,
        MtlsMode::Permissive | MtlsMode::Disable => false,
    }
}

/// The policy that a workload must name; `inherited` is what its namespace says, `policy` the one that selects it.
pub(crate) fn policy_for(
    inherited: bool,
    policy: Option<&PeerAuthentication>,
    root_namespace: &Arc<str>,
) -> Option<PolicyName> {
    let base = policy.map_or(inherited, |p| refuses_plaintext(p.mode, inherited));
    match policy {
        Some(policy) if converted(policy, inherited).is_some() => Some(converted_name(policy)),
        Some(_) | None if base => Some(PolicyName { namespace: root_namespace.clone(), name: STATIC_STRICT.into() }),
        Some(_) | None => None,
    }
}

/// The DENY policy for ports whose mode differs from the workload's; none when no port differs.
pub fn converted(policy: &PeerAuthentication, inherited: bool) -> Option<Policy> {
    let base = refuses_plaintext(policy.mode, inherited);
    let different: Vec<u16> =
        policy.port_modes.iter().filter(|(_, mode)| refuses_plaintext(**mode, base) != base).map(|(p, _)| *p).collect();
    if policy.selector.is_empty() || different.is_empty() {
        return None;
    }
    let ports = if base {
        Match { not_destination_ports: different, ..Match::default() }
    } else {
        Match { destination_ports: different, ..Match::default() }
    };
    Some(deny(converted_name(policy), vec![no_identity(), Clause { matches: vec![ports] }]))
}

fn converted_name(policy: &PeerAuthentication) -> PolicyName {
    let name = format!("{CONVERTED_PREFIX}{}", policy.meta.name).into();
    PolicyName { namespace: policy.meta.namespace.clone(), name }
}

fn no_identity() -> Clause {
    Clause { matches: vec![Match { not_principals: vec![StringMatch::Presence], ..Match::default() }] }
}

fn deny(name: PolicyName, clauses: Vec<Clause>) -> Policy {
    Policy { name, scope: PolicyScope::Workload, action: Action::Deny, dry_run: false, rules: vec![Rule { clauses }] }
}

#[cfg(test)]
mod tests {
    use crate::config::objects::{Meta, Object, Pod};
    use crate::config::{Compiler, Delta, Settings};

    use super::*;

    fn meta(name: &str, created_secs: u64) -> Meta {
        Meta { namespace: "ns".into(), name: name.into(), created_secs, ..Meta::default() }
    }

    fn pod(name: &str, labels: &[&str]) -> Delta {
        let labels = labels.iter().map(|label| (Arc::from(*label), Arc::from("x"))).collect();
        let ip = format!("10.0.0.{}", name.len()).parse().expect("an address");
        Delta::Upsert(Object::Pod(Pod { meta: Meta { labels, ..meta(name, 0) }, ips: vec![ip], ..Pod::default() }))
    }

    fn authentication(name: &str, created_secs: u64, label: &str) -> Delta {
        let selector = [(Arc::from(label), Arc::from("x"))].into();
        let mode = MtlsMode::Strict;
        let policy = PeerAuthentication { meta: meta(name, created_secs), selector, mode, ..Default::default() };
        Delta::Upsert(Object::PeerAuthentication(policy))
    }

    #[test]
    fn of_several_that_select_a_workload_those_that_are_ignored_are_reported() {
        let mut compiler = Compiler::new(Settings::default());
        let mut check = |deltas: &[Delta], expected: &[&str]| {
            let problems = compiler.compile(deltas).problems;
            let found: Vec<String> =
                problems.iter().map(|p| format!("{} {} {}: {}", p.code, p.object.name, p.field, p.message)).collect();
            assert_eq!(found, expected);
        };
        let young = "MESH108 young spec.selector: on 2 of its workloads old counts, which is older or sorts first; \
                     this one is ignored there";
        let pods = [pod("p", &["a"]), pod("pp", &["a", "b"]), pod("ppp", &["a", "b", "c"])];
        check(&[&pods[..], &[authentication("young", 2, "a"), authentication("old", 1, "b")]].concat(), &[young]);
        check(
            &[authentication("middle", 1, "c")],
            &[
                // Of the same age, the name that sorts first counts.
                "MESH108 old spec.selector: on 1 of its workloads middle counts, which is older or sorts first; \
                 this one is ignored there",
                "MESH108 young spec.selector: on 1 of its workloads middle counts, which is older or sorts first; \
                 this one is ignored there",
                "MESH108 young spec.selector: on 1 of its workloads old counts, which is older or sorts first; \
                 this one is ignored there",
            ],
        );
        let gone = |name: &str| Delta::Remove(ObjectKey::new(Kind::PeerAuthentication, "ns", name));
        check(&[gone("middle")], &[young]);
        check(&[gone("old")], &[]);
    }
}
