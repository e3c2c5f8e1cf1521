//! What the node proxy cannot see makes a rule stricter, never a no-op, and a problem says so.

use std::sync::Arc;

use mesh_core::authorize::authorize;
use mesh_core::policy::{Action, Clause, Match, Policy, PolicyName, PolicyScope, Rule};
use mesh_core::snapshot::Change;

use crate::language::{Mesh, check, check_problems, words};

const CLIENT: &str = "default/client -> web:80";
const OTHER: &str = "shop/cart -> web:80";
const PLAIN: &str = "plain -> web:80";
const EVERYBODY: [&str; 3] = [CLIENT, OTHER, PLAIN];

const IN_FROM: [&str; 4] =
    ["requestPrincipals=*", "notRequestPrincipals=a/b", "remoteIpBlocks=10.0.0.0/8", "notRemoteIpBlocks=10.0.0.0/8"];
const IN_TO: [&str; 6] =
    ["hosts=a.example", "notHosts=a.example", "methods=POST", "notMethods=GET", "paths=/admin*", "notPaths=/public"];
const IN_WHEN: [&str; 8] = [
    "request.headers[x-token]=a",
    "request.headers[x-token]!=a",
    "request.auth.claims[group]=admin",
    "request.auth.principal=*",
    "remote.ip=10.0.0.0/8",
    "connection.sni=a.example",
    "experimental.envoy.filters.a[b]=c",
    "nobody.knows=x",
];

/// Every HTTP field, as a part of a rule.
fn parts() -> impl Iterator<Item = String> {
    let from = IN_FROM.iter().map(|field| format!("from {field}"));
    let to = IN_TO.iter().map(|field| format!("to {field}"));
    from.chain(to).chain(IN_WHEN.iter().map(|condition| format!("when {condition}")))
}

#[test]
fn an_allow_rule_with_an_http_field_never_allows() {
    for part in parts() {
        for switch in ["", "upstream\n"] {
            check(&format!("{switch}ALLOW {{{part}}}"), &EVERYBODY.map(|flow| (flow, "deny: no allow")));
        }
    }
}

#[test]
fn an_allow_rule_is_taken_out_alone() {
    let config = "ALLOW {to methods=GET} {from namespaces=shop}";
    check(config, &[(OTHER, "allow p0"), (CLIENT, "deny: no allow")]);
    // One entry with HTTP fields is enough; the others of the same rule go with it.
    check("ALLOW {to methods=GET | ports=80}", &EVERYBODY.map(|flow| (flow, "deny: no allow")));
    check("ALLOW {from namespaces=default | requestPrincipals=*}", &EVERYBODY.map(|flow| (flow, "deny: no allow")));
}

#[test]
fn a_deny_rule_of_nothing_but_http_denies_everything() {
    for part in parts() {
        check(&format!("DENY {{{part}}}"), &EVERYBODY.map(|flow| (flow, "deny p0")));
    }
}

#[test]
fn a_deny_rule_with_an_http_field_denies_what_the_rest_matches() {
    check(
        "DENY {to ports=80 methods=POST}",
        &[(CLIENT, "deny p0"), (PLAIN, "deny p0"), ("default/client -> web:81", "allow")],
    );
    check("DENY {from namespaces=shop requestPrincipals=*}", &[(OTHER, "deny p0"), (CLIENT, "allow")]);
    for part in parts().filter(|part| !part.starts_with("from ")) {
        check(
            &format!("DENY {{from namespaces=shop; {part}}}"),
            &[(OTHER, "deny p0"), (CLIENT, "allow"), (PLAIN, "allow")],
        );
    }
    check(
        "DENY {from namespaces=shop; to ports=80 paths=/a; when nobody.knows=x}",
        &[(OTHER, "deny p0"), ("shop/cart -> web:81", "allow"), (CLIENT, "allow")],
    );
}

#[test]
fn an_entry_of_nothing_but_http_matches_everything_beside_others() {
    check("DENY {to ports=81 | methods=POST}", &EVERYBODY.map(|flow| (flow, "deny p0")));
    check("DENY {from namespaces=shop; to ports=81 | methods=POST}", &[(OTHER, "deny p0"), (CLIENT, "allow")]);
}

#[test]
fn the_mesh_wide_switch_gives_upstreams_behaviour() {
    // Entries keep what is left of them.
    check("upstream\nDENY {to ports=8080 methods=POST}", &[("plain -> web:8080", "deny p0"), (PLAIN, "allow")]);
    // An entry of which nothing is left never matches, and a part of such entries keeps the rule from ever firing.
    check("upstream\nDENY {from namespaces=shop; to methods=POST}", &EVERYBODY.map(|flow| (flow, "allow")));
    check("upstream\nDENY {from namespaces=shop; when request.headers[a]=b}", &EVERYBODY.map(|flow| (flow, "allow")));
    for part in parts() {
        check(&format!("upstream\nDENY {{{part}}}"), &EVERYBODY.map(|flow| (flow, "allow")));
    }
    // Beside others it is skipped.
    check("upstream\nDENY {to ports=81 | methods=POST}", &[("plain -> web:81", "deny p0"), (PLAIN, "allow")]);
    // The other rules of the policy stay.
    check("upstream\nDENY {to methods=POST} {to ports=80}", &[(PLAIN, "deny p0"), ("plain -> web:81", "allow")]);
    // Who is nobody is not one of the excluded.
    check("upstream\nALLOW {from notNamespaces=evil}", &[(PLAIN, "allow p0"), ("evil/x -> web:80", "deny: no allow")]);
}

