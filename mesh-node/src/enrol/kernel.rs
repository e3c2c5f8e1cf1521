//! A workload's namespace, seen from inside: its addresses, our listeners in it, and the kernel's part of enrolment.
//! Everything here blocks.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use mesh_core::workload::WorkloadUid;
use mesh_ebpf_common::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT};
use nix::net::if_::InterfaceFlags;
use socket2::{Domain, SockRef, Socket, Type};

use super::kept;
use crate::capture::{Capture, EnrollRequest, in_netns, netns_cookie};
use crate::dial;
use crate::runtime::{Enrolled, Listeners};

/// Connections that wait for `accept` on one listener, while the proxy restarts too. The kernel lowers it to the
/// namespace's `net.core.somaxconn` (4096 since Linux 5.4).
const LISTEN_BACKLOG: i32 = 4096;

/// A captured workload.
#[derive(Debug)]
pub struct Captured {
    /// Its network namespace.
    pub netns: OwnedFd,
    /// Cookie of that namespace.
    pub cookie: u64,
    /// Ours inside it.
    pub listeners: Listeners,
}

/// A workload that cannot be enrolled. If the kernel knows it, it is closed.
#[derive(Debug)]
pub struct NotCaptured {
    /// Why.
    pub reason: String,
    /// Its network namespace.
    pub netns: OwnedFd,
    /// Cookie of that namespace; `None` when the kernel was not told.
    pub cookie: Option<u64>,
}

/// Opens the listeners and captures the workload.
pub fn capture(capture: &Capture, uid: &WorkloadUid, netns: OwnedFd) -> Result<Captured, NotCaptured> {
    let cookie = match netns_cookie(netns.as_fd()) {
        Ok(cookie) => cookie,
        Err(error) => {
            let reason = format!("not a network namespace: {error}");
            return Err(NotCaptured { reason, netns, cookie: None });
        }
    };
    let inside = in_netns(netns.as_fd(), || (addresses(), open_listeners()));
    let closed = |reason: String, netns| Err(NotCaptured { reason, netns, cookie: Some(cookie) });
    let (addresses, listeners) = match inside {
        Ok((Ok(addresses), listeners)) => (addresses, listeners),
        Ok((Err(error), _)) | Err(error) => {
            // Nothing is known of it but its cookie, and that is enough to let nothing in or out.
            let shut = enroll(capture, uid, netns.as_fd(), Addresses::default(), &[]);
            let and = shut.err().map(|error| format!("; {error}")).unwrap_or_default();
            return closed(format!("addresses of its namespace: {error}{and}"), netns);
        }
    };
    let enrolled = match &listeners {
        Ok(listeners) => {
            let fds: Vec<_> = kept::listeners(listeners).map(|(_, fd)| fd).collect();
            enroll(capture, uid, netns.as_fd(), addresses, &fds)
        }
        // With the listeners that there are it is closed, and a port that is held is named with its holder.
        Err(failed) => {
            let fds: Vec<_> = failed.opened.iter().map(AsFd::as_fd).collect();
            enroll(capture, uid, netns.as_fd(), addresses, &fds)
        }
    };
    match (enrolled, listeners) {
        (Ok(()), Ok(listeners)) => Ok(Captured { netns, cookie, listeners }),
        (Ok(()), Err(failed)) => closed(format!("listen on {}: {}", failed.address, failed.source), netns),
        (Err(reason), _) => closed(reason, netns),
    }
}

/// Renews what the kernel knows of an enrolled workload: it may have a new address or interface.
pub fn renew(capture: &Capture, workload: &Enrolled) -> Result<(), String> {
    let netns = workload.netns.as_fd();
    let addresses = in_netns(netns, addresses).and_then(|found| found);
    let addresses = addresses.map_err(|error| format!("addresses of its namespace: {error}"))?;
    let fds: Vec<_> = kept::listeners(&workload.listeners).map(|(_, fd)| fd).collect();
    enroll(capture, &workload.uid, netns, addresses, &fds)
}

