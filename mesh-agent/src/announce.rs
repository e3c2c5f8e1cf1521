//! What to tell a node proxy next. Pure: the socket and the clock are the caller's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_api::proto::workload::zds::workload_request::Payload;
use mesh_api::proto::workload::zds::{AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo};

/// First pause before a refused workload is announced again.
pub(crate) const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest pause.
pub(crate) const RETRY_MAX: Duration = Duration::from_secs(30);

/// Where a network namespace is found.
#[derive(Debug, Clone)]
pub enum Netns {
    /// Mounted there.
    Path(PathBuf),
    /// Held open, so that its number is nobody else's.
    Held(Arc<File>),
    /// Not found yet: what a proxy serves already it goes on with.
    Unknown,
}

impl Netns {
    /// Opens it.
    ///
    /// # Errors
    /// It is gone.
    pub fn open(&self) -> io::Result<Arc<File>> {
        match self {
            Self::Path(path) => File::open(path).map(Arc::new),
            Self::Held(file) => Ok(Arc::clone(file)),
            Self::Unknown => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Differs where another namespace took the place of the last: its inode. 0 for one by its path, which stays.
    pub(crate) fn stamp(&self) -> u64 {
        match self {
            Self::Path(_) | Self::Unknown => 0,
            Self::Held(file) => file.metadata().map_or(0, |metadata| metadata.ino()),
        }
    }
}

/// A workload that should be enrolled.
#[derive(Debug, Clone)]
pub struct Enrol {
    /// For people.
    pub key: String,
    /// Name, namespace, service account.
    pub info: WorkloadInfo,
    /// Its network namespace.
    pub netns: Netns,
}

/// Workloads of one node by UID.
pub type Desired = BTreeMap<String, Enrol>;

/// What one proxy was told so far and how it answered.
#[derive(Debug, Default)]
pub(crate) struct Announcer {
    told: BTreeMap<String, Told>,
    /// Those without a known namespace that the proxy was told to keep.
    kept: BTreeSet<String>,
    snapshot_sent: bool,
}

/// An announcement that was answered.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    pub(crate) outcome: Outcome,
    /// The namespace that was told.
    pub(crate) stamp: u64,
}

/// How a proxy answered an announcement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
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
    pub(crate) fn next(&self, desired: &Desired, now: Instant) -> Option<Payload> {
        if let Some(uid) = self.told.keys().find(|uid| !desired.contains_key(*uid)) {
            return Some(Payload::Del(DelWorkload { uid: uid.clone(), lives_on: false }));
        }
        let mut known = desired.iter().filter(|(_, enrol)| !matches!(enrol.netns, Netns::Unknown));
        let wanted = known.find(|(uid, enrol)| match self.told.get(*uid) {
            None => true,
            // A pod whose network was made anew: the proxy ends the old one.
            Some(told) if told.stamp != enrol.netns.stamp() => true,
            Some(told) => match told.outcome {
                Outcome::Enrolled => false,
                Outcome::Refused { retry_at, .. } => retry_at <= now,
            },
        });
        match wanted {
            Some((uid, enrol)) => {
                Some(Payload::Add(AddWorkload { uid: uid.clone(), workload_info: Some(enrol.info.clone()) }))
            }
            None if self.snapshot_sent => None,
            None => {
                // What is not told of before the snapshot's end, the proxy lets go.
                let mut unknown = desired.iter().filter(|(_, enrol)| matches!(enrol.netns, Netns::Unknown));
                match unknown.find(|(uid, _)| !self.kept.contains(*uid)) {
                    Some((uid, _)) => Some(Payload::Keep(KeepWorkload { uid: uid.clone() })),
                    None => Some(Payload::SnapshotSent(SnapshotSent {})),
                }
            }
        }
    }

    /// Takes the answer to a request in; an empty error is a success.
    pub(crate) fn answered(&mut self, request: &Payload, desired: &Desired, error: &str, now: Instant) {
        match request {
            Payload::Add(add) => {
                let stamp = desired.get(&add.uid).map_or(0, |enrol| enrol.netns.stamp());
                let outcome = if error.is_empty() { Outcome::Enrolled } else { self.refused(&add.uid, error, now) };
                self.told.insert(add.uid.clone(), Told { outcome, stamp });
            }
            // A proxy that cannot release it has nothing to release: it is not asked a second time.
            Payload::Del(del) => drop(self.told.remove(&del.uid)),
            Payload::SnapshotSent(_) => self.snapshot_sent = true,
            // It may never have heard of it, which is as good.
            Payload::Keep(keep) => drop(self.kept.insert(keep.uid.clone())),
        }
    }

    /// When there is something to ask again.
    pub(crate) fn next_retry(&self) -> Option<Instant> {
        let retry = |told: &Told| match told.outcome {
            Outcome::Enrolled => None,
            Outcome::Refused { retry_at, .. } => Some(retry_at),
        };
        self.told.values().filter_map(retry).min()
    }

    /// Answers by UID.
    pub(crate) fn answers(&self) -> &BTreeMap<String, Told> {
        &self.told
    }

    fn refused(&self, uid: &str, why: &str, now: Instant) -> Outcome {
        let pause = match self.told.get(uid).map(|told| &told.outcome) {
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
            (uid.to_string(), Enrol { key: uid.to_string(), info, netns: Netns::Path("/x".into()) })
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
            announcer.answered(&request, desired, "", now);
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
            announcer.answered(&request, &want, "port 15001 is taken", now);
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
        announcer.answered(&request, &desired(&["a"]), "no", now);
        assert_eq!(drive(&mut announcer, &desired(&[]), now), ["del a", "snapshot"]);
        assert_eq!(announcer.next_retry(), None);
    }

    #[test]
    fn a_workload_in_another_namespace_is_told_anew() {
        let held = |path: &str| Netns::Held(Arc::new(File::open(path).unwrap()));
        let in_netns = |netns: Netns| {
            let mut all = desired(&["a"]);
            all.get_mut("a").unwrap().netns = netns;
            all
        };
        let (mut announcer, now) = (Announcer::default(), Instant::now());
        // Any two files of different numbers will do.
        assert_eq!(drive(&mut announcer, &in_netns(held("/proc/self/ns/net")), now), ["add a", "snapshot"]);
        assert!(drive(&mut announcer, &in_netns(held("/proc/self/ns/net")), now).is_empty());
        assert_eq!(drive(&mut announcer, &in_netns(held("/proc/self/ns/uts")), now), ["add a"]);
    }

    #[test]
    fn what_a_proxy_serves_is_kept_while_its_namespace_is_not_found() {
        let (mut announcer, now) = (Announcer::default(), Instant::now());
        let mut want = desired(&["a", "b"]);
        want.get_mut("b").unwrap().netns = Netns::Unknown;
        assert_eq!(drive(&mut announcer, &want, now), ["add a", "keep b", "snapshot"]);
        assert_eq!(drive(&mut announcer, &desired(&["a", "b"]), now), ["add b"]);
    }
}
