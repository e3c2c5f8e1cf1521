//! Bodies of questions to the webhook, read so that those of a stranger keep nobody else's out.
//!
//! A body takes room as its bytes arrive: what is announced and does not come costs nobody anything. Small ones, which is what
//! questions about most objects are, have room for every connection that there may be. Of large ones each host sends one
//! at a time, all share a room, and who takes too long gives up its part. The room of a body lives as long as the body,
//! also when nobody waits for what is made of it any more.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Body;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

/// Bytes of a body. An API server takes requests of 3 MiB and stores objects of 1.5 MiB; a question may hold both.
pub const MAX_BODY_BYTES: usize = 6 << 20;
/// Bytes of a body that counts as small.
const SMALL_BYTES: usize = 64 << 10;
/// Bytes of all large bodies together.
const MAX_LARGE_BYTES: usize = 4 * MAX_BODY_BYTES;
/// Time for a body to arrive, without the wait of a large one for its turn. API servers are near and have it whole.
const READ_WITHIN: Duration = Duration::from_secs(2);

/// Room for bodies.
#[derive(Debug)]
pub struct Bodies {
    /// A permit is a body.
    all: Arc<Semaphore>,
    /// A permit is a byte of a large body.
    large: Arc<Semaphore>,
    /// Of each host that sends a large body or waits for that: its one turn.
    turns: Mutex<BTreeMap<IpAddr, Weak<Semaphore>>>,
}

/// A body, and its room.
#[derive(Debug)]
pub struct Held {
    bytes: Vec<u8>,
    _one: OwnedSemaphorePermit,
    large: Option<OwnedSemaphorePermit>,
}

/// Why there is no body.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    /// It is larger than a question can be.
    #[error("at most {MAX_BODY_BYTES} bytes")]
    TooLarge,
    /// It took too long.
    #[error("the body did not come within {} s", READ_WITHIN.as_secs())]
    TooSlow,
    /// The connection or its framing.
    #[error("the body cannot be read: {0}")]
    Broken(String),
}

impl Held {
    /// What was sent.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Bodies {
    /// Room for this many small bodies, and for some large ones.
    pub fn new(bodies: usize) -> Self {
        let (all, large) = (Semaphore::new(bodies), Semaphore::new(MAX_LARGE_BYTES));
        Self { all: Arc::new(all), large: Arc::new(large), turns: Mutex::default() }
    }

    /// Reads what a host sends.
    pub async fn read<B>(&self, host: IpAddr, mut body: B) -> Result<Held, Unread>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: fmt::Display,
    {
        if body.size_hint().lower() > MAX_BODY_BYTES as u64 {
            return Err(Unread::TooLarge);
        }
        let mut held = Held { bytes: Vec::new(), _one: permits(&self.all, 1).await?, large: None };
        let (mut turn, mut deadline) = (None, Instant::now() + READ_WITHIN);
        while let Some(frame) = timeout_at(deadline, body.frame()).await.map_err(|_| Unread::TooSlow)? {
            let frame = frame.map_err(|error| Unread::Broken(error.to_string()))?;
            // Trailers say nothing.
            let Ok(data) = frame.into_data() else { continue };
            let len = held.bytes.len() + data.len();
            if len > MAX_BODY_BYTES {
                return Err(Unread::TooLarge);
            }
            if len > SMALL_BYTES {
                if turn.is_none() {
                    turn = Some(permits(&self.turn(host), 1).await?);
                    deadline = Instant::now() + READ_WITHIN;
                }
                // Within the same time: of several that hold a part and wait for more, one would wait for another for ever.
                let more = timeout_at(deadline, permits(&self.large, data.len())).await;
                held.charge(more.map_err(|_| Unread::TooSlow)??);
            }
            held.bytes.extend_from_slice(&data);
        }
        Ok(held)
    }

    fn turn(&self, host: IpAddr) -> Arc<Semaphore> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = turns.get(&host).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::new(Semaphore::new(1));
        turns.insert(host, Arc::downgrade(&turn));
        turn
    }
}

impl Held {
    fn charge(&mut self, more: OwnedSemaphorePermit) {
        match &mut self.large {
            Some(room) => room.merge(more),
            None => self.large = Some(more),
        }
    }
}

