//! A second interpreter of policies, written from their specification: on text, without the compiler, slow.
//!
//! It shares nothing with the crate but the short form that `language` describes, which it reads in its own way.

use std::net::IpAddr;

/// What the specification says about a flow, with every policy that may be named as the reason.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Opinion {
    Allow(Vec<String>),
    Denied(Vec<String>),
    NoAllow,
    Missing(Vec<String>),
    Foreign,
}

struct Flow<'a> {
    /// Trust domain, namespace, account.
    client: Option<[&'a str; 3]>,
    source: String,
    target: String,
    port: &'a str,
    namespace: &'a str,
    app: &'a str,
}

/// A line of a configuration.
struct Policy<'a> {
    kind: &'a str,
    options: Vec<(&'a str, &'a str)>,
    modes: Vec<&'a str>,
    rules: Vec<&'a str>,
    name: String,
}

/// `late`: number of the policy that has not arrived at the proxy.
pub(crate) fn judge(config: &str, late: usize, flow: &str) -> Opinion {
    let flow = Flow::read(flow);
    if flow.client.is_some_and(|[domain, ..]| domain != "cluster.local") {
        return Opinion::Foreign;
    }
    let is_upstream = config.contains("upstream");
    let policies: Vec<Policy<'_>> = config.lines().filter(|l| *l != "upstream").enumerate().map(Policy::read).collect();
    let (mut denied, mut allowed, mut missing, mut is_guarded) = (Vec::new(), Vec::new(), Vec::new(), false);
    for (index, policy) in policies.iter().enumerate() {
        let denies = policy.kind == "DENY" || (policy.kind == "CUSTOM" && !is_upstream);
        if !(denies || policy.kind == "ALLOW") || !policy.concerns(&flow) {
            continue;
        }
        if late == index {
            // Those without a selector are not named by anybody: as if they had not been written yet.
            missing.extend(policy.option("app").map(|_| policy.name.clone()));
            continue;
        }
        if policy.option("dry-run") == Some("true") {
            continue;
        }
        is_guarded |= !denies;
        if policy.rules.iter().any(|rule| fires(rule, denies, is_upstream, policy, &flow)) {
            if denies { &mut denied } else { &mut allowed }.push(policy.name.clone());
        }
    }
    if flow.client.is_none() && is_strict(&policies, &flow) {
        denied.push("strict".to_owned());
    }
    if !denied.is_empty() {
        Opinion::Denied(denied)
    } else if !missing.is_empty() {
        Opinion::Missing(missing)
    } else if is_guarded && allowed.is_empty() {
        Opinion::NoAllow
    } else {
        Opinion::Allow(allowed)
    }
}

impl<'a> Flow<'a> {
    fn read(text: &'a str) -> Self {
        let (client, server) = text.split_once(" -> ").expect("flow");
        let (client, source) = client.split_once('@').expect("an address");
        let (pod, port) = server.split_once(':').expect("port");
        let is_v4 = bits(source).len() == 32;
        let (namespace, app, v4, v6) = match pod {
            "web" => ("default", "web", "10.0.0.1", "fd00::1"),
            "db" => ("default", "db", "10.0.0.2", "fd00::2"),
            "cart" => ("shop", "web", "10.0.1.1", "fd00::101"),
            "gate" => ("istio-system", "web", "10.0.2.1", "fd00::201"),
            other => panic!("pod {other}"),
        };
        let parts: Vec<&str> = client.split('/').collect();
        let client = match parts[..] {
            ["plain"] => None,
            [namespace, account] => Some(["cluster.local", namespace, account]),
            [domain, _, namespace, _, account] => Some([domain, namespace, account]),
            _ => panic!("client {client}"),
        };
        Flow { client, source: bits(source), target: bits(if is_v4 { v4 } else { v6 }), port, namespace, app }
    }
}

