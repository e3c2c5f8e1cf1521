//! Receive windows of a tunnel's streams, so that those that nobody reads leave room for the others.
//!
//! All streams of a tunnel share its window. Bytes that an application does not read stay in it, so a few applications
//! that stop reading would take all of it and every other connection of the tunnel would stand still, for good if one of
//! the applications waits for another of its connections. Hence: the more streams hold bytes that nobody takes, the
//! smaller the window of each.

use std::cmp::Ordering;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::{CONNECTION_WINDOW, STREAM_WINDOW};

/// How long fewer streams must have been stuck before windows grow again: applications that read slowly are stuck and
/// not, many times a second.
const GROW_AFTER: Duration = Duration::from_secs(1);
/// Window of a stream that is not stuck in the smallest of tunnels, bytes: a full TLS record.
const SMALLEST_STREAM_WINDOW: u32 = 16 * 1024;
/// When a change is tried again that the last one, not yet acknowledged, was in the way of: some round trips.
const RETRY_AFTER: Duration = Duration::from_millis(5);

/// Window of each stream of a tunnel that has this window, while none is stuck. One stream can hold a small part of what
/// all together can.
pub(super) fn largest_stream_window(tunnel: u32) -> u32 {
    (tunnel / (CONNECTION_WINDOW / STREAM_WINDOW)).max(SMALLEST_STREAM_WINDOW)
}

/// Window of each stream while so many are stuck. What 128 of them hold, each stuck when its window was this, adds up to
/// four and a half times the window of one.
fn stream_window(largest: u32, stuck: u32) -> u32 {
    largest / stuck.max(1).next_power_of_two()
}

/// Streams of one tunnel that hold bytes which their application does not take.
#[derive(Debug)]
pub struct Pressure {
    /// Window of a stream while none is stuck.
    largest: u32,
    stuck: AtomicU32,
    /// Most since windows were last looked at.
    most: AtomicU32,
    window: AtomicU32,
    too_much: Notify,
}

/// A stream's part in the pressure of its tunnel.
#[derive(Debug)]
pub struct Share {
    tunnel: Arc<Pressure>,
    stuck: bool,
}

impl Share {
    /// Of a stream that is not stuck.
    pub fn new(tunnel: Arc<Pressure>) -> Self {
        Self { tunnel, stuck: false }
    }

    /// Whether the stream holds bytes that its application does not take.
    pub fn set_stuck(&mut self, stuck: bool) {
        if stuck == self.stuck {
            return;
        }
        self.stuck = stuck;
        let tunnel = &self.tunnel;
        if !stuck {
            tunnel.stuck.fetch_sub(1, Relaxed);
            return;
        }
        let now = tunnel.stuck.fetch_add(1, Relaxed) + 1;
        tunnel.most.fetch_max(now, Relaxed);
        if stream_window(tunnel.largest, now) < tunnel.window.load(Relaxed) {
            tunnel.too_much.notify_one();
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set_stuck(false);
    }
}

/// Decides about the windows of one tunnel.
#[derive(Debug)]
pub(super) struct Windows {
    pressure: Arc<Pressure>,
    grow_at: Instant,
    retry_at: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Set(u32),
    LookAt(Instant),
    Wait,
}

impl Windows {
    /// Of a tunnel whose streams begin with the window `largest`.
    pub(super) fn new(largest: u32, now: Instant) -> Self {
        let pressure = Pressure {
            largest,
            stuck: AtomicU32::new(0),
            most: AtomicU32::new(0),
            window: AtomicU32::new(largest),
            too_much: Notify::new(),
        };
        Self { pressure: Arc::new(pressure), grow_at: now, retry_at: now }
    }

    /// For the tunnel's streams.
    pub(super) fn pressure(&self) -> Arc<Pressure> {
        Arc::clone(&self.pressure)
    }

    /// Waits until the windows must change; to what. Costs nothing while they need not.
    pub(super) async fn due(&mut self) -> u32 {
        loop {
            match self.next(Instant::now()) {
                Step::Set(window) => return window,
                // Either is a reason to look again.
                Step::LookAt(at) => drop(timeout_at(at, self.pressure.too_much.notified()).await),
                Step::Wait => self.pressure.too_much.notified().await,
            }
        }
    }

