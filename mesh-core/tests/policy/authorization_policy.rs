//! AuthorizationPolicy as written in its specification, as far as it concerns connections.

use mesh_core::authorize::explain;
use mesh_core::config::{Compiler, Delta, Settings};
use mesh_core::flow::InboundFlow;
use mesh_core::snapshot::{Change, Snapshot};

use crate::language::{Mesh, check, check_problems};

const CLIENT: &str = "default/client -> web:80";
const PLAIN: &str = "plain -> web:80";

#[test]
fn without_a_policy_everything_is_allowed() {
    check("", &[(CLIENT, "allow"), (PLAIN, "allow")]);
}

#[test]
fn deny_wins_over_allow() {
    for config in ["ALLOW {}\nDENY {}", "DENY name:p1 {}\nALLOW name:p0 {}"] {
        check(config, &[(CLIENT, "deny p1"), (PLAIN, "deny p1")]);
    }
}

#[test]
fn a_deny_that_does_not_match_allows_nothing_and_refuses_nothing() {
    let deny = "DENY {from namespaces=evil}";
    check(deny, &[(CLIENT, "allow"), ("evil/x -> web:80", "deny p0")]);
    let with_allow = format!("{deny}\nALLOW {{from namespaces=default}}");
    check(
        &with_allow,
        &[(CLIENT, "allow p1"), ("evil/x -> web:80", "deny p0"), ("shop/cart -> web:80", "deny: no allow")],
    );
}

#[test]
fn with_an_allow_policy_what_does_not_match_is_refused() {
    let config = "ALLOW {to ports=80}";
    check(config, &[(CLIENT, "allow p0"), ("default/client -> web:81", "deny: no allow"), (PLAIN, "allow p0")]);
}

#[test]
fn one_of_several_allow_policies_is_enough() {
    let config = "ALLOW {to ports=80}\nALLOW {to ports=81}";
    check(
        config,
        &[
            (CLIENT, "allow p0"),
            ("default/client -> web:81", "allow p1"),
            ("default/client -> web:82", "deny: no allow"),
        ],
    );
}

#[test]
fn one_of_several_deny_policies_is_enough() {
    let config = "DENY {to ports=80}\nDENY {to ports=81}\nALLOW {}";
    check(
        config,
        &[(CLIENT, "deny p0"), ("default/client -> web:81", "deny p1"), ("default/client -> web:82", "allow p2")],
    );
}

#[test]
fn empty_spec_denies_all() {
    check("ALLOW", &[(CLIENT, "deny: no allow"), (PLAIN, "deny: no allow")]);
}

#[test]
fn an_allow_that_matches_undoes_an_empty_spec() {
    check("ALLOW\nALLOW {from namespaces=default}", &[(CLIENT, "allow p1"), (PLAIN, "deny: no allow")]);
}

#[test]
fn an_action_deny_without_rules_has_no_effect() {
    check("DENY", &[(CLIENT, "allow"), (PLAIN, "allow")]);
}

#[test]
fn an_empty_rule_matches_everything() {
    let everybody = [CLIENT, PLAIN, "shop/x@fd00::9 -> web:1", "default/client -> web:65535"];
    check("ALLOW {}", &everybody.map(|flow| (flow, "allow p0")));
    check("DENY {}", &everybody.map(|flow| (flow, "deny p0")));
}

#[test]
fn rules_are_alternatives() {
    let config = "ALLOW {from namespaces=shop} {to ports=81}";
    check(
        config,
        &[
            (CLIENT, "deny: no allow"),
            ("shop/cart -> web:80", "allow p0"),
            ("default/client -> web:81", "allow p0"),
            ("shop/cart -> web:81", "allow p0"),
        ],
    );
}

#[test]
fn from_to_and_when_must_all_match() {
    let config = "DENY {from namespaces=default; to ports=80; when source.ip=10.0.0.0/24}";
    check(
        config,
        &[
            (CLIENT, "deny p0"),
            ("shop/client -> web:80", "allow"),
            ("default/client -> web:81", "allow"),
            ("default/client@10.0.1.9 -> web:80", "allow"),
        ],
    );
}

