//! AuthorizationPolicy, as far as the node proxy can enforce it.
//!
//! The node proxy sees addresses, ports and identities, not HTTP. What becomes of the rest is a decision ("stricter,
//! never looser"), with a switch for upstream's way ([`HttpFields`]):
//!
//! | rule | stricter (default) | upstream |
//! |---|---|---|
//! | ALLOW with any HTTP field | allows nothing | the same |
//! | DENY, HTTP fields beside others | denies what the others match | the same |
//! | DENY, nothing but HTTP fields in an entry of `from` or `to` | the entry matches everything | the entry never matches |
//! | DENY, HTTP key in `when` | the condition counts as met | the rule never matches |
//! | CUSTOM | denies what its rules match: nobody can ask the provider | ignored |
//! | AUDIT | ignored | ignored |
//! | `notPrincipals`, `notNamespaces`, `notServiceAccounts` under ALLOW | need an identity | plaintext clients are let in |
//! | unknown `when.key` | as an HTTP key | as an HTTP key |
//!
//! The last but one row is a decision of its own: `notNamespaces: [evil]` under ALLOW reads "everybody but evil", and a
//! client that presents nothing could be anybody, evil too. Such a rule is given `principals: ["*"]`. Under DENY
//! the same fields match plaintext as upstream, which is the safe side and how STRICT is written down.
//!
//! Each deviation from what the author wrote is a [`Problem`]. An object with a value that cannot be meant is refused as
//! a whole, with the path of the field.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::objects::{
    AuthorizationPolicy, Condition, Kind, ObjectKey, Operation, PolicyAction, PolicyRule, Source, Values,
};
use super::problem::{Code, Findings, Problem};
use super::{HttpFields, Settings};
use crate::policy::{Action, Clause, Match, Policy, PolicyName, PolicyScope, Rule, ServiceAccountMatch, StringMatch};

/// Annotation of policies that are judged and reported only.
const DRY_RUN: &str = "istio.io/dry-run";

/// What an AuthorizationPolicy comes to at node proxies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enforced {
    /// None: nothing to enforce here.
    pub policy: Option<Policy>,
    /// Where it differs from what was written.
    pub problems: Vec<Problem>,
}

/// Compiles one policy. `Err`: it must not be applied.
pub fn compile(object: &AuthorizationPolicy, settings: &Settings) -> Result<Enforced, Vec<Problem>> {
    let key = ObjectKey::new(Kind::AuthorizationPolicy, &object.meta.namespace, &object.meta.name);
    let mut compilation = Compilation { object, settings, findings: Findings::about(key, &object.meta) };
    let policy = compilation.policy();
    if compilation.findings.has_errors() {
        return Err(compilation.findings.into_problems());
    }
    Ok(Enforced { policy, problems: compilation.findings.into_problems() })
}

struct Compilation<'a> {
    object: &'a AuthorizationPolicy,
    settings: &'a Settings,
    findings: Findings,
}

/// The part of an entry that the node proxy can judge, and the names of the fields that it cannot.
struct Judged {
    matches: Match,
    unseen: Vec<&'static str>,
}

