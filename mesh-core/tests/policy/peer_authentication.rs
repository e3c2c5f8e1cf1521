//! PeerAuthentication as written in its specification.

use mesh_core::policy::PolicyScope;

use crate::language::{Mesh, check, check_problems};

const STRICT: &str = "deny istio-system/istio_converted_static_strict";
const CONVERTED: &str = "deny converted_peer_authentication_p0";

/// Which of the pods refuse plaintext on port 80.
#[track_caller]
fn check_strict(config: &str, expected: &[&str]) {
    let mesh = Mesh::read(config);
    let strict = |pod: &&str| mesh.verdict(&format!("plain -> {pod}:80")) == STRICT;
    let refusing: Vec<&str> = ["web", "db", "cart", "gate"].into_iter().filter(|pod| strict(pod)).collect();
    assert_eq!(refusing, expected, "\n{config}");
}

#[test]
fn without_any_plaintext_is_accepted() {
    check_strict("", &[]);
}

#[test]
fn the_root_namespaces_counts_for_the_mesh() {
    check_strict("PEER ns:istio-system STRICT", &["web", "db", "cart", "gate"]);
    for mode in ["PERMISSIVE", "DISABLE", "UNSET"] {
        check_strict(&format!("PEER ns:istio-system {mode}"), &[]);
    }
}

#[test]
fn a_namespaces_beats_the_meshs() {
    check_strict("PEER ns:istio-system STRICT\nPEER ns:shop PERMISSIVE", &["web", "db", "gate"]);
    check_strict("PEER ns:istio-system STRICT\nPEER ns:shop DISABLE", &["web", "db", "gate"]);
    check_strict("PEER ns:istio-system PERMISSIVE\nPEER ns:shop STRICT", &["cart"]);
}

#[test]
fn a_workloads_beats_the_namespaces() {
    check_strict("PEER STRICT\nPEER app:web PERMISSIVE", &["db"]);
    check_strict("PEER STRICT\nPEER app:web DISABLE", &["db"]);
    check_strict("PEER PERMISSIVE\nPEER app:web STRICT", &["web"]);
    check_strict("PEER ns:istio-system STRICT\nPEER app:db PERMISSIVE", &["web", "cart", "gate"]);
}

#[test]
fn unset_inherits_at_every_level() {
    check_strict("PEER ns:istio-system STRICT\nPEER UNSET\nPEER app:web UNSET", &["web", "db", "cart", "gate"]);
    check_strict("PEER ns:istio-system UNSET\nPEER STRICT\nPEER app:web UNSET", &["web", "db"]);
    check_strict("PEER ns:istio-system UNSET\nPEER UNSET\nPEER app:web UNSET", &[]);
    check_strict("PEER ns:istio-system PERMISSIVE\nPEER UNSET\nPEER app:web STRICT", &["web"]);
}

#[test]
fn the_oldest_of_a_level_counts_alone() {
    check_strict("PEER age:2 STRICT\nPEER age:1 PERMISSIVE", &[]);
    check_strict("PEER age:1 STRICT\nPEER age:2 PERMISSIVE", &["web", "db"]);
    check_strict("PEER app:web age:2 STRICT\nPEER app:web age:1 PERMISSIVE", &[]);
    check_strict(
        "PEER ns:istio-system age:2 PERMISSIVE\nPEER ns:istio-system age:1 STRICT",
        &["web", "db", "cart", "gate"],
    );
    // No merging: the older one's UNSET asks the level above, not its neighbour.
    check_strict("PEER age:1 UNSET\nPEER age:2 STRICT", &[]);
    // Of the same age the name decides, so that every controller decides alike.
    check_strict("PEER name:b STRICT\nPEER name:a PERMISSIVE", &[]);
    check_strict("PEER name:b PERMISSIVE\nPEER name:a STRICT", &["web", "db"]);
}

#[test]
fn the_younger_ones_ports_are_not_merged_in() {
    check("PEER app:web age:1 UNSET\nPEER app:web age:2 80:STRICT", &[("plain -> web:80", "allow")]);
    check(
        "PEER app:web age:2 UNSET\nPEER app:web age:1 80:STRICT",
        &[("plain -> web:80", "deny converted_peer_authentication_p1")],
    );
}

#[test]
fn one_that_an_older_one_hides_is_reported() {
    check_problems("PEER age:1 STRICT\nPEER age:2 STRICT", &["MESH108 warning "]);
    check_problems("PEER age:1 STRICT\nPEER app:web age:2 STRICT", &[]);
}

#[test]
fn a_selector_in_the_root_namespace_is_ignored_and_reported() {
    let config = "PEER ns:istio-system app:web STRICT";
    check_strict(config, &[]);
    check_problems(config, &["MESH108 warning spec.selector"]);
    check_strict(
        "PEER ns:istio-system STRICT\nPEER ns:istio-system app:web PERMISSIVE",
        &["web", "db", "cart", "gate"],
    );
    let with_port = "PEER ns:istio-system app:web 80:STRICT";
    check(with_port, &[("plain -> gate:80", "allow"), ("plain -> web:80", "allow")]);
}

#[test]
fn ports_need_a_selector() {
    check_problems("PEER STRICT 80:PERMISSIVE", &["MESH101 error spec.portLevelMtls"]);
    check_problems("PEER ns:istio-system UNSET 80:STRICT", &["MESH101 error spec.portLevelMtls"]);
    check_problems("PEER app:web 0:STRICT", &["MESH101 error spec.portLevelMtls.0"]);
}