async fn permits(of: &Arc<Semaphore>, count: usize) -> Result<OwnedSemaphorePermit, Unread> {
    let count = u32::try_from(count).map_err(|_| Unread::TooLarge)?;
    // Nobody closes them.
    of.clone().acquire_many_owned(count).await.map_err(|error| Unread::Broken(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::net::Ipv4Addr;

    use futures_util::{FutureExt, StreamExt, stream};
    use http_body_util::{Full, StreamBody};
    use hyper::body::Frame;

    use super::*;

    /// Longer than anything here takes that goes well.
    const DEADLINE: Duration = Duration::from_secs(10);
    const FRAME_BYTES: usize = 32 << 10;

    fn host(last: u8) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, last).into()
    }

    /// A body of which no more comes.
    fn stuck(bytes: usize) -> impl Body<Data = Bytes, Error = Infallible> + Unpin {
        let frames = (0..bytes / FRAME_BYTES).map(|_| Ok(Frame::data(Bytes::from_static(&[b'x'; FRAME_BYTES]))));
        StreamBody::new(stream::iter(frames).chain(stream::pending()))
    }

    fn whole(bytes: usize) -> Full<Bytes> {
        Full::new(Bytes::from(vec![b'x'; bytes]))
    }

    async fn read(bodies: &Bodies, from: u8, bytes: usize) -> usize {
        let held = tokio::time::timeout(DEADLINE, bodies.read(host(from), whole(bytes))).await;
        held.expect("a body has room").unwrap().bytes().len()
    }

    #[tokio::test]
    async fn what_does_not_come_takes_no_room() {
        let bodies = Bodies::new(256);
        let mut crowd: Vec<_> = (0..64).map(|_| Box::pin(bodies.read(host(1), stuck(0)))).collect();
        for read in &mut crowd {
            assert!(read.now_or_never().is_none());
        }
        assert_eq!(bodies.large.available_permits(), MAX_LARGE_BYTES);
        // Also a body of the same host, and the largest of another.
        assert_eq!(read(&bodies, 1, SMALL_BYTES).await, SMALL_BYTES);
        assert_eq!(read(&bodies, 2, MAX_BODY_BYTES).await, MAX_BODY_BYTES);
    }

    #[tokio::test]
    async fn a_host_has_one_large_body_under_way() {
        let bodies = Bodies::new(256);
        let almost = MAX_BODY_BYTES - FRAME_BYTES;
        let mut crowd: Vec<_> = (0..64).map(|_| Box::pin(bodies.read(host(1), stuck(almost)))).collect();
        // A task has a budget: not everything that is ready comes at the first look.
        let all = async {
            loop {
                crowd.iter_mut().for_each(|read| assert!(read.now_or_never().is_none()));
                if MAX_LARGE_BYTES - bodies.large.available_permits() >= almost - SMALL_BYTES {
                    break;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(DEADLINE, all).await.expect("one of them is read");
        assert!(MAX_LARGE_BYTES - bodies.large.available_permits() <= almost, "the others wait");
        assert_eq!(read(&bodies, 1, SMALL_BYTES).await, SMALL_BYTES);
        assert_eq!(read(&bodies, 2, MAX_BODY_BYTES).await, MAX_BODY_BYTES);
    }

    #[tokio::test]
    async fn who_takes_too_long_gives_up_its_room() {
        let bodies = Bodies::new(256);
        let crowd = (1..=5).map(|from| bodies.read(host(from), stuck(MAX_BODY_BYTES - FRAME_BYTES)));
        let ended = tokio::time::timeout(DEADLINE, futures_util::future::join_all(crowd)).await.expect("they end");
        assert!(ended.iter().all(|end| matches!(end, Err(Unread::TooSlow))), "{ended:?}");
        assert_eq!(bodies.large.available_permits(), MAX_LARGE_BYTES);
    }

    #[tokio::test]
    async fn a_body_has_its_room_until_it_is_dropped() {
        let bodies = Bodies::new(1);
        let held = bodies.read(host(1), whole(MAX_BODY_BYTES)).await.unwrap();
        assert_eq!(bodies.large.available_permits(), MAX_LARGE_BYTES - MAX_BODY_BYTES);
        assert!(Box::pin(bodies.read(host(2), whole(1))).now_or_never().is_none(), "there is room for one");
        drop(held);
        assert_eq!(bodies.large.available_permits(), MAX_LARGE_BYTES);
        assert_eq!(read(&bodies, 2, 1).await, 1);
        assert!(matches!(bodies.read(host(1), whole(MAX_BODY_BYTES + 1)).await, Err(Unread::TooLarge)));
    }
}