impl Compilation<'_> {
    fn policy(&mut self) -> Option<Policy> {
        if !self.object.target_refs.is_empty() && !self.object.selector.is_empty() {
            self.findings.error(
                "spec.targetRefs",
                "targetRefs and selector exclude each other",
                "use targetRefs for a waypoint, selector for workloads",
            );
        }
        let action = self.action();
        // Rules are read in any case: a value that cannot be meant is an error wherever the policy applies.
        let rules = self.rules(action.unwrap_or(Action::Deny));
        if !self.object.target_refs.is_empty() {
            let names: Vec<String> = self.object.target_refs.iter().map(|t| format!("{}/{}", t.kind, t.name)).collect();
            self.findings.warn(
                Code::NeedsWaypoint,
                "spec.targetRefs",
                format!("applies at the waypoint of {} only; node proxies do not enforce it", names.join(", ")),
                "give the target a waypoint, or select the workloads with spec.selector",
            );
            return None;
        }
        let meta = &self.object.meta;
        let scope = if !self.object.selector.is_empty() {
            PolicyScope::Workload
        } else if meta.namespace == self.settings.root_namespace {
            PolicyScope::Global
        } else {
            PolicyScope::Namespace
        };
        let name = PolicyName { namespace: meta.namespace.clone(), name: meta.name.clone() };
        let dry_run = meta.annotations.get(DRY_RUN).is_some_and(|v| **v == *"true");
        action.map(|action| Policy { name, scope, action, dry_run, rules })
    }

    /// What a match means at the node proxy; none when the policy does nothing there.
    fn action(&mut self) -> Option<Action> {
        match (self.object.action, self.settings.http_fields) {
            (PolicyAction::Allow, _) => Some(Action::Allow),
            (PolicyAction::Deny, _) => Some(Action::Deny),
            (PolicyAction::Audit, _) => {
                self.findings.warn(
                    Code::ActionAtNodeProxy,
                    "spec.action",
                    "node proxies do not write audit records; the policy has no effect there",
                    "use a waypoint for AUDIT",
                );
                None
            }
            (PolicyAction::Custom, HttpFields::Stricter) => {
                self.findings.warn(
                    Code::ActionAtNodeProxy,
                    "spec.action",
                    "node proxies cannot ask an external authorizer; what the rules match is denied",
                    "attach the policy to a waypoint with targetRefs",
                );
                Some(Action::Deny)
            }
            (PolicyAction::Custom, HttpFields::UpstreamBehaviour) => {
                self.findings.warn(
                    Code::ActionAtNodeProxy,
                    "spec.action",
                    "node proxies cannot ask an external authorizer; the policy has no effect there",
                    "attach the policy to a waypoint with targetRefs",
                );
                None
            }
        }
    }

    fn rules(&mut self, action: Action) -> Vec<Rule> {
        let object = self.object;
        object.rules.iter().enumerate().filter_map(|(i, rule)| self.rule(rule, i, action)).collect()
    }

    /// None: the rule never matches at the node proxy.
    fn rule(&mut self, rule: &PolicyRule, index: usize, action: Action) -> Option<Rule> {
        let path = format!("spec.rules[{index}]");
        let mut groups: Vec<Vec<Judged>> = Vec::new();
        if let Some(from) = &rule.from {
            self.not_empty(from, &format!("{path}.from"));
            groups.push(
                from.iter().enumerate().map(|(i, s)| self.source(s, &format!("{path}.from[{i}].source"))).collect(),
            );
        }
        if let Some(to) = &rule.to {
            self.not_empty(to, &format!("{path}.to"));
            groups.push(
                to.iter().enumerate().map(|(i, o)| self.operation(o, &format!("{path}.to[{i}].operation"))).collect(),
            );
        }
        for (i, condition) in rule.when.iter().enumerate() {
            groups.push(vec![self.condition(condition, &format!("{path}.when[{i}]"))]);
        }
        let unseen: Vec<&str> = groups.iter().flatten().flat_map(|j| j.unseen.iter().copied()).collect();
        let compiled = match action {
            Action::Allow if !unseen.is_empty() => None,
            Action::Allow => Some(allow_rule(groups, self.settings.http_fields)),
            Action::Deny => deny_rule(groups, self.settings.http_fields),
        };
        if !unseen.is_empty() {
            self.explain_unseen(&path, &unseen, action, compiled.as_ref());
        }
        compiled
    }

    fn explain_unseen(&mut self, path: &str, unseen: &[&str], action: Action, compiled: Option<&Rule>) {
        let consequence = match (action, compiled) {
            (Action::Allow, _) => "the rule allows nothing there",
            (Action::Deny, None) => "the rule never denies there",
            (Action::Deny, Some(rule)) if rule.clauses.is_empty() => "the rule denies every connection there",
            (Action::Deny, Some(_)) => "the rule denies all that its other fields match there",
        };
        let mut names = unseen.to_vec();
        names.sort_unstable();
        names.dedup();
        self.findings.warn(
            Code::HttpAtNodeProxy,
            path,
            format!("node proxies do not see {}; {consequence}", names.join(", ")),
            "attach the policy to a waypoint with targetRefs, or use ports, principals, namespaces and ipBlocks only",
        );
    }

    fn source(&mut self, source: &Source, path: &str) -> Judged {
        let seen = [&source.principals, &source.namespaces, &source.service_accounts, &source.ip_blocks];
        let unseen = [("requestPrincipals", &source.request_principals), ("remoteIpBlocks", &source.remote_ip_blocks)];
        self.has_values(seen.into_iter().chain(unseen.iter().map(|(_, v)| *v)), path);
        let narrowed_otherwise = !source.principals.is_empty() || !source.namespaces.is_empty();
        if narrowed_otherwise && !source.service_accounts.is_empty() {
            self.findings.error(
                format!("{path}.serviceAccounts"),
                "serviceAccounts cannot be combined with principals or namespaces",
                "write them as separate entries of from",
            );
        }
        let (principals, not_principals) = self.principals(&source.principals, path, "principals");
        let (namespaces, not_namespaces) = self.strings(&source.namespaces, path, "namespaces");
        let (service_accounts, not_service_accounts) =
            self.service_accounts(&source.service_accounts, path, "serviceAccounts");
        let (source_ips, not_source_ips) = self.blocks(&source.ip_blocks, path, "ipBlocks");
        let matches = Match {
            principals,
            not_principals,
            namespaces,
            not_namespaces,
            service_accounts,
            not_service_accounts,
            source_ips,
            not_source_ips,
            ..Match::default()
        };
        Judged { matches, unseen: present(&unseen) }
    }

    fn operation(&mut self, operation: &Operation, path: &str) -> Judged {
        let unseen = [("hosts", &operation.hosts), ("methods", &operation.methods), ("paths", &operation.paths)];
        self.has_values(std::iter::once(&operation.ports).chain(unseen.iter().map(|(_, v)| *v)), path);
        let (destination_ports, not_destination_ports) = self.ports(&operation.ports, path, "ports");
        let matches = Match { destination_ports, not_destination_ports, ..Match::default() };
        Judged { matches, unseen: present(&unseen) }
    }

    fn condition(&mut self, condition: &Condition, path: &str) -> Judged {
        self.has_values(std::iter::once(&condition.values), path);
        let values = &condition.values;
        let mut m = Match::default();
        let mut unseen = Vec::new();
        match &*condition.key {
            "source.ip" => (m.source_ips, m.not_source_ips) = self.blocks(values, path, "values"),
            "source.namespace" => (m.namespaces, m.not_namespaces) = self.strings(values, path, "values"),
            "source.principal" => (m.principals, m.not_principals) = self.principals(values, path, "values"),
            "source.serviceAccount" => {
                (m.service_accounts, m.not_service_accounts) = self.service_accounts(values, path, "values");
            }
            "destination.ip" => (m.destination_ips, m.not_destination_ips) = self.blocks(values, path, "values"),
            "destination.port" => (m.destination_ports, m.not_destination_ports) = self.ports(values, path, "values"),
            "remote.ip" => unseen.push("remote.ip"),
            "connection.sni" => unseen.push("connection.sni"),
            key if key.starts_with("request.") => unseen.push("request attributes"),
            key if key.starts_with("experimental.envoy.filters.") => unseen.push("Envoy filter metadata"),
            key => {
                unseen.push("unknown attributes");
                self.findings.warn(
                    Code::UnknownCondition,
                    format!("{path}.key"),
                    format!("`{key}` is not an attribute of connections or requests"),
                    "see the conditions reference of AuthorizationPolicy for the known keys",
                );
            }
        }
        Judged { matches: m, unseen }
    }

    fn not_empty<T>(&mut self, list: &[T], path: &str) {
        if list.is_empty() {
            self.findings.error(path, "the list is empty", "remove the key to match everything, or fill the list");
        }
    }

    fn has_values<'v>(&mut self, mut fields: impl Iterator<Item = &'v Values>, path: &str) {
        if fields.all(Values::is_empty) {
            self.findings.error(path, "has no values", "remove the entry, or give it at least one value");
        }
    }

    fn strings(&mut self, values: &Values, path: &str, field: &str) -> (Vec<StringMatch>, Vec<StringMatch>) {
        self.explain_inner_wildcards(values, path, field);
        self.both(values, path, field, |text| Ok(StringMatch::parse(text)))
    }

    /// A `*` that is not at one end is meant as a wildcard, and stands for itself: nobody's name has one.
    fn explain_inner_wildcards(&mut self, values: &Values, path: &str, field: &str) {
        for (list, field) in [(&values.is, field.to_owned()), (&values.not, negated(field))] {
            for (i, text) in list.iter().enumerate().filter(|(_, text)| StringMatch::parse(text).has_literal_star()) {
                self.findings.warn(
                    Code::UnknownValue,
                    format!("{path}.{field}[{i}]"),
                    format!("`{text}` never matches: `*` is a wildcard at one end of a value only"),
                    "write one value for each name, or leave only the `*` at the beginning or the end",
                );
            }
        }
    }

    /// Principals are written without `spiffe://`; upstream never matches one written with it.
    fn principals(&mut self, values: &Values, path: &str, field: &str) -> (Vec<StringMatch>, Vec<StringMatch>) {
        const SCHEME: &str = "spiffe://";
        let literal = self.settings.http_fields == HttpFields::UpstreamBehaviour;
        if values.is.iter().chain(&values.not).any(|v| v.starts_with(SCHEME)) {
            let effect = if literal { "it never matches" } else { "it is read without" };
            self.findings.warn(
                Code::UnknownValue,
                format!("{path}.{field}"),
                format!("principals are written without {SCHEME}; {effect}"),
                format!("remove {SCHEME}"),
            );
        }
        self.explain_inner_wildcards(values, path, field);
        self.both(values, path, field, |text| {
            let bare = if literal { text } else { text.strip_prefix(SCHEME).unwrap_or(text) };
            Ok(StringMatch::parse(bare))
        })
    }

    fn service_accounts(
        &mut self,
        values: &Values,
        path: &str,
        field: &str,
    ) -> (Vec<ServiceAccountMatch>, Vec<ServiceAccountMatch>) {
        let own = self.object.meta.namespace.clone();
        self.both(values, path, field, |text| {
            if text.contains('*') {
                return Err("service accounts take no wildcard".into());
            }
            let (namespace, account) = match text.split_once('/') {
                Some((namespace, account)) => (Arc::from(namespace), account),
                None => (own.clone(), text),
            };
            if namespace.is_empty() || account.is_empty() || account.contains('/') {
                return Err(format!("`{text}` is not NAME or NAMESPACE/NAME"));
            }
            Ok(ServiceAccountMatch { namespace, service_account: account.into() })
        })
    }

    fn blocks(&mut self, values: &Values, path: &str, field: &str) -> (Vec<IpNet>, Vec<IpNet>) {
        self.both(values, path, field, |text| {
            parse_block(text).ok_or_else(|| format!("`{text}` is neither an address nor a CIDR"))
        })
    }

    fn ports(&mut self, values: &Values, path: &str, field: &str) -> (Vec<u16>, Vec<u16>) {
        self.both(values, path, field, |text| parse_port(text).ok_or_else(|| format!("`{text}` is not a port")))
    }

    /// Parses a field and its `not` form; values that do not parse become errors with their path.
    fn both<T>(
        &mut self,
        values: &Values,
        path: &str,
        field: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> (Vec<T>, Vec<T>) {
        let is = self.each(&values.is, &format!("{path}.{field}"), &parse);
        let not = self.each(&values.not, &format!("{path}.{}", negated(field)), &parse);
        (is, not)
    }

    fn each<T>(&mut self, values: &[Arc<str>], path: &str, parse: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let mut parsed = Vec::with_capacity(values.len());
        for (i, text) in values.iter().enumerate() {
            let result = if text.is_empty() { Err("the value is empty".into()) } else { parse(text) };
            match result {
                Ok(value) => parsed.push(value),
                Err(message) => {
                    self.findings.error(
                        format!("{path}[{i}]"),
                        message,
                        "correct the value; the policy is not applied",
                    );
                }
            }
        }
        parsed
    }
}

