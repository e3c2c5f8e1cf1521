//! SPIFFE IDs of Istio's shape: `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT`.

use mesh_core::identity::SpiffeId;
use proptest::prelude::*;

#[track_caller]
fn refused(text: &str) {
    let error = text.parse::<SpiffeId>().expect_err(text);
    assert!(error.to_string().ends_with("is not spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT"), "{error}");
}

#[test]
fn an_identity_is_read_and_written_as_it_stands() {
    for text in [
        "spiffe://cluster.local/ns/default/sa/web",
        "spiffe://td/ns/a/sa/b",
        "spiffe://a-b_c.d/ns/ns/sa/sa",
        "spiffe://ns/ns/sa/sa/ns",
        "spiffe://1.2.3.4/ns/0/sa/9",
    ] {
        let id: SpiffeId = text.parse().expect(text);
        assert_eq!(id.to_string(), text);
    }
    let id: SpiffeId = "spiffe://td/ns/a/sa/b".parse().expect("an identity");
    assert_eq!(id, SpiffeId::new("td", "a", "b"));
}

#[test]
fn anything_else_is_refused() {
    for text in [
        "",
        "spiffe://",
        "spiffe://td",
        "spiffe://td/",
        "spiffe://td/ns/a/sa",
        "spiffe://td/ns/a/sa/",
        "spiffe://td/ns//sa/b",
        "spiffe:///ns/a/sa/b",
        "spiffe://td/ns/a/sa/b/",
        "spiffe://td/ns/a/sa/b/c",
        "spiffe://td//ns/a/sa/b",
        "spiffe://td/sa/a/ns/b",
        "spiffe://td/NS/a/sa/b",
        "spiffe://td/ns/../sa/b",
        "spiffe://td/ns/a/sa/.",
        "td/ns/a/sa/b",
        "http://td/ns/a/sa/b",
        " spiffe://td/ns/a/sa/b",
        "spiffe://td/ns/a/sa/b ",
        "spiffe://td/ns/a/sa/b?x",
        "spiffe://td/ns/a/sa/b#x",
        "spiffe://user@td/ns/a/sa/b",
        "spiffe://td:443/ns/a/sa/b",
        "spiffe://td/ns/a/sa/%62",
        "spiffe://td/ns/a\0/sa/b",
        "spiffe://td/ns/ä/sa/b",
        "spiffe://td/ns/*/sa/b",
    ] {
        refused(text);
    }
}

/// CVE-2020-15104 and its like: names are compared byte for byte, and what a certificate writes otherwise is no name.
#[test]
fn upper_case_is_no_other_way_to_write_a_name() {
    for text in [
        "SPIFFE://td/ns/a/sa/b",
        "Spiffe://td/ns/a/sa/b",
        "spiffe://TD/ns/a/sa/b",
        "spiffe://td/ns/A/sa/b",
        "spiffe://td/ns/a/sa/B",
    ] {
        refused(text);
    }
}

#[test]
fn a_part_has_a_longest_length() {
    let of = |length: usize| format!("spiffe://td/ns/{}/sa/b", "a".repeat(length));
    assert!(of(253).parse::<SpiffeId>().is_ok());
    refused(&of(254));
    let error = of(1 << 20).parse::<SpiffeId>().expect_err("too long");
    assert!(error.to_string().len() < 400, "what a stranger wrote is not repeated whole");
}

/// Character by character, from the specification.
fn naive(text: &str) -> bool {
    let parts: Vec<String> = text.split('/').map(str::to_owned).collect();
    let is_name = |part: &String| {
        let known = "abcdefghijklmnopqrstuvwxyz0123456789.-_";
        (1..=253).contains(&part.chars().count())
            && part.chars().all(|letter| known.contains(letter))
            && part != "."
            && part != ".."
    };
    parts.len() == 7
        && parts[0] == "spiffe:"
        && parts[1].is_empty()
        && parts[3] == "ns"
        && parts[5] == "sa"
        && [2, 4, 6].iter().all(|at| is_name(&parts[*at]))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_an_identity_is_what_the_naive_reader_says(
        parts in prop::collection::vec("(spiffe:|[a-z0-9._-]{0,4}|ns|sa|\\.{1,2}|\\PC{0,3})", 5..9), change in 0_usize..6
    ) {
        let mut parts = parts;
        // Mostly right, or nothing would ever be accepted.
        for (at, word) in [(0, "spiffe:"), (1, ""), (3, "ns"), (5, "sa")] {
            if change != at && at < parts.len() {
                parts[at] = word.to_owned();
            }
        }
        let text = parts.join("/");
        let read = text.parse::<SpiffeId>();
        prop_assert_eq!(read.is_ok(), naive(&text), "{}", text);
        if let Ok(id) = read {
            prop_assert_eq!(id.to_string(), text);
        }
    }

    #[test]
    fn every_identity_survives_its_text(td in "[a-z0-9][a-z0-9._-]{0,20}", ns in "[a-z0-9-]{1,20}", sa in "[a-z0-9][a-z0-9.-]{0,20}") {
        let id = SpiffeId::new(&td, &ns, &sa);
        prop_assert_eq!(id.to_string().parse(), Ok(id));
    }
}