    /// The change was sent, or could not be.
    pub(super) fn changed(&mut self, window: u32, result: &Result<(), h2::Error>, now: Instant) {
        match result {
            Ok(()) => {
                self.pressure.window.store(window, Relaxed);
                self.pressure.most.store(self.pressure.stuck.load(Relaxed), Relaxed);
                self.grow_at = now + GROW_AFTER;
            }
            // The last change is not acknowledged yet.
            Err(_) => self.retry_at = now + RETRY_AFTER,
        }
    }

    fn next(&mut self, now: Instant) -> Step {
        let pressure = &self.pressure;
        let current = pressure.window.load(Relaxed);
        let wanted = stream_window(pressure.largest, pressure.most.load(Relaxed));
        match wanted.cmp(&current) {
            Ordering::Equal if current == pressure.largest => Step::Wait,
            Ordering::Equal if now < self.grow_at => Step::LookAt(self.grow_at),
            Ordering::Equal => {
                // A period is over; the next one shows whether fewer are stuck all the time.
                pressure.most.store(pressure.stuck.load(Relaxed), Relaxed);
                self.grow_at = now + GROW_AFTER;
                Step::LookAt(self.grow_at)
            }
            Ordering::Greater if now < self.grow_at => Step::LookAt(self.grow_at),
            Ordering::Less | Ordering::Greater if now < self.retry_at => Step::LookAt(self.retry_at),
            Ordering::Less | Ordering::Greater => Step::Set(wanted),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CLIENT_STREAMS, SERVER_STREAMS};
    use super::*;

    const MIB: u32 = 1024 * 1024;

    #[test]
    fn what_all_streams_can_hold_leaves_room_for_one_more() {
        for tunnel in [CONNECTION_WINDOW, CONNECTION_WINDOW / 3, 100 * 1024] {
            let largest = largest_stream_window(tunnel);
            for streams in [1, 4, 5, CLIENT_STREAMS, SERVER_STREAMS] {
                let held: u32 = (1..=streams).map(|stuck| stream_window(largest, stuck)).sum();
                let left = tunnel.checked_sub(held).unwrap_or_else(|| panic!("{streams} streams hold {held}"));
                assert!(
                    left >= stream_window(largest, streams + 1),
                    "{streams} streams leave {left} bytes of {tunnel}"
                );
            }
        }
    }

    fn stuck(windows: &Windows, streams: usize) -> Vec<Share> {
        let shares = (0..streams).map(|_| Share::new(windows.pressure()));
        shares
            .map(|mut share| {
                share.set_stuck(true);
                share
            })
            .collect()
    }

    #[test]
    fn windows_shrink_at_once_and_grow_when_fewer_were_stuck_for_a_while() {
        let start = Instant::now();
        let mut windows = Windows::new(STREAM_WINDOW, start);
        assert_eq!(windows.next(start), Step::Wait);
        let one = stuck(&windows, 1);
        assert_eq!(windows.next(start), Step::Wait, "a single reader that is slow takes nothing from others");
        let five = stuck(&windows, 4);
        assert_eq!(windows.next(start), Step::Set(MIB / 2));
        windows.changed(MIB / 2, &Ok(()), start);
        assert_eq!(windows.next(start), Step::LookAt(start + GROW_AFTER));
        drop((one, five));
        assert_eq!(windows.next(start), Step::LookAt(start + GROW_AFTER), "they may be back at once");
        let later = start + GROW_AFTER;
        assert_eq!(windows.next(later), Step::LookAt(later + GROW_AFTER));
        let some = stuck(&windows, 2);
        drop(some);
        let later = later + GROW_AFTER;
        assert_eq!(windows.next(later), Step::Set(2 * MIB), "two were stuck meanwhile");
        windows.changed(2 * MIB, &Ok(()), later);
        let calm = later + GROW_AFTER;
        assert_eq!(windows.next(later), Step::LookAt(calm));
        assert_eq!(windows.next(calm), Step::Set(STREAM_WINDOW));
        windows.changed(STREAM_WINDOW, &Ok(()), calm);
        assert_eq!(windows.next(calm), Step::Wait);
    }

    #[test]
    fn a_change_that_cannot_be_sent_yet_is_tried_again() {
        let start = Instant::now();
        let mut windows = Windows::new(STREAM_WINDOW, start);
        let _three = stuck(&windows, 3);
        assert_eq!(windows.next(start), Step::Set(MIB));
        windows.changed(MIB, &Err(h2::Reason::INTERNAL_ERROR.into()), start);
        assert_eq!(windows.next(start), Step::LookAt(start + RETRY_AFTER));
        assert_eq!(windows.next(start + RETRY_AFTER), Step::Set(MIB));
    }
}
