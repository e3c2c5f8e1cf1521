//! The incumbents' advisories about authorization that concern connections, each by name.

use std::cell::Cell;

use mesh_core::config::objects::{Labels, MtlsMode, PeerAuthentication, Service};
use mesh_core::config::{Object, Settings};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::language::{Mesh, check, check_problems, meta, pods};
use crate::naive::is_like;

/// CVE-2026-39350: dots of service accounts reached a regular expression unescaped. Names are compared as they stand.
#[test]
fn cve_2026_39350_names_are_literal() {
    for (written, other) in [
        ("a.b", "axb"),
        ("a.b", "a-b"),
        ("a+b", "aab"),
        (".*x", "abx"),
        ("[a-z]", "b"),
        ("(a)", "a"),
        ("a?", "a"),
        ("^a$", "a"),
        ("\\w", "w"),
        ("ä", "a"),
        ("ａ", "a"),
        ("é", "e\u{301}"),
        ("ſ", "s"),
        ("K", "\u{212a}"),
        ("İ", "i"),
    ] {
        let flow = |namespace: &str, account: &str| format!("{namespace}/{account} -> web:80");
        let same = flow(written, written);
        let decoys = [flow(written, other), flow(other, written), flow(other, other)];
        let by_namespace = format!("DENY {{from namespaces={written}}}");
        check(
            &by_namespace,
            &[(&same, "deny p0"), (&decoys[0], "deny p0"), (&decoys[1], "allow"), (&decoys[2], "allow")],
        );
        let of_both =
            |verdict| [(&*same, verdict), (&*decoys[0], "allow"), (&*decoys[1], "allow"), (&*decoys[2], "allow")];
        check(&format!("DENY {{from principals=cluster.local/ns/{written}/sa/{written}}}"), &of_both("deny p0"));
        if !written.contains('*') {
            check(&format!("DENY {{from serviceAccounts={written}/{written}}}"), &of_both("deny p0"));
        }
    }
}

