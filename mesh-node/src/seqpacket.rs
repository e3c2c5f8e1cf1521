//! Unix SOCK_SEQPACKET sockets: whole messages, with descriptors beside them.
//!
//! Here: how a message and its descriptors cross a socket, bounded. Not here: what any message means.
#![allow(unsafe_code)]

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr};
use tokio::io::unix::AsyncFd;

/// Longest message in bytes. An enrolment is a few hundred; a descriptor's name at most 512.
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024;

/// Descriptors that one message may carry. One is what both protocols use; more are received only to be refused.
const MAX_MESSAGE_FDS: usize = 4;

/// Most descriptors that the kernel lets one message carry (`SCM_MAX_FD`). There is room for so many, because what does
/// not fit is not always closed for us.
const MAX_SENT_FDS: usize = 253;
/// Control data of so many descriptors: one header, and 4 bytes for each.
const CONTROL_BYTES: usize = 16 + MAX_SENT_FDS * size_of::<RawFd>();

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
    // As 64-bit words, because a header must be aligned.
    let mut control = [0_u64; CONTROL_BYTES.div_ceil(size_of::<u64>())];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all zero is a valid `msghdr`.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: the header's pointers and lengths are of live buffers.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has just filled the header and the control data that it points to.
    let fds = unsafe { take_descriptors(&header) };
    let cut_off = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    if cut_off || fds.len() > MAX_MESSAGE_FDS {
        return Ok(Received::Oversized);
    }
    if length == 0 && fds.is_empty() {
        return Ok(Received::Closed);
    }
    bytes.truncate(length);
    Ok(Received::Message(Message { bytes, fds }))
}

/// All descriptors that came along, also where control data was cut off (`MSG_CTRUNC`: this process may open no more):
/// those that are there are ours to close. `nix` shows nothing in that case.
///
/// # Safety
/// The header is what `recvmsg` left, its control data lives, and the descriptors are taken once.
unsafe fn take_descriptors(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: as promised; the macros stay within the length that the header gives.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while !message.is_null() {
            if ((*message).cmsg_level, (*message).cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let data = libc::CMSG_DATA(message);
                let bytes = (*message).cmsg_len.saturating_sub(data.offset_from_unsigned(message.cast()));
                for at in 0..bytes / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.cast::<RawFd>().add(at).read_unaligned()));
                }
            }
            message = libc::CMSG_NXTHDR(header, message);
        }
    }
    fds
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

    /// Descriptors of this process that lead to what `file` is.
    fn open(file: &str) -> usize {
        let entries = std::fs::read_dir("/proc/self/fd").expect("list").flatten();
        let targets = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        targets.filter(|target| target.to_string_lossy().contains(file)).count()
    }

    #[test]
    fn descriptors_that_come_with_a_refused_message_are_closed() {
        let (a, b) = pair().expect("pair");
        let file = nix::sys::memfd::memfd_create("mesh-refused", nix::sys::memfd::MFdFlags::empty()).expect("memfd");
        for count in [MAX_MESSAGE_FDS + 1, MAX_MESSAGE_FDS + 2, MAX_SENT_FDS] {
            send(a.as_fd(), b"many", &vec![file.as_fd(); count]).expect("send");
            assert!(matches!(receive(b.as_fd()), Ok(Received::Oversized)), "{count}");
            assert_eq!(open("mesh-refused"), 1, "after {count}");
        }
        send(a.as_fd(), &vec![7; MAX_MESSAGE_BYTES + 1], &[file.as_fd()]).expect("send");
        assert!(matches!(receive(b.as_fd()), Ok(Received::Oversized)));
        send(a.as_fd(), b"next", &[file.as_fd(); MAX_MESSAGE_FDS]).expect("send");
        assert_eq!(message(&b).fds.len(), MAX_MESSAGE_FDS);
        assert_eq!(open("mesh-refused"), 1);
    }

    /// The limit is the process's: this test runs itself once more, in a process of its own.
    #[test]
    fn descriptors_are_closed_when_this_process_may_not_open_all_that_came() {
        const INNER: &str = "MESH_TEST_FEW_DESCRIPTORS";
        const CUT_OFF: &str = "was cut off";
        if std::env::var_os(INNER).is_some() {
            receive_with_room_for_two();
            println!("{CUT_OFF}");
            return;
        }
        let exe = std::env::current_exe().expect("this program");
        let test = "seqpacket::tests::descriptors_are_closed_when_this_process_may_not_open_all_that_came";
        let mut inner = std::process::Command::new(exe);
        let output = inner.args([test, "--exact", "--nocapture"]).env(INNER, "1").output().expect("run");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains(CUT_OFF), "{text}");
    }

    fn receive_with_room_for_two() {
        let (a, b) = pair().expect("pair");
        let file = nix::sys::memfd::memfd_create("mesh-few", nix::sys::memfd::MFdFlags::empty()).expect("memfd");
        send(a.as_fd(), b"four", &[file.as_fd(); MAX_MESSAGE_FDS]).expect("send");
        let resource = nix::sys::resource::Resource::RLIMIT_NOFILE;
        let (soft, hard) = nix::sys::resource::getrlimit(resource).expect("limit");
        let free = (0..).filter(|fd| !Path::new(&format!("/proc/self/fd/{fd}")).exists()).nth(1).expect("a number");
        nix::sys::resource::setrlimit(resource, free + 1, hard).expect("set");
        let received = receive(b.as_fd());
        nix::sys::resource::setrlimit(resource, soft, hard).expect("set back");
        assert!(matches!(received, Ok(Received::Oversized)), "{received:?}");
        assert_eq!(open("mesh-few"), 1);
    }

    #[test]
    fn the_other_end_gone_is_closed() {
        let (a, b) = pair().expect("pair");
        drop(a);
        assert!(matches!(receive(b.as_fd()), Ok(Received::Closed)));
    }
}
