//! Bounds on what a peer can make the controller do: token buckets, and log lines once per peer and minute.

use std::collections::BTreeMap;

/// Peers that are told apart; beyond it all share one bucket, so that names made up by a peer cost no memory.
const MAX_PEERS: usize = 4096;
/// Seconds between two log lines about one peer.
const LOG_INTERVAL_SECS: u64 = 60;

/// Token buckets, one a peer. Time is an argument, in milliseconds of any clock that does not run backwards.
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    per_second: u32,
    buckets: BTreeMap<String, Bucket>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// Thousandths of a token.
    millis: u64,
    at_ms: u64,
}

impl RateLimit {
    /// Allows `burst` at once and `per_second` in the long run.
    pub fn new(burst: u32, per_second: u32) -> Self {
        Self { burst, per_second, buckets: BTreeMap::new() }
    }

    /// Takes a token; false when there is none.
    pub fn admit(&mut self, peer: &str, now_ms: u64) -> bool {
        let full = u64::from(self.burst) * 1000;
        if !self.buckets.contains_key(peer) && self.buckets.len() >= MAX_PEERS {
            // A bucket that has filled up again says no more than a new one.
            let rate = u64::from(self.per_second);
            self.buckets.retain(|_, b| b.millis + now_ms.saturating_sub(b.at_ms).saturating_mul(rate) < full);
        }
        let key = if self.buckets.contains_key(peer) || self.buckets.len() < MAX_PEERS { peer } else { "" };
        let bucket = self.buckets.entry(key.to_owned()).or_insert(Bucket { millis: full, at_ms: now_ms });
        let gained = now_ms.saturating_sub(bucket.at_ms).saturating_mul(u64::from(self.per_second));
        bucket.millis = bucket.millis.saturating_add(gained).min(full);
        bucket.at_ms = now_ms;
        let admitted = bucket.millis >= 1000;
        if admitted {
            bucket.millis -= 1000;
        }
        admitted
    }
}

/// Decides which refusals are worth a line.
#[derive(Debug, Default)]
pub struct QuietLog {
    last: BTreeMap<String, u64>,
}

impl QuietLog {
    /// Whether to log about this peer now. Time in seconds.
    pub fn is_due(&mut self, peer: &str, now_secs: u64) -> bool {
        if self.last.len() >= MAX_PEERS {
            self.last.retain(|_, at| now_secs.saturating_sub(*at) < LOG_INTERVAL_SECS);
        }
        let due = self.last.get(peer).is_none_or(|at| now_secs.saturating_sub(*at) >= LOG_INTERVAL_SECS);
        let due = due && (self.last.len() < MAX_PEERS || self.last.contains_key(peer));
        if due {
            self.last.insert(peer.to_owned(), now_secs);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let mut limit = RateLimit::new(3, 2);
        let admitted = |limit: &mut RateLimit, at| limit.admit("node-a", at);
        assert_eq!([0, 0, 0, 0, 499].map(|at| admitted(&mut limit, at)), [true, true, true, false, false]);
        assert_eq!(
            [500, 500, 1000, 60_000, 60_000, 60_000, 60_000].map(|at| admitted(&mut limit, at)),
            [true, false, true, true, true, true, false]
        );
        assert!(limit.admit("node-b", 60_000), "nodes do not disturb each other");
    }

    #[test]
    fn made_up_names_are_bounded() {
        let mut limit = RateLimit::new(1, 1);
        for i in 0..3 * MAX_PEERS {
            limit.admit(&format!("n{i}"), 0);
        }
        assert!(limit.buckets.len() <= MAX_PEERS + 1);
        assert!(limit.admit("late", 10_000), "old buckets make room");
        let mut log = QuietLog::default();
        assert_eq!((0..3 * MAX_PEERS).filter(|i| log.is_due(&format!("p{i}"), 0)).count(), MAX_PEERS);
        assert!(log.is_due("late", LOG_INTERVAL_SECS) && !log.is_due("late", LOG_INTERVAL_SECS + 1));
    }
}
