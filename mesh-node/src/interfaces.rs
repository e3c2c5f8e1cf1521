//! Sees to it that interfaces of workloads have a guard which come after enrolment, or whose guard was taken away.
//!
//! Here: when a workload is looked at again. Not here: what a guard is, and how it is attached (`capture`).

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::capture::Capture;
use crate::enrol::chain;
use crate::runtime::Shared;

/// Shortest time between two looks at one workload; doubles while things go on happening there, so that root of one
/// workload cannot keep this process busy. New interfaces take no connections meanwhile.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// Longest time between two looks at a workload where something happened.
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// Longest time between two looks at a workload that cannot be guarded.
const MAX_RETRY: Duration = Duration::from_secs(60);

/// Follows changes until cancelled.
pub async fn follow(capture: Arc<Capture>, shared: Arc<Shared>, cancel: CancellationToken) {
    let failed = tokio::select! {
        () = cancel.cancelled() => return,
        Err(failed) = watch(&capture, &shared) => failed,
    };
    error!(error = %failed, "interfaces of workloads are not watched: new ones take no connections");
    cancel.cancelled().await;
}

/// Ends with an error only.
async fn watch(capture: &Arc<Capture>, shared: &Shared) -> io::Result<()> {
    let changes = capture.changes()?;
    let mut turns: BTreeMap<u64, Turn> = BTreeMap::new();
    loop {
        let next = turns.values().filter_map(|turn| turn.due).min();
        let due = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ready = changes.readable() => match (ready?, capture.changed()?) {
                (_, Some(cookies)) => {
                    let now = Instant::now();
                    cookies.into_iter().for_each(|cookie| turns.entry(cookie).or_insert_with(|| Turn::new(now)).changed(now));
                }
                (mut ready, None) => ready.clear_ready(),
            },
            () = due => look(capture, shared, &mut turns).await,
        }
    }
}

/// Guards every workload whose turn it is.
async fn look(capture: &Arc<Capture>, shared: &Shared, turns: &mut BTreeMap<u64, Turn>) {
    let now = Instant::now();
    turns.retain(|_, turn| !turn.is_forgotten(now));
    for (&cookie, turn) in turns.iter_mut().filter(|(_, turn)| turn.due.is_some_and(|at| at <= now)) {
        let guarding = Arc::clone(capture);
        let looked = tokio::task::spawn_blocking(move || guarding.guard_again(cookie)).await;
        let workload = name_of(shared, cookie);
        match looked.map_err(|panic| panic.to_string()).and_then(|done| done.map_err(|error| chain(&error))) {
            Ok(new) => {
                new.iter().for_each(|new| info!(workload, interface = new.name, "new interface is guarded"));
                turn.guarded(Instant::now());
            }
            Err(error) => {
                warn!(workload, error, "an interface cannot be guarded and takes no connections");
                turn.failed(Instant::now());
            }
        }
    }
}

/// `web-1.default`, or the cookie of one that is captured but not served.
fn name_of(shared: &Shared, cookie: u64) -> String {
    let view = shared.view.load();
    let served = view.enrolled.values().find(|workload| workload.cookie == cookie);
    served.map_or_else(|| cookie.to_string(), |workload| format!("{}.{}", workload.name, workload.namespace))
}

/// When a workload is looked at.
#[derive(Debug)]
struct Turn {
    due: Option<Instant>,
    not_before: Instant,
    pause: Duration,
}

impl Turn {
    fn new(now: Instant) -> Self {
        Self { due: None, not_before: now, pause: FIRST_PAUSE }
    }

    /// Something happened.
    fn changed(&mut self, now: Instant) {
        let at = now.max(self.not_before);
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    fn guarded(&mut self, now: Instant) {
        self.not_before = now + self.pause;
        self.pause = (self.pause * 2).min(MAX_PAUSE);
        self.due = None;
    }

    fn failed(&mut self, now: Instant) {
        self.not_before = now + self.pause;
        self.due = Some(self.not_before);
        self.pause = (self.pause * 2).min(MAX_RETRY);
    }

    /// Nothing happened for so long that the next change is a first one.
    fn is_forgotten(&self, now: Instant) -> bool {
        self.due.is_none() && now >= self.not_before + MAX_PAUSE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_first_change_is_looked_at_at_once_and_noise_ever_more_seldom() {
        let mut now = Instant::now();
        let mut turn = Turn::new(now);
        let mut waits = Vec::new();
        for _ in 0..10 {
            turn.changed(now);
            let due = turn.due.expect("a turn");
            waits.push((due - now).as_millis());
            now = due;
            turn.guarded(now);
            assert_eq!(turn.due, None);
        }
        assert_eq!(waits, [0, 10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        assert!(!turn.is_forgotten(now + MAX_PAUSE));
        assert!(turn.is_forgotten(now + MAX_PAUSE * 2));
    }

    #[test]
    fn what_cannot_be_guarded_is_tried_again() {
        let mut now = Instant::now();
        let mut turn = Turn::new(now);
        turn.changed(now);
        for _ in 0..20 {
            turn.failed(now);
            now = turn.due.expect("another try");
        }
        assert_eq!(turn.pause, MAX_RETRY);
        turn.changed(now);
        assert!(turn.due.expect("sooner") <= now + MS);
        assert!(!turn.is_forgotten(now + MAX_RETRY * 2), "a try is due");
    }
}
