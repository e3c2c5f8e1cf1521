//! The server's end of a tunnel: takes requests off an HTTP/2 connection until it ends, is drained or misbehaves.

use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use super::keepalive::until_dead;
use super::windows::{Pressure, Windows, largest_stream_window};
use super::{
    CONNECTION_WINDOW, FIRST_REQUEST_TIMEOUT, FRAME_BYTES, FRAME_OVERHEAD_BYTES, HANDSHAKE_TIMEOUT,
    REQUEST_HEADER_BYTES, SEND_BUFFER_BYTES, SERVER_STREAMS,
};
use crate::wire::Turns;

/// Streams that a peer may reset before they carried a byte, at once.
const RESETS_AT_ONCE: f64 = 200.0;
/// And lastingly, a second: clients that give up before they are served.
const RESETS_PER_SEC: f64 = 20.0;

/// How far along a listener is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// Takes connections.
    #[default]
    Serving,
    /// Takes no more, and lets those that are there end.
    Draining,
    /// Ends those that are there too.
    Stopped,
}

/// Why a tunnel was ended by the server.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The other end broke the protocol, or the connection broke.
    #[error("HTTP/2: {0}")]
    Http2(#[from] h2::Error),
    /// No preface in time.
    #[error("no HTTP/2 preface within {} s", HANDSHAKE_TIMEOUT.as_secs())]
    SlowPreface,
    /// No request in time.
    #[error("no request within {} s", FIRST_REQUEST_TIMEOUT.as_secs())]
    NoRequest,
    /// Too many streams opened and reset.
    #[error("peer opens and resets streams too often")]
    ResetFlood,
    /// Pings are not answered.
    #[error("peer does not answer pings")]
    Dead,
}

/// Counts streams that were reset before they carried anything.
#[derive(Debug)]
pub struct ResetBudget {
    left: Mutex<(f64, Instant)>,
    spent: Notify,
}

impl ResetBudget {
    fn new(now: Instant) -> Self {
        Self { left: Mutex::new((RESETS_AT_ONCE, now)), spent: Notify::new() }
    }

    /// One more; ends the tunnel when it is one too many.
    pub fn spend(&self, now: Instant) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let refill = now.saturating_duration_since(left.1).as_secs_f64() * RESETS_PER_SEC;
        *left = ((left.0 + refill).min(RESETS_AT_ONCE) - 1.0, now);
        if left.0 < 0.0 {
            self.spent.notify_one();
        }
    }
}

/// One request of a tunnel.
#[derive(Debug)]
pub struct Accepted {
    /// Head and body.
    pub request: Request<RecvStream>,
    /// Where the answer goes.
    pub respond: SendResponse<Bytes>,
    /// To be told when the stream is reset before it carried anything.
    pub resets: Arc<ResetBudget>,
    /// To be told when bytes from the stream are not taken.
    pub pressure: Arc<Pressure>,
}

/// Serves one tunnel, whose peer may send `window` bytes before an application reads. `on_request` must not block; it
/// hands the request to a task. From `retired` on the tunnel takes no further requests, as if its listener drained.
pub async fn serve<IO>(
    io: IO,
    window: u32,
    mut phase: watch::Receiver<Phase>,
    retired: impl Future<Output = ()>,
    mut on_request: impl FnMut(Accepted),
) -> Result<(), ServeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut connection = timeout(HANDSHAKE_TIMEOUT, builder(window).handshake(Turns::new(io)))
        .await
        .map_err(|_| ServeError::SlowPreface)??;
    let resets = Arc::new(ResetBudget::new(Instant::now()));
    let mut windows = Windows::new(largest_stream_window(window), Instant::now());
    let pings = connection.ping_pong();
    let mut dead = pin!(async {
        match pings {
            Some(pings) => until_dead(pings).await,
            None => std::future::pending().await,
        }
    });
    let mut retired = pin!(retired);
    let mut first_request = pin!(sleep(FIRST_REQUEST_TIMEOUT));
    let mut waiting_for_first = true;
    let mut draining = false;
    loop {
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    waiting_for_first = false;
                    let (resets, pressure) = (Arc::clone(&resets), windows.pressure());
                    on_request(Accepted { request, respond, resets, pressure });
                }
                Some(Err(error)) => return Err(error.into()),
                None => return Ok(()),
            },
            window = windows.due() => {
                let sent = connection.set_initial_window_size(window);
                windows.changed(window, &sent, Instant::now());
            }
            () = &mut dead => return Err(ServeError::Dead),
            () = resets.spent.notified() => {
                connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                // What h2 has to say goes out now or never.
                let _ = timeout(HANDSHAKE_TIMEOUT, std::future::poll_fn(|cx| connection.poll_closed(cx))).await;
                return Err(ServeError::ResetFlood);
            }
            () = &mut first_request, if waiting_for_first => return Err(ServeError::NoRequest),
            () = &mut retired, if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
            now = next_phase(&mut phase, draining) => match now {
                Phase::Stopped => return Ok(()),
                Phase::Draining | Phase::Serving => {
                    draining = true;
                    waiting_for_first = false;
                    connection.graceful_shutdown();
                }
            },
        }
    }
}

async fn next_phase(phase: &mut watch::Receiver<Phase>, draining: bool) -> Phase {
    let wanted = |phase: &Phase| *phase == Phase::Stopped || (!draining && *phase == Phase::Draining);
    // A listener that is gone without a word has stopped.
    phase.wait_for(wanted).await.map_or(Phase::Stopped, |phase| *phase)
}

fn builder(window: u32) -> h2::server::Builder {
    // A small window holds fewer frames too.
    let overhead = FRAME_OVERHEAD_BYTES as u64 * u64::from(window) / u64::from(CONNECTION_WINDOW);
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(largest_stream_window(window))
        .initial_connection_window_size(window)
        .max_frame_size(FRAME_BYTES)
        .max_header_list_size(REQUEST_HEADER_BYTES)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .data_frame_budget(usize::try_from(overhead).unwrap_or(FRAME_OVERHEAD_BYTES))
        .max_concurrent_streams(SERVER_STREAMS);
    builder
}
