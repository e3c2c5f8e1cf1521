//! The schedule's rules, one by one.

use std::slice::from_ref;

use mesh_core::certs::{
    Adoption, BACKOFF_FIRST_SECS, BACKOFF_MAX_SECS, CertSchedule, CertState, JITTER_PERCENT, REQUEST_TIMEOUT_SECS,
};
use mesh_core::identity::SpiffeId;
use rand::SeedableRng;
use rand::rngs::StdRng;

const DAY: u64 = 24 * 3600;
const START: u64 = 1_800_000_000;
/// More than any test has identities.
const ROOM: usize = 10_000;

fn id(name: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "default", name)
}

fn dice() -> StdRng {
    StdRng::seed_from_u64(7)
}

/// A schedule that wants one identity, and has asked for it.
fn asked() -> (CertSchedule, SpiffeId, StdRng) {
    let (mut schedule, mut rng, id) = (CertSchedule::default(), dice(), id("a"));
    schedule.want(id.clone(), START);
    assert_eq!(schedule.due(START, ROOM, &mut rng), from_ref(&id));
    (schedule, id, rng)
}

fn renew_at(schedule: &CertSchedule, id: &SpiffeId, now: u64) -> u64 {
    match schedule.state(id, now) {
        Some(CertState::Available { renew_at_secs, .. }) => renew_at_secs,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_wanted_is_asked_for_at_once_and_once() {
    let (mut schedule, id, mut rng) = asked();
    assert_eq!(schedule.state(&id, START), Some(CertState::Initializing { failures: 0 }));
    schedule.want(id.clone(), START + 1);
    for now in START..START + REQUEST_TIMEOUT_SECS {
        assert!(schedule.due(now, ROOM, &mut rng).is_empty(), "at {}", now - START);
    }
    assert_eq!(schedule.next_wakeup(), Some(START + REQUEST_TIMEOUT_SECS));
}

#[test]
fn wanting_again_keeps_what_is_there() {
    let (mut schedule, id, mut rng) = asked();
    schedule.issued(&id, (START, START + DAY), START, &mut rng);
    schedule.want(id.clone(), START + 1);
    assert!(matches!(schedule.state(&id, START + 1), Some(CertState::Available { .. })));
    assert!(schedule.due(START + 1, ROOM, &mut rng).is_empty());
}

#[test]
fn a_lost_request_is_repeated_after_its_time_and_a_wait() {
    let (mut schedule, id, mut rng) = asked();
    let lost = START + REQUEST_TIMEOUT_SECS;
    assert!(schedule.due(lost, ROOM, &mut rng).is_empty(), "it waits first");
    let wake = schedule.next_wakeup().expect("wanted");
    assert!((lost + BACKOFF_FIRST_SECS..=lost + BACKOFF_FIRST_SECS + 1).contains(&wake), "{}", wake - lost);
    assert_eq!(schedule.due(wake, ROOM, &mut rng), [id]);
}

#[test]
fn a_request_that_was_lost_long_ago_is_repeated_at_once() {
    let (mut schedule, id, mut rng) = asked();
    // The machine slept.
    assert_eq!(schedule.due(START + 100 * REQUEST_TIMEOUT_SECS, ROOM, &mut rng), from_ref(&id));
}

#[test]
fn waits_double_up_to_their_bound_and_start_anew_after_success() {
    let (mut schedule, id, mut rng) = asked();
    let mut now = START;
    for wait in [1, 2, 4, 8, 16, 32, 64, 128, 150, 150, 150].into_iter().chain(std::iter::repeat_n(150, 200)) {
        schedule.failed(&id, now, &mut rng);
        let next = schedule.next_wakeup().expect("wanted");
        assert!((now + wait..=now + wait + wait / 5).contains(&next), "{} instead of {wait}", next - now);
        assert!(schedule.due(next - 1, ROOM, &mut rng).is_empty());
        assert_eq!(schedule.due(next, ROOM, &mut rng), from_ref(&id));
        now = next;
    }
    assert_eq!(BACKOFF_MAX_SECS, 150);
    schedule.issued(&id, (now, now + DAY), now, &mut rng);
    now = renew_at(&schedule, &id, now);
    assert_eq!(schedule.due(now, ROOM, &mut rng), from_ref(&id));
    schedule.failed(&id, now, &mut rng);
    assert!(schedule.next_wakeup().expect("wanted") <= now + BACKOFF_FIRST_SECS + 1);
}

#[test]
fn an_answer_to_a_request_that_was_given_up_does_not_delay_the_next() {
    let (mut schedule, id, mut rng) = asked();
    schedule.due(START + REQUEST_TIMEOUT_SECS, ROOM, &mut rng);
    let wake = schedule.next_wakeup();
    schedule.failed(&id, START + REQUEST_TIMEOUT_SECS, &mut rng);
    assert_eq!(schedule.next_wakeup(), wake);
}

#[test]
fn renewal_is_due_at_half_of_what_remains_with_jitter() {
    for lifetime in [60, 3_600, DAY, 90 * DAY] {
        // The signer dates certificates back for clocks that are slow.
        for back_dated in [0, 120] {
            let mut all = Vec::new();
            for seed in 0..500 {
                let (mut schedule, id, _) = asked();
                let mut rng = StdRng::seed_from_u64(seed);
                schedule.issued(&id, (START - back_dated, START + lifetime), START, &mut rng);
                all.push(renew_at(&schedule, &id, START) - START);
            }
            let (half, jitter) = (lifetime / 2, lifetime * JITTER_PERCENT / 100);
            let (min, max) = (all.iter().min().expect("some"), all.iter().max().expect("some"));
            assert!(*min >= half - jitter && *max <= half + jitter, "{lifetime}: {min} to {max}");
            // The whole width is used.
            assert!(max - min >= jitter, "{lifetime}: {min} to {max}");
        }
    }
}

#[test]
fn a_thousand_certificates_of_one_second_are_not_renewed_in_one_second() {
    let (mut schedule, mut rng) = (CertSchedule::default(), dice());
    let ids: Vec<SpiffeId> = (0..1_000).map(|number| id(&format!("sa-{number}"))).collect();
    for id in &ids {
        schedule.want(id.clone(), START);
    }
    schedule.due(START, ROOM, &mut rng);
    for id in &ids {
        schedule.issued(id, (START, START + DAY), START, &mut rng);
    }
    let mut by_minute = std::collections::BTreeMap::<u64, u32>::new();
    for id in &ids {
        *by_minute.entry(renew_at(&schedule, id, START) / 60).or_default() += 1;
    }
    // Spread over 288 minutes: 3.5 a minute on average.
    let most = by_minute.values().max().expect("some");
    assert!(*most <= 15, "{most} in one minute");
}

#[test]
fn seconds_long_certificates_are_not_asked_for_in_a_loop() {
    for lifetime in 1..10 {
        let (mut schedule, id, mut rng) = asked();
        schedule.issued(&id, (START, START + lifetime), START, &mut rng);
        assert!(renew_at(&schedule, &id, START) > START, "{lifetime}");
    }
}

#[test]
fn what_has_run_out_is_expired_and_asked_for_again() {
    let (mut schedule, id, mut rng) = asked();
    schedule.issued(&id, (START, START + 100), START, &mut rng);
    assert!(
        matches!(schedule.state(&id, START + 99), Some(CertState::Available { not_after_secs, .. }) if not_after_secs == START + 100)
    );
    assert_eq!(schedule.state(&id, START + 100), Some(CertState::Expired { not_after_secs: START + 100 }));
    assert_eq!(schedule.due(START + 100, ROOM, &mut rng), from_ref(&id));
    schedule.issued(&id, (START + 100, START + 200), START + 101, &mut rng);
    assert!(matches!(schedule.state(&id, START + 101), Some(CertState::Available { .. })));
}

#[test]
fn a_certificate_that_is_not_valid_is_not_used() {
    for validity in [(START, START), (START - 10, START - 1), (START + 10, START + 10), (START + 10, START + 9)] {
        let (mut schedule, id, mut rng) = asked();
        assert_eq!(schedule.issued(&id, validity, START, &mut rng), Adoption::Discard, "{validity:?}");
        assert_eq!(schedule.state(&id, START), Some(CertState::Initializing { failures: 0 }));
    }
}

#[test]
fn a_certificate_that_nobody_wants_is_not_used() {
    let (mut schedule, id, mut rng) = asked();
    schedule.drop(&id);
    assert_eq!(schedule.issued(&id, (START, START + DAY), START, &mut rng), Adoption::Discard);
    assert_eq!((schedule.state(&id, START), schedule.next_wakeup()), (None, None));
    schedule.failed(&id, START, &mut rng);
    assert_eq!(schedule.state(&id, START), None);
}

#[test]
fn an_older_certificate_that_comes_late_does_not_replace_a_newer_one() {
    let (mut schedule, id, mut rng) = asked();
    assert_eq!(schedule.issued(&id, (START + 20, START + 20 + DAY), START + 20, &mut rng), Adoption::Use);
    assert_eq!(schedule.issued(&id, (START + 1, START + 1 + DAY), START + 21, &mut rng), Adoption::Discard);
    assert!(
        matches!(schedule.state(&id, START + 21), Some(CertState::Available { not_after_secs, .. }) if not_after_secs == START + 20 + DAY)
    );
}

#[test]
fn a_newer_certificate_counts_even_when_it_is_valid_for_less_long() {
    let (mut schedule, id, mut rng) = asked();
    schedule.issued(&id, (START, START + DAY), START, &mut rng);
    // The signer was replaced by one whose certificates last an hour.
    let renewal = renew_at(&schedule, &id, START);
    assert_eq!(schedule.due(renewal, ROOM, &mut rng), from_ref(&id));
    let newer = (renewal, renewal + 3_600);
    assert_eq!(schedule.issued(&id, newer, renewal, &mut rng), Adoption::Use);
    assert!(
        matches!(schedule.state(&id, renewal), Some(CertState::Available { not_after_secs, .. }) if not_after_secs == newer.1)
    );
}

#[test]
fn after_a_restart_a_young_certificate_is_renewed_at_its_half_life() {
    let (mut schedule, id, mut rng) = (CertSchedule::default(), id("a"), dice());
    schedule.want(id.clone(), START);
    assert_eq!(schedule.restored(&id, (START - 3_600, START - 3_600 + DAY), START, &mut rng), Adoption::Use);
    assert!(schedule.due(START, ROOM, &mut rng).is_empty());
    assert!(renew_at(&schedule, &id, START) <= START - 3_600 + DAY / 2);
}

#[test]
fn after_a_restart_old_certificates_are_renewed_soon_but_not_all_at_once() {
    let (mut schedule, mut rng) = (CertSchedule::default(), dice());
    let ids: Vec<SpiffeId> = (0..300).map(|number| id(&format!("sa-{number}"))).collect();
    for id in &ids {
        schedule.want(id.clone(), START);
        schedule.restored(id, (START - DAY + 3_600, START + 3_600), START, &mut rng);
    }
    let times: Vec<u64> = ids.iter().map(|id| renew_at(&schedule, id, START) - START).collect();
    assert!(times.iter().all(|at| *at <= BACKOFF_MAX_SECS), "{times:?}");
    assert!(schedule.due(START, ROOM, &mut rng).len() < 20, "at once");
    // Close to its end there is less to spread over.
    let (mut schedule, id) = (CertSchedule::default(), id("late"));
    schedule.want(id.clone(), START);
    schedule.restored(&id, (START - DAY, START + 50), START, &mut rng);
    assert!(renew_at(&schedule, &id, START) <= START + 5);
}

#[test]
fn after_a_restart_an_expired_certificate_is_not_used_and_asked_for_at_once() {
    let (mut schedule, id, mut rng) = (CertSchedule::default(), id("a"), dice());
    schedule.want(id.clone(), START);
    assert_eq!(schedule.restored(&id, (START - DAY, START), START, &mut rng), Adoption::Discard);
    assert_eq!(schedule.due(START, ROOM, &mut rng), [id]);
}

#[test]
fn replaced_roots_renew_everything_within_the_time() {
    const WITHIN: u64 = 10;
    let (mut schedule, mut rng) = (CertSchedule::default(), dice());
    let ids: Vec<SpiffeId> = (0..100).map(|number| id(&format!("sa-{number}"))).collect();
    for id in &ids {
        schedule.want(id.clone(), START);
    }
    schedule.due(START, ROOM, &mut rng);
    for id in &ids {
        schedule.issued(id, (START, START + DAY), START, &mut rng);
    }
    let now = START + 100;
    schedule.renew_all(now, WITHIN, &mut rng);
    let at_once = schedule.due(now, ROOM, &mut rng).len();
    assert!(at_once < 40, "{at_once} at once");
    let later: usize = (1..=WITHIN).map(|second| schedule.due(now + second, ROOM, &mut rng).len()).sum();
    assert_eq!(at_once + later, ids.len());
}

#[test]
fn replaced_roots_renew_what_was_being_asked_for_as_well() {
    const WITHIN: u64 = 10;
    let (mut schedule, id, mut rng) = asked();
    schedule.renew_all(START + 1, WITHIN, &mut rng);
    // Perhaps signed before the change.
    schedule.issued(&id, (START, START + DAY), START + 2, &mut rng);
    assert!(renew_at(&schedule, &id, START + 2) <= START + 1 + WITHIN);
    let wake = schedule.next_wakeup().expect("wanted");
    assert_eq!(schedule.due(wake, ROOM, &mut rng), from_ref(&id));
    schedule.issued(&id, (wake, wake + DAY), wake, &mut rng);
    assert!(renew_at(&schedule, &id, wake) > wake + DAY / 3, "once is enough");
}

#[test]
fn replaced_roots_are_not_forgotten_over_an_answer_that_comes_late() {
    let (mut schedule, id, mut rng) = asked();
    let lost = START + REQUEST_TIMEOUT_SECS;
    schedule.due(lost, ROOM, &mut rng);
    schedule.renew_all(lost, 1, &mut rng);
    // The answer to the request that was given up, signed before the change, and once more.
    for _ in 0..2 {
        schedule.issued(&id, (START, START + DAY), lost, &mut rng);
        assert!(renew_at(&schedule, &id, lost) <= lost + 1);
    }
}

#[test]
fn replaced_roots_do_not_shorten_a_wait_after_a_failure_twice() {
    let (mut schedule, id, mut rng) = asked();
    schedule.renew_all(START, 0, &mut rng);
    schedule.failed(&id, START, &mut rng);
    let wake = schedule.next_wakeup().expect("wanted");
    assert_eq!(schedule.due(wake, ROOM, &mut rng), from_ref(&id));
    // This request was made after the change.
    schedule.issued(&id, (wake, wake + DAY), wake, &mut rng);
    assert!(renew_at(&schedule, &id, wake) > wake + DAY / 3);
}

#[test]
fn with_little_room_those_go_first_that_have_waited_longest() {
    let (mut schedule, mut rng) = (CertSchedule::default(), dice());
    for (wait, name) in [(3, "a"), (1, "b"), (2, "c"), (0, "d")] {
        schedule.want(id(name), START + wait);
    }
    let now = START + 10;
    assert_eq!(schedule.due(now, 3, &mut rng), [id("d"), id("b"), id("c")]);
    assert!(schedule.due(now, 0, &mut rng).is_empty());
    // The one that waits does not count as asked for.
    assert_eq!(schedule.due(now + 100, 1, &mut rng), [id("a")]);
}

#[test]
fn without_room_for_all_nobody_is_left_out() {
    const IDS: usize = 40;
    let (mut schedule, mut rng) = (CertSchedule::default(), dice());
    for number in 0..IDS {
        schedule.want(id(&format!("sa-{number:02}")), START);
    }
    // The authority never answers.
    let mut asked = std::collections::BTreeSet::new();
    for now in START..START + 200 {
        asked.extend(schedule.due(now, 1, &mut rng));
    }
    assert_eq!(asked.len(), IDS);
}