#[test]
fn entries_of_from_and_of_to_are_alternatives() {
    let config =
        "DENY {from namespaces=shop | principals=cluster.local/ns/default/sa/client; to ports=80 | ports=81,82}";
    check(
        config,
        &[
            (CLIENT, "deny p0"),
            ("shop/x -> web:82", "deny p0"),
            ("default/other -> web:80", "allow"),
            ("shop/x -> web:83", "allow"),
        ],
    );
}

#[test]
fn conditions_must_all_hold() {
    let config = "DENY {when source.namespace=default; when destination.port=80,81; when source.ip!=10.9.0.0/16}";
    check(
        config,
        &[
            (CLIENT, "deny p0"),
            ("default/client -> web:82", "allow"),
            ("shop/client -> web:80", "allow"),
            ("default/client@10.9.0.1 -> web:80", "allow"),
        ],
    );
}

#[test]
fn the_same_condition_twice_is_an_and() {
    let config = "DENY {when source.namespace=a*; when source.namespace=*z}";
    check(config, &[("a-z/x -> web:80", "deny p0"), ("a-b/x -> web:80", "allow"), ("b-z/x -> web:80", "allow")]);
}

#[test]
fn different_fields_of_an_entry_must_all_match() {
    let config = "DENY {from namespaces=default principals=*/sa/client ipBlocks=10.0.0.0/8}";
    check(
        config,
        &[
            (CLIENT, "deny p0"),
            ("default/other -> web:80", "allow"),
            ("shop/client -> web:80", "allow"),
            ("default/client@172.16.0.1 -> web:80", "allow"),
            (PLAIN, "allow"),
        ],
    );
}

#[test]
fn values_of_a_field_are_alternatives() {
    let config = "DENY {from namespaces=a,b; to ports=80,443}";
    check(
        config,
        &[
            ("a/x -> web:80", "deny p0"),
            ("b/x -> web:443", "deny p0"),
            ("c/x -> web:80", "allow"),
            ("a/x -> web:81", "allow"),
        ],
    );
}

#[test]
fn a_not_field_excludes_each_of_its_values() {
    let config = "DENY {from notNamespaces=a,b; to notPorts=80,443}";
    check(
        config,
        &[
            ("c/x -> web:81", "deny p0"),
            ("a/x -> web:81", "allow"),
            ("b/x -> web:81", "allow"),
            ("c/x -> web:80", "allow"),
            ("c/x -> web:443", "allow"),
        ],
    );
}

#[test]
fn a_field_and_its_not_form_must_both_hold() {
    let config = "DENY {from namespaces=a* notNamespaces=abc; to ports=80,81 notPorts=81}";
    check(config, &[("ab/x -> web:80", "deny p0"), ("abc/x -> web:80", "allow"), ("ab/x -> web:81", "allow")]);
    let with_blocks = "DENY {from ipBlocks=10.0.0.0/8 notIpBlocks=10.1.0.0/16}";
    check(with_blocks, &[("plain@10.2.0.1 -> web:80", "deny p0"), ("plain@10.1.0.1 -> web:80", "allow")]);
}

#[test]
fn a_service_account_alone_is_of_the_policys_namespace() {
    check(
        "DENY {from serviceAccounts=client}",
        &[(CLIENT, "deny p0"), ("shop/client -> web:80", "allow"), (PLAIN, "allow")],
    );
    check(
        "DENY ns:istio-system {from serviceAccounts=client}",
        &[(CLIENT, "allow"), ("istio-system/client -> web:80", "deny istio-system/p0")],
    );
    check("DENY {from serviceAccounts=shop/client}", &[(CLIENT, "allow"), ("shop/client -> web:80", "deny p0")]);
    check(
        "DENY {when source.serviceAccount=shop/client,other}",
        &[("shop/client -> web:80", "deny p0"), ("default/other -> web:80", "deny p0"), (CLIENT, "allow")],
    );
}

