//! What happens to the interfaces of enrolled namespaces, by rtnetlink: a new one has no guard, and root of the workload
//! may have taken one away.
//!
//! Here: one socket in each namespace, and which namespaces have to be looked at. Not here: looking ([`super::guard`]).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

use super::sock_diag::next_message;

/// Groups of rtnetlink (`RTNLGRP_...`, each a bit): links, tc, routes and rules of both families.
const GROUPS: u32 = 1 << 0 | 1 << 3 | 1 << 6 | 1 << 7 | 1 << 10 | 1 << 18;
/// Namespaces that are reported at once; the rest follows.
const MAX_AT_ONCE: usize = 64;
/// Notifications that are read of one namespace before others have their turn.
const MAX_READS: usize = 64;
/// Larger than the kernel's notifications.
const BUFFER_BYTES: usize = 32 * 1024;
/// Where a message about a link has the link's index: behind family, padding and type of `struct ifinfomsg`.
const LINK_INDEX_AT: usize = 4;

/// The watched namespaces.
#[derive(Debug)]
pub(super) struct Watches {
    epoll: Epoll,
    /// By cookie.
    all: Mutex<BTreeMap<u64, Watch>>,
}

#[derive(Debug)]
struct Watch {
    socket: OwnedFd,
    /// Indexes of the interfaces that have a guard.
    guarded: BTreeSet<u32>,
}

impl Watches {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, all: Mutex::default() })
    }

    /// Polls readable when [`Self::changed`] has something to say.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.epoll.0.try_clone()
    }

    /// Watches the calling thread's namespace. Before its interfaces are listed, so that none is missed.
    pub(super) fn add(&self, cookie: u64) -> io::Result<()> {
        let mut all = self.lock();
        if all.contains_key(&cookie) {
            return Ok(());
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
        self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, cookie))?;
        all.insert(cookie, Watch { socket, guarded: BTreeSet::new() });
        Ok(())
    }

    /// These interfaces have a guard.
    pub(super) fn set_guarded(&self, cookie: u64, interfaces: &[u32]) {
        if let Some(watch) = self.lock().get_mut(&cookie) {
            watch.guarded = interfaces.iter().copied().collect();
        }
    }

    /// Interfaces that have a guard.
    pub(super) fn guarded(&self, cookie: u64) -> BTreeSet<u32> {
        self.lock().get(&cookie).map(|watch| watch.guarded.clone()).unwrap_or_default()
    }

    pub(super) fn remove(&self, cookie: u64) {
        if let Some(watch) = self.lock().remove(&cookie) {
            // Closing would do, but for a moment a child of ours may have a duplicate.
            let _closed_is_as_good = self.epoll.delete(&watch.socket);
        }
    }

    /// A watched namespace.
    pub(super) fn netns(&self, cookie: u64) -> io::Result<Option<OwnedFd>> {
        self.lock().get(&cookie).map(|watch| netns_of(&watch.socket)).transpose()
    }

    /// Namespaces in which something happened that may have left them open; `None` when nothing waits to be read.
    pub(super) fn changed(&self) -> io::Result<Option<Vec<u64>>> {
        let mut events = [EpollEvent::empty(); MAX_AT_ONCE];
        let count = match self.epoll.wait(&mut events, EpollTimeout::ZERO) {
            Ok(0) => return Ok(None),
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let all = self.lock();
        let heard = events[..count].iter().map(EpollEvent::data);
        Ok(Some(heard.filter(|cookie| all.get(cookie).is_some_and(Watch::hear)).collect()))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Watch>> {
        // A panic while holding it leaves whole entries.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watch {
    /// Reads what waits, or some of it: whoever makes much noise is not the only one.
    fn hear(&self) -> bool {
        let mut buffer = vec![0_u8; BUFFER_BYTES];
        let mut matters = false;
        for _ in 0..MAX_READS {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(0) | Err(Errno::EAGAIN) => break,
                Ok(length) => matters |= self.matters(&buffer[..length]),
                Err(Errno::EINTR) => {}
                // `ENOBUFS`: more happened than the kernel keeps. Anything else: better once too often.
                Err(_) => matters = true,
            }
        }
        matters
    }

    /// Whether messages say that something has no guard. What capture itself does says nothing of the kind.
    fn matters(&self, messages: &[u8]) -> bool {
        let mut rest = messages;
        while let Some((kind, body, tail)) = next_message(rest) {
            match kind {
                libc::RTM_NEWLINK if !self.knows(body) => return true,
                libc::RTM_DELLINK | libc::RTM_DELROUTE | libc::RTM_DELRULE => return true,
                libc::RTM_DELQDISC | libc::RTM_DELTFILTER => return true,
                // A known link went up or down, or something was added: that opens nothing.
                _ => {}
            }
            rest = tail;
        }
        false
    }

    fn knows(&self, link: &[u8]) -> bool {
        let index = link.get(LINK_INDEX_AT..LINK_INDEX_AT + 4).and_then(|bytes| bytes.try_into().ok());
        index.is_some_and(|bytes| self.guarded.contains(&u32::from_ne_bytes(bytes)))
    }
}

/// The network namespace that a socket is of.
fn netns_of(socket: &OwnedFd) -> io::Result<OwnedFd> {
    const SIOCGSKNS: libc::c_ulong = 0x894c;
    // SAFETY: this ioctl takes no argument and returns a descriptor.
    let fd = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), SIOCGSKNS as libc::Ioctl) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