/// The same, of all names and patterns.
#[test]
fn cve_2026_39350_patterns_match_as_the_naive_matcher_says() {
    let letters =
        prop::sample::select(vec!["a", "b", ".", "*", "+", "-", "_", "é", "\u{301}", "K", "\u{212a}", "\\", "^", "("]);
    let text = prop::collection::vec(letters, 1..5).prop_map(|letters| letters.concat());
    let matched = Cell::new(0_u32);
    let config = Config { cases: 4_000, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new(config).run(&(text.clone(), text, any::<bool>()), |(pattern, other, is_alike)| {
        // By chance alone hardly any name would match.
        let name = if is_alike { pattern.replace('*', &other) } else { other };
        let verdict =
            Mesh::read(&format!("DENY {{from namespaces={pattern}}}")).verdict(&format!("{name}/x -> web:80"));
        let is_match = is_like(&pattern, &name);
        matched.set(matched.get() + u32::from(is_match));
        prop_assert_eq!(verdict, if is_match { "deny p0" } else { "allow" }, "{} {}", pattern, name);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    assert!((1_000..3_900).contains(&matched.get()), "{matched:?} of 4000 patterns matched");
}

/// CVE-2020-16844: a principal with a wildcard in front never matched in a DENY on TCP.
#[test]
fn cve_2020_16844_wildcards_in_front_of_a_principal_match_under_deny() {
    let flow = "shop/cart -> web:80";
    for pattern in [
        "*",
        "*/sa/cart",
        "*cart",
        "*/ns/shop/sa/cart",
        "*cluster.local/ns/shop/sa/cart",
        "cluster.local/ns/shop/*",
        "cluster*",
        "cluster.local/ns/shop/sa/cart*",
        "cluster.local/ns/shop/sa/cart",
    ] {
        for part in [format!("from principals={pattern}"), format!("when source.principal={pattern}")] {
            check(&format!("DENY {{{part}}}"), &[(flow, "deny p0"), ("plain -> web:80", "allow")]);
            check(&format!("ALLOW {{{part}}}"), &[(flow, "allow p0"), ("plain -> web:80", "deny: no allow")]);
        }
    }
    for pattern in
        ["*/sa/car", "*/sa/cartx", "cart", "cart*", "*shop*", "spiffe", "*/ns/shop", "cluster.local/ns/sho/*"]
    {
        check(&format!("DENY {{from principals={pattern}}}"), &[(flow, "allow")]);
    }
}

/// ISTIO-SECURITY-2021-004: fields about identity against a peer that has none: `notNamespaces` let it in, DENY missed it.
#[test]
fn istio_security_2021_004_every_field_of_from_with_every_kind_of_peer() {
    const MTLS: &str = "shop/cart@10.0.0.9 -> web:80";
    const OTHER: &str = "default/client@10.0.0.9 -> web:80";
    const PLAIN: &str = "plain@10.0.0.9 -> web:80";
    const FOREIGN: &str = "evil.org/ns/shop/sa/cart@10.0.0.9 -> web:80";
    // Field, and whether the meshed peer, another meshed peer and plaintext are refused under DENY and let in under ALLOW.
    let cases = [
        ("principals=cluster.local/ns/shop/sa/cart", [true, false, false], [true, false, false]),
        ("notPrincipals=cluster.local/ns/shop/sa/cart", [false, true, true], [false, true, false]),
        ("namespaces=shop", [true, false, false], [true, false, false]),
        ("notNamespaces=shop", [false, true, true], [false, true, false]),
        ("serviceAccounts=shop/cart", [true, false, false], [true, false, false]),
        ("notServiceAccounts=shop/cart", [false, true, true], [false, true, false]),
        ("principals=*", [true, true, false], [true, true, false]),
        ("notPrincipals=*", [false, false, true], [false, false, false]),
        ("ipBlocks=10.0.0.9", [true, true, true], [true, true, true]),
        ("notIpBlocks=10.0.0.9", [false, false, false], [false, false, false]),
    ];
    for (field, denied, allowed) in cases {
        let peers = [MTLS, OTHER, PLAIN];
        let deny = |i: usize| (peers[i], if denied[i] { "deny p0" } else { "allow" });
        check(&format!("DENY {{from {field}}}"), &[deny(0), deny(1), deny(2), (FOREIGN, "deny: foreign evil.org")]);
        let allow = |i: usize| (peers[i], if allowed[i] { "allow p0" } else { "deny: no allow" });
        check(&format!("ALLOW {{from {field}}}"), &[allow(0), allow(1), allow(2), (FOREIGN, "deny: foreign evil.org")]);
    }
}

/// istio/istio 61126: a DENY rule of HTTP fields only was a silent no-op at the node proxy.
#[test]
fn istio_61126_a_rule_for_http_is_never_less_strict_at_the_node_proxy() {
    for rule in [
        "{to methods=POST}",
        "{from namespaces=shop; to paths=/admin}",
        "{from namespaces=shop; when request.headers[a]=b}",
    ] {
        check(&format!("DENY {rule}"), &[("shop/cart -> web:80", "deny p0")]);
        check_problems(&format!("DENY {rule}"), &["MESH102 warning spec.rules[0]"]);
        check(&format!("ALLOW {rule}"), &[("shop/cart -> web:80", "deny: no allow")]);
    }
}

/// istio/istio 54146 (1.24.3): several STRICT ports were joined by AND, so that no port was strict.
#[test]
fn istio_54146_each_of_several_strict_ports_is_strict() {
    let config = "PEER app:web PERMISSIVE 80:STRICT 81:STRICT 82:STRICT 83:PERMISSIVE";
    let refused = "deny converted_peer_authentication_p0";
    check(
        config,
        &[
            ("plain -> web:80", refused),
            ("plain -> web:81", refused),
            ("plain -> web:82", refused),
            ("plain -> web:83", "allow"),
            ("plain -> web:84", "allow"),
            ("default/client -> web:80", "allow"),
        ],
    );
}

/// Istio 1.30.5: an empty selector was not told from an absent one, and matched every workload. For policies both mean
/// the whole namespace; a Service with an empty selector selects nothing.
#[test]
fn istio_1_30_5_empty_and_absent_selectors() {
    check("DENY {}", &[("plain -> web:80", "deny p0"), ("plain -> db:80", "deny p0"), ("plain -> cart:80", "allow")]);
    let strict = PeerAuthentication {
        meta: meta("default", "strict"),
        selector: Labels::new(),
        mode: MtlsMode::Strict,
        ..PeerAuthentication::default()
    };
    let mesh = Mesh::of(pods().into_iter().chain([Object::PeerAuthentication(strict)]).collect(), Settings::default());
    assert_eq!(mesh.verdict("plain -> db:80"), "deny istio-system/istio_converted_static_strict");
    assert_eq!(mesh.verdict("plain -> cart:80"), "allow");

    let service = |selector: &[(&str, &str)]| {
        Object::Service(Service {
            meta: meta("default", "all"),
            selector: selector.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
            ..Service::default()
        })
    };
    for (selector, expected) in
        [(&[][..], 0), (&[("app", "web")][..], 1), (&[("app", "web"), ("version", "v1")][..], 0)]
    {
        let mesh = Mesh::of(pods().into_iter().chain([service(selector)]).collect(), Settings::default());
        let service = mesh.snapshot.services().next().expect("compiled");
        assert_eq!(mesh.snapshot.endpoints(&service.key).len(), expected, "{selector:?}");
    }
}