impl<'a> Policy<'a> {
    fn read((index, line): (usize, &'a str)) -> Self {
        let head = line.split('{').next().expect("never empty");
        let mut words = head.split_whitespace();
        let kind = words.next().expect("kind");
        let is_option = |word: &&str| ["ns:", "app:", "dry-run:", "age:"].iter().any(|option| word.starts_with(option));
        let (options, modes): (Vec<&str>, Vec<&str>) = words.partition(is_option);
        let options = options.into_iter().filter_map(|word| word.split_once(':')).collect();
        let rules = line.match_indices('{').map(|(at, _)| line[at + 1..].split('}').next().expect("rule")).collect();
        Self { kind, options, modes, rules, name: format!("p{index}") }
    }

    fn option(&self, key: &str) -> Option<&'a str> {
        self.options.iter().find(|(k, _)| *k == key).map(|(_, v)| *v)
    }

    fn namespace(&self) -> &'a str {
        self.option("ns").unwrap_or("default")
    }

    fn concerns(&self, flow: &Flow<'_>) -> bool {
        let here = self.namespace() == "istio-system" || self.namespace() == flow.namespace;
        here && self.option("app").is_none_or(|app| app == flow.app)
    }
}

/// Yes, no, or: that is decided by what a node proxy cannot see.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Truth {
    No,
    Unseen,
    Yes,
}

impl Truth {
    fn of(fact: bool) -> Self {
        if fact { Self::Yes } else { Self::No }
    }

    /// The AND: as true as the least true.
    fn all(truths: impl IntoIterator<Item = Self>) -> Self {
        let truths: Vec<Self> = truths.into_iter().collect();
        [Self::No, Self::Unseen].into_iter().find(|t| truths.contains(t)).unwrap_or(Self::Yes)
    }

    /// The OR: as true as the truest.
    fn any(truths: impl IntoIterator<Item = Self>) -> Self {
        let truths: Vec<Self> = truths.into_iter().collect();
        [Self::Yes, Self::Unseen].into_iter().find(|t| truths.contains(t)).unwrap_or(Self::No)
    }
}

fn fires(rule: &str, denies: bool, is_upstream: bool, policy: &Policy<'_>, flow: &Flow<'_>) -> bool {
    let parts: Vec<Vec<Vec<&str>>> = rule.split(';').map(str::trim).filter(|p| !p.is_empty()).map(entries).collect();
    let has_unseen = parts.iter().flatten().flatten().any(|term| is_unseen(term));
    let asks_who = |term: &&str| {
        ["notPrincipals", "notNamespaces", "notServiceAccounts"].iter().any(|field| term.starts_with(field))
            || (term.starts_with("source.") && !term.starts_with("source.ip") && term.contains("!="))
    };
    let judge = |term: &&str| {
        if is_unseen(term) {
            Truth::Unseen
        } else if !denies && !is_upstream && flow.client.is_none() && asks_who(term) {
            // "All but these" is said of those who say who they are.
            Truth::No
        } else {
            Truth::of(holds(term, policy, flow))
        }
    };
    if !denies {
        return !has_unseen
            && Truth::all(parts.iter().map(|p| Truth::any(p.iter().map(|e| Truth::all(e.iter().map(judge))))))
                == Truth::Yes;
    }
    if is_upstream {
        // What cannot be seen is cut out; an entry of which nothing is left never matches.
        return parts.iter().all(|part| {
            part.iter().any(|entry| {
                let seen: Vec<&&str> = entry.iter().filter(|term| !is_unseen(term)).collect();
                !seen.is_empty() && seen.into_iter().all(|term| judge(term) == Truth::Yes)
            })
        });
    }
    Truth::all(parts.iter().map(|p| Truth::any(p.iter().map(|e| Truth::all(e.iter().map(judge)))))) != Truth::No
}

/// Entries of a part, each a list of terms that must hold together.
fn entries(part: &str) -> Vec<Vec<&str>> {
    let (_, body) = part.split_once(' ').expect("from, to or when");
    body.split('|').map(|entry| entry.split_whitespace().collect()).collect()
}

fn is_unseen(term: &str) -> bool {
    let known = [
        "principals",
        "notPrincipals",
        "namespaces",
        "notNamespaces",
        "serviceAccounts",
        "notServiceAccounts",
        "ipBlocks",
        "notIpBlocks",
        "ports",
        "notPorts",
        "source.ip",
        "source.namespace",
        "source.principal",
        "source.serviceAccount",
        "destination.ip",
        "destination.port",
    ];
    let field = term.split(['=', '!']).next().expect("never empty");
    !known.contains(&field)
}

