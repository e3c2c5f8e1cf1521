//! When certificates are requested, renewed and given up.
//!
//! A schedule of identities: [`CertSchedule::due`] says which to request now, [`CertSchedule::issued`] and
//! [`CertSchedule::failed`] report what became of it. Time is Unix time in seconds and always passed in, chance too.
//! Not here: keys, requests, storage. Answers may come late, twice or never; the schedule stays right in all orders.

use std::collections::BTreeMap;

use rand::Rng;

use crate::identity::SpiffeId;

/// First wait after a failed request.
pub const BACKOFF_FIRST_SECS: u64 = 1;
/// Longest wait after a failed request (as the incumbent's proxy).
pub const BACKOFF_MAX_SECS: u64 = 150;
/// A request without answer counts as failed after this.
pub const REQUEST_TIMEOUT_SECS: u64 = 15;
/// Renewal is due at half of the remaining lifetime, moved by up to this share of it in either direction, so that a
/// thousand certificates issued in one second are not renewed in one second.
pub const JITTER_PERCENT: u64 = 10;

/// All identities that this process needs.
#[derive(Debug, Clone, Default)]
pub struct CertSchedule {
    entries: BTreeMap<SpiffeId, Entry>,
}

/// Where an identity stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CertState {
    /// Never had a certificate; `failures` requests failed so far.
    Initializing {
        /// Failed requests.
        failures: u32,
    },
    /// Has a valid certificate.
    Available {
        /// When renewal is due.
        renew_at_secs: u64,
        /// End of validity.
        not_after_secs: u64,
    },
    /// Its certificate has run out.
    Expired {
        /// End of validity.
        not_after_secs: u64,
    },
}

/// What an issued certificate is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adoption {
    /// Use it.
    Use,
    /// Nobody wants this identity any more, the certificate has run out, or one that was issued later is there. Drop it.
    Discard,
}

#[derive(Debug, Clone)]
struct Entry {
    /// Next moment at which something is to be done.
    due_at_secs: u64,
    /// A request is on its way; `due_at_secs` is then when it counts as lost.
    in_flight: bool,
    failures: u32,
    /// Validity of the certificate in use: not before, not after.
    validity_secs: Option<(u64, u64)>,
    /// The roots have changed and nothing was requested since: whatever comes is renewed by then.
    renew_by_secs: Option<u64>,
}

impl CertSchedule {
    /// Needs a certificate for the identity, now.
    pub fn want(&mut self, id: SpiffeId, now_secs: u64) {
        self.entries.entry(id).or_insert(Entry {
            due_at_secs: now_secs,
            in_flight: false,
            failures: 0,
            validity_secs: None,
            renew_by_secs: None,
        });
    }

    /// The identity is not needed any more.
    pub fn drop(&mut self, id: &SpiffeId) {
        self.entries.remove(id);
    }

    /// A certificate came. Renewal is due at half of what remains of its lifetime.
    ///
    /// `not_before_secs` lies before the time of issue (the signer allows for clocks that are slow), so the remaining
    /// lifetime counts, not the whole. Of two certificates the one that was issued later is the better one, even when it
    /// is valid for less long: the signer, its lifetimes or its roots may have changed in between.
    pub fn issued(
        &mut self,
        id: &SpiffeId,
        (not_before_secs, not_after_secs): (u64, u64),
        now_secs: u64,
        rng: &mut impl Rng,
    ) -> Adoption {
        let Some(entry) = self.entries.get_mut(id) else { return Adoption::Discard };
        let is_older = entry.validity_secs.is_some_and(|(not_before, _)| not_before > not_before_secs);
        if is_older || not_after_secs <= now_secs || not_before_secs >= not_after_secs {
            return Adoption::Discard;
        }
        let renew_at_secs = now_secs + jittered_half(not_after_secs - now_secs, rng);
        *entry = Entry {
            due_at_secs: entry.renew_by_secs.map_or(renew_at_secs, |by| renew_at_secs.min(by.max(now_secs))),
            in_flight: false,
            failures: 0,
            validity_secs: Some((not_before_secs, not_after_secs)),
            renew_by_secs: entry.renew_by_secs,
        };
        Adoption::Use
    }

