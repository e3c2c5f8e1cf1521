//! `crds/` on a real API server: what it takes, what it refuses and why, and that the versions of a kind are one object.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::fs;
use std::path::Path;

use mesh_tests::cluster::{Cluster, Dns};
use mesh_tests::cluster_bed::ClusterBed;
use serde_json::{Value, json};

const PEER: &str = "security.istio.io/v1 PeerAuthentication";
const POLICY: &str = "security.istio.io/v1 AuthorizationPolicy";
const TOKENS: &str = "security.istio.io/v1 RequestAuthentication";
const ENTRY: &str = "networking.istio.io/v1 WorkloadEntry";
const SERVICE: &str = "networking.istio.io/v1 ServiceEntry";

/// Specs that are taken.
const GOOD: &[(&str, &str)] = &[
    (PEER, "{}"),
    (PEER, "{mtls: {}}"),
    (PEER, "{mtls: {mode: UNSET}}"),
    (PEER, "{mtls: {mode: DISABLE}}"),
    (PEER, "{mtls: {mode: PERMISSIVE}}"),
    (
        PEER,
        "{selector: {matchLabels: {a: b}}, mtls: {mode: STRICT}, portLevelMtls: {1: {mode: UNSET}, 65535: {mode: STRICT}}}",
    ),
    (POLICY, "{}"),
    (POLICY, "{action: DENY, rules: [{}]}"),
    (
        POLICY,
        "{action: AUDIT, rules: [{to: [{operation: {methods: [GET], notPaths: ['/a*'], hosts: ['*.b'], ports: ['80']}}]}]}",
    ),
    (POLICY, "{action: CUSTOM, provider: {name: judge}, rules: [{to: [{operation: {paths: ['/admin']}}]}]}"),
    (POLICY, "{targetRef: {kind: Service, name: web, group: ''}}"),
    (
        POLICY,
        "{targetRefs: [{kind: Gateway, name: way, group: gateway.networking.k8s.io}, {kind: Service, name: web}]}",
    ),
    (POLICY, "{rules: [{from: [{source: {serviceAccounts: [shop/web, db], ipBlocks: [10.0.0.0/8]}}]}]}"),
    (POLICY, "{rules: [{from: [{source: {trustDomains: [a.b], notTrustDomains: [c]}}]}]}"),
    (
        POLICY,
        "{rules: [{from: [{source: {requestPrincipals: ['*'], notRequestPrincipals: [a/b], remoteIpBlocks: [1.2.3.4]}}]}]}",
    ),
    (
        POLICY,
        "{rules: [{when: [{key: 'request.auth.claims[role]', values: [admin]}, {key: source.ip, notValues: [10.0.0.1]}]}]}",
    ),
    (ENTRY, "{address: 10.0.0.1, ports: {http: 8080, g-1: 65535}, labels: {app: vm}, weight: 4294967295}"),
    (ENTRY, "{address: vm.example, serviceAccount: vm, locality: a/b/c}"),
    (ENTRY, "{address: 'unix:///run/web.sock'}"),
    (ENTRY, "{address: 'unix://@web'}"),
    (ENTRY, "{network: elsewhere}"),
    (
        TOKENS,
        "{selector: {matchLabels: {a: b}}, jwtRules: [{issuer: a, jwksUri: 'https://a.b/keys', audiences: [c], timeout: 5s}]}",
    ),
    (
        TOKENS,
        "{jwtRules: [{issuer: a, jwks: '{}', fromHeaders: [{name: x, prefix: 'Bearer '}], forwardOriginalToken: true}]}",
    ),
    (
        SERVICE,
        "{hosts: [a.b, '*.c.d'], ports: [{number: 443, name: tls, protocol: TLS}], location: MESH_EXTERNAL, resolution: DNS}",
    ),
    (
        SERVICE,
        "{hosts: [a.b], addresses: [10.0.0.0/8], resolution: STATIC, endpoints: [{address: 10.0.0.1, ports: {http: 80}}]}",
    ),
    (SERVICE, "{hosts: [a.b], location: MESH_INTERNAL, workloadSelector: {labels: {app: a}}, exportTo: ['.']}"),
];