fn holds(term: &str, policy: &Policy<'_>, flow: &Flow<'_>) -> bool {
    let (field, values) = term.split_once('=').expect("field=values");
    let (field, is_not) = match field.strip_suffix('!') {
        Some(field) => (field, true),
        None => (field, field.starts_with("not")),
    };
    let is_any = values.split(',').any(|value| match field {
        "namespaces" | "notNamespaces" | "source.namespace" => {
            flow.client.is_some_and(|[_, namespace, _]| is_like(value, namespace))
        }
        "principals" | "notPrincipals" | "source.principal" => {
            flow.client.is_some_and(|[domain, namespace, account]| {
                is_like(value, &format!("{domain}/ns/{namespace}/sa/{account}"))
            })
        }
        "serviceAccounts" | "notServiceAccounts" | "source.serviceAccount" => {
            let full = if value.contains('/') { value.to_owned() } else { format!("{}/{value}", policy.namespace()) };
            flow.client.is_some_and(|[_, namespace, account]| format!("{namespace}/{account}") == full)
        }
        "ipBlocks" | "notIpBlocks" | "source.ip" => is_within(value, &flow.source),
        "destination.ip" => is_within(value, &flow.target),
        "ports" | "notPorts" | "destination.port" => value == flow.port,
        other => panic!("field {other}"),
    });
    is_any != is_not
}

pub(crate) fn is_like(pattern: &str, value: &str) -> bool {
    let (pattern, value) = (pattern.as_bytes(), value.as_bytes());
    let backwards = |text: &[u8]| text.iter().rev().copied().collect::<Vec<u8>>();
    let begins = |text: &[u8], start: &[u8]| start.iter().enumerate().all(|(at, byte)| text.get(at) == Some(byte));
    match (pattern.first(), pattern.last()) {
        _ if pattern == b"*" => !value.is_empty(),
        (Some(b'*'), _) => begins(&backwards(value), &backwards(&pattern[1..])),
        (_, Some(b'*')) => begins(value, &pattern[..pattern.len() - 1]),
        _ => pattern == value,
    }
}

/// An address as noughts and ones: 32 of them also for an IPv4 address in IPv6 clothes.
fn bits(address: &str) -> String {
    let octets = match address.parse().expect("address") {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let octets = if octets.len() == 16 && octets.starts_with(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255]) {
        &octets[12..]
    } else {
        &octets
    };
    octets.iter().map(|octet| format!("{octet:08b}")).collect()
}

fn is_within(block: &str, address: &str) -> bool {
    let (network, length) = block.split_once('/').unwrap_or((block, "128"));
    let network_bits = bits(network);
    let written: usize = length.parse().expect("length");
    // The length counts the bits as written: 96 of them are clothes.
    let length = if network.contains(':') && network_bits.len() == 32 { written.saturating_sub(96) } else { written };
    let length = length.min(network_bits.len());
    network_bits.len() == address.len() && network_bits[..length] == address[..length]
}

/// Port before workload before namespace before mesh; the oldest of a level; UNSET asks the level above.
fn is_strict(policies: &[Policy<'_>], flow: &Flow<'_>) -> bool {
    let oldest = |namespace: &str, app: Option<&str>| {
        let age = |p: &&Policy<'_>| (p.option("age").unwrap_or("0").parse::<u64>().expect("age"), p.name.clone());
        let of_level = |p: &&Policy<'_>| p.kind == "PEER" && p.namespace() == namespace && p.option("app") == app;
        policies.iter().filter(of_level).min_by_key(age)
    };
    let is_root = flow.namespace == "istio-system";
    let workload = if is_root { None } else { oldest(flow.namespace, Some(flow.app)) };
    let namespace = if is_root { None } else { oldest(flow.namespace, None) };
    let levels = [workload, namespace, oldest("istio-system", None)];
    let own_port = format!("{}:", flow.port);
    let of_port = workload.and_then(|p| p.modes.iter().find_map(|mode| mode.strip_prefix(&own_port)));
    let of_levels = levels.iter().flatten().filter_map(|p| p.modes.iter().find(|mode| !mode.contains(':')).copied());
    let said = of_port.into_iter().chain(of_levels).find(|mode| *mode != "UNSET");
    said == Some("STRICT")
}
