//! Dialling: sockets that belong to a workload's namespace, and connections that carry a client's own address.
//!
//! A socket belongs to the namespace that its thread was in when it was made, and stays there; everything after that may
//! be done from anywhere. So a worker steps into the workload's namespace for the one `socket` call, synchronously.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_ebpf_common::INNER_MARK;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::fstat;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};

/// Time for one TCP connect.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Idle time before the first keepalive probe.
pub const KEEPALIVE_IDLE: Duration = Duration::from_secs(180);
/// Between keepalive probes.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(60);
/// Probes without an answer after which a connection is dead.
pub const KEEPALIVE_PROBES: u32 = 3;
/// Source ports for plaintext connections to an application, outside of what kernels hand out by default (32768 and up):
/// the client's own port is taken by the connection that was captured. A client that itself uses such a port while the
/// proxy has drawn it for a live connection between the same addresses gets no connection, and has to try another.
const SPOOFED_PORTS: std::ops::RangeInclusive<u16> = 1024..=32767;
/// Ports tried before giving up.
const SPOOFED_PORT_TRIES: u32 = 16;

/// The namespaces of this thread.
#[derive(Debug)]
pub struct Namespaces {
    own: OwnedFd,
    own_inode: u64,
}

impl Namespaces {
    /// For the calling thread. Must stay on it.
    pub fn of_this_thread() -> io::Result<Self> {
        let own: OwnedFd = std::fs::File::open("/proc/thread-self/ns/net")?.into();
        let own_inode = fstat(&own)?.st_ino;
        Ok(Self { own, own_inode })
    }

    /// A TCP socket in the namespace, non-blocking, with TCP_NODELAY.
    ///
    /// A thread that cannot get back would make later sockets in a wrong namespace, so that ends the process.
    pub fn socket(&self, namespace: BorrowedFd<'_>, address: IpAddr) -> io::Result<Socket> {
        let elsewhere = fstat(namespace)?.st_ino != self.own_inode;
        if elsewhere {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
        }
        let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP));
        if elsewhere && let Err(error) = setns(self.own.as_fd(), CloneFlags::CLONE_NEWNET) {
            tracing::error!(%error, "cannot leave a workload's network namespace");
            std::process::abort();
        }
        let socket = socket?;
        socket.set_tcp_nodelay(true)?;
        Ok(socket)
    }
}

/// Sets keepalive as all connections of the proxy have it.
pub fn keep_alive(socket: &SockRef<'_>) -> io::Result<()> {
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

/// The captured connections of one workload, by the client's address and the one that it dialled. They live in the
/// workload's namespace as the proxy's sockets, where the application's end of another connection must not have the same
/// two addresses: its first segment would reach the proxy's socket and get that one reset. Clients whose kernels hand out
/// ports of [`SPOOFED_PORTS`] too come that near.
#[derive(Debug, Default)]
pub struct CapturedAddresses(Mutex<HashSet<(SocketAddr, SocketAddr)>>);

/// A captured connection's entry, removed when dropped.
#[derive(Debug)]
pub struct CapturedEntry {
    all: Arc<CapturedAddresses>,
    addresses: (SocketAddr, SocketAddr),
}

impl CapturedAddresses {
    /// Notes a connection for as long as the entry lives.
    pub fn enter(self: &Arc<Self>, client: SocketAddr, dialled: SocketAddr) -> CapturedEntry {
        let addresses = (canonical(client), canonical(dialled));
        self.entries().insert(addresses);
        CapturedEntry { all: Arc::clone(self), addresses }
    }

    fn has(&self, client: SocketAddr, dialled: SocketAddr) -> bool {
        self.entries().contains(&(canonical(client), canonical(dialled)))
    }

    fn entries(&self) -> MutexGuard<'_, HashSet<(SocketAddr, SocketAddr)>> {
        // Each change is one call, so a panic elsewhere leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for CapturedEntry {
    fn drop(&mut self) {
        self.all.entries().remove(&self.addresses);
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Whose address a connection to an application carries.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// The proxy's choice.
    Any,
    /// The client's address; any port.
    Client(IpAddr),
    /// The client's address, and a port that is none of a captured connection's.
    ClientOfCaptured(IpAddr, &'a CapturedAddresses),
}

/// Connects a socket, giving up after [`CONNECT_TIMEOUT`].
pub async fn connect(socket: Socket, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::from_std_stream(socket.into());
    tokio::time::timeout(CONNECT_TIMEOUT, socket.connect(to))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Connects to an application at `to` from inside its namespace. Without keepalive: both ends are in this kernel, so
/// neither can vanish without a word.
pub async fn connect_application(
    namespaces: &Namespaces,
    namespace: BorrowedFd<'_>,
    source: Source<'_>,
    to: SocketAddr,
) -> io::Result<TcpStream> {
    let (client, captured) = match source.normalised(to) {
        Source::Any => {
            let socket = namespaces.socket(namespace, to.ip())?;
            // As with the client's address: what carries the mark does not leave the workload, whatever its routes say.
            socket.set_mark(INNER_MARK)?;
            return connect(socket, to).await;
        }
        Source::Client(client) => (client, None),
        Source::ClientOfCaptured(client, captured) => (client, Some(captured)),
    };
    let mut tries = 0;
    loop {
        let port = captured.map_or(0, |captured| free_port(captured, client, to));
        let socket = namespaces.socket(namespace, to.ip())?;
        tries += 1;
        let connected = match spoof(&socket, client, port) {
            Ok(()) => connect(socket, to).await,
            Err(error) => Err(error),
        };
        match connected {
            // Somebody listens on this port, or another connection has it towards this destination; the next draw is
            // another one.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
                    && tries < SPOOFED_PORT_TRIES => {}
            result => return result,
        }
    }
}

/// A port with which `client` has no captured connection to `to`; some port if there seems to be none.
fn free_port(captured: &CapturedAddresses, client: IpAddr, to: SocketAddr) -> u16 {
    let draw = || rand::random_range(SPOOFED_PORTS);
    (0..SPOOFED_PORT_TRIES)
        .map(|_| draw())
        .find(|port| !captured.has(SocketAddr::new(client, *port), to))
        .unwrap_or_else(draw)
}

impl Source<'_> {
    /// Loopback, unspecified and multicast addresses, and those of another family, cannot be carried.
    fn normalised(self, to: SocketAddr) -> Self {
        let usable = |ip: IpAddr| {
            ip.is_ipv4() == to.is_ipv4() && !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast()
        };
        match self {
            Self::Client(ip) if usable(ip.to_canonical()) => Self::Client(ip.to_canonical()),
            Self::ClientOfCaptured(ip, captured) if usable(ip.to_canonical()) => {
                Self::ClientOfCaptured(ip.to_canonical(), captured)
            }
            Self::Any | Self::Client(_) | Self::ClientOfCaptured(..) => Self::Any,
        }
    }
}

/// Lets a socket carry an address that is not ours. Binding to port 0 leaves the choice to `connect`, which then only
/// has to keep the 4-tuple unique (IP_BIND_ADDRESS_NO_PORT).
fn spoof(socket: &Socket, client: IpAddr, port: u16) -> io::Result<()> {
    match client {
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        IpAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
    }
    socket.set_mark(INNER_MARK)?;
    if port == 0 {
        nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
    } else {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&SocketAddr::new(client, port).into())
}
