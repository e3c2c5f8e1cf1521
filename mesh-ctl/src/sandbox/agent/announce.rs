//! What to tell a node proxy next. Pure: the socket and the clock are the caller's.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mesh_api::proto::workload::zds::workload_request::Payload;
use mesh_api::proto::workload::zds::{AddWorkload, DelWorkload, SnapshotSent, WorkloadInfo};

/// First pause before a refused workload is announced again.
pub(super) const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest pause.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(30);

/// A workload that should be enrolled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Enrol {
    /// Key of the workload in the sandbox.
    pub key: String,
    /// Name, namespace, service account.
    pub info: WorkloadInfo,
    /// Its network namespace.
    pub netns: std::path::PathBuf,
}

/// Workloads of one node by UID.
pub(super) type Desired = BTreeMap<String, Enrol>;

/// What one proxy was told so far and how it answered.
#[derive(Debug, Default)]
pub(super) struct Announcer {
    told: BTreeMap<String, Outcome>,
    snapshot_sent: bool,
}

/// How a proxy answered an announcement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It serves the workload.
    Enrolled,
    /// It refused, and may be asked again then.
    Refused {
        /// Its words.
        why: String,
        /// Pause before that.
        pause: Duration,
        /// When to ask again.
        retry_at: Instant,
    },
}

impl Announcer {
    /// The next request, if there is one now. Deletions go first, so that an address or name that is used again is free.
    pub(super) fn next(&self, desired: &Desired, now: Instant) -> Option<Payload> {
        if let Some(uid) = self.told.keys().find(|uid| !desired.contains_key(*uid)) {
            return Some(Payload::Del(DelWorkload { uid: uid.clone() }));
        }
        let wanted = desired.iter().find(|(uid, _)| match self.told.get(*uid) {
            None => true,
            Some(Outcome::Enrolled) => false,
            Some(Outcome::Refused { retry_at, .. }) => *retry_at <= now,
        });
        match wanted {
            Some((uid, enrol)) => {
                Some(Payload::Add(AddWorkload { uid: uid.clone(), workload_info: Some(enrol.info.clone()) }))
            }
            None if !self.snapshot_sent => Some(Payload::SnapshotSent(SnapshotSent {})),
            None => None,
        }
    }

    /// Takes the answer to a request in; an empty error is a success.
    pub(super) fn answered(&mut self, request: &Payload, error: &str, now: Instant) {
        match request {
            Payload::Add(add) => {
                let outcome = if error.is_empty() { Outcome::Enrolled } else { self.refused(&add.uid, error, now) };
                self.told.insert(add.uid.clone(), outcome);
            }
            // A proxy that cannot release it has nothing to release: it is not asked a second time.
            Payload::Del(del) => {
                self.told.remove(&del.uid);
            }
            Payload::SnapshotSent(_) => self.snapshot_sent = true,
            Payload::Keep(_) => {}
        }
    }

    /// When there is something to ask again.
    pub(super) fn next_retry(&self) -> Option<Instant> {
        let retry = |o: &Outcome| match o {
            Outcome::Enrolled => None,
            Outcome::Refused { retry_at, .. } => Some(*retry_at),
        };
        self.told.values().filter_map(retry).min()
    }

    /// Answers by UID.
    pub(super) fn outcomes(&self) -> &BTreeMap<String, Outcome> {
        &self.told
    }

    fn refused(&self, uid: &str, why: &str, now: Instant) -> Outcome {
        let pause = match self.told.get(uid) {
            Some(Outcome::Refused { pause, .. }) => (*pause * 2).min(RETRY_MAX),
            Some(Outcome::Enrolled) | None => RETRY_FIRST,
        };
        Outcome::Refused { why: why.to_string(), pause, retry_at: now + pause }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desired(uids: &[&str]) -> Desired {
        let enrol = |uid: &&str| {
            let info = WorkloadInfo { name: uid.to_string(), ..WorkloadInfo::default() };
            (uid.to_string(), Enrol { key: uid.to_string(), info, netns: "/x".into() })
        };
        uids.iter().map(enrol).collect()
    }

    fn words(payload: Option<&Payload>) -> String {
        match payload {
            None => "-".into(),
            Some(Payload::Add(a)) => format!("add {}", a.uid),
            Some(Payload::Del(d)) => format!("del {}", d.uid),
            Some(Payload::SnapshotSent(_)) => "snapshot".into(),
            Some(Payload::Keep(k)) => format!("keep {}", k.uid),
        }
    }

    /// Answers each request without error until there is none; returns what was asked.
    fn drive(announcer: &mut Announcer, desired: &Desired, now: Instant) -> Vec<String> {
        let mut asked = Vec::new();
        while let Some(request) = announcer.next(desired, now) {
            asked.push(words(Some(&request)));
            announcer.answered(&request, "", now);
        }
        asked
    }

    #[test]
    fn all_that_exist_then_the_snapshot_then_changes() {
        let (mut announcer, now) = (Announcer::default(), Instant::now());
        assert_eq!(drive(&mut announcer, &desired(&["a", "b"]), now), ["add a", "add b", "snapshot"]);
        assert_eq!(drive(&mut announcer, &desired(&["b", "c"]), now), ["del a", "add c"]);
        assert!(drive(&mut announcer, &desired(&["b", "c"]), now).is_empty());
    }

    #[test]
    fn a_refusal_keeps_nobody_else_waiting_and_is_asked_again_ever_later() {
        let (mut announcer, mut now) = (Announcer::default(), Instant::now());
        let want = desired(&["a", "b"]);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let request = announcer.next(&want, now).unwrap();
            assert_eq!(words(Some(&request)), "add a");
            announcer.answered(&request, "port 15001 is taken", now);
            if pauses.is_empty() {
                assert_eq!(drive(&mut announcer, &want, now), ["add b", "snapshot"]);
            }
            let retry = announcer.next_retry().unwrap();
            pauses.push((retry - now).as_secs());
            now = retry;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
    }

    #[test]
    fn a_refused_workload_that_is_gone_is_taken_back() {
        let (mut announcer, now) = (Announcer::default(), Instant::now());
        let request = announcer.next(&desired(&["a"]), now).unwrap();
        announcer.answered(&request, "no", now);
        assert_eq!(drive(&mut announcer, &desired(&[]), now), ["del a", "snapshot"]);
        assert_eq!(announcer.next_retry(), None);
    }
}
