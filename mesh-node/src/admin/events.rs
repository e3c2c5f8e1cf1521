//! The last drops and refusals of the kernel programs.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use mesh_api::admin::BpfEvent;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_util::sync::CancellationToken;

use crate::capture::{CaptureEvent, Events};
use crate::runtime::{Shared, View};

/// Events that are kept; older ones make room.
const MAX_EVENTS: usize = 1000;
/// Events taken from the ring before others have their turn.
const EVENTS_PER_TURN: usize = 256;

/// The last events, oldest first.
#[derive(Debug, Default)]
pub struct EventLog {
    events: Mutex<VecDeque<BpfEvent>>,
}

impl EventLog {
    /// All that are kept.
    pub fn all(&self) -> Vec<BpfEvent> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    fn push(&self, event: BpfEvent) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() == MAX_EVENTS {
            events.pop_front();
        }
        events.push_back(event);
    }
}

/// Moves events from the kernel's ring to the log until cancelled.
pub async fn follow(ring: Events, log: Arc<EventLog>, shared: Arc<Shared>, cancel: CancellationToken) {
    let mut ring = match ring.into_async() {
        Ok(ring) => ring,
        Err(error) => {
            tracing::error!(%error, "events of the kernel programs cannot be read");
            cancel.cancelled().await;
            return;
        }
    };
    loop {
        let mut ready = tokio::select! {
            () = cancel.cancelled() => return,
            ready = ring.readable_mut() => match ready {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!(%error, "events of the kernel programs cannot be read");
                    cancel.cancelled().await;
                    return;
                }
            },
        };
        let view = shared.view.load();
        let taken = std::iter::from_fn(|| ready.get_inner_mut().poll()).take(EVENTS_PER_TURN);
        let count = taken.map(|event| log.push(row(&event, &view))).count();
        if count < EVENTS_PER_TURN {
            ready.clear_ready();
        }
        drop(view);
        tokio::task::yield_now().await;
    }
}

fn row(event: &CaptureEvent, view: &View) -> BpfEvent {
    let workload = event.cookie.map(|cookie| {
        let enrolled = view.enrolled.values().find(|enrolled| enrolled.cookie == cookie);
        enrolled.map_or_else(|| cookie.to_string(), |enrolled| format!("{}.{}", enrolled.name, enrolled.namespace))
    });
    BpfEvent {
        time: OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default(),
        hook: event.hook.map_or("unknown", |hook| hook.name()).to_owned(),
        reason: event.reason.name().to_owned(),
        source: event.src.to_string(),
        destination: event.dst.to_string(),
        workload: workload.unwrap_or_default(),
    }
}
