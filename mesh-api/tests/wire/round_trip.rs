//! From the domain to bytes and back: nothing is lost, and equal values are equal bytes.

use std::sync::Arc;

use mesh_api::wds::{Content, decode, encode, removal, version};
use mesh_core::snapshot::Change;
use proptest::prelude::*;
use proptest::test_runner::Config;

use crate::values::{policy, service, workload};

fn config() -> Config {
    let is_long = std::env::var("MESH_TEST_LONG").is_ok_and(|value| value == "1");
    Config { cases: if is_long { 50_000 } else { 1_000 }, failure_persistence: None, ..Config::default() }
}

#[track_caller]
fn content(change: &Change) -> (String, Content) {
    let resource = encode(change);
    (resource.name, resource.content.expect("an upsert has a body"))
}

fn there_and_back(change: &Change) -> Result<(), TestCaseError> {
    let resource = encode(change);
    let (name, body) = content(change);
    prop_assert_eq!(&decode(resource.type_url, &body.bytes), &Ok(change.clone()));
    prop_assert_eq!(&body.version, &version(&body.bytes));
    let removed = match change {
        Change::UpsertWorkload(w) => Change::RemoveWorkload(w.uid.clone()),
        Change::UpsertService(s) => Change::RemoveService(s.key.clone()),
        Change::UpsertPolicy(p) => Change::RemovePolicy(p.name.clone()),
        other => panic!("{other:?}"),
    };
    let gone = encode(&removed);
    prop_assert_eq!((gone.type_url, &gone.name, gone.content), (resource.type_url, &name, None));
    prop_assert!(
        removal(resource.type_url, &name).contains(&removed),
        "{name}: {:?}",
        removal(resource.type_url, &name)
    );
    Ok(())
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn workloads_survive_the_wire(workload in workload()) {
        there_and_back(&Change::UpsertWorkload(Arc::new(workload)))?;
    }

    #[test]
    fn services_survive_the_wire(service in service()) {
        there_and_back(&Change::UpsertService(Arc::new(service)))?;
    }

    #[test]
    fn policies_survive_the_wire(policy in policy()) {
        there_and_back(&Change::UpsertPolicy(Arc::new(policy)))?;
    }

    /// Bytes do not depend on how a value came about, and differ when values differ.
    #[test]
    fn a_version_stands_for_a_content(one in workload(), other in workload()) {
        let mut again = one.clone();
        again.services = one.services.iter().rev().map(|(key, ports)| (key.clone(), ports.clone())).collect();
        let of = |workload: &mesh_core::workload::Workload| content(&Change::UpsertWorkload(Arc::new(workload.clone()))).1;
        prop_assert_eq!(of(&one), of(&again));
        prop_assert_eq!(one == other, of(&one).version == of(&other).version);
    }

    /// Whatever comes, the answer is a value or an error, and a value that can be written again is the same value.
    #[test]
    fn damaged_bytes_are_refused_or_mean_something(
        policy in policy(), workload in workload(), at in any::<prop::sample::Index>(), flip in 1_u8..
    ) {
        for change in [Change::UpsertPolicy(Arc::new(policy)), Change::UpsertWorkload(Arc::new(workload))] {
            let resource = encode(&change);
            let mut bytes = content(&change).1.bytes.to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            if let Ok(change) = decode(resource.type_url, &bytes) {
                let again = content(&change).1.bytes;
                prop_assert_eq!(decode(resource.type_url, &again), Ok(change));
            }
            let _ = decode(resource.type_url, &bytes[..at]);
        }
    }
}