#[test]
fn service_accounts_stand_alone_and_take_no_wildcard() {
    for entry in [
        "serviceAccounts=*",
        "serviceAccounts=shop/*",
        "serviceAccounts=a/b/c",
        "serviceAccounts=/a",
        "serviceAccounts=a/",
    ] {
        check_problems(
            &format!("DENY {{from {entry}}}"),
            &["MESH101 error spec.rules[0].from[0].source.serviceAccounts[0]"],
        );
    }
    for other in ["principals=x", "namespaces=x", "notPrincipals=x", "notNamespaces=x"] {
        for accounts in ["serviceAccounts=a", "notServiceAccounts=a"] {
            check_problems(
                &format!("DENY {{from {accounts} {other}}}"),
                &["MESH101 error spec.rules[0].from[0].source.serviceAccounts"],
            );
        }
    }
    check("DENY {from serviceAccounts=client ipBlocks=10.0.0.0/8}", &[(CLIENT, "deny p0")]);
}

#[test]
fn a_client_without_identity_matches_no_principal() {
    for entry in ["principals=*", "principals=cluster.local/*", "namespaces=*", "serviceAccounts=client"] {
        check(&format!("ALLOW {{from {entry}}}"), &[(PLAIN, "deny: no allow"), (CLIENT, "allow p0")]);
        check(&format!("DENY {{from {entry}}}"), &[(PLAIN, "allow"), (CLIENT, "deny p0")]);
    }
}

#[test]
fn presence_means_not_empty() {
    check("DENY {from namespaces=*}", &[("/x -> web:80", "allow"), ("a/x -> web:80", "deny p0")]);
}

#[test]
fn a_client_without_identity_matches_a_deny_of_all_but_some() {
    for entry in ["notPrincipals=*", "notPrincipals=*/sa/client", "notNamespaces=default", "notServiceAccounts=client"]
    {
        check(&format!("DENY {{from {entry}}}"), &[(PLAIN, "deny p0"), (CLIENT, "allow")]);
    }
}

#[test]
fn principals_are_written_without_the_scheme() {
    let with = "from principals=spiffe://cluster.local/ns/default/sa/client";
    check(&format!("ALLOW {{{with}}}"), &[(CLIENT, "allow p0"), (PLAIN, "deny: no allow")]);
    check(&format!("DENY {{{with}}}"), &[(CLIENT, "deny p0"), (PLAIN, "allow")]);
    check_problems(&format!("DENY {{{with}}}"), &["MESH109 warning spec.rules[0].from[0].source.principals"]);
    // Upstream compares it as it stands.
    check(&format!("upstream\nDENY {{{with}}}"), &[(CLIENT, "allow")]);
    check_problems(&format!("upstream\nDENY {{{with}}}"), &["MESH109 warning spec.rules[0].from[0].source.principals"]);
}

#[test]
fn a_policy_concerns_its_namespace() {
    let config = "DENY ns:default {}";
    check(
        config,
        &[(CLIENT, "deny p0"), ("default/client -> db:80", "deny p0"), ("default/client -> cart:80", "allow")],
    );
    let elsewhere = "DENY ns:other {}";
    check(elsewhere, &[(CLIENT, "allow")]);
    check_problems(elsewhere, &["MESH105 warning spec.selector"]);
}

#[test]
fn a_policy_with_a_selector_concerns_what_it_selects_in_its_namespace() {
    let config = "DENY app:web {}";
    check(
        config,
        &[
            (CLIENT, "deny p0"),
            ("default/client -> db:80", "allow"),
            ("default/client -> cart:80", "allow"),
            ("default/client -> gate:80", "allow"),
        ],
    );
}

#[test]
fn a_policy_of_the_root_namespace_is_mesh_wide() {
    let config = "DENY ns:istio-system {}";
    let name = "deny istio-system/p0";
    check(
        config,
        &[
            (CLIENT, name),
            ("default/client -> db:80", name),
            ("default/client -> cart:80", name),
            ("default/client -> gate:80", name),
        ],
    );
}

#[test]
fn a_selector_in_the_root_namespace_selects_in_all_namespaces() {
    let config = "DENY ns:istio-system app:web {}";
    let name = "deny istio-system/p0";
    check(
        config,
        &[
            (CLIENT, name),
            ("default/client -> cart:80", name),
            ("default/client -> gate:80", name),
            ("default/client -> db:80", "allow"),
        ],
    );
}