impl Values {
    fn is_empty(&self) -> bool {
        self.is.is_empty() && self.not.is_empty()
    }
}

impl StringMatch {
    /// Istio's order: `*` alone, leading `*`, trailing `*`, exact. So `*abc*` ends with the literal `abc*`.
    pub fn parse(text: &str) -> Self {
        if text == "*" {
            Self::Presence
        } else if let Some(suffix) = text.strip_prefix('*') {
            Self::Suffix(suffix.into())
        } else if let Some(prefix) = text.strip_suffix('*') {
            Self::Prefix(prefix.into())
        } else {
            Self::Exact(text.into())
        }
    }

    fn has_literal_star(&self) -> bool {
        match self {
            Self::Presence => false,
            Self::Suffix(text) | Self::Prefix(text) | Self::Exact(text) => text.contains('*'),
        }
    }
}

fn allow_rule(groups: Vec<Vec<Judged>>, mode: HttpFields) -> Rule {
    let clause = |group: Vec<Judged>| Clause {
        matches: group
            .into_iter()
            .map(|judged| match mode {
                HttpFields::Stricter => with_identity(judged.matches),
                HttpFields::UpstreamBehaviour => judged.matches,
            })
            .collect(),
    };
    Rule { clauses: groups.into_iter().map(clause).collect() }
}

