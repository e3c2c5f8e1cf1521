//! Unix SOCK_SEQPACKET sockets: whole messages, with descriptors beside them.
//!
//! Here: how a message and its descriptors cross a socket, bounded. Not here: what any message means.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
};
use tokio::io::unix::AsyncFd;

/// Longest message in bytes. An enrolment is a few hundred; a descriptor's name at most 512.
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024;

/// Descriptors that one message may carry. One is what both protocols use; more are received only to be refused.
const MAX_MESSAGE_FDS: usize = 4;

/// Connections that wait for `accept`.
const LISTEN_BACKLOG: i32 = 16;

/// What came out of a socket.
#[derive(Debug)]
pub enum Received {
    /// A whole message.
    Message(Message),
    /// More than a message may hold; it is gone, its descriptors are closed.
    Oversized,
    /// The other end closed.
    Closed,
}

/// A message and the descriptors that came with it.
#[derive(Debug)]
pub struct Message {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// A connected pair, both ends close-on-exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::sys::socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Connects to a listening socket. Unix sockets connect at once or fail.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = nix::sys::socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    nix::sys::socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

/// Makes a socket one that a runtime waits for.
pub fn asynchronous(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
    fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    // SAFETY: the descriptor is owned by what it is registered with, so it stays open and the same until then.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

/// Listens at `path`, taking the place of whoever listened there before, without an instant at which nobody does.
/// Non-blocking.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = nix::sys::socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    let fresh = path.with_extension(format!("{}.new", std::process::id()));
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    nix::sys::socket::bind(socket.as_raw_fd(), &UnixAddr::new(&fresh)?)?;
    nix::sys::socket::listen(&socket, Backlog::new(LISTEN_BACKLOG)?)?;
    std::fs::set_permissions(&fresh, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    std::fs::rename(&fresh, path)?;
    Ok(socket)
}

/// Takes a waiting connection, non-blocking and close-on-exec.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = nix::sys::socket::accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: accept4 returned a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends one message.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL;
    let sent = nix::sys::socket::sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives one message.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<Received> {
    let mut bytes = vec![0; MAX_MESSAGE_BYTES];
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; MAX_MESSAGE_FDS]);
    let (length, flags, fds) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let got = nix::sys::socket::recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
        let mut fds = Vec::new();
        // `cmsgs` fails where the control data was cut off; the kernel closed what did not fit.
        for message in got.cmsgs().into_iter().flatten() {
            if let ControlMessageOwned::ScmRights(raw) = message {
                // SAFETY: the kernel installed these descriptors for this call, and nothing else owns them.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        (got.bytes, got.flags, fds)
    };
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Ok(Received::Oversized);
    }
    if length == 0 && fds.is_empty() {
        return Ok(Received::Closed);
    }
    bytes.truncate(length);
    Ok(Received::Message(Message { bytes, fds }))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn message(socket: &OwnedFd) -> Message {
        match receive(socket.as_fd()).expect("receive") {
            Received::Message(message) => message,
            other => panic!("expected a message, got {other:?}"),
        }
    }

    #[test]
    fn a_message_arrives_whole_with_its_descriptor() {
        let (a, b) = pair().expect("pair");
        let (inner_a, inner_b) = pair().expect("pair");
        send(a.as_fd(), b"put x", &[inner_a.as_fd()]).expect("send");
        send(a.as_fd(), b"second", &[]).expect("send");
        let first = message(&b);
        assert_eq!(first.bytes, b"put x");
        assert_eq!(first.fds.len(), 1);
        send(first.fds[0].as_fd(), b"through", &[]).expect("send");
        assert_eq!(message(&inner_b).bytes, b"through");
        assert_eq!(message(&b).bytes, b"second");
    }

    #[test]
    fn too_long_or_too_many_descriptors_is_oversized_and_leaves_the_next_message_intact() {
        let (a, b) = pair().expect("pair");
        send(a.as_fd(), &vec![7; MAX_MESSAGE_BYTES + 1], &[]).expect("send");
        send(a.as_fd(), b"many", &[a.as_fd(); MAX_MESSAGE_FDS + 3]).expect("send");
        send(a.as_fd(), b"next", &[]).expect("send");
        assert!(matches!(receive(b.as_fd()), Ok(Received::Oversized)));
        assert!(matches!(receive(b.as_fd()), Ok(Received::Oversized)));
        assert_eq!(message(&b).bytes, b"next");
    }

    #[test]
    fn the_other_end_gone_is_closed() {
        let (a, b) = pair().expect("pair");
        drop(a);
        assert!(matches!(receive(b.as_fd()), Ok(Received::Closed)));
    }
}