/// Whether a namespace has no interface but loopback: what runs a pod takes the other away when the pod is dead.
pub fn is_gone(netns: BorrowedFd<'_>) -> bool {
    let has_link = || -> io::Result<bool> {
        let mut interfaces = nix::ifaddrs::getifaddrs()?;
        Ok(interfaces.any(|interface| !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK)))
    };
    // What cannot be told is not taken for dead.
    matches!(in_netns(netns, has_link), Ok(Ok(false)))
}

fn enroll(
    capture: &Capture,
    uid: &WorkloadUid,
    netns: BorrowedFd<'_>,
    addresses: Addresses,
    listeners: &[BorrowedFd<'_>],
) -> Result<(), String> {
    let request = EnrollRequest { uid: &uid.0, netns, v4: addresses.v4, v6: addresses.v6, listeners };
    match capture.enroll(&request) {
        Ok(enrollment) => {
            tracing::debug!(uid = &*uid.0, ?enrollment, "captured");
            Ok(())
        }
        Err(error) => Err(chain(&error)),
    }
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Addresses {
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
}

/// The workload's addresses: the first global one of each family on an interface that is not loopback.
fn addresses() -> io::Result<Addresses> {
    let mut found = Addresses::default();
    for interface in nix::ifaddrs::getifaddrs()? {
        if interface.flags.contains(InterfaceFlags::IFF_LOOPBACK) {
            continue;
        }
        let Some(address) = interface.address else { continue };
        let ip = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        match ip.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()))) {
            Some(IpAddr::V4(v4)) if !v4.is_link_local() => found.v4 = found.v4.or(Some(v4)),
            Some(IpAddr::V6(v6)) if !v6.is_unicast_link_local() => found.v6 = found.v6.or(Some(v6)),
            Some(_) | None => {}
        }
    }
    Ok(found)
}

/// Why not all listeners are open.
#[derive(Debug)]
struct ListenFailed {
    address: SocketAddr,
    source: io::Error,
    /// Those that are.
    opened: Vec<OwnedFd>,
}

/// Opens the listeners in the calling thread's namespace.
fn open_listeners() -> Result<Listeners, ListenFailed> {
    let loopback4 = SocketAddr::from((Ipv4Addr::LOCALHOST, OUTBOUND_PORT));
    let loopback6 = SocketAddr::from((Ipv6Addr::LOCALHOST, OUTBOUND_PORT));
    let any4 = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let any6 = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let wanted = [loopback4, any4(INBOUND_PORT), any4(HBONE_PORT), loopback6, any6(INBOUND_PORT), any6(HBONE_PORT)];
    let mut opened = Vec::with_capacity(wanted.len());
    for address in wanted {
        match listen(address) {
            Ok(socket) => opened.push(socket),
            // No IPv6 in this namespace, or it is disabled: then there is no [::1].
            Err(error) if address == loopback6 && is_missing(&error) => break,
            Err(source) => return Err(ListenFailed { address, source, opened }),
        }
    }
    let mut opened = opened.into_iter();
    let mut next = || opened.next();
    let (Some(outbound4), Some(inbound4), Some(hbone4)) = (next(), next(), next()) else {
        let source = io::Error::other("not opened");
        return Err(ListenFailed { address: loopback4, source, opened: Vec::new() });
    };
    Ok(Listeners { outbound4, inbound4, hbone4, outbound6: next(), inbound6: next(), hbone6: next() })
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn listen(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if address.port() == INBOUND_PORT {
        // Segments to any address and port are assigned to it.
        match address {
            SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
            SocketAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
        }
    }
    // Connections of the last proxy in TIME_WAIT must not keep the next one from listening.
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    dial::keep_alive(&SockRef::from(&socket))?;
    socket.bind(&address.into())?;
    socket.listen(LISTEN_BACKLOG)?;
    Ok(socket.into())
}
