//! TCP sockets of a network namespace by `NETLINK_SOCK_DIAG`: what was there before enrolment, who holds a port.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use mesh_ebpf_common::abi::Addr;

/// `IPPROTO_TCP` as the one byte that the netlink message has for it.
const IPPROTO_TCP: u8 = 6;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const HEADER_BYTES: usize = 16;
const REQUEST_BYTES: usize = 56;
const MESSAGE_BYTES: usize = 72;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
/// `INET_DIAG_CGROUP_ID`, Linux 5.8.
const CGROUP_ID: u16 = 21;
/// Larger than the kernel's dump messages.
const BUFFER_BYTES: usize = 64 * 1024;
/// How long the kernel may take to answer, seconds.
const ANSWER_TIMEOUT_SECS: libc::time_t = 5;

/// `TCP_SYN_SENT`.
pub(super) const SYN_SENT: u8 = 2;
/// `TCP_SYN_RECV` as `sock_diag` reports request sockets.
pub(super) const SYN_RECV: u8 = 3;
/// `TCP_LISTEN`.
pub(super) const LISTEN: u8 = 10;
const TIME_WAIT: u8 = 6;
const CLOSE: u8 = 7;

/// A TCP socket.
#[derive(Clone, Debug)]
pub(super) struct TcpSocket {
    pub(super) family: u8,
    pub(super) state: u8,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) cookie: u64,
    pub(super) uid: u32,
    /// Id of the cgroup that it was made in; `None` for a handshake, which has its listener's.
    pub(super) cgroup: Option<u64>,
    id: [u8; 48],
}

/// A `sock_diag` socket in the namespace of the thread that opened it.
pub(super) struct SockDiag {
    fd: OwnedFd,
}

impl SockDiag {
    pub(super) fn open() -> io::Result<Self> {
        // SAFETY: no pointers.
        let fd =
            unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_SOCK_DIAG) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just returned this descriptor to us alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let timeout = libc::timeval { tv_sec: ANSWER_TIMEOUT_SECS, tv_usec: 0 };
        nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::ReceiveTimeout, &timeout.into())?;
        Ok(Self { fd })
    }

    /// All sockets but those in TIME_WAIT and closed ones.
    pub(super) fn sockets(&self) -> io::Result<Vec<TcpSocket>> {
        let mut sockets = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            self.dump(u8::try_from(family).map_err(io::Error::other)?, &mut sockets)?;
        }
        Ok(sockets)
    }

    fn dump(&self, family: u8, sockets: &mut Vec<TcpSocket>) -> io::Result<()> {
        let states = !((1_u32 << TIME_WAIT) | (1_u32 << CLOSE));
        self.send(SOCK_DIAG_BY_FAMILY, libc::NLM_F_DUMP, &request(family, states, &[0; 48]))?;
        let mut buffer = vec![0_u8; BUFFER_BYTES];
        loop {
            let length = self.receive(&mut buffer)?;
            let mut rest = &buffer[..length];
            while let Some((kind, body, tail)) = next_message(rest) {
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => return Err(netlink_error(body)),
                    _ if kind == SOCK_DIAG_BY_FAMILY => sockets.extend(parse(body)),
                    // A message of another kind is not ours to understand.
                    _ => {}
                }
                rest = tail;
            }
        }
    }

    /// Ends a connection, as `ss -K` does; both sides learn it. A socket that is gone is fine.
    pub(super) fn destroy(&self, socket: &TcpSocket) -> io::Result<()> {
        let message = request(socket.family, u32::MAX, &socket.id);
        self.send(SOCK_DESTROY, libc::NLM_F_ACK, &message)?;
        let mut buffer = vec![0_u8; BUFFER_BYTES];
        let length = self.receive(&mut buffer)?;
        match next_message(&buffer[..length]) {
            Some((_, body, _)) => match netlink_error(body) {
                error if error.raw_os_error() == Some(0) => Ok(()),
                error if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
                error => Err(error),
            },
            None => Err(io::Error::other("short netlink answer")),
        }
    }

    fn send(&self, kind: u16, flags: libc::c_int, body: &[u8]) -> io::Result<()> {
        let length = u32::try_from(HEADER_BYTES + body.len()).map_err(io::Error::other)?;
        let flags = u16::try_from(flags | libc::NLM_F_REQUEST).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(HEADER_BYTES + body.len());
        message.extend(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        // SAFETY: pointer and length are of one live buffer.
        let sent = unsafe { libc::send(self.fd.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: pointer and length are of one live buffer.
        let length = unsafe { libc::recv(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        usize::try_from(length).map_err(|_| io::Error::last_os_error())
    }
}

/// `struct inet_diag_req_v2`
fn request(family: u8, states: u32, id: &[u8; 48]) -> Vec<u8> {
    let mut body = Vec::with_capacity(REQUEST_BYTES);
    body.extend([family, IPPROTO_TCP, 0, 0]);
    body.extend(states.to_ne_bytes());
    body.extend(id);
    body
}

/// Kind and body of the first netlink message, and what is behind it.
pub(super) fn next_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?)).ok()?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER_BYTES..length)?;
    let tail = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, body, tail))
}

fn netlink_error(body: &[u8]) -> io::Error {
    match body.get(..4).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes) {
        Some(code) => io::Error::from_raw_os_error(-code),
        None => io::Error::other("short netlink error"),
    }
}

/// `struct inet_diag_msg`
fn parse(body: &[u8]) -> Option<TcpSocket> {
    let message: &[u8; MESSAGE_BYTES] = body.get(..MESSAGE_BYTES)?.try_into().ok()?;
    let id: [u8; 48] = message[4..52].try_into().ok()?;
    let family = message[0];
    let port = |at: usize| u16::from_be_bytes([id[at], id[at + 1]]);
    let word = |at: usize| u32::from_ne_bytes([id[at], id[at + 1], id[at + 2], id[at + 3]]);
    let addr = |at: usize| {
        if i32::from(family) == libc::AF_INET {
            Addr::v4(word(at))
        } else {
            Addr { words: [word(at), word(at + 4), word(at + 8), word(at + 12)] }
        }
    };
    Some(TcpSocket {
        family,
        state: message[1],
        local: SocketAddr::new(addr(4).into(), port(0)),
        remote: SocketAddr::new(addr(20).into(), port(2)),
        cookie: u64::from(word(40)) | (u64::from(word(44)) << 32),
        uid: u32::from_ne_bytes([message[64], message[65], message[66], message[67]]),
        cgroup: attribute(&body[MESSAGE_BYTES..], CGROUP_ID).and_then(|id| id.try_into().ok()).map(u64::from_ne_bytes),
        id,
    })
}

/// Content of the first attribute of a kind.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let half = |at: usize| Some(u16::from_ne_bytes(attributes.get(at..at + 2)?.try_into().ok()?));
        let (length, kind) = (usize::from(half(0)?), half(2)?);
        let content = attributes.get(ATTRIBUTE_HEADER_BYTES..length)?;
        if kind == wanted {
            return Some(content);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}
