//! Socket calls of the tests: with addresses of both families, and bounded waiting.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockaddrIn, SockaddrIn6, SockaddrLike, SockaddrStorage, sockopt};

/// An address as the kernel takes it. IPv4 stays IPv4.
pub fn sockaddr(addr: SocketAddr) -> SockaddrStorage {
    let made = match addr {
        SocketAddr::V4(v4) => {
            let raw = SockaddrIn::from(v4);
            // SAFETY: pointer and length are of one live address.
            unsafe { SockaddrStorage::from_raw(raw.as_ptr(), Some(raw.len())) }
        }
        SocketAddr::V6(v6) => {
            let raw = SockaddrIn6::from(v6);
            // SAFETY: as above.
            unsafe { SockaddrStorage::from_raw(raw.as_ptr(), Some(raw.len())) }
        }
    };
    made.expect("an IP address")
}

fn to_std(addr: &SockaddrStorage) -> SocketAddr {
    if let Some(v4) = addr.as_sockaddr_in() {
        return SocketAddr::V4((*v4).into());
    }
    SocketAddr::V6((*addr.as_sockaddr_in6().expect("an IP socket")).into())
}

/// `bind`
pub fn bind(fd: BorrowedFd<'_>, addr: SocketAddr) -> io::Result<()> {
    Ok(nix::sys::socket::bind(fd.as_raw_fd(), &sockaddr(addr))?)
}

/// `SO_REUSEADDR`, `bind` and `listen`.
pub fn listen(fd: BorrowedFd<'_>, addr: SocketAddr) -> io::Result<()> {
    nix::sys::socket::setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if addr.is_ipv6() {
        nix::sys::socket::setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    }
    bind(fd, addr)?;
    Ok(nix::sys::socket::listen(&fd, nix::sys::socket::Backlog::new(1024)?)?)
}

/// `connect`, at most for `timeout`.
pub fn connect(fd: OwnedFd, addr: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    if !begin_connect(fd.as_fd(), addr)? {
        wait_connected(fd.as_fd(), timeout)?;
    }
    set_nonblocking(fd.as_fd(), false)?;
    Ok(TcpStream::from(fd))
}

/// `connect` without waiting; whether it is done already.
pub fn begin_connect(fd: BorrowedFd<'_>, addr: SocketAddr) -> io::Result<bool> {
    set_nonblocking(fd, true)?;
    match nix::sys::socket::connect(fd.as_raw_fd(), &sockaddr(addr)) {
        Ok(()) => Ok(true),
        Err(nix::errno::Errno::EINPROGRESS) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Puts a socket under repair (`TCP_REPAIR`): it connects without a handshake, and sends nothing.
pub fn repair(fd: BorrowedFd<'_>) -> io::Result<()> {
    let on = 1_i32;
    // SAFETY: pointer and length are of one live value.
    let set =
        unsafe { libc::setsockopt(fd.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, (&raw const on).cast(), 4) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn wait_connected(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<()> {
    if !wait(fd, PollFlags::POLLOUT, timeout)? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    match nix::sys::socket::getsockopt(&fd, sockopt::SocketError)? {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Waits until the socket is ready; false when `timeout` is over.
pub fn wait(fd: BorrowedFd<'_>, flags: PollFlags, timeout: Duration) -> io::Result<bool> {
    let millis = u16::try_from(timeout.as_millis()).unwrap_or(u16::MAX);
    Ok(poll(&mut [PollFd::new(fd, flags)], PollTimeout::from(millis))? == 1)
}

/// Switches between waiting and not waiting.
pub fn set_nonblocking(fd: BorrowedFd<'_>, nonblocking: bool) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = if nonblocking { OFlag::O_NONBLOCK } else { OFlag::empty() };
    fcntl(fd, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// `getpeername`
pub fn peer_name(fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    Ok(to_std(&nix::sys::socket::getpeername(fd.as_raw_fd())?))
}

/// `getsockname`
pub fn local_name(fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    Ok(to_std(&nix::sys::socket::getsockname(fd.as_raw_fd())?))
}

/// `::ffff:a.b.c.d`
pub fn mapped(addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), addr.port()),
        IpAddr::V6(_) => addr,
    }
}

/// `connect` with `AF_UNSPEC`: a TCP socket becomes one that was never connected.
pub fn disconnect(fd: BorrowedFd<'_>) -> io::Result<()> {
    let none = libc::sockaddr { sa_family: 0, sa_data: [0; 14] };
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr>()).map_err(io::Error::other)?;
    // SAFETY: pointer and length are of one live address.
    if unsafe { libc::connect(fd.as_raw_fd(), &raw const none, length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
