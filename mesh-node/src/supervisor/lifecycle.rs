//! When a proxy is started, when waiting connections are shed, when a slow end is cut short. Decides only; time is an
//! argument.

use std::time::{Duration, Instant};

/// Crashes within [`CRASH_WINDOW`] that are answered by an immediate restart.
const IMMEDIATE_RESTARTS: usize = 3;
/// How far back crashes count.
const CRASH_WINDOW: Duration = Duration::from_secs(10);
/// Pause before the first restart that is not immediate; doubles with every further crash.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
/// Longest pause. Together with a start it stays under the second that connections wait.
const MAX_BACKOFF: Duration = Duration::from_millis(500);
/// How long connections wait in the backlog for a proxy that is ready.
pub const SHED_AFTER: Duration = Duration::from_secs(1);
/// Time between two rounds of shedding.
pub const SHED_EVERY: Duration = Duration::from_millis(50);
/// What a draining proxy gets on top of its drain time before it is killed.
const DRAIN_GRACE: Duration = Duration::from_secs(2);

/// The proxy as the supervisor sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// None runs; one is due at the instant.
    Down { start_at: Instant },
    /// It runs and has not reported ready.
    Starting,
    /// It serves.
    Ready,
    /// It was told to end and is killed at the instant.
    Draining { kill_at: Instant },
    /// It ended as it was told.
    Ended,
}

/// What the supervisor shall do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Start a proxy.
    Start,
    /// Accept and reset what waits on the listeners.
    Shed,
    /// Kill the proxy: its drain time is over.
    Kill,
    /// Exit.
    Exit,
}

/// Start, crash, drain and end of the proxy.
#[derive(Debug)]
pub struct Lifecycle {
    phase: Phase,
    /// Since when no proxy is ready.
    unready_since: Instant,
    last_shed: Option<Instant>,
    crashes: Vec<Instant>,
    ever_ready: bool,
}

impl Lifecycle {
    /// Nothing runs yet; a proxy is due at once.
    pub fn new(now: Instant) -> Self {
        Self {
            phase: Phase::Down { start_at: now },
            unready_since: now,
            last_shed: None,
            crashes: Vec::new(),
            ever_ready: false,
        }
    }

    /// A proxy was started.
    pub fn started(&mut self) {
        self.phase = Phase::Starting;
    }

    /// The proxy says that it serves.
    pub fn ready(&mut self) {
        if self.phase == Phase::Starting {
            self.phase = Phase::Ready;
            self.ever_ready = true;
        }
    }

    /// Whether a proxy serves now.
    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Ready
    }

    /// Whether any proxy was ready since the supervisor started.
    pub fn ever_ready(&self) -> bool {
        self.ever_ready
    }

    /// The proxy is gone (or could not be started). Returns the pause before the next, `None` when it was told to end.
    pub fn exited(&mut self, now: Instant) -> Option<Duration> {
        match self.phase {
            Phase::Draining { .. } | Phase::Ended => {
                self.phase = Phase::Ended;
                return None;
            }
            Phase::Ready => self.unready_since = now,
            Phase::Down { .. } | Phase::Starting => {}
        }
        self.crashes.retain(|&at| now.duration_since(at) < CRASH_WINDOW);
        self.crashes.push(now);
        let pause = pause_after(self.crashes.len());
        self.phase = Phase::Down { start_at: now + pause };
        Some(pause)
    }

    /// The proxy shall drain and end. Returns whether there is one to tell.
    pub fn terminate(&mut self, now: Instant, drain: Duration) -> bool {
        match self.phase {
            Phase::Down { .. } | Phase::Ended => {
                self.phase = Phase::Ended;
                false
            }
            Phase::Starting | Phase::Ready => {
                self.unready_since = now;
                self.phase = Phase::Draining { kill_at: now + drain + DRAIN_GRACE };
                true
            }
            // Told already: its time runs on.
            Phase::Draining { .. } => false,
        }
    }

    /// What is due now, if anything. Start stays due until [`Self::started`].
    pub fn due(&mut self, now: Instant) -> Option<Due> {
        match self.phase {
            Phase::Ended => Some(Due::Exit),
            Phase::Draining { kill_at } if now >= kill_at => {
                self.phase = Phase::Draining { kill_at: now + DRAIN_GRACE };
                Some(Due::Kill)
            }
            Phase::Down { start_at } if now >= start_at => Some(Due::Start),
            Phase::Down { .. } | Phase::Starting | Phase::Draining { .. } if now >= self.next_shed() => {
                self.last_shed = Some(now);
                Some(Due::Shed)
            }
            Phase::Draining { .. } | Phase::Down { .. } | Phase::Starting | Phase::Ready => None,
        }
    }

    /// When [`Self::due`] has something to say without another event.
    pub fn next_wakeup(&self) -> Option<Instant> {
        match self.phase {
            Phase::Down { start_at } => Some(start_at.min(self.next_shed())),
            Phase::Starting => Some(self.next_shed()),
            Phase::Draining { kill_at } => Some(kill_at.min(self.next_shed())),
            Phase::Ready | Phase::Ended => None,
        }
    }

    fn next_shed(&self) -> Instant {
        let first = match self.phase {
            // A draining proxy accepts nothing any more, and no other will come: nobody need wait.
            Phase::Draining { .. } => self.unready_since,
            Phase::Down { .. } | Phase::Starting | Phase::Ready | Phase::Ended => self.unready_since + SHED_AFTER,
        };
        self.last_shed.map_or(first, |last| first.max(last + SHED_EVERY))
    }
}

