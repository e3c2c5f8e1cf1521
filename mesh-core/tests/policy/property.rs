//! Random policies and flows: the crate and the naive interpreter agree, always.

use std::cell::RefCell;

use mesh_core::config::Severity;
use mesh_core::snapshot::Change;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::language::Mesh;
use crate::naive::{Opinion, judge};

/// Configurations; each is asked about [`FLOWS`] flows.
const SHORT: u32 = 3_000;
const LONG: u32 = 100_000;
const FLOWS: usize = 6;
const MAX_POLICIES: usize = 5;

#[test]
fn the_verdict_is_that_of_the_naive_interpreter() {
    let is_long = std::env::var("MESH_TEST_LONG").is_ok_and(|value| value == "1");
    let config = Config { cases: if is_long { LONG } else { SHORT }, failure_persistence: None, ..Config::default() };
    let seen = RefCell::new([0_u32; 6]);
    let cases = (configuration(), 0..MAX_POLICIES, prop::collection::vec(flow(), FLOWS));
    let result = TestRunner::new(config).run(&cases, |(config, late, flows)| {
        let mesh = without(Mesh::read(&config), late);
        for flow in &flows {
            seen.borrow_mut()[agree(&mesh, &config, late, flow)?] += 1;
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    // Kinds of verdict that hardly occur would hold whatever the code does.
    assert!(seen.borrow().iter().all(|count| *count > SHORT / 20), "verdicts by kind: {seen:?}");
}

/// As a proxy has it that one policy did not reach.
fn without(mut mesh: Mesh, late: usize) -> Mesh {
    let name = format!("p{late}");
    let withheld = mesh.snapshot.policies().find(|p| *p.name.name == *name).map(|p| p.name.clone());
    mesh.snapshot = mesh.snapshot.apply(&withheld.map(Change::RemovePolicy).into_iter().collect::<Vec<_>>());
    mesh
}

/// The kind of verdict.
fn agree(mesh: &Mesh, config: &str, late: usize, flow: &str) -> Result<usize, TestCaseError> {
    let verdict = mesh.verdict(flow);
    let opinion = judge(config, late, flow);
    let blamed = verdict.rsplit([' ', '/']).next().unwrap_or_default();
    let is_strict = blamed == "istio_converted_static_strict" || blamed.starts_with("converted_peer_authentication_");
    let blamed = if is_strict { "strict" } else { blamed };
    let is_among = |names: &[String]| names.iter().any(|name| name == blamed);
    let (kind, agree) = match &opinion {
        Opinion::Allow(by) if by.is_empty() => (0, verdict == "allow"),
        Opinion::Allow(by) => (1, verdict.starts_with("allow ") && is_among(by)),
        Opinion::Denied(by) => (2, verdict.starts_with("deny ") && is_among(by)),
        Opinion::NoAllow => (3, verdict == "deny: no allow"),
        Opinion::Missing(names) => (4, verdict.starts_with("deny: missing ") && is_among(names)),
        Opinion::Foreign => (5, verdict.starts_with("deny: foreign ")),
    };
    let errors = mesh.compiled.problems.iter().filter(|p| p.severity == Severity::Error).count();
    prop_assert_eq!(errors, 0, "\n{}\n{:#?}", config, mesh.compiled.problems);
    prop_assert!(agree, "\n{config}\n(late: p{late})\n{flow}\nspecification: {opinion:?}\nthe crate: {verdict}\n");
    Ok(kind)
}

fn configuration() -> impl Strategy<Value = String> {
    let line = prop_oneof![4 => authorization(), 1 => peer()];
    let upstream = prop_oneof![3 => Just(None), 1 => Just(Some("upstream".to_owned()))];
    (upstream, prop::collection::vec(line, 0..=MAX_POLICIES))
        .prop_map(|(upstream, lines)| upstream.into_iter().chain(lines).collect::<Vec<_>>().join("\n"))
}

fn word(words: &'static [&'static str]) -> impl Strategy<Value = String> {
    prop::sample::select(words).prop_map(str::to_owned)
}

/// One to three different values.
fn list(values: &'static [&'static str]) -> impl Strategy<Value = String> {
    prop::sample::subsequence(values, 1..=3.min(values.len())).prop_map(|values| values.join(","))
}

fn options() -> impl Strategy<Value = String> {
    let namespace = word(&["", " ns:default", " ns:shop", " ns:istio-system"]);
    let selector = word(&["", "", " app:web", " app:db"]);
    (namespace, selector).prop_map(|(namespace, selector)| namespace + &selector)
}

fn authorization() -> impl Strategy<Value = String> {
    let action = prop_oneof![5 => word(&["ALLOW", "DENY"]), 1 => word(&["AUDIT", "CUSTOM"])];
    let dry_run = prop_oneof![8 => Just(""), 1 => Just(" dry-run:true"), 1 => Just(" dry-run:false")];
    (action, options(), dry_run, prop::collection::vec(rule(), 0..4))
        .prop_map(|(action, options, dry_run, rules)| format!("{action}{options}{dry_run} {}", rules.concat()))
}

fn rule() -> impl Strategy<Value = String> {
    let from = prop::option::of(part("from", source()));
    let to = prop::option::of(part("to", operation()));
    let when = prop::collection::vec(condition(), 0..3);
    (from, to, when).prop_map(|(from, to, when)| {
        let when = when.into_iter().map(|condition| format!("when {condition}"));
        format!("{{{}}}", from.into_iter().chain(to).chain(when).collect::<Vec<_>>().join("; "))
    })
}

fn part(verb: &'static str, entry: impl Strategy<Value = String>) -> impl Strategy<Value = String> {
    prop::collection::vec(entry, 1..4).prop_map(move |entries| format!("{verb} {}", entries.join(" | ")))
}

const NAMESPACES: &[&str] =
    &["default", "shop", "*", "def*", "*ault", "s*p", "*o*", "sho", "hop", "**", "istio-system", "shop*", "*shop"];
const PRINCIPALS: &[&str] = &[
    "cluster.local/ns/default/sa/client",
    "cluster.local/ns/shop/sa/cart",
    "cluster.local/*",
    "cluster.local/ns/default/*",
    "*/sa/client",
    "*cart",
    "*",
    "*/ns/*",
    "evil.org/*",
    "cluster.local/ns/*/sa/client",
];
const ACCOUNTS: &[&str] = &["client", "cart", "default/client", "shop/cart", "shop/client"];
const BLOCKS: &[&str] = &[
    "10.0.0.0/8",
    "10.0.0.9",
    "10.0.0.0/24",
    "0.0.0.0/0",
    "192.168.1.128/25",
    "192.168.1.200/32",
    "::/0",
    "fd00::/16",
    "fd00::9",
    "fd00::101/128",
    "::ffff:10.0.0.0/104",
    "::ffff:10.0.0.9",
    "10.0.0.1",
    "fd00::/120",
];
const PORTS: &[&str] = &["80", "81", "443", "8080", "65535"];

/// Different fields, each at most once.
fn fields(all: Vec<BoxedStrategy<String>>) -> impl Strategy<Value = String> {
    let count = all.len();
    prop::sample::subsequence((0..count).collect::<Vec<_>>(), 1..=2.min(count))
        .prop_flat_map(move |chosen| chosen.into_iter().map(|index| all[index].clone()).collect::<Vec<_>>())
        .prop_map(|terms| terms.join(" "))
}

fn term(field: &'static str, values: &'static [&'static str]) -> BoxedStrategy<String> {
    list(values).prop_map(move |values| format!("{field}={values}")).boxed()
}

fn source() -> impl Strategy<Value = String> {
    let by_identity = fields(vec![
        term("principals", PRINCIPALS),
        term("notPrincipals", PRINCIPALS),
        term("namespaces", NAMESPACES),
        term("notNamespaces", NAMESPACES),
        term("ipBlocks", BLOCKS),
        term("notIpBlocks", BLOCKS),
    ]);
    let by_account = fields(vec![
        term("serviceAccounts", ACCOUNTS),
        term("notServiceAccounts", ACCOUNTS),
        term("ipBlocks", BLOCKS),
        term("notIpBlocks", BLOCKS),
    ]);
    let with_http = fields(vec![
        term("requestPrincipals", &["*", "issuer/subject"]),
        term("notRemoteIpBlocks", BLOCKS),
        term("namespaces", NAMESPACES),
        term("principals", PRINCIPALS),
    ]);
    prop_oneof![4 => by_identity, 2 => by_account, 1 => with_http]
}

fn operation() -> impl Strategy<Value = String> {
    let by_port = fields(vec![term("ports", PORTS), term("notPorts", PORTS)]);
    let with_http = fields(vec![
        term("ports", PORTS),
        term("methods", &["GET", "POST"]),
        term("notPaths", &["/admin", "/a*"]),
        term("hosts", &["a.example"]),
    ]);
    prop_oneof![4 => by_port, 1 => with_http]
}

fn condition() -> impl Strategy<Value = String> {
    let of = |key: &'static str, values: &'static [&'static str]| {
        (any::<bool>(), list(values)).prop_map(move |(is_not, v)| format!("{key}{}={v}", if is_not { "!" } else { "" }))
    };
    prop_oneof![
        2 => of("source.ip", BLOCKS),
        2 => of("source.namespace", NAMESPACES),
        2 => of("source.principal", PRINCIPALS),
        2 => of("source.serviceAccount", ACCOUNTS),
        2 => of("destination.ip", BLOCKS),
        2 => of("destination.port", PORTS),
        1 => of("request.headers[x-a]", &["a", "b"]),
        1 => of("connection.sni", &["a.example", "b"]),
        1 => of("nobody.knows", &["a", "b"]),
    ]
}

fn peer() -> impl Strategy<Value = String> {
    let mode = || word(&["UNSET", "DISABLE", "PERMISSIVE", "STRICT"]);
    let age = prop::option::of(0_u8..3);
    let ports = prop::collection::btree_map(prop::sample::select(&["80", "81", "443"][..]), mode(), 0..3);
    (options(), age, mode(), ports).prop_map(|(options, age, mode, ports)| {
        // Ports are those of workloads, so they need a selector.
        let ports =
            ports.into_iter().filter(|_| options.contains("app:")).map(|(port, mode)| format!(" {port}:{mode}"));
        let age = age.map_or_else(String::new, |age| format!(" age:{age}"));
        format!("PEER{options}{age} {mode}{}", ports.collect::<String>())
    })
}

fn flow() -> impl Strategy<Value = String> {
    let client = prop_oneof![
        2 => Just("plain"),
        3 => Just("default/client"),
        3 => Just("shop/cart"),
        1 => Just("shop/client"),
        1 => Just("istio-system/gate"),
        1 => Just("evil.org/ns/default/sa/client"),
    ];
    let source = prop::sample::select(
        &[
            "10.0.0.9",
            "10.0.0.1",
            "10.200.1.1",
            "11.0.0.9",
            "192.168.1.200",
            "192.168.1.100",
            "fd00::9",
            "fd00::101",
            "2001:db8::1",
            "::ffff:10.0.0.9",
        ][..],
    );
    let pod = prop::sample::select(&["web", "web", "db", "cart", "gate"][..]);
    (client, source, pod, prop::sample::select(PORTS))
        .prop_map(|(client, source, pod, port)| format!("{client}@{source} -> {pod}:{port}"))
}
