//! Senders of another version: what may be passed over, and what must not be.

use std::sync::Arc;

use mesh_api::wds::{WireError, decode, encode};
use mesh_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use mesh_core::snapshot::Change;
use proptest::prelude::*;
use proptest::test_runner::Config;

use crate::raw::{bytes, fixed32, fixed64, nested, number};
use crate::values::{policy, service, workload};

/// Every message of a policy: its path, the path in words, and the numbers of its fields.
const POLICY_MESSAGES: [(&[u32], &str, &[u32]); 16] = [
    (&[], "message", &[1, 2, 3, 4, 5, 6]),
    (&[5], "rules", &[1]),
    (&[5, 1], "rules.clauses", &[2]),
    (&[5, 1, 2], "rules.clauses.matches", &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
    (&[5, 1, 2, 1], "rules.clauses.matches.namespaces", &[1, 2, 3, 4]),
    (&[5, 1, 2, 2], "rules.clauses.matches.not_namespaces", &[1, 2, 3, 4]),
    (&[5, 1, 2, 3], "rules.clauses.matches.principals", &[1, 2, 3, 4]),
    (&[5, 1, 2, 4], "rules.clauses.matches.not_principals", &[1, 2, 3, 4]),
    (&[5, 1, 2, 5], "rules.clauses.matches.source_ips", &[1, 2]),
    (&[5, 1, 2, 6], "rules.clauses.matches.not_source_ips", &[1, 2]),
    (&[5, 1, 2, 7], "rules.clauses.matches.destination_ips", &[1, 2]),
    (&[5, 1, 2, 8], "rules.clauses.matches.not_destination_ips", &[1, 2]),
    (&[5, 1, 2, 11], "rules.clauses.matches.service_accounts", &[1, 2]),
    (&[5, 1, 2, 12], "rules.clauses.matches.not_service_accounts", &[1, 2]),
    (&[5, 1, 2, 1, 4], "rules.clauses.matches.namespaces.presence", &[]),
    (&[5, 1, 2, 4, 4], "rules.clauses.matches.not_principals.presence", &[]),
];

/// A field of a number that no message here knows, of any kind.
fn stranger() -> impl Strategy<Value = (u32, Vec<u8>)> {
    let number_of = prop_oneof![Just(13_u32), 14_u32..40, Just(1_000), Just((1 << 29) - 1)];
    (number_of, 0..4, any::<u32>(), prop::collection::vec(any::<u8>(), 0..20)).prop_map(
        |(field, kind, value, content)| {
            let encoded = match kind {
                0 => number(field, value.into()),
                1 => fixed64(field, value.into()),
                2 => fixed32(field, value),
                _ => bytes(field, &content),
            };
            (field, encoded)
        },
    )
}

fn config() -> Config {
    let is_long = std::env::var("MESH_TEST_LONG").is_ok_and(|value| value == "1");
    Config { cases: if is_long { 50_000 } else { 1_000 }, failure_persistence: None, ..Config::default() }
}

proptest! {
    #![proptest_config(config())]

    /// CVE-2022-21679 and ISTIO-SECURITY-2021-002: a control plane that is newer than the proxy writes one more
    /// condition; a proxy that passes over it lets in too much.
    #[test]
    fn cve_2022_21679_an_unknown_field_anywhere_in_a_policy_refuses_it(
        policy in policy(), (field, stranger) in stranger(), place in 0..POLICY_MESSAGES.len()
    ) {
        let (path, words, _) = POLICY_MESSAGES[place];
        let mut encoded = encode(&Change::UpsertPolicy(Arc::new(policy))).content.expect("body").bytes.to_vec();
        encoded.extend(nested(path, &stranger));
        let refusal = decode(AUTHORIZATION_TYPE_URL, &encoded);
        let is_extension = words == "rules.clauses.matches" && field == 13;
        match refusal {
            Err(WireError::Unknown { path, what }) => {
                prop_assert!(path == words && what == format!("field {field}"), "{path}: {what}, at {words} {field}");
            }
            // Field 13 of a match is known by its number, and its content is nothing that could be judged.
            Err(WireError::Malformed(_)) if is_extension => {}
            other => return Err(TestCaseError::fail(format!("{words} {field}: {other:?}"))),
        }
    }

    /// What only helps to choose well may be passed over.
    #[test]
    fn an_unknown_field_of_a_workload_or_service_changes_nothing(
        workload in workload(), service in service(), (_, stranger) in stranger()
    ) {
        for (kind, change) in [(1, Change::UpsertWorkload(Arc::new(workload))), (2, Change::UpsertService(Arc::new(service)))] {
            let mut encoded = encode(&change).content.expect("body").bytes.to_vec();
            // Beside the workload, and in it; the numbers that exist are below 28.
            encoded.extend(bytes(kind, &nested(&[200], &stranger)));
            encoded.extend(nested(&[200], &stranger));
            prop_assert_eq!(decode(ADDRESS_TYPE_URL, &encoded), Ok(change));
        }
    }
}

#[test]
fn the_schema_knows_every_field_that_a_policy_has_and_no_other() {
    for (path, words, fields) in POLICY_MESSAGES {
        for field in 1..=20 {
            let message = [bytes(1, b"p"), bytes(2, b"ns"), nested(path, &bytes(field, b""))].concat();
            let is_unknown = matches!(
                decode(AUTHORIZATION_TYPE_URL, &message),
                Err(WireError::Unknown { what, .. }) if what == format!("field {field}")
            );
            assert_eq!(is_unknown, !fields.contains(&field), "field {field} of {words}");
        }
    }
}

#[test]
fn values_that_are_not_known_are_refused_in_policies() {
    let base = [bytes(1, b"p"), bytes(2, b"ns")].concat();
    let check = |field: &[u8], expected: &str| {
        let error = decode(AUTHORIZATION_TYPE_URL, &[&base, field].concat()).expect_err(expected);
        assert!(error.to_string().starts_with(expected), "{error}");
    };
    check(&number(3, 3), "scope: unknown value 3");
    check(&number(4, 2), "action: unknown value 2");
    check(&nested(&[5, 1, 2, 1], b""), "namespaces: unknown kind of match");
    check(&nested(&[5, 1, 2], &number(9, 65_536)), "destination_ports: 65536 is not a port");
    check(&nested(&[5, 1, 2, 5], &[bytes(1, &[10, 0, 0]), number(2, 8)].concat()), "source_ips: address of 3 bytes");
    check(
        &nested(&[5, 1, 2, 6], &[bytes(1, &[10, 0, 0, 0]), number(2, 33)].concat()),
        "not_source_ips: prefix length 33",
    );
    check(&nested(&[5, 1, 2, 7], &[bytes(1, &[0; 16]), number(2, 129)].concat()), "destination_ips: prefix length 129");
    check(
        &nested(&[5, 1, 2, 8], &[bytes(1, &[0; 16]), number(2, 1 << 20)].concat()),
        "not_destination_ips: prefix length 1048576",
    );
}

#[test]
fn values_that_are_not_known_are_refused_or_harmless_in_workloads() {
    let base = [bytes(2, b"ns"), bytes(20, b"uid")].concat();
    let read = |field: &[u8]| decode(ADDRESS_TYPE_URL, &bytes(1, &[&base, field].concat()));
    for (field, expected) in [
        (number(5, 3), "tunnel_protocol: value 3"),
        (number(25, 2), "network_mode: value 2"),
        (bytes(3, &[1, 2, 3]), "addresses: address of 3 bytes"),
        (bytes(7, b"a/b"), "service_account: "),
        (bytes(7, b"UPPER"), "service_account: "),
        (bytes(8, b""), "waypoint: has no destination"),
        (bytes(16, b"no-slash"), "authorization_policies: "),
        (bytes(22, &bytes(1, b"no-slash")), "services: "),
    ] {
        let error = read(&field).expect_err(expected);
        assert!(error.to_string().starts_with(expected), "{error}, not {expected}");
    }
    let Ok(Change::UpsertWorkload(w)) = read(&[number(12, 9), number(17, 9)].concat()) else { panic!() };
    assert_eq!(w.workload_type, mesh_core::workload::WorkloadType::Pod);
    assert_eq!(w.health, mesh_core::workload::Health::Unhealthy, "not known to be good");
    assert!(decode(ADDRESS_TYPE_URL, &bytes(3, b"")).is_err(), "neither workload nor service");
    assert!(decode(ADDRESS_TYPE_URL, &bytes(1, &bytes(2, b"ns"))).is_err(), "no uid");
}

#[test]
fn a_resource_has_a_largest_size() {
    let long = vec![b'a'; mesh_api::wds::RESOURCE_MAX_BYTES];
    assert!(matches!(decode(AUTHORIZATION_TYPE_URL, &bytes(1, &long)), Err(WireError::TooLarge(_))));
    assert!(matches!(decode(ADDRESS_TYPE_URL, &bytes(1, &long)), Err(WireError::TooLarge(_))));
    assert!(matches!(decode("type.googleapis.com/other", b""), Err(WireError::Malformed(_))));
}
