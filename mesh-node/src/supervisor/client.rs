//! The proxy's side of the descriptor store.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::signal::Signal;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::warn;

use super::message::StoreMessage;
use super::peer::{Heard, Peer, understand};
use crate::seqpacket;

/// Time for the supervisor to send what it keeps.
const LOAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for the supervisor to take a message; it does nothing else that takes long.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// The supervisor, as the proxy speaks to it.
#[derive(Debug)]
pub struct StoreClient {
    socket: OwnedFd,
}

/// What the supervisor that ours takes over from changes after this proxy was given what was kept.
#[derive(Debug)]
pub struct Changes {
    socket: AsyncFd<OwnedFd>,
}

/// One change.
#[derive(Debug)]
pub enum StoreChange {
    /// Another descriptor has this name.
    Put(String, OwnedFd),
    /// Nothing has this name.
    Del(String),
}

impl Changes {
    /// Over a socket from a supervisor.
    pub fn over(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self { socket: seqpacket::asynchronous(socket)? })
    }

    /// The next one; most proxies wait for ever. None is lost when this is given up.
    pub async fn next(&self) -> StoreChange {
        loop {
            match self.socket.async_io(Interest::READABLE, |socket| seqpacket::receive(socket.as_fd())).await {
                Ok(received) => match understand(received) {
                    Heard::Message(StoreMessage::Put(name), Some(fd)) => return StoreChange::Put(name, fd),
                    Heard::Message(StoreMessage::Del(name), _) => return StoreChange::Del(name),
                    Heard::Message(message, _) => warn!(%message, "message from the supervisor out of place"),
                    Heard::Malformed(reason) => warn!(%reason, "message from the supervisor ignored"),
                    Heard::Nothing => {}
                    // This process ends with its supervisor.
                    Heard::Closed => std::future::pending::<()>().await,
                },
                Err(error) => {
                    warn!(%error, "supervisor is not heard any more");
                    std::future::pending::<()>().await;
                }
            }
        }
    }
}

/// Everything that was kept.
pub type Kept = BTreeMap<String, OwnedFd>;

impl StoreClient {
    /// Takes the socket from standard input, which becomes /dev/null, and ends this process with its supervisor: without
    /// one nobody would hold the listeners when this process dies, and nobody would restart it.
    pub fn from_stdin() -> anyhow::Result<(Self, Kept)> {
        let supervisor = nix::unistd::getppid();
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        let socket = io::stdin().as_fd().try_clone_to_owned()?;
        let null = std::fs::File::open("/dev/null")?;
        nix::unistd::dup2_stdin(&null)?;
        if nix::unistd::getppid() != supervisor {
            bail!("the supervisor died while this proxy started");
        }
        Self::load(socket).context("`mesh-node proxy` is started by `mesh-node run`")
    }

    /// Receives what is kept.
    pub fn load(socket: OwnedFd) -> anyhow::Result<(Self, Kept)> {
        let peer = Peer::new(socket.try_clone()?)?;
        let deadline = Instant::now() + LOAD_TIMEOUT;
        let mut kept = Kept::new();
        loop {
            match peer.hear() {
                Heard::Message(StoreMessage::Put(name), Some(fd)) => drop(kept.insert(name, fd)),
                Heard::Message(StoreMessage::Loaded, _) => break,
                Heard::Message(message, _) => bail!("supervisor said `{message}` while it sent descriptors"),
                Heard::Malformed(reason) => bail!("supervisor does not speak our protocol: {reason}"),
                Heard::Closed => bail!("standard input is not connected to a supervisor"),
                Heard::Nothing => wait(&socket, PollFlags::POLLIN, deadline)?,
            }
        }
        Ok((Self { socket }, kept))
    }

    /// What is changed from now on by others.
    pub fn changes(&self) -> io::Result<Changes> {
        Changes::over(self.socket.try_clone()?)
    }

    /// Keeps a descriptor under a name.
    pub fn put(&self, name: &str, fd: &impl AsFd) -> io::Result<()> {
        self.send(&StoreMessage::Put(name.to_owned()), Some(fd.as_fd()))
    }

    /// Forgets a descriptor.
    pub fn del(&self, name: &str) -> io::Result<()> {
        self.send(&StoreMessage::Del(name.to_owned()), None)
    }

    /// Says that this proxy serves.
    pub fn ready(&self) -> io::Result<()> {
        self.send(&StoreMessage::Ready, None)
    }

    fn send(&self, message: &StoreMessage, fd: Option<std::os::fd::BorrowedFd<'_>>) -> io::Result<()> {
        let deadline = Instant::now() + SEND_TIMEOUT;
        loop {
            match seqpacket::send(self.socket.as_fd(), message.to_string().as_bytes(), fd.as_slice()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait(&self.socket, PollFlags::POLLOUT, deadline)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }
}

fn wait(socket: &OwnedFd, events: PollFlags, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "the supervisor does not answer"));
    }
    let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
    match nix::poll::poll(&mut [PollFd::new(socket.as_fd(), events)], timeout) {
        Ok(_) | Err(nix::Error::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