#[test]
fn mesh_wide_and_own_policies_are_judged_together() {
    let config =
        "ALLOW ns:istio-system {from namespaces=shop}\nALLOW {from namespaces=default}\nDENY app:web {to ports=99}";
    check(
        config,
        &[
            (CLIENT, "allow p1"),
            ("shop/x -> web:80", "allow istio-system/p0"),
            ("shop/x -> web:99", "deny p2"),
            ("other/x -> web:80", "deny: no allow"),
            ("default/client -> cart:80", "deny: no allow"),
        ],
    );
}

#[test]
fn a_policy_that_selects_nothing_is_reported() {
    check_problems("DENY app:nobody {}", &["MESH105 warning spec.selector"]);
    check_problems("DENY ns:istio-system app:nobody {}", &["MESH105 warning spec.selector"]);
    check_problems("DENY app:web {}", &[]);
}

#[test]
fn a_policy_for_a_waypoint_does_nothing_here_and_says_so() {
    let config = "DENY target:Service/web {}";
    check(config, &[(CLIENT, "allow")]);
    check_problems(config, &["MESH104 warning spec.targetRefs"]);
    check_problems(
        "DENY target:Service/web {to ports=x}",
        &["MESH101 error spec.rules[0].to[0].operation.ports[0]", "MESH104 warning spec.targetRefs"],
    );
}

#[test]
fn target_refs_and_a_selector_exclude_each_other() {
    check_problems(
        "DENY target:Service/web app:web {}",
        &["MESH101 error spec.targetRefs", "MESH104 warning spec.targetRefs"],
    );
}

#[test]
fn a_named_policy_that_has_not_arrived_denies() {
    let mesh = Mesh::read("DENY app:web {to ports=99}\nALLOW {}");
    let name = mesh.snapshot.policies().find(|p| *p.name.name == *"p0").expect("compiled").name.clone();
    let without = mesh.snapshot.apply(&[Change::RemovePolicy(name)]);
    let late = Mesh { compiled: mesh.compiled, snapshot: without };
    for flow in [CLIENT, PLAIN] {
        assert_eq!(late.verdict(flow), "deny: missing p0");
    }
    assert_eq!(late.verdict("default/client -> db:80"), "allow p1");
}

#[test]
fn a_deny_that_is_there_is_named_before_one_that_is_missing() {
    let mesh = Mesh::read("ALLOW app:web {}\nDENY {}");
    let name = mesh.snapshot.policies().find(|p| *p.name.name == *"p0").expect("compiled").name.clone();
    let without = mesh.snapshot.apply(&[Change::RemovePolicy(name)]);
    assert_eq!(Mesh { compiled: mesh.compiled, snapshot: without }.verdict(CLIENT), "deny p1");
}

#[test]
fn a_waypoint_is_judged_by_its_own_identity() {
    let config = "ALLOW app:web {from serviceAccounts=client}";
    check(config, &[(CLIENT, "allow p0"), ("default/waypoint -> web:80", "deny: no allow")]);
    let both = "ALLOW app:web {from serviceAccounts=client,waypoint}";
    check(both, &[("default/waypoint -> web:80", "allow p0")]);
}

#[test]
fn a_dry_run_is_not_enforced() {
    check("DENY dry-run:true {}", &[(CLIENT, "allow")]);
    check("ALLOW dry-run:true", &[(CLIENT, "allow")]);
    check("ALLOW dry-run:true {}\nALLOW {from namespaces=shop}", &[(CLIENT, "deny: no allow")]);
    check("DENY dry-run:false {}", &[(CLIENT, "deny p0")]);
    // Only the one word that is documented turns a policy off.
    for word in ["TRUE", "yes", "1"] {
        check(&format!("DENY dry-run:{word} {{}}"), &[(CLIENT, "deny p0")]);
    }
}

#[test]
fn a_dry_run_says_what_it_would_do() {
    let mesh = Mesh::read("DENY dry-run:true {to ports=80}");
    let flow = InboundFlow {
        client: None,
        source: "10.0.0.9".parse().expect("address"),
        destination: "10.0.0.1:80".parse().expect("address"),
    };
    let (_, traces) = explain(&mesh.snapshot, mesh.pod("web"), &flow);
    assert!(traces[0].matched && traces[0].detail == "rule 0 matches (dry run: not enforced)", "{traces:?}");
}