/// Pause before the restart that follows the `crashes`th crash of the window.
fn pause_after(crashes: usize) -> Duration {
    match crashes.checked_sub(IMMEDIATE_RESTARTS + 1) {
        None => Duration::ZERO,
        Some(doublings) => {
            let factor = 1u32 << doublings.min(8);
            (FIRST_BACKOFF * factor).min(MAX_BACKOFF)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn ready_at(now: Instant) -> Lifecycle {
        let mut lifecycle = Lifecycle::new(now);
        assert_eq!(lifecycle.due(now), Some(Due::Start));
        lifecycle.started();
        lifecycle.ready();
        lifecycle
    }

    #[test]
    fn the_first_crash_is_answered_at_once() {
        let now = Instant::now();
        let mut lifecycle = ready_at(now);
        assert_eq!(lifecycle.exited(now), Some(Duration::ZERO));
        assert_eq!(lifecycle.due(now), Some(Due::Start));
    }

    #[test]
    fn many_crashes_back_off_up_to_the_cap_and_are_forgotten_after_the_window() {
        let mut now = Instant::now();
        let mut lifecycle = ready_at(now);
        let pauses: Vec<u128> = (0..9)
            .map(|_| {
                let pause = lifecycle.exited(now).expect("restart");
                lifecycle.started();
                now += MS;
                pause.as_millis()
            })
            .collect();
        assert_eq!(pauses, [0, 0, 0, 50, 100, 200, 400, 500, 500]);
        now += CRASH_WINDOW;
        assert_eq!(lifecycle.exited(now), Some(Duration::ZERO));
    }

    #[test]
    fn connections_are_shed_from_one_second_on_until_a_proxy_is_ready() {
        let start = Instant::now();
        let mut lifecycle = ready_at(start);
        assert_eq!(lifecycle.due(start + SHED_AFTER * 5), None, "a ready proxy serves them");
        lifecycle.exited(start);
        lifecycle.started();
        assert_eq!(lifecycle.due(start + SHED_AFTER - MS), None);
        assert_eq!(lifecycle.due(start + SHED_AFTER), Some(Due::Shed));
        assert_eq!(lifecycle.due(start + SHED_AFTER), None, "once a round");
        assert_eq!(lifecycle.next_wakeup(), Some(start + SHED_AFTER + SHED_EVERY));
        assert_eq!(lifecycle.due(start + SHED_AFTER + SHED_EVERY), Some(Due::Shed));
        lifecycle.ready();
        assert_eq!(lifecycle.due(start + SHED_AFTER * 9), None);
    }

    #[test]
    fn a_proxy_that_dies_again_and_again_does_not_restart_the_clock_of_those_who_wait() {
        let start = Instant::now();
        let mut lifecycle = ready_at(start);
        for i in 0..4 {
            lifecycle.exited(start + MS * 200 * i);
            lifecycle.started();
        }
        assert_eq!(lifecycle.due(start + SHED_AFTER), Some(Due::Shed));
    }

    #[test]
    fn told_to_end_it_drains_is_killed_when_too_slow_and_the_supervisor_exits() {
        let now = Instant::now();
        let drain = Duration::from_secs(10);
        let mut lifecycle = ready_at(now);
        assert!(lifecycle.terminate(now, drain));
        assert!(!lifecycle.terminate(now + MS, drain), "told once");
        assert_eq!(lifecycle.due(now), Some(Due::Shed), "nobody accepts any more");
        assert_eq!(lifecycle.due(now), None);
        assert_eq!(lifecycle.due(now + drain), Some(Due::Shed));
        assert_eq!(lifecycle.due(now + drain + DRAIN_GRACE), Some(Due::Kill));
        assert_ne!(lifecycle.due(now + drain + DRAIN_GRACE), Some(Due::Kill), "killed once");
        assert_eq!(lifecycle.exited(now + drain), None);
        assert_eq!(lifecycle.due(now + drain), Some(Due::Exit));
    }

    #[test]
    fn told_to_end_while_no_proxy_runs_exits_at_once() {
        let now = Instant::now();
        let mut lifecycle = Lifecycle::new(now);
        assert!(!lifecycle.terminate(now, Duration::from_secs(10)));
        assert_eq!(lifecycle.due(now), Some(Due::Exit));
    }
}
