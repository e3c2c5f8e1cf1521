//! `istio.security.Authorization`.

use std::sync::Arc;

use ipnet::IpNet;
use mesh_core::policy::{
    Action, Clause, Match, Policy, PolicyName, PolicyScope, Rule, ServiceAccountMatch, StringMatch,
};
use mesh_core::snapshot::Change;

use super::unknown::{Schema, refuse_unknown};
use super::{WireError, invalid, message};
use crate::proto::security as proto;

const STRING_MATCH: Schema = Schema { scalars: &[1, 2, 3], messages: &[(4, "presence", &EMPTY)] };
const EMPTY: Schema = Schema { scalars: &[], messages: &[] };
const CIDR: Schema = Schema { scalars: &[1, 2], messages: &[] };
const ACCOUNT: Schema = Schema { scalars: &[1, 2], messages: &[] };
/// Without 13, `extensions`: each is a condition that we cannot judge.
const MATCH: Schema = Schema {
    scalars: &[9, 10],
    messages: &[
        (1, "namespaces", &STRING_MATCH),
        (2, "not_namespaces", &STRING_MATCH),
        (3, "principals", &STRING_MATCH),
        (4, "not_principals", &STRING_MATCH),
        (5, "source_ips", &CIDR),
        (6, "not_source_ips", &CIDR),
        (7, "destination_ips", &CIDR),
        (8, "not_destination_ips", &CIDR),
        (11, "service_accounts", &ACCOUNT),
        (12, "not_service_accounts", &ACCOUNT),
    ],
};
const CLAUSE: Schema = Schema { scalars: &[], messages: &[(2, "matches", &MATCH)] };
const RULE: Schema = Schema { scalars: &[], messages: &[(1, "clauses", &CLAUSE)] };
/// Without 7, `extensions`, as above.
const AUTHORIZATION: Schema = Schema { scalars: &[1, 2, 3, 4, 6], messages: &[(5, "rules", &RULE)] };

/// Decodes a policy; one with anything that this version does not know is refused.
pub fn decode_authorization(bytes: &[u8]) -> Result<Change, WireError> {
    let proto: proto::Authorization = message(bytes)?;
    refuse_unknown(&AUTHORIZATION, bytes, "")?;
    policy_from_proto(&proto).map(|policy| Change::UpsertPolicy(policy.into()))
}

/// Whom a policy concerns that [`decode_authorization`] refuses, and whether it is a dry run; none if even that cannot be
/// told.
pub fn scope_of_refused(bytes: &[u8]) -> Option<(PolicyScope, bool)> {
    let proto: proto::Authorization = message(bytes).ok()?;
    Some((scope_from_proto(proto.scope)?, proto.dry_run))
}

/// `namespace/name`.
pub(super) fn policy_name(name: &str) -> Option<PolicyName> {
    let (namespace, name) = name.split_once('/')?;
    Some(PolicyName { namespace: namespace.into(), name: name.into() })
}

/// Message to policy.
pub fn policy_from_proto(proto: &proto::Authorization) -> Result<Policy, WireError> {
    if proto.name.is_empty() {
        return Err(invalid("name", "is empty"));
    }
    if !proto.extensions.is_empty() {
        return Err(WireError::Unknown { path: "extensions".into(), what: "extension".into() });
    }
    let unknown = |path: &str, value: i32| WireError::Unknown { path: path.into(), what: format!("value {value}") };
    let scope = scope_from_proto(proto.scope).ok_or_else(|| unknown("scope", proto.scope))?;
    let action = match proto::Action::try_from(proto.action) {
        Ok(proto::Action::Allow) => Action::Allow,
        Ok(proto::Action::Deny) => Action::Deny,
        Err(_) => return Err(unknown("action", proto.action)),
    };
    let name = PolicyName { namespace: proto.namespace.as_str().into(), name: proto.name.as_str().into() };
    let rules = proto.rules.iter().map(rule_from_proto).collect::<Result<_, _>>()?;
    Ok(Policy { name, scope, action, dry_run: proto.dry_run, rules })
}

fn scope_from_proto(scope: i32) -> Option<PolicyScope> {
    Some(match proto::Scope::try_from(scope).ok()? {
        proto::Scope::Global => PolicyScope::Global,
        proto::Scope::Namespace => PolicyScope::Namespace,
        proto::Scope::WorkloadSelector => PolicyScope::Workload,
    })
}

fn rule_from_proto(rule: &proto::Rule) -> Result<Rule, WireError> {
    let clause = |c: &proto::Clause| -> Result<Clause, WireError> {
        Ok(Clause { matches: c.matches.iter().map(match_from_proto).collect::<Result<_, _>>()? })
    };
    Ok(Rule { clauses: rule.clauses.iter().map(clause).collect::<Result<_, _>>()? })
}

