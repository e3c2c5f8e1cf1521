//! Both ends of connections between workloads, as sockets of the test: opened as a process of the workload would open
//! them, used by the test itself.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use mesh_ctl::sandbox::Workload;
use nix::poll::PollFlags;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use crate::capture_bed::socket_in;
use crate::capture_bed::tcp::{connect, listen, set_nonblocking, wait};
use crate::mesh_bed::{MeshBed, PATIENCE};

/// A way that a connection can take through the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// For messages.
    pub name: &'static str,
    /// Workload of the client.
    pub from: &'static str,
    /// Workload of the server.
    pub to: &'static str,
}

/// Every way that there is, in the topology of [`every_route`].
pub const ROUTES: [Route; 4] = [
    Route { name: "across nodes", from: "client", to: "far" },
    Route { name: "on one node", from: "client", to: "near" },
    Route { name: "in clear into the mesh", from: "outsider", to: "far" },
    Route { name: "in clear out of the mesh", from: "client", to: "outsider" },
];

/// `client` and `near` on node-a, `far` on node-b, and `outsider` on node-a, which is not in the mesh. Nothing runs in
/// them.
pub fn every_route() -> mesh_ctl::sandbox::Topology {
    mesh_ctl::sandbox::Topology::new()
        .node("node-a")
        .node("node-b")
        .namespace("default", &[("istio.io/dataplane-mode", "ambient")])
        .workload(Workload::new("client", "node-a"))
        .workload(Workload::new("near", "node-a"))
        .workload(Workload::new("far", "node-b"))
        .workload(Workload::new("outsider", "node-a").outside_mesh())
}

/// Both ends of one connection.
#[derive(Debug)]
pub struct Ends {
    /// The end that dialled.
    pub client: TcpStream,
    /// The end that accepted.
    pub server: TcpStream,
}

impl MeshBed {
    /// A TCP socket as a process of the workload would open it.
    pub fn socket(&self, workload: &str, family: IpAddr) -> OwnedFd {
        let found = self.sandbox.workload(workload).expect("workload");
        let layout = &self.sandbox.layout;
        let netns = File::open(layout.netns(&found.key())).expect("namespace");
        let family = if family.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let cgroup = layout.pods_cgroup(&found.node).join(found.key());
        let kind = (family, libc::SOCK_STREAM, 0);
        socket_in(netns.as_fd(), &cgroup, kind).unwrap_or_else(|e| panic!("open a socket in {workload}: {e}"))
    }

    /// Dials from a workload. The stream's reads and writes end after [`PATIENCE`].
    pub fn dial(&self, from: &str, to: SocketAddr) -> io::Result<TcpStream> {
        let stream = connect(self.socket(from, to.ip()), to, PATIENCE)?;
        bounded(&stream);
        Ok(stream)
    }

    /// Listens in a workload at a port of an address; port 0 is any.
    pub fn listen(&self, workload: &str, at: SocketAddr) -> Listener {
        let socket = self.socket(workload, at.ip());
        listen(socket.as_fd(), at).unwrap_or_else(|e| panic!("listen at {at} in {workload}: {e}"));
        let patience = TimeVal::new(i64::try_from(PATIENCE.as_secs()).expect("seconds"), 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &patience).expect("timeout of accept");
        Listener(TcpListener::from(socket))
    }

    /// Address of a workload, of the family of another address.
    pub fn address_of(&self, workload: &str, family: Family) -> IpAddr {
        let workload = self.sandbox.workload(workload).expect("workload");
        self.sandbox.topology().addresses(workload).expect("addresses")[family as usize]
    }

    /// A connection by IPv4.
    pub fn ends(&self, route: Route) -> Ends {
        self.ends_by(route, Family::V4)
    }

    /// A connection, whose ends wait for each other at most for [`PATIENCE`].
    ///
    /// # Panics
    /// It does not come about.
    pub fn ends_by(&self, route: Route, family: Family) -> Ends {
        let listener = self.listen(route.to, SocketAddr::new(self.address_of(route.to, family), 0));
        let client = self.dial(route.from, listener.address());
        let client = client.unwrap_or_else(|e| panic!("{}: dial {}: {e}", route.name, listener.address()));
        Ends { client, server: listener.accept(route.name) }
    }
}

/// Address family; the number is its place in the topology's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4 = 0,
    /// IPv6.
    V6 = 1,
}

/// A listening socket of a workload.
#[derive(Debug)]
pub struct Listener(TcpListener);