    /// A certificate from before a restart. Past its half-life renewal is due soon, spread over [`BACKOFF_MAX_SECS`] or
    /// a tenth of what remains, whichever is less.
    pub fn restored(
        &mut self,
        id: &SpiffeId,
        (not_before_secs, not_after_secs): (u64, u64),
        now_secs: u64,
        rng: &mut impl Rng,
    ) -> Adoption {
        let adoption = self.issued(id, (not_before_secs, not_after_secs), now_secs, rng);
        if let (Adoption::Use, Some(entry)) = (adoption, self.entries.get_mut(id)) {
            let half_life = not_before_secs + (not_after_secs - not_before_secs) / 2;
            let spread = ((not_after_secs - now_secs) / 10).min(BACKOFF_MAX_SECS);
            let soonest = now_secs + rng.random_range(0..=spread);
            entry.due_at_secs = entry.due_at_secs.min(half_life.max(soonest));
        }
        adoption
    }

    /// A request failed. Tries again after 1 s, 2 s, 4 s up to [`BACKOFF_MAX_SECS`], each moved by up to a fifth; a
    /// certificate that is still valid stays in use.
    pub fn failed(&mut self, id: &SpiffeId, now_secs: u64, rng: &mut impl Rng) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        // An answer to a request that was given up already says nothing about the next one.
        if entry.in_flight {
            entry.back_off(now_secs, rng);
        }
    }

    /// Roots have changed: renews everything within `within_secs`, spread evenly by chance. A request that is on its way
    /// may have been signed before the change, so what it brings is renewed as well.
    pub fn renew_all(&mut self, now_secs: u64, within_secs: u64, rng: &mut impl Rng) {
        for entry in self.entries.values_mut() {
            let by_secs = now_secs + rng.random_range(0..=within_secs);
            entry.renew_by_secs = Some(by_secs);
            if !entry.in_flight {
                entry.due_at_secs = entry.due_at_secs.min(by_secs);
            }
        }
    }

    /// Identities to request now, at most `room`, those first that have waited longest. Each is on its way until it is
    /// issued, failed, or [`REQUEST_TIMEOUT_SECS`] have passed; the caller gives a request up before that.
    pub fn due(&mut self, now_secs: u64, room: usize, rng: &mut impl Rng) -> Vec<SpiffeId> {
        for entry in self.entries.values_mut() {
            if entry.in_flight && entry.due_at_secs <= now_secs {
                entry.back_off(entry.due_at_secs, rng);
            }
        }
        let mut due: Vec<(&SpiffeId, &mut Entry)> =
            self.entries.iter_mut().filter(|(_, entry)| !entry.in_flight && entry.due_at_secs <= now_secs).collect();
        due.sort_by_key(|(_, entry)| entry.due_at_secs);
        let start = |(id, entry): (&SpiffeId, &mut Entry)| {
            entry.in_flight = true;
            entry.renew_by_secs = None;
            entry.due_at_secs = now_secs + REQUEST_TIMEOUT_SECS;
            id.clone()
        };
        due.into_iter().take(room).map(start).collect()
    }

    /// When [`CertSchedule::due`] has something to do next, Unix seconds.
    pub fn next_wakeup(&self) -> Option<u64> {
        self.entries.values().map(|e| e.due_at_secs).min()
    }

    /// Where an identity stands; none when nobody wants it.
    pub fn state(&self, id: &SpiffeId, now_secs: u64) -> Option<CertState> {
        let entry = self.entries.get(id)?;
        Some(match entry.validity_secs {
            None => CertState::Initializing { failures: entry.failures },
            Some((_, not_after_secs)) if not_after_secs <= now_secs => CertState::Expired { not_after_secs },
            Some((_, not_after_secs)) => CertState::Available { renew_at_secs: entry.due_at_secs, not_after_secs },
        })
    }
}

impl Entry {
    fn back_off(&mut self, now_secs: u64, rng: &mut impl Rng) {
        let wait = backoff_secs(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.in_flight = false;
        self.due_at_secs = now_secs + wait + rng.random_range(0..=wait / 5);
    }
}

/// Wait after the given number of earlier failures, without jitter.
fn backoff_secs(failures: u32) -> u64 {
    BACKOFF_FIRST_SECS.checked_shl(failures.min(16)).unwrap_or(BACKOFF_MAX_SECS).min(BACKOFF_MAX_SECS)
}

/// Half of the lifetime, moved by up to [`JITTER_PERCENT`] of it.
fn jittered_half(remaining_secs: u64, rng: &mut impl Rng) -> u64 {
    let half = remaining_secs / 2;
    let jitter = remaining_secs * JITTER_PERCENT / 100;
    // At least a second, or a signer that hands out second-long certificates would be asked in a loop.
    (half - jitter.min(half) + rng.random_range(0..=2 * jitter)).max(1)
}
