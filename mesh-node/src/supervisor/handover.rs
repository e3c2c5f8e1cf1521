//! Everything goes from the running supervisor to the next: its lock, its descriptors, and, when the next one's proxy
//! is ready, the duty to serve. Until then the running one goes on as if nothing happened, and what its proxy puts and
//! deletes meanwhile goes to the next one, too.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use tracing::{debug, info, warn};

use super::lock::StateLock;
use super::message::StoreMessage;
use super::peer::{Change, Heard, Peer};
use super::store::{FdStore, MAX_KEPT_FDS};
use crate::seqpacket;

/// Name of the socket in the state directory.
pub const HANDOVER_SOCKET: &str = "handover.sock";
/// Name under which the state directory's lock crosses.
const LOCK_NAME: &str = "lock";
/// Supervisors that may ask at the same time; one is usual.
const MAX_SUCCESSORS: usize = 4;
/// Messages that wait for one successor; one that takes none is given up.
const MAX_BACKLOG: usize = 2 * MAX_KEPT_FDS;
/// Time for the running supervisor to send everything.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(5);

/// The running supervisor's side.
#[derive(Debug)]
pub struct HandoverServer {
    listener: std::os::fd::OwnedFd,
    /// Those who connected.
    pub successors: Vec<Successor>,
}

/// A supervisor that wants to take over.
#[derive(Debug)]
pub struct Successor {
    /// Its socket.
    pub peer: Peer,
    /// It was sent the store, and hears of changes.
    follows: bool,
}

/// Where a successor is.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// Under way, or gone.
    Waiting,
    /// Its proxy is ready.
    TakenOver,
}

impl HandoverServer {
    /// Listens in the state directory.
    pub fn listen(state_dir: &Path) -> anyhow::Result<Self> {
        let path = socket_path(state_dir);
        let listener = seqpacket::listen(&path).with_context(|| format!("listen at {}", path.display()))?;
        Ok(Self { listener, successors: Vec::new() })
    }

    /// Takes waiting connections.
    pub fn accept(&mut self) {
        while let Ok(socket) = seqpacket::accept(self.listener.as_fd()) {
            match Peer::new(socket) {
                Ok(peer) if self.successors.len() < MAX_SUCCESSORS => {
                    self.successors.push(Successor { peer, follows: false });
                }
                Ok(_) => warn!("too many supervisors want to take over"),
                Err(error) => warn!(%error, "connection of a supervisor that wants to take over"),
            }
        }
    }

    /// Hears and answers the successor at an index, which may go away by that.
    pub fn hear(&mut self, at: usize, store: &FdStore, lock: &StateLock) -> Progress {
        let Some(Successor { peer, follows }) = self.successors.get_mut(at) else { return Progress::Waiting };
        let gone = loop {
            match peer.hear() {
                Heard::Nothing => break false,
                Heard::Closed => break true,
                Heard::Message(StoreMessage::TakenOver, _) => {
                    // What still waits is in the socket before it is closed; more than that it does not take.
                    if let Err(error) = peer.flush(store) {
                        debug!(%error, "the next supervisor missed the last changes");
                    }
                    return Progress::TakenOver;
                }
                Heard::Message(StoreMessage::TakeOver, _) => match lock.as_fd().try_clone_to_owned() {
                    Ok(fd) => {
                        info!("handing everything to another supervisor");
                        peer.queue_fd(LOCK_NAME, fd);
                        peer.queue_store(store);
                        *follows = true;
                    }
                    Err(error) => {
                        warn!(%error, "cannot hand over");
                        break true;
                    }
                },
                Heard::Message(message, _) => debug!(%message, "message from the next supervisor out of place"),
                Heard::Malformed(reason) => warn!(%reason, "message from the next supervisor ignored"),
            }
        };
        if gone || peer.flush(store).is_err() {
            self.successors.remove(at);
        }
        Progress::Waiting
    }
}

impl HandoverServer {
    /// Tells those who were sent the store that it changed: `change` has been carried out.
    pub fn forward(&mut self, change: &Change, store: &FdStore) {
        self.successors.retain_mut(|Successor { peer, follows }| {
            if !*follows {
                return true;
            }
            peer.queue_change(change);
            // One that is gone is heard of by the next poll.
            let sent = peer.flush(store);
            let keeps_up = peer.backlog() <= MAX_BACKLOG;
            if !keeps_up {
                warn!(?sent, "a supervisor that wants to take over takes nothing");
            }
            keeps_up
        });
    }
}

impl AsFd for HandoverServer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// What the next supervisor got.
#[derive(Debug)]
pub struct Taken {
    /// All descriptors.
    pub store: FdStore,
    /// The state directory's lock.
    pub lock: StateLock,
    /// Whom to tell when our proxy is ready.
    pub predecessor: Peer,
}

/// Asks the running supervisor for everything; `None` when none runs, or dies before it has given all.
pub fn take_over(state_dir: &Path) -> anyhow::Result<Option<Taken>> {
    let path = socket_path(state_dir);
    let socket = match seqpacket::connect(&path) {
        // Never one, or one that left its socket behind when it died.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        connected => connected.with_context(|| format!("connect to {}", path.display()))?,
    };
    let mut peer = Peer::new(socket)?;
    peer.queue(StoreMessage::TakeOver);
    let deadline = Instant::now() + TAKE_OVER_TIMEOUT;
    let mut store = FdStore::default();
    let mut lock = None;
    loop {
        match peer.flush(&store) {
            Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
                return Ok(None);
            }
            flushed => flushed.context("ask the running supervisor")?,
        };
        match peer.hear() {
            Heard::Message(StoreMessage::Put(name), Some(fd)) if name == LOCK_NAME => lock = Some(StateLock::adopt(fd)),
            Heard::Message(StoreMessage::Put(name), Some(fd)) => store.put(name, fd)?,
            Heard::Message(StoreMessage::Loaded, _) => break,
            Heard::Message(message, _) => bail!("the running supervisor said `{message}` instead of handing over"),
            Heard::Malformed(reason) => bail!("the running supervisor does not speak our protocol: {reason}"),
            Heard::Closed => {
                warn!("the running supervisor went away while handing over");
                return Ok(None);
            }
            Heard::Nothing => wait_readable(&peer, deadline)?,
        }
    }
    let lock = lock.context("the running supervisor did not hand over the state directory's lock")?;
    Ok(Some(Taken { store, lock, predecessor: peer }))
}

fn wait_readable(peer: &Peer, deadline: Instant) -> anyhow::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        bail!("the running supervisor did not hand over within {TAKE_OVER_TIMEOUT:?}");
    }
    let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
    match nix::poll::poll(&mut [PollFd::new(peer.as_fd(), PollFlags::POLLIN)], timeout) {
        Ok(_) | Err(nix::Error::EINTR) => Ok(()),
        Err(error) => Err(io::Error::from(error).into()),
    }
}

fn socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join(HANDOVER_SOCKET)
}

#[cfg(test)]
mod tests;