#[test]
fn a_problem_says_so() {
    let at = "MESH102 warning spec.rules[1]";
    for switch in ["", "upstream\n"] {
        for action in ["ALLOW", "DENY"] {
            for part in parts().filter(|part| !part.contains("nobody.knows")) {
                check_problems(&format!("{switch}{action} {{}} {{{part}}}"), &[at]);
            }
            let unknown = "{when source.ip=10.0.0.1; when nobody.knows=x}";
            check_problems(
                &format!("{switch}{action} {{}} {unknown}"),
                &[at, "MESH106 warning spec.rules[1].when[1].key"],
            );
        }
    }
}

#[test]
fn the_problem_tells_what_becomes_of_the_rule() {
    let message = |config: &str| Mesh::read(config).compiled.problems[0].message.clone();
    let cases = [
        ("ALLOW {to methods=GET}", "node proxies do not see methods; the rule allows nothing there"),
        (
            "DENY {to methods=GET paths=/a}",
            "node proxies do not see methods, paths; the rule denies every connection there",
        ),
        (
            "DENY {to ports=80 methods=GET}",
            "node proxies do not see methods; the rule denies all that its other fields match there",
        ),
        ("upstream\nDENY {to methods=GET}", "node proxies do not see methods; the rule never denies there"),
    ];
    for (config, expected) in cases {
        assert_eq!(message(config), expected, "{config}");
    }
}

#[test]
fn an_unknown_condition_is_treated_as_one_that_cannot_be_seen() {
    check("ALLOW {when source.Namespace=default}", &EVERYBODY.map(|flow| (flow, "deny: no allow")));
    check("DENY {when source.Namespace=default}", &EVERYBODY.map(|flow| (flow, "deny p0")));
}

#[test]
fn all_but_some_under_allow_is_said_of_clients_with_an_identity() {
    for part in [
        "from notNamespaces=shop",
        "from notPrincipals=*/sa/cart",
        "from notServiceAccounts=shop/cart",
        "when source.namespace!=shop",
        "when source.principal!=cluster.local/ns/shop/*",
        "when source.serviceAccount!=shop/cart",
    ] {
        check(
            &format!("ALLOW {{{part}}}"),
            &[(CLIENT, "allow p0"), (OTHER, "deny: no allow"), (PLAIN, "deny: no allow")],
        );
    }
    // Fields that say nothing about identity let plaintext in as they stand.
    check("ALLOW {from notIpBlocks=10.9.0.0/16; to notPorts=81}", &[(PLAIN, "allow p0")]);
    // One entry of several may still name plaintext's address.
    check("ALLOW {from notNamespaces=shop | ipBlocks=10.0.0.0/8}", &[(PLAIN, "allow p0")]);
}

/// Policies as an upstream control plane pushes them, judged for plaintext from 10.0.0.9 to 10.0.0.1:80.
#[track_caller]
fn pushed(action: Action, clauses: Vec<Clause>, expected: &str) {
    let mesh = Mesh::read("");
    let name = PolicyName { namespace: "default".into(), name: "p0".into() };
    let rules = vec![Rule { clauses }];
    let policy = Policy { name, scope: PolicyScope::Namespace, action, dry_run: false, rules };
    let snapshot = mesh.snapshot.apply(&[Change::UpsertPolicy(Arc::new(policy))]);
    let flow = mesh_core::flow::InboundFlow {
        client: None,
        source: "10.0.0.9".parse().expect("address"),
        destination: "10.0.0.1:80".parse().expect("address"),
    };
    assert_eq!(words(&authorize(&snapshot, mesh.pod("web"), &flow)), expected);
}

#[test]
fn an_empty_match_that_upstream_left_behind_denies_and_never_allows() {
    let clause = |ports: &[u16]| Clause {
        matches: ports.iter().map(|port| Match { destination_ports: vec![*port], ..Match::default() }).collect(),
    };
    let empty = || Clause { matches: vec![Match::default()] };
    pushed(Action::Allow, vec![empty()], "deny: no allow");
    pushed(Action::Allow, vec![clause(&[80]), empty()], "deny: no allow");
    pushed(
        Action::Allow,
        vec![Clause { matches: vec![Match::default(), clause(&[80]).matches.remove(0)] }],
        "allow p0",
    );
    pushed(Action::Deny, vec![empty()], "deny p0");
    pushed(Action::Deny, vec![clause(&[80]), empty()], "deny p0");
    pushed(Action::Deny, vec![clause(&[81]), empty()], "allow");
    // A clause of no matches says nothing, a rule of no clauses is the empty rule.
    for (action, verdict) in [(Action::Allow, "allow p0"), (Action::Deny, "deny p0")] {
        pushed(action, vec![clause(&[])], verdict);
        pushed(action, vec![], verdict);
    }
}

#[test]
fn a_block_of_ipv4_in_ipv6_clothes_that_upstream_pushes_means_ipv4() {
    let from = |block: &str| {
        vec![Clause { matches: vec![Match { source_ips: vec![block.parse().expect("block")], ..Match::default() }] }]
    };
    for (block, verdict) in [
        ("::ffff:0:0/96", "deny p0"),
        ("::ffff:10.0.0.0/104", "deny p0"),
        ("::ffff:10.0.0.9/128", "deny p0"),
        ("::ffff:10.0.0.8/128", "allow"),
        ("::ffff:11.0.0.0/104", "allow"),
        ("::/0", "allow"),
        ("::/95", "allow"),
    ] {
        pushed(Action::Deny, from(block), verdict);
    }
}
