//! Finds out that a tunnel's other end is gone.

use h2::{Ping, PingPong};
use tokio::time::{sleep, timeout};

use super::{PING_EVERY, PING_TIMEOUT};

/// Asks at intervals, and returns when an answer stays out.
pub(super) async fn until_dead(mut pings: PingPong) {
    loop {
        sleep(PING_EVERY).await;
        match timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_pong)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}