/// "Not these" is said of clients that say who they are.
fn with_identity(mut m: Match) -> Match {
    let excludes = !(m.not_principals.is_empty() && m.not_namespaces.is_empty() && m.not_service_accounts.is_empty());
    let names = !(m.principals.is_empty() && m.namespaces.is_empty() && m.service_accounts.is_empty());
    if excludes && !names {
        m.principals.push(StringMatch::Presence);
    }
    m
}

fn deny_rule(groups: Vec<Vec<Judged>>, mode: HttpFields) -> Option<Rule> {
    let mut clauses = Vec::new();
    for group in groups {
        let entries = group.len();
        let matches: Vec<Match> = group.into_iter().map(|j| j.matches).filter(|m| *m != Match::default()).collect();
        match mode {
            // An entry of which nothing is left matches everything, and so does the OR of it with others.
            HttpFields::Stricter if matches.len() < entries => {}
            // Upstream's node proxy skips it, and a clause of nothing else never matches.
            HttpFields::UpstreamBehaviour if matches.is_empty() => return None,
            HttpFields::Stricter | HttpFields::UpstreamBehaviour => clauses.push(Clause { matches }),
        }
    }
    Some(Rule { clauses })
}

fn present(fields: &[(&'static str, &Values)]) -> Vec<&'static str> {
    fields.iter().filter(|(_, v)| !v.is_empty()).map(|(name, _)| *name).collect()
}

/// `ports` -> `notPorts`.
fn negated(field: &str) -> String {
    let mut chars = field.chars();
    chars.next().map_or_else(String::new, |first| format!("not{}{}", first.to_ascii_uppercase(), chars.as_str()))
}

/// An address or a CIDR; host bits are cut off, IPv4-mapped IPv6 becomes IPv4.
fn parse_block(text: &str) -> Option<IpNet> {
    let net = match text.parse::<IpAddr>() {
        Ok(ip) => IpNet::from(ip),
        Err(_) => text.parse::<IpNet>().ok()?,
    };
    let net = net.trunc();
    match net {
        IpNet::V6(v6) if v6.prefix_len() >= 96 => match v6.addr().to_ipv4_mapped() {
            Some(v4) => IpNet::new(v4.into(), v6.prefix_len() - 96).ok(),
            None => Some(net),
        },
        IpNet::V6(_) | IpNet::V4(_) => Some(net),
    }
}

/// 1 to 65535 in plain decimal digits.
fn parse_port(text: &str) -> Option<u16> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    plain.then(|| text.parse().ok()).flatten()
}