/// Specs that are refused, and a part of what the API server says.
const BAD: &[(&str, &str, &str)] = &[
    (PEER, "{mtls: {mode: MUTUAL}}", r#"Unsupported value: "MUTUAL""#),
    (PEER, "{mtls: {mode: strict}}", r#"Unsupported value: "strict""#),
    (PEER, "{mtls: STRICT}", "spec.mtls: Invalid value: \"string\""),
    (PEER, "{mtsl: {mode: STRICT}}", r#"unknown field "spec.mtsl""#),
    (
        PEER,
        "{selector: {matchLabels: {a: b}}, portLevelMtls: {}}",
        "spec.portLevelMtls in body should have at least 1 properties",
    ),
    (PEER, "{portLevelMtls: {80: {mode: STRICT}}}", "portLevelMtls needs a selector with labels"),
    (PEER, "{selector: {}, portLevelMtls: {80: {mode: STRICT}}}", "portLevelMtls needs a selector with labels"),
    (
        PEER,
        "{selector: {matchLabels: {}}, portLevelMtls: {80: {mode: STRICT}}}",
        "portLevelMtls needs a selector with labels",
    ),
    (
        PEER,
        "{selector: {matchLabels: {a: b}}, portLevelMtls: {0: {mode: STRICT}}}",
        "each key is a port, from 1 to 65535",
    ),
    (
        PEER,
        "{selector: {matchLabels: {a: b}}, portLevelMtls: {65536: {mode: STRICT}}}",
        "each key is a port, from 1 to 65535",
    ),
    (
        PEER,
        "{selector: {matchLabels: {a: b}}, portLevelMtls: {http: {mode: STRICT}}}",
        "each key is a port, from 1 to 65535",
    ),
    (PEER, "{selector: {matchLabels: {a: b}}, portLevelMtls: {80: {mode: NONE}}}", r#"Unsupported value: "NONE""#),
    (PEER, "{selector: {matchLabels: {a: '*'}}}", "a label's value is matched as it is: no wildcards"),
    (PEER, "{selector: {matchLabels: {'a*': b}}}", "a label's key is matched as it is: no wildcards"),
    (PEER, "{selector: {matchLabels: {'': b}}}", "a label has a key"),
    (PEER, "{selector: {matchLabels: {a: 1}}}", "must be of type string"),
    (POLICY, "{action: REFUSE}", r#"Unsupported value: "REFUSE""#),
    (POLICY, "{action: DENY}", "DENY and CUSTOM without rules never match"),
    (POLICY, "{action: CUSTOM, provider: {name: a}}", "DENY and CUSTOM without rules never match"),
    (POLICY, "{action: CUSTOM, rules: [{}]}", "the action CUSTOM needs a provider, and no other action has one"),
    (POLICY, "{action: ALLOW, provider: {name: a}}", "the action CUSTOM needs a provider, and no other action has one"),
    (POLICY, "{provider: {name: a}}", "the action CUSTOM needs a provider, and no other action has one"),
    (
        POLICY,
        "{action: CUSTOM, provider: {name: ''}, rules: [{}]}",
        "spec.provider.name in body should be at least 1 chars",
    ),
    (
        POLICY,
        "{selector: {matchLabels: {a: b}}, targetRefs: [{kind: Service, name: a}]}",
        "selector, targetRef and targetRefs exclude each other",
    ),
    (
        POLICY,
        "{targetRef: {kind: Service, name: a}, targetRefs: []}",
        "selector, targetRef and targetRefs exclude each other",
    ),
    (POLICY, "{targetRef: {kind: Service}}", "spec.targetRef.name: Required value"),
    (POLICY, "{targetRef: {kind: 1st, name: a}}", "spec.targetRef.kind in body should match"),
    (POLICY, "{targetRef: {kind: Service, name: a, group: A_b}}", "spec.targetRef.group in body should match"),
    (POLICY, "{targetRef: {kind: Service, name: a, namespace: shop}}", "a target lies in the object's own namespace"),
    (POLICY, "{rules: {}}", "must be of type array"),
    (POLICY, "{rules: [{from: []}]}", "spec.rules[0].from in body should have at least 1 items"),
    (POLICY, "{rules: [{to: []}]}", "spec.rules[0].to in body should have at least 1 items"),
    (POLICY, "{rules: [{when: []}]}", "spec.rules[0].when in body should have at least 1 items"),
    (POLICY, "{rules: [{from: [{}]}]}", "spec.rules[0].from[0].source: Required value"),
    (POLICY, "{rules: [{to: [{}]}]}", "spec.rules[0].to[0].operation: Required value"),
    (
        POLICY,
        "{rules: [{from: [{source: {}}]}]}",
        "spec.rules[0].from[0].source in body should have at least 1 properties",
    ),
    (
        POLICY,
        "{rules: [{to: [{operation: {}}]}]}",
        "spec.rules[0].to[0].operation in body should have at least 1 properties",
    ),
    (
        POLICY,
        "{rules: [{from: [{source: {principals: []}}]}]}",
        "source.principals in body should have at least 1 items",
    ),
    (POLICY, "{rules: [{from: [{source: {principals: ['']}}]}]}", "principals[0] in body should be at least 1 chars"),
    (
        POLICY,
        "{rules: [{from: [{source: {principal: [a]}}]}]}",
        r#"unknown field "spec.rules[0].from[0].source.principal""#,
    ),
    (
        POLICY,
        "{rules: [{from: [{source: {serviceAccounts: [a], principals: [b]}}]}]}",
        "neither principals nor namespaces go with them",
    ),
    (
        POLICY,
        "{rules: [{from: [{source: {notServiceAccounts: [a], namespaces: [b]}}]}]}",
        "neither principals nor namespaces go with them",
    ),
    (POLICY, "{rules: [{to: [{operation: {ports: [80]}}]}]}", "must be of type string"),
    (POLICY, "{rules: [{to: [{operation: {ports: [http]}}]}]}", "ports[0] in body should match"),
    (POLICY, "{rules: [{when: [{values: [a]}]}]}", "spec.rules[0].when[0].key: Required value"),
    (POLICY, "{rules: [{when: [{key: source.ip}]}]}", "a condition needs values or notValues"),
    (
        POLICY,
        "{rules: [{when: [{key: source.ip, values: []}]}]}",
        "when[0].values in body should have at least 1 items",
    ),
    (ENTRY, "{}", "a workload has an address, or a network whose gateway leads to it"),
    (ENTRY, "{address: 7}", "must be of type string"),
    (ENTRY, "{address: 'unix://run/web.sock'}", "a socket's path is absolute, or abstract and begins with @"),
    (ENTRY, "{address: 'unix:///run/'}", "a socket is no directory"),
    (ENTRY, "{address: 'unix:///run/web.sock', ports: {http: 80}}", "a socket has no ports"),
    (ENTRY, "{address: 10.0.0.1, ports: {http: 0}}", "should be greater than or equal to 1"),
    (ENTRY, "{address: 10.0.0.1, ports: {http: 65536}}", "should be less than or equal to 65535"),
    (
        ENTRY,
        "{address: 10.0.0.1, ports: {http_1: 80}}",
        "a port's name has letters, digits and inner hyphens, at most 62",
    ),
    (ENTRY, "{address: 10.0.0.1, weight: -1}", "should be greater than or equal to 0"),
    (ENTRY, "{address: 10.0.0.1, port: 80}", r#"unknown field "spec.port""#),
    (TOKENS, "{jwtRules: [{issuer: a, jwksUri: 'ftp://a.b'}]}", "the keys' address begins with http:// or https://"),
    (TOKENS, "{jwtRules: [{issuer: a, jwksUri: keys}]}", "the keys' address begins with http:// or https://"),
    (TOKENS, "{jwtRules: [{issuer: a, jwksUri: 'https://a', jwks: '{}'}]}", "jwks and jwksUri exclude each other"),
    (TOKENS, "{jwtRules: [{issuer: a, timeout: 0s}]}", "a duration has a unit and is at least 1ms"),
    (TOKENS, "{jwtRules: [{jwks: '{}'}]}", "a token is known by its issuer or by the address of the keys"),
    (TOKENS, "{jwtRules: [{issuer: ''}]}", "issuer in body should be at least 1 chars"),
    (
        TOKENS,
        "{selector: {}, targetRef: {kind: Service, name: a}}",
        "selector, targetRef and targetRefs exclude each other",
    ),
    (SERVICE, "{ports: []}", "spec.hosts: Required value"),
    (SERVICE, "{hosts: []}", "spec.hosts in body should have at least 1 items"),
    (SERVICE, "{hosts: ['*']}", "a host is more than a wildcard"),
    (SERVICE, "{hosts: [a], location: ELSEWHERE}", r#"Unsupported value: "ELSEWHERE""#),
    (SERVICE, "{hosts: [a], resolution: STRICT_DNS}", r#"Unsupported value: "STRICT_DNS""#),
    (
        SERVICE,
        "{hosts: [a], resolution: STATIC, endpoints: [{address: b}], workloadSelector: {}}",
        "workloadSelector and endpoints exclude each other",
    ),
    (SERVICE, "{hosts: [a], endpoints: [{address: b}]}", "endpoints need a resolution other than NONE"),
    (
        SERVICE,
        "{hosts: [a], addresses: [10.0.0.0/8], resolution: DNS}",
        "ranges of addresses need the resolution NONE or STATIC",
    ),
    (
        SERVICE,
        "{hosts: [a], resolution: DNS_ROUND_ROBIN, endpoints: [{address: b}, {address: c}]}",
        "DNS_ROUND_ROBIN takes one endpoint",
    ),
    (SERVICE, "{hosts: [a], resolution: DNS, endpoints: [{ports: {http: 80}}]}", "a workload has an address"),
    (
        SERVICE,
        "{hosts: [a], ports: [{number: 80, name: a}, {number: 80, name: b}]}",
        "no two ports have the same number",
    ),
    (SERVICE, "{hosts: [a], ports: [{number: 80, name: a}, {number: 81, name: a}]}", "Duplicate value"),
    (SERVICE, "{hosts: [a], ports: [{number: 70000, name: a}]}", "should be less than or equal to 65535"),
];

#[test]
fn a_cluster_without_istio_takes_istios_yaml_and_refuses_what_means_nothing() {
    let bed = ClusterBed::up(1, Dns::Nobody);
    let cluster = &bed.cluster;
    install(cluster);
    let judge = |kind: &str, spec: &str| {
        cluster
            .kubectl_with(&["apply", "--validate=strict", "--dry-run=server", "-f", "-"], &object(kind, "case", spec))
    };
    let mut wrong = Vec::new();
    for (kind, spec) in GOOD {
        if let Err(error) = judge(kind, spec) {
            wrong.push(format!("{kind} {spec} is refused: {error:#}"));
        }
    }
    for (kind, spec, why) in BAD {
        match judge(kind, spec) {
            Ok(_) => wrong.push(format!("{kind} {spec} is taken")),
            Err(error) if format!("{error:#}").contains(why) => {}
            Err(error) => wrong.push(format!("{kind} {spec} is refused, but not for `{why}`: {error:#}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    examples_are_taken(cluster);
    every_version_is_the_same_object(cluster);
    kinds_without_effect_warn(cluster);
    kubectl_shows_columns(cluster);
    status_is_apart(cluster);
}

/// Applies the files as a user does, and waits until they are served.
fn install(cluster: &Cluster) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds");
    cluster.kubectl(&["apply", "--validate=strict", "-f", &directory.to_string_lossy()]).unwrap();
    cluster.wait(&["--for=condition=Established", "crd", "--all"]).unwrap_or_else(|error| panic!("{error:#}"));
    let complaints = "jsonpath={.items[*].status.conditions[?(@.type==\"NonStructuralSchema\")].message}";
    assert_eq!(cluster.kubectl(&["get", "crd", "-o", complaints]).unwrap(), "");
}

fn object(kind: &str, name: &str, spec: &str) -> String {
    let (version, kind) = kind.split_once(' ').unwrap();
    format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n")
}

fn examples_are_taken(cluster: &Cluster) {
    for namespace in ["production", "istio-system"] {
        cluster.kubectl(&["create", "namespace", namespace]).unwrap();
    }
    for example in ["06-mtls.yaml", "07-authorization.yaml", "14-migration.yaml"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/examples").join(example);
        let text = fs::read_to_string(path).unwrap();
        cluster
            .kubectl_with(&["apply", "--validate=strict", "-f", "-"], &text)
            .unwrap_or_else(|error| panic!("{example}: {error:#}"));
    }
}

fn every_version_is_the_same_object(cluster: &Cluster) {
    let kinds = [
        ("peerauthentications", "security.istio.io", &["v1", "v1beta1"][..], PEER, GOOD[5].1),
        ("authorizationpolicies", "security.istio.io", &["v1", "v1beta1"], POLICY, GOOD[8].1),
        ("workloadentries", "networking.istio.io", &["v1", "v1beta1", "v1alpha3"], ENTRY, GOOD[16].1),
        ("requestauthentications", "security.istio.io", &["v1", "v1beta1"], TOKENS, GOOD[21].1),
        ("serviceentries", "networking.istio.io", &["v1", "v1beta1", "v1alpha3"], SERVICE, GOOD[23].1),
    ];
    for (plural, group, versions, kind, spec) in kinds {
        let mut specs: Vec<Value> = Vec::new();
        for written in versions {
            let name = format!("by-{written}");
            let kind = kind.replace("/v1 ", &format!("/{written} "));
            cluster.apply(&object(&kind, &name, spec)).unwrap();
            for read in versions {
                let said = cluster.kubectl(&["get", &format!("{plural}.{read}.{group}"), &name, "-o", "json"]).unwrap();
                let mut said: Value = serde_json::from_str(&said).unwrap();
                assert_eq!(said["apiVersion"], format!("{group}/{read}"));
                specs.push(said["spec"].take());
            }
        }
        assert!(specs.iter().all(|spec| spec.is_object() && *spec == specs[0]), "{plural}: {specs:?}");
        let stored = cluster
            .kubectl(&["get", "crd", &format!("{plural}.{group}"), "-o", "jsonpath={.status.storedVersions[*]}"])
            .unwrap();
        assert_eq!(stored, "v1");
    }
}

/// Who applies an object that nothing is done about learns it at once.
fn kinds_without_effect_warn(cluster: &Cluster) {
    let warnings = |plural: &str| {
        let said = cluster.kubectl_command().args(["get", plural]).output().unwrap();
        String::from_utf8(said.stderr).unwrap()
    };
    for (plural, kind) in [("requestauthentications", "RequestAuthentication"), ("serviceentries", "ServiceEntry")] {
        let said = warnings(plural);
        assert!(said.contains(&format!("Warning: the mesh does not act on a {kind}")), "{plural}: {said}");
    }
    for plural in ["peerauthentications", "authorizationpolicies", "workloadentries"] {
        assert_eq!(warnings(plural), "");
    }
}

fn kubectl_shows_columns(cluster: &Cluster) {
    for (short, columns) in
        [("pa", ["NAME", "MODE", "AGE"]), ("ap", ["NAME", "ACTION", "AGE"]), ("we", ["NAME", "ADDRESS", "AGE"])]
    {
        let said = cluster.kubectl(&["get", short]).unwrap();
        assert_eq!(said.lines().next().unwrap().split_whitespace().collect::<Vec<_>>(), columns);
    }
    let all = cluster.kubectl(&["get", "istio-io", "-A", "-o", "name"]).unwrap();
    for one in ["peerauthentication.security.istio.io/mesh-mtls", "authorizationpolicy.security.istio.io/deny-all"] {
        assert!(all.contains(one), "{all}");
    }
}

/// A controller writes it and what it does not know stays; who applies a spec leaves it alone.
fn status_is_apart(cluster: &Cluster) {
    let condition = json!({
        "type": "Ready", "status": "True", "reason": "Read", "message": "m", "observedGeneration": "1",
        "lastTransitionTime": "2026-01-31T12:00:00Z", "lastProbeTime": "2026-01-31T12:00:00Z",
    });
    let message = json!({"type": {"code": "IST0101", "name": "n"}, "level": "WARNING", "more": [1]});
    let status =
        json!({"conditions": [condition], "observedGeneration": 1, "validationMessages": [message], "ours": {"a": 1}});
    let patch = |patch: &str| {
        cluster.kubectl(&["patch", "peerauthentication", "by-v1", "--subresource=status", "--type=merge", "-p", patch])
    };
    patch(&json!({"status": status}).to_string()).unwrap();
    cluster.apply(&object(PEER, "by-v1", "{mtls: {mode: STRICT}}")).unwrap();
    let said = cluster.kubectl(&["get", "peerauthentication", "by-v1", "-o", "json"]).unwrap();
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&said["status"], &said["metadata"]["generation"]), (&status, &json!(2)));
    let refused = patch(r#"{"status": {"conditions": [{"lastProbeTime": "today"}]}}"#).unwrap_err();
    assert!(format!("{refused:#}").contains("lastProbeTime"), "{refused:#}");
}