#[test]
fn audit_only_marks() {
    let config = "AUDIT {}\nAUDIT";
    check(config, &[(CLIENT, "allow"), (PLAIN, "allow")]);
    check_problems(config, &["MESH103 warning spec.action", "MESH103 warning spec.action"]);
}

#[test]
fn custom_cannot_be_asked_here_and_so_denies_what_it_matches() {
    let config = "CUSTOM {to ports=80}\nALLOW {}";
    check(config, &[(CLIENT, "deny p0"), ("default/client -> web:81", "allow p1")]);
    check_problems("CUSTOM {to ports=80}", &["MESH103 warning spec.action"]);
    check("CUSTOM {to paths=/admin}", &[(CLIENT, "deny p0")]);
    check("CUSTOM", &[(CLIENT, "allow")]);
    check("upstream\nCUSTOM {}", &[(CLIENT, "allow")]);
    check_problems("upstream\nCUSTOM {}", &["MESH103 warning spec.action"]);
}

#[test]
fn a_foreign_trust_domain_is_refused_policy_or_not() {
    let foreign = "evil.org/ns/default/sa/client -> web:80";
    for config in ["", "ALLOW {}", "ALLOW {from principals=evil.org/*}", "DENY {from principals=evil.org/*}"] {
        check(config, &[(foreign, "deny: foreign evil.org")]);
    }
    // Compared as it stands, not as a host name would be.
    check("", &[("CLUSTER.LOCAL/ns/default/sa/client -> web:80", "deny: foreign CLUSTER.LOCAL")]);
}

#[test]
fn a_wildcard_inside_a_value_is_named_because_it_never_matches() {
    const FROM: &str = "spec.rules[0].from[0].source";
    for (config, field) in [
        ("DENY {from namespaces=prod-*-eu}", format!("{FROM}.namespaces[0]")),
        ("ALLOW {from principals=*/ns/shop/*}", format!("{FROM}.principals[0]")),
        ("DENY {from notNamespaces=a*b}", format!("{FROM}.notNamespaces[0]")),
        ("DENY {when source.namespace=**}", "spec.rules[0].when[0].values[0]".to_owned()),
    ] {
        check_problems(config, &[&format!("MESH109 warning {field}")]);
    }
    check_problems("DENY {from namespaces=*-eu | principals=cluster.local/*}", &[]);
}

#[test]
fn an_empty_list_or_entry_is_not_guessed_at() {
    check_problems("DENY {from}", &["MESH101 error spec.rules[0].from"]);
    check_problems("DENY {to}", &["MESH101 error spec.rules[0].to"]);
    check_problems("DENY {from -}", &["MESH101 error spec.rules[0].from[0].source"]);
    check_problems("DENY {to ports=80 | -}", &["MESH101 error spec.rules[0].to[1].operation"]);
    check_problems("DENY {to ports=}", &["MESH101 error spec.rules[0].to[0].operation.ports[0]"]);
    check_problems("DENY {from namespaces=}", &["MESH101 error spec.rules[0].from[0].source.namespaces[0]"]);
}

#[test]
fn a_refused_policy_leaves_its_last_good_version_in_force() {
    let mut compiler = Compiler::new(Settings::default());
    let upserts = |config: &str| Mesh::objects(config).into_iter().map(Delta::Upsert).collect::<Vec<_>>();
    let good = compiler.compile(&upserts("DENY {to ports=80}"));
    let snapshot = Snapshot::default().apply(&good.changes);
    let bad = compiler.compile(&upserts("DENY {to ports=x}"));
    assert_eq!((bad.changes.len(), bad.problems.len()), (0, 1));
    let mesh = Mesh { compiled: bad, snapshot };
    assert_eq!(mesh.verdict(PLAIN), "deny p0");
    let again = compiler.compile(&upserts("DENY {to ports=81}"));
    assert_eq!((again.changes.len(), again.problems.len()), (1, 0));
    let mesh = Mesh { snapshot: mesh.snapshot.apply(&again.changes), compiled: again };
    assert_eq!((mesh.verdict(PLAIN), mesh.verdict("plain -> web:81")), ("allow".into(), "deny p0".into()));
}