fn match_from_proto(m: &proto::Match) -> Result<Match, WireError> {
    if !m.extensions.is_empty() {
        return Err(WireError::Unknown { path: "rules.clauses.matches.extensions".into(), what: "extension".into() });
    }
    Ok(Match {
        namespaces: strings("namespaces", &m.namespaces)?,
        not_namespaces: strings("not_namespaces", &m.not_namespaces)?,
        principals: strings("principals", &m.principals)?,
        not_principals: strings("not_principals", &m.not_principals)?,
        service_accounts: m.service_accounts.iter().map(account_from_proto).collect(),
        not_service_accounts: m.not_service_accounts.iter().map(account_from_proto).collect(),
        source_ips: networks("source_ips", &m.source_ips)?,
        not_source_ips: networks("not_source_ips", &m.not_source_ips)?,
        destination_ips: networks("destination_ips", &m.destination_ips)?,
        not_destination_ips: networks("not_destination_ips", &m.not_destination_ips)?,
        destination_ports: ports("destination_ports", &m.destination_ports)?,
        not_destination_ports: ports("not_destination_ports", &m.not_destination_ports)?,
    })
}

fn strings(field: &'static str, list: &[proto::StringMatch]) -> Result<Vec<StringMatch>, WireError> {
    use proto::string_match::MatchType;
    let one = |m: &proto::StringMatch| match &m.match_type {
        Some(MatchType::Exact(s)) => Ok(StringMatch::Exact(s.as_str().into())),
        Some(MatchType::Prefix(s)) => Ok(StringMatch::Prefix(s.as_str().into())),
        Some(MatchType::Suffix(s)) => Ok(StringMatch::Suffix(s.as_str().into())),
        Some(MatchType::Presence(_)) => Ok(StringMatch::Presence),
        None => Err(WireError::Unknown { path: field.into(), what: "kind of match".into() }),
    };
    list.iter().map(one).collect()
}

fn networks(field: &'static str, list: &[proto::Address]) -> Result<Vec<IpNet>, WireError> {
    let one = |a: &proto::Address| {
        let ip = super::address::ip_from_bytes(field, &a.address)?;
        let length = u8::try_from(a.length).map_err(|_| invalid(field, format!("prefix length {}", a.length)))?;
        IpNet::new(ip, length).map(|net| net.trunc()).map_err(|_| invalid(field, format!("prefix length {length}")))
    };
    list.iter().map(one).collect()
}

fn ports(field: &'static str, list: &[u32]) -> Result<Vec<u16>, WireError> {
    list.iter().map(|p| u16::try_from(*p).map_err(|_| invalid(field, format!("{p} is not a port")))).collect()
}

fn account_from_proto(account: &proto::ServiceAccountMatch) -> ServiceAccountMatch {
    ServiceAccountMatch {
        namespace: account.namespace.as_str().into(),
        service_account: account.service_account.as_str().into(),
    }
}

/// Policy to message.
pub fn policy_to_proto(policy: &Policy) -> proto::Authorization {
    let scope = match policy.scope {
        PolicyScope::Global => proto::Scope::Global,
        PolicyScope::Namespace => proto::Scope::Namespace,
        PolicyScope::Workload => proto::Scope::WorkloadSelector,
    };
    let action = match policy.action {
        Action::Allow => proto::Action::Allow,
        Action::Deny => proto::Action::Deny,
    };
    let clause = |c: &Clause| proto::Clause { matches: c.matches.iter().map(match_to_proto).collect() };
    let rule = |r: &Rule| proto::Rule { clauses: r.clauses.iter().map(clause).collect() };
    proto::Authorization {
        name: policy.name.name.to_string(),
        namespace: policy.name.namespace.to_string(),
        scope: scope.into(),
        action: action.into(),
        rules: policy.rules.iter().map(rule).collect(),
        dry_run: policy.dry_run,
        extensions: Vec::new(),
    }
}

fn match_to_proto(m: &Match) -> proto::Match {
    let strings = |list: &[StringMatch]| list.iter().map(string_to_proto).collect();
    let networks = |list: &[IpNet]| list.iter().map(network_to_proto).collect();
    let ports = |list: &[u16]| list.iter().map(|p| u32::from(*p)).collect();
    let accounts = |list: &[ServiceAccountMatch]| {
        list.iter()
            .map(|a| proto::ServiceAccountMatch {
                namespace: a.namespace.to_string(),
                service_account: a.service_account.to_string(),
            })
            .collect()
    };
    proto::Match {
        namespaces: strings(&m.namespaces),
        not_namespaces: strings(&m.not_namespaces),
        principals: strings(&m.principals),
        not_principals: strings(&m.not_principals),
        source_ips: networks(&m.source_ips),
        not_source_ips: networks(&m.not_source_ips),
        destination_ips: networks(&m.destination_ips),
        not_destination_ips: networks(&m.not_destination_ips),
        destination_ports: ports(&m.destination_ports),
        not_destination_ports: ports(&m.not_destination_ports),
        service_accounts: accounts(&m.service_accounts),
        not_service_accounts: accounts(&m.not_service_accounts),
        extensions: Vec::new(),
    }
}

fn string_to_proto(m: &StringMatch) -> proto::StringMatch {
    use proto::string_match::MatchType;
    let text = |s: &Arc<str>| s.to_string();
    let match_type = match m {
        StringMatch::Exact(s) => MatchType::Exact(text(s)),
        StringMatch::Prefix(s) => MatchType::Prefix(text(s)),
        StringMatch::Suffix(s) => MatchType::Suffix(text(s)),
        StringMatch::Presence => MatchType::Presence(()),
    };
    proto::StringMatch { match_type: Some(match_type) }
}

fn network_to_proto(net: &IpNet) -> proto::Address {
    proto::Address { address: super::address::ip_to_bytes(net.addr()), length: net.prefix_len().into() }
}