impl Listener {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.0.local_addr().expect("address")
    }

    /// The next connection.
    ///
    /// # Panics
    /// None comes within [`PATIENCE`].
    pub fn accept(&self, what: &str) -> TcpStream {
        let (stream, _) = self.0.accept().unwrap_or_else(|e| panic!("{what}: accept: {e}"));
        bounded(&stream);
        stream
    }

    /// A connection that waits already.
    pub fn accept_now(&self) -> Option<TcpStream> {
        self.0.set_nonblocking(true).expect("non-blocking");
        let accepted = self.0.accept();
        self.0.set_nonblocking(false).expect("blocking");
        let (stream, _) = accepted.ok()?;
        set_nonblocking(stream.as_fd(), false).expect("blocking");
        bounded(&stream);
        Some(stream)
    }
}

fn bounded(stream: &TcpStream) {
    stream.set_read_timeout(Some(PATIENCE)).expect("read timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("write timeout");
}

/// Closes a connection so that the other end sees a reset.
pub fn reset(stream: TcpStream) {
    setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).expect("linger");
    drop(stream);
}

/// Whether the other end of a connection that nobody reads was reset, within [`PATIENCE`].
pub fn is_reset_without_reading(stream: &TcpStream) -> bool {
    // Errors are reported without being asked for.
    wait(stream.as_fd(), PollFlags::empty(), PATIENCE).expect("poll")
        && matches!(stream.take_error(), Ok(Some(error)) if is_reset(&error))
}

/// The ways in which the kernel says that the other end has reset the connection.
pub fn is_reset(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

/// Bytes that follow from their place in the stream, so that a lost, doubled or moved one shows.
#[derive(Debug)]
pub struct Pattern(Vec<u8>);

/// Bytes that are written or read at once.
const CHUNK_BYTES: usize = 64 * 1024;
/// The pattern repeats after so many bytes: a prime number, which no buffer's size is a multiple of.
const PERIOD: usize = 251;
/// Without room for so long, nobody takes anything any more.
const STALLED_AFTER: Duration = Duration::from_millis(100);

impl Pattern {
    /// One of many.
    pub fn number(number: u8) -> Self {
        let one: Vec<u8> = (0..=250).map(|at: u8| at.wrapping_add(number)).collect();
        Self(one.into_iter().cycle().take(PERIOD + CHUNK_BYTES).collect())
    }

    /// A chunk that begins at `from`.
    fn chunk(&self, from: u64, bytes: usize) -> &[u8] {
        let start = usize::try_from(from % PERIOD as u64).expect("small");
        &self.0[start..start + bytes]
    }

    /// Writes so many bytes, which begin at `from`.
    pub fn write(&self, mut to: &TcpStream, from: u64, bytes: u64) -> io::Result<()> {
        let mut written = 0;
        while written < bytes {
            let part = usize::try_from(bytes - written).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
            to.write_all(self.chunk(from + written, part))?;
            written += part as u64;
        }
        Ok(())
    }

    /// Reads to the end and counts.
    ///
    /// # Panics
    /// A byte is not the one that belongs there, or reading fails.
    pub fn read_to_end(&self, mut from: &TcpStream, what: &str) -> u64 {
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut read = 0;
        loop {
            let part = from.read(&mut chunk).unwrap_or_else(|e| panic!("{what}: after {read} bytes: {e}"));
            if part == 0 {
                return read;
            }
            let expected = self.chunk(read, part);
            if chunk[..part] != *expected {
                let at = (0..part).find(|at| chunk[*at] != expected[*at]).expect("one differs");
                panic!("{what}: byte {} is {}, not {}", read + at as u64, chunk[at], expected[at]);
            }
            read += part as u64;
        }
    }

    /// Writes until nobody takes any more; how many bytes went.
    pub fn write_until_stalled(&self, mut to: &TcpStream) -> u64 {
        set_nonblocking(to.as_fd(), true).expect("non-blocking");
        let mut written = 0;
        let mut last = Instant::now();
        while last.elapsed() < STALLED_AFTER {
            match to.write(self.chunk(written, CHUNK_BYTES)) {
                Ok(part) => {
                    written += part as u64;
                    last = Instant::now();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait(to.as_fd(), PollFlags::POLLOUT, STALLED_AFTER).expect("poll");
                }
                Err(error) => panic!("after {written} bytes: {error}"),
            }
        }
        set_nonblocking(to.as_fd(), false).expect("blocking");
        written
    }
}

/// Copies of a process's connected TCP sockets.
///
/// # Panics
/// The process is gone.
pub fn connections_of(pid: i32) -> Vec<TcpStream> {
    // SAFETY: plain system call with integers; the result is checked before it is owned.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let pidfd = own(pidfd).unwrap_or_else(|| panic!("process {pid}: {}", io::Error::last_os_error()));
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors");
    let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    numbers
        .filter_map(|number| {
            // SAFETY: as above. A descriptor that was closed meanwhile is an error.
            own(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) })
        })
        .map(TcpStream::from)
        .filter(|socket| socket.peer_addr().is_ok())
        .collect()
}

fn own(fd: libc::c_long) -> Option<OwnedFd> {
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just returned this descriptor to us alone.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}
