//! A short form of configurations, flows and verdicts, so that a case is a line.
//!
//! ```text
//! upstream                                     upstream's behaviour instead of the stricter one
//! PEER [OPTION..] MODE [PORT:MODE..]           a PeerAuthentication
//! ACTION [OPTION..] {RULE} {RULE}              an AuthorizationPolicy; {} is the empty rule
//!
//! OPTION  name:N  ns:N  app:LABEL  age:SECONDS  dry-run:VALUE  target:KIND/NAME
//! RULE    from ENTRY | ENTRY; to ENTRY | ENTRY; when KEY=VALUE,VALUE; when KEY!=VALUE
//! ENTRY   field=VALUE,VALUE notField=VALUE
//!
//! flow    CLIENT[@ADDRESS] -> POD:PORT         CLIENT: plain, NAMESPACE/ACCOUNT or DOMAIN/ns/NAMESPACE/sa/ACCOUNT
//! verdict allow | allow POLICY | deny POLICY | deny: no allow | deny: missing POLICY | deny: foreign DOMAIN
//! ```
//!
//! Policies are called p0, p1, .. in order and live in `default` unless they say otherwise.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_core::authorize::{authorize, explain};
use mesh_core::config::objects::{
    AuthorizationPolicy, Condition, Labels, Meta, MtlsMode, Operation, PeerAuthentication, Pod, PolicyAction,
    PolicyRule, Source, TargetRef, Values,
};
use mesh_core::config::{Compiled, Compiler, Delta, HttpFields, Object, Settings};
use mesh_core::flow::{InboundFlow, Refusal, Verdict};
use mesh_core::identity::SpiffeId;
use mesh_core::policy::PolicyName;
use mesh_core::snapshot::Snapshot;
use mesh_core::workload::Workload;

const NAMESPACE: &str = "default";
const ROOT: &str = "istio-system";
const CLIENT_ADDRESS: &str = "10.0.0.9";
/// Namespace, name, label `app`, addresses.
const PODS: [(&str, &str, &str, [&str; 2]); 4] = [
    (NAMESPACE, "web", "web", ["10.0.0.1", "fd00::1"]),
    (NAMESPACE, "db", "db", ["10.0.0.2", "fd00::2"]),
    ("shop", "cart", "web", ["10.0.1.1", "fd00::101"]),
    (ROOT, "gate", "web", ["10.0.2.1", "fd00::201"]),
];

/// The verdict on each flow under a configuration.
#[track_caller]
pub(crate) fn check(config: &str, flows: &[(&str, &str)]) {
    let mesh = Mesh::read(config);
    let errors: Vec<String> =
        mesh.compiled.problems.iter().filter(|p| p.severity.as_str() == "error").map(said).collect();
    assert!(errors.is_empty(), "\n{config}\nis refused: {errors:#?}");
    for (flow, expected) in flows {
        let verdict = mesh.verdict(flow);
        assert_eq!(verdict, *expected, "\n{config}\n{flow}");
    }
}

/// `CODE severity field` of everything that is wrong.
#[track_caller]
pub(crate) fn check_problems(config: &str, expected: &[&str]) {
    let mesh = Mesh::read(config);
    let problems: Vec<String> = mesh.compiled.problems.iter().map(said).collect();
    assert_eq!(problems, expected, "\n{config}\n{:#?}", mesh.compiled.problems);
}

fn said(problem: &mesh_core::config::Problem) -> String {
    format!("{} {} {}", problem.code, problem.severity.as_str(), problem.field)
}

/// A compiled configuration with a few pods.
pub(crate) struct Mesh {
    pub(crate) compiled: Compiled,
    pub(crate) snapshot: Snapshot,
}

impl Mesh {
    pub(crate) fn read(config: &str) -> Self {
        let mut settings = Settings::default();
        if config.lines().any(|line| line.trim() == "upstream") {
            settings.http_fields = HttpFields::UpstreamBehaviour;
        }
        Self::of(Self::objects(config), settings)
    }

    /// The pods and the policies of a configuration.
    pub(crate) fn objects(config: &str) -> Vec<Object> {
        let lines = config.lines().map(str::trim).filter(|line| !line.is_empty() && *line != "upstream");
        pods().into_iter().chain(lines.enumerate().map(|(index, line)| object(line, index))).collect()
    }

    /// Of objects, to which the pods belong.
    pub(crate) fn of(objects: Vec<Object>, settings: Settings) -> Self {
        let deltas: Vec<Delta> = objects.into_iter().map(Delta::Upsert).collect();
        let compiled = Compiler::new(settings).compile(&deltas);
        let snapshot = Snapshot::default().apply(&compiled.changes);
        Self { compiled, snapshot }
    }

    pub(crate) fn pod(&self, name: &str) -> &Arc<Workload> {
        let of_name = self.snapshot.workloads().find(|w| *w.name == *name);
        of_name.unwrap_or_else(|| panic!("no pod {name}"))
    }

