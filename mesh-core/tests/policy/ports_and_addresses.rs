//! AuthorizationPolicy: how ports and addresses are written, and what they are compared with.

use mesh_core::authorize::authorize;
use mesh_core::flow::InboundFlow;

use crate::language::{Mesh, check, check_problems, words};

const PLAIN: &str = "plain -> web:80";

#[test]
fn ports_are_decimal_text_and_a_bad_one_refuses_the_policy() {
    check(
        "DENY {to ports=1,65535}",
        &[("plain -> web:1", "deny p0"), ("plain -> web:65535", "deny p0"), (PLAIN, "allow")],
    );
    for bad in ["0", "65536", "http", "+80", "-1", "080", "80-90", "8*", "*", "99999999999999999999", "８０", " "] {
        let bad = bad.trim();
        for field in ["ports", "notPorts"] {
            check_problems(
                &format!("DENY {{to {field}=80,{bad}}}"),
                &[&format!("MESH101 error spec.rules[0].to[0].operation.{field}[1]")],
            );
        }
        check_problems(
            &format!("DENY {{when destination.port={bad}}}"),
            &["MESH101 error spec.rules[0].when[0].values[0]"],
        );
    }
}

#[test]
fn address_blocks_are_addresses_or_cidrs_of_both_families() {
    let config = "DENY {from ipBlocks=10.1.0.0/16,10.2.0.7,fd00:1::/32,fd00:2::7}";
    check(
        config,
        &[
            ("plain@10.1.255.255 -> web:80", "deny p0"),
            ("plain@10.2.0.7 -> web:80", "deny p0"),
            ("plain@10.2.0.8 -> web:80", "allow"),
            ("plain@fd00:1:ffff::1 -> web:80", "deny p0"),
            ("plain@fd00:2::7 -> web:80", "deny p0"),
            ("plain@fd00:2::8 -> web:80", "allow"),
        ],
    );
    check("DENY {from ipBlocks=10.1.2.3/16}", &[("plain@10.1.9.9 -> web:80", "deny p0")]);
    check("DENY {from ipBlocks=0.0.0.0/0}", &[(PLAIN, "deny p0"), ("plain@fd00::9 -> web:80", "allow")]);
    check("DENY {from ipBlocks=::/0}", &[(PLAIN, "allow"), ("plain@fd00::9 -> web:80", "deny p0")]);
    check("DENY {from notIpBlocks=10.0.0.0/8}", &[(PLAIN, "allow"), ("plain@fd00::9 -> web:80", "deny p0")]);
}

#[test]
fn bits_beyond_the_prefix_say_nothing() {
    let policies = |block: &str| {
        let mesh = Mesh::read(&format!("DENY {{from ipBlocks={block}}}"));
        mesh.snapshot.policies().cloned().collect::<Vec<_>>()
    };
    for (written, meant) in
        [("10.1.2.3/16", "10.1.0.0/16"), ("fd00::1:2/112", "fd00::1:0/112"), ("10.1.2.3", "10.1.2.3/32")]
    {
        assert_eq!(policies(written), policies(meant), "{written}");
    }
}

#[test]
fn an_ipv4_address_in_ipv6_clothes_is_the_ipv4_address() {
    let cases = [
        ("plain@10.1.0.1 -> web:80", "deny p0"),
        ("plain@::ffff:10.1.0.1 -> web:80", "deny p0"),
        ("plain@10.0.0.1 -> web:80", "allow"),
        ("plain@10.2.0.1 -> web:80", "allow"),
    ];
    for block in ["10.1.0.0/16", "::ffff:10.1.0.0/112", "::ffff:10.1.0.1", "10.1.0.1"] {
        check(&format!("DENY {{from ipBlocks={block}}}"), &cases);
        check(&format!("DENY {{when source.ip={block}}}"), &cases);
    }
    // On a socket of IPv6, as the node proxy may hold it, the destination is dressed as well.
    let mesh = Mesh::read("DENY {when destination.ip=10.0.0.1}");
    let flow = InboundFlow {
        client: None,
        source: "::ffff:10.0.0.9".parse().expect("address"),
        destination: "[::ffff:10.0.0.1]:80".parse().expect("address"),
    };
    assert_eq!(words(&authorize(&mesh.snapshot, mesh.pod("web"), &flow)), "deny p0");
}

#[test]
fn the_destinations_address_and_port_are_those_of_the_workload() {
    check(
        "DENY {when destination.ip=10.0.0.1,fd00::1; when destination.port=80}",
        &[
            (PLAIN, "deny p0"),
            ("plain@fd00::9 -> web:80", "deny p0"),
            ("plain -> web:81", "allow"),
            ("plain -> db:80", "allow"),
        ],
    );
    check("DENY {when destination.ip!=10.0.0.0/24}", &[(PLAIN, "allow"), ("plain@fd00::9 -> web:80", "deny p0")]);
}

#[test]
fn a_bad_block_refuses_the_policy() {
    for bad in ["10.0.0.0/33", "10.0.0", "fd00::/129", "::1%lo", "host", "10.0.0.0/", "10.0.0.0/8/8", "*"] {
        check_problems(
            &format!("ALLOW {{from ipBlocks={bad}}}"),
            &["MESH101 error spec.rules[0].from[0].source.ipBlocks[0]"],
        );
        check_problems(
            &format!("ALLOW {{when destination.ip!={bad}}}"),
            &["MESH101 error spec.rules[0].when[0].notValues[0]"],
        );
    }
}
