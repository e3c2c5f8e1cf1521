//! One end of the descriptor store's protocol with messages that wait to be sent, so that a slow reader never blocks
//! the supervisor.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::message::StoreMessage;
use super::store::FdStore;
use crate::seqpacket::{self, Message, Received};

/// A proxy, or the next supervisor.
#[derive(Debug)]
pub struct Peer {
    socket: OwnedFd,
    outbox: VecDeque<Outgoing>,
}

/// What waits to be sent. Bounded by whoever queues: the store once, and then changes as long as few of them wait.
#[derive(Debug)]
enum Outgoing {
    /// The descriptor that the store has under this name when its turn comes.
    Kept(String),
    /// A descriptor from outside the store.
    Other(String, OwnedFd),
    /// No descriptor.
    Plain(StoreMessage),
}

/// A change of the store that was carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Another descriptor has this name.
    Put(String),
    /// Nothing has this name.
    Del(String),
}

/// What a peer said.
#[derive(Debug)]
pub enum Heard {
    /// A message, with the descriptor for `put`.
    Message(StoreMessage, Option<OwnedFd>),
    /// Not a message; why.
    Malformed(String),
    /// Nothing more now.
    Nothing,
    /// The other end is gone.
    Closed,
}

impl Peer {
    /// Speaks over a connected socket, which becomes non-blocking.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
        fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self { socket, outbox: VecDeque::new() })
    }

    /// Queues all that the store keeps, then `loaded`.
    pub fn queue_store(&mut self, store: &FdStore) {
        self.outbox.extend(store.names().cloned().map(Outgoing::Kept));
        self.outbox.push_back(Outgoing::Plain(StoreMessage::Loaded));
    }

    /// Queues a change of the store.
    pub fn queue_change(&mut self, change: &Change) {
        self.outbox.push_back(match change {
            Change::Put(name) => Outgoing::Kept(name.clone()),
            Change::Del(name) => Outgoing::Plain(StoreMessage::Del(name.clone())),
        });
    }

    /// How much waits to be sent.
    pub fn backlog(&self) -> usize {
        self.outbox.len()
    }

    /// Queues a descriptor that the store does not keep.
    pub fn queue_fd(&mut self, name: &str, fd: OwnedFd) {
        self.outbox.push_back(Outgoing::Other(name.to_owned(), fd));
    }

    /// Queues a message.
    pub fn queue(&mut self, message: StoreMessage) {
        self.outbox.push_back(Outgoing::Plain(message));
    }

    /// Whether something waits to be sent.
    pub fn wants_to_send(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Sends what the socket takes now.
    pub fn flush(&mut self, store: &FdStore) -> io::Result<()> {
        while let Some(next) = self.outbox.front() {
            let sent = match next {
                Outgoing::Kept(name) => match store.find(name) {
                    Some(fd) => self.send(&StoreMessage::Put(name.clone()), &[fd.as_fd()]),
                    None => Ok(()),
                },
                Outgoing::Other(name, fd) => self.send(&StoreMessage::Put(name.clone()), &[fd.as_fd()]),
                Outgoing::Plain(message) => self.send(message, &[]),
            };
            match sent {
                Ok(()) => drop(self.outbox.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn send(&self, message: &StoreMessage, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        seqpacket::send(self.socket.as_fd(), message.to_string().as_bytes(), fds)
    }

    /// The next message, if there is one.
    pub fn hear(&self) -> Heard {
        match seqpacket::receive(self.socket.as_fd()) {
            Ok(received) => understand(received),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Heard::Nothing,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Heard::Nothing,
            Err(_) => Heard::Closed,
        }
    }
}

/// Reads what was received.
pub(super) fn understand(received: Received) -> Heard {
    let Message { bytes, mut fds } = match received {
        Received::Message(message) => message,
        Received::Oversized => return Heard::Malformed("message is too long or carries too many descriptors".into()),
        Received::Closed => return Heard::Closed,
    };
    match StoreMessage::parse(&bytes) {
        Err(error) => Heard::Malformed(error.to_string()),
        Ok(message @ StoreMessage::Put(_)) if fds.len() == 1 => Heard::Message(message, fds.pop()),
        Ok(StoreMessage::Put(name)) => Heard::Malformed(format!("put {name} carries {} descriptors", fds.len())),
        Ok(message) if fds.is_empty() => Heard::Message(message, None),
        Ok(message) => Heard::Malformed(format!("{message} carries a descriptor")),
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