    #[track_caller]
    pub(crate) fn verdict(&self, flow: &str) -> String {
        let (flow, destination) = self.flow(flow);
        let verdict = authorize(&self.snapshot, destination, &flow);
        explained(&self.snapshot, destination, &flow, &verdict);
        words(&verdict)
    }

    fn flow(&self, text: &str) -> (InboundFlow, &Arc<Workload>) {
        let (client, server) = text.split_once(" -> ").expect("CLIENT -> POD:PORT");
        let (client, source) = client.split_once('@').unwrap_or((client, CLIENT_ADDRESS));
        let (pod, port) = server.split_once(':').expect("POD:PORT");
        let source: IpAddr = source.parse().expect("address");
        let destination = self.pod(pod);
        let same_family = |ip: &&IpAddr| ip.is_ipv4() == source.to_canonical().is_ipv4();
        let ip = destination.addresses.iter().find(same_family).expect("address of the family");
        let destination_addr = SocketAddr::new(*ip, port.parse().expect("port"));
        (InboundFlow { client: identity(client), source, destination: destination_addr }, destination)
    }
}

/// What explains a verdict says the same, and gives a trace of each policy that concerns the workload.
#[track_caller]
fn explained(snapshot: &Snapshot, destination: &Workload, flow: &InboundFlow, verdict: &Verdict) {
    let (again, traces) = explain(snapshot, destination, flow);
    assert_eq!(again, *verdict);
    assert_eq!(traces.len(), snapshot.policies_for(destination).count());
    let blamed = match verdict {
        Verdict::Deny(Refusal::Denied(name)) | Verdict::Allow(Some(name)) => name,
        Verdict::Deny(_) | Verdict::Allow(None) => return,
    };
    let trace = traces.iter().find(|t| t.policy == *blamed).expect("a trace of the policy that decided");
    assert!(trace.matched && trace.detail.starts_with("rule "), "{trace:?}");
}

pub(crate) fn words(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Allow(None) => "allow".to_owned(),
        Verdict::Allow(Some(policy)) => format!("allow {}", short(policy)),
        Verdict::Deny(Refusal::Denied(policy)) => format!("deny {}", short(policy)),
        Verdict::Deny(Refusal::NoAllowMatched) => "deny: no allow".to_owned(),
        Verdict::Deny(Refusal::PolicyMissing(policy)) => format!("deny: missing {}", short(policy)),
        Verdict::Deny(Refusal::ForeignTrustDomain(domain)) => format!("deny: foreign {domain}"),
        Verdict::Deny(other) => panic!("authorization never says: {other}"),
    }
}

fn short(name: &PolicyName) -> String {
    if *name.namespace == *NAMESPACE { name.name.to_string() } else { name.to_string() }
}

fn identity(client: &str) -> Option<SpiffeId> {
    let parts: Vec<&str> = client.split('/').collect();
    match parts[..] {
        ["plain"] => None,
        [namespace, account] => Some(SpiffeId::new("cluster.local", namespace, account)),
        [domain, "ns", namespace, "sa", account] => Some(SpiffeId::new(domain, namespace, account)),
        _ => panic!("`{client}` is no client"),
    }
}

pub(crate) fn pods() -> Vec<Object> {
    let pod = |(namespace, name, app, ips): (&str, &str, &str, [&str; 2])| {
        Object::Pod(Pod {
            meta: Meta { labels: labels(&[("app", app)]), ..meta(namespace, name) },
            service_account: name.into(),
            ips: ips.iter().map(|ip| ip.parse().expect("address")).collect(),
            ..Pod::default()
        })
    };
    PODS.map(pod).into()
}

pub(crate) fn meta(namespace: &str, name: &str) -> Meta {
    Meta { namespace: namespace.into(), name: name.into(), ..Meta::default() }
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| (Arc::from(*key), Arc::from(*value))).collect()
}

fn object(line: &str, index: usize) -> Object {
    let (head, rules) = line.split_at(line.find('{').unwrap_or(line.len()));
    let rules = rules.split('{').skip(1).map(|rule| read_rule(rule.trim_end().trim_end_matches('}')));
    let mut words = head.split_whitespace();
    let kind = words.next().expect("an action");
    let mut common = Common { meta: meta(NAMESPACE, &format!("p{index}")), ..Common::default() };
    let rest: Vec<&str> = words.filter(|word| !common.take(word)).collect();
    if kind == "PEER" {
        return Object::PeerAuthentication(peer_authentication(common, &rest));
    }
    assert!(rest.is_empty(), "{rest:?} in {line}");
    Object::AuthorizationPolicy(AuthorizationPolicy {
        meta: common.meta,
        selector: common.selector,
        target_refs: common.targets,
        action: match kind {
            "ALLOW" => PolicyAction::Allow,
            "DENY" => PolicyAction::Deny,
            "AUDIT" => PolicyAction::Audit,
            "CUSTOM" => PolicyAction::Custom,
            other => panic!("action {other}"),
        },
        provider: "".into(),
        rules: rules.collect(),
    })
}