#[test]
fn a_strict_port_below_a_permissive_workload() {
    for mode in ["PERMISSIVE", "DISABLE", "UNSET"] {
        let config = format!("PEER app:web {mode} 80:STRICT");
        check(
            &config,
            &[
                ("plain -> web:80", CONVERTED),
                ("plain -> web:81", "allow"),
                ("default/client -> web:80", "allow"),
                ("plain -> db:80", "allow"),
            ],
        );
    }
}

#[test]
fn an_open_port_below_a_strict_workload() {
    for mode in ["PERMISSIVE", "DISABLE"] {
        let config = format!("PEER app:web STRICT 80:{mode}");
        check(
            &config,
            &[
                ("plain -> web:80", "allow"),
                ("plain -> web:81", CONVERTED),
                ("default/client -> web:81", "allow"),
                ("plain -> db:81", "allow"),
            ],
        );
    }
}

#[test]
fn several_open_ports_are_all_open_and_the_others_closed() {
    let config = "PEER app:web STRICT 80:PERMISSIVE 81:DISABLE 82:UNSET 83:STRICT";
    check(
        config,
        &[
            ("plain -> web:80", "allow"),
            ("plain -> web:81", "allow"),
            ("plain -> web:82", CONVERTED),
            ("plain -> web:83", CONVERTED),
            ("plain -> web:84", CONVERTED),
        ],
    );
}

#[test]
fn a_ports_unset_is_the_workloads_mode() {
    check("PEER app:web STRICT 80:UNSET", &[("plain -> web:80", STRICT), ("plain -> web:81", STRICT)]);
    check("PEER app:web PERMISSIVE 80:UNSET", &[("plain -> web:80", "allow")]);
    check("PEER STRICT\nPEER app:web UNSET 80:UNSET", &[("plain -> web:80", STRICT)]);
}

#[test]
fn a_ports_disable_below_an_inherited_strict_counts() {
    for (parent, name) in [("PEER STRICT", "p1"), ("PEER ns:istio-system STRICT", "p1")] {
        for mode in ["PERMISSIVE", "DISABLE"] {
            check(
                &format!("{parent}\nPEER app:web UNSET 80:{mode}"),
                &[
                    ("plain -> web:80", "allow"),
                    ("plain -> web:81", &format!("deny converted_peer_authentication_{name}")),
                    ("plain -> db:81", STRICT),
                ],
            );
        }
    }
}

#[test]
fn a_change_of_the_parent_reaches_the_ports() {
    check(
        "PEER PERMISSIVE\nPEER app:web UNSET 80:PERMISSIVE",
        &[("plain -> web:80", "allow"), ("plain -> web:81", "allow")],
    );
    check(
        "PEER STRICT\nPEER app:web UNSET 80:PERMISSIVE",
        &[("plain -> web:80", "allow"), ("plain -> web:81", "deny converted_peer_authentication_p1")],
    );
}

#[test]
fn strict_is_a_policy_of_the_root_namespace_that_workloads_name() {
    let mesh = Mesh::read("PEER STRICT");
    let named: Vec<String> = mesh.pod("web").policies.iter().map(ToString::to_string).collect();
    assert_eq!(named, ["istio-system/istio_converted_static_strict"]);
    let policy = mesh.snapshot.policy(&mesh.pod("web").policies[0]).expect("pushed");
    assert_eq!(policy.scope, PolicyScope::Workload);
    // It is there before the first workload that names it.
    assert_eq!(Mesh::read("").snapshot.policies().count(), 1);
}

#[test]
fn a_workload_with_port_exceptions_names_its_own_policy_alone() {
    for config in
        ["PEER app:web STRICT 80:PERMISSIVE", "PEER ns:default PERMISSIVE\nPEER name:p0 app:web UNSET 80:STRICT"]
    {
        let mesh = Mesh::read(config);
        let named: Vec<String> = mesh.pod("web").policies.iter().map(ToString::to_string).collect();
        assert_eq!(named, ["default/converted_peer_authentication_p0"], "{config}");
    }
}

#[test]
fn a_workload_that_names_a_policy_which_has_not_arrived_refuses() {
    for config in ["PEER STRICT", "PEER app:web 99:STRICT"] {
        let mesh = Mesh::read(config);
        let name = mesh.pod("web").policies[0].clone();
        let snapshot = mesh.snapshot.apply(&[mesh_core::snapshot::Change::RemovePolicy(name.clone())]);
        let late = Mesh { compiled: mesh.compiled, snapshot };
        for flow in ["plain -> web:80", "default/client -> web:80"] {
            assert!(late.verdict(flow).starts_with("deny: missing "), "{config} {flow}");
        }
    }
}

#[test]
fn a_client_with_an_identity_is_accepted_in_every_mode() {
    for mode in ["UNSET", "DISABLE", "PERMISSIVE", "STRICT"] {
        for place in ["ns:istio-system", "ns:default", "app:web"] {
            check(&format!("PEER {place} {mode}"), &[("default/client -> web:80", "allow")]);
        }
    }
}

#[test]
fn strict_and_an_allow_policy_must_both_agree() {
    let config = "PEER STRICT\nALLOW {to ports=80}";
    check(
        config,
        &[
            ("plain -> web:80", STRICT),
            ("default/client -> web:80", "allow p1"),
            ("default/client -> web:81", "deny: no allow"),
        ],
    );
}

#[test]
fn one_that_selects_nothing_is_reported() {
    check_problems("PEER app:nobody STRICT", &["MESH105 warning spec.selector"]);
    check_problems("PEER ns:elsewhere STRICT", &["MESH105 warning spec.selector"]);
}