#[derive(Default)]
struct Common {
    meta: Meta,
    selector: Labels,
    targets: Vec<TargetRef>,
}

impl Common {
    /// Whether the word is an option.
    fn take(&mut self, word: &str) -> bool {
        let Some((key, value)) = word.split_once(':') else { return false };
        match key {
            "name" => self.meta.name = value.into(),
            "ns" => self.meta.namespace = value.into(),
            "age" => self.meta.created_secs = value.parse().expect("seconds"),
            "app" => self.selector = labels(&[("app", value)]),
            "dry-run" => self.meta.annotations = labels(&[("istio.io/dry-run", value)]),
            "target" => {
                let (kind, name) = value.split_once('/').expect("KIND/NAME");
                self.targets.push(TargetRef { kind: kind.into(), name: name.into(), ..TargetRef::default() });
            }
            _ => return false,
        }
        true
    }
}

fn peer_authentication(common: Common, words: &[&str]) -> PeerAuthentication {
    let mut policy =
        PeerAuthentication { meta: common.meta, selector: common.selector, ..PeerAuthentication::default() };
    for word in words {
        match word.split_once(':') {
            Some((port, text)) => {
                policy.port_modes.insert(port.parse().expect("port"), mode(text));
            }
            None => policy.mode = mode(word),
        }
    }
    policy
}

fn mode(text: &str) -> MtlsMode {
    match text {
        "UNSET" => MtlsMode::Unset,
        "DISABLE" => MtlsMode::Disable,
        "PERMISSIVE" => MtlsMode::Permissive,
        "STRICT" => MtlsMode::Strict,
        other => panic!("mode {other}"),
    }
}

fn read_rule(text: &str) -> PolicyRule {
    let mut rule = PolicyRule::default();
    for part in text.split(';').map(str::trim).filter(|part| !part.is_empty()) {
        let (verb, body) = part.split_once(' ').unwrap_or((part, ""));
        let entries = || body.split('|').map(str::trim).filter(|entry| !entry.is_empty());
        match verb {
            "from" => rule.from = Some(entries().map(source).collect()),
            "to" => rule.to = Some(entries().map(operation).collect()),
            "when" => rule.when.push(condition(body)),
            other => panic!("`{other}` in {text}"),
        }
    }
    rule
}

fn source(entry: &str) -> Source {
    let mut source = Source::default();
    for (field, values) in fields(entry) {
        let (field, is_not) = positive(&field);
        let target = match &*field {
            "principals" => &mut source.principals,
            "requestPrincipals" => &mut source.request_principals,
            "namespaces" => &mut source.namespaces,
            "serviceAccounts" => &mut source.service_accounts,
            "ipBlocks" => &mut source.ip_blocks,
            "remoteIpBlocks" => &mut source.remote_ip_blocks,
            other => panic!("source.{other}"),
        };
        set(target, is_not, values);
    }
    source
}

fn operation(entry: &str) -> Operation {
    let mut operation = Operation::default();
    for (field, values) in fields(entry) {
        let (field, is_not) = positive(&field);
        let target = match &*field {
            "hosts" => &mut operation.hosts,
            "ports" => &mut operation.ports,
            "methods" => &mut operation.methods,
            "paths" => &mut operation.paths,
            other => panic!("operation.{other}"),
        };
        set(target, is_not, values);
    }
    operation
}

fn condition(text: &str) -> Condition {
    let mut values = Values::default();
    let key = match text.split_once("!=") {
        Some((key, list)) => {
            values.not = list_of(list);
            key
        }
        None => {
            let (key, list) = text.split_once('=').expect("KEY=VALUE");
            values.is = list_of(list);
            key
        }
    };
    Condition { key: key.into(), values }
}

/// `field=a,b field=c`; an entry without fields is a lone `-`.
fn fields(entry: &str) -> impl Iterator<Item = (String, Vec<Arc<str>>)> {
    entry.split_whitespace().filter(|word| *word != "-").map(|word| {
        let (field, list) = word.split_once('=').unwrap_or_else(|| panic!("`{word}` is not field=values"));
        (field.to_owned(), list_of(list))
    })
}

fn list_of(list: &str) -> Vec<Arc<str>> {
    list.split(',').map(Arc::from).collect()
}

/// `notPorts` -> (`ports`, true).
fn positive(field: &str) -> (String, bool) {
    match field.strip_prefix("not") {
        Some(rest) => (format!("{}{}", rest[..1].to_ascii_lowercase(), &rest[1..]), true),
        None => (field.to_owned(), false),
    }
}

fn set(target: &mut Values, is_not: bool, values: Vec<Arc<str>>) {
    if is_not {
        target.not = values;
    } else {
        target.is = values;
    }
}
