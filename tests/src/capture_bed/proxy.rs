//! A proxy of thirty lines, and an application: each tells who called and where to, and then echoes.

use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use mesh_ebpf_common::outcome::{Hook, Reason};
use mesh_ebpf_common::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT};
use mesh_node::capture::Capture;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Bed, Group, Netns, tcp};

/// How often a serving thread looks whether it shall end.
const LOOK_MILLIS: u16 = 20;

/// A bed with an enrolled workload and a serving proxy. Fields drop in this order: the bed last.
pub struct Mesh {
    /// The proxy in the workload's namespace.
    pub proxy: Option<Proxy>,
    /// The loader.
    pub capture: Arc<Capture>,
    /// Namespaces and cgroups.
    pub bed: Bed,
}

impl Mesh {
    /// With tcx.
    pub fn new() -> Self {
        Self::with(super::Bed::capture)
    }

    /// With another loader.
    pub fn with(open: impl FnOnce(&Bed) -> Capture) -> Self {
        let bed = Bed::new();
        let capture = Arc::new(open(&bed));
        let listeners = Listeners::open(&bed, &bed.pod);
        let enrollment = bed.enroll(&capture, &listeners.fds());
        let proxy = listeners.serve(Arc::clone(&capture), enrollment.cookie);
        Self { proxy: Some(proxy), capture, bed }
    }

    /// The serving proxy.
    pub fn proxy(&self) -> &Proxy {
        self.proxy.as_ref().expect("the proxy runs")
    }

    /// Connects from the workload.
    pub fn dial(&self, destination: SocketAddr) -> io::Result<TcpStream> {
        tcp::connect(self.bed.tcp(&self.bed.pod, Group::App, destination.is_ipv6()), destination, super::PATIENCE)
    }

    /// Connects from outside the mesh, as a pod.
    pub fn call(&self, destination: SocketAddr) -> io::Result<TcpStream> {
        self.call_as(Group::Neighbour, destination)
    }

    /// Connects from the node's namespace.
    pub fn call_as(&self, group: Group, destination: SocketAddr) -> io::Result<TcpStream> {
        tcp::connect(self.bed.tcp(&self.bed.peer, group, destination.is_ipv6()), destination, super::PATIENCE)
    }

    /// How often a hook had an outcome.
    pub fn count(&self, hook: Hook, reason: Reason) -> u64 {
        super::count(&self.capture, hook, reason)
    }
}

impl Default for Mesh {
    fn default() -> Self {
        Self::new()
    }
}

/// Listeners of the proxy in a namespace, not served yet.
pub struct Listeners {
    sockets: Vec<(SocketAddr, OwnedFd)>,
}

impl Listeners {
    /// On all ports and both families.
    pub fn open(bed: &Bed, netns: &Netns) -> Self {
        Self::open_as(&bed.cgroup(Group::Proxy), netns)
    }

    /// As a proxy of another cgroup opens them.
    pub fn open_as(cgroup: &Path, netns: &Netns) -> Self {
        let (v4, v6) = (Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED);
        let addresses = [
            SocketAddr::from((Ipv4Addr::LOCALHOST, OUTBOUND_PORT)),
            SocketAddr::from((Ipv6Addr::LOCALHOST, OUTBOUND_PORT)),
            SocketAddr::from((v4, INBOUND_PORT)),
            SocketAddr::from((v6, INBOUND_PORT)),
            SocketAddr::from((v4, HBONE_PORT)),
            SocketAddr::from((v6, HBONE_PORT)),
        ];
        let sockets = addresses.map(|address| {
            let family = if address.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
            let socket = super::socket_in(netns.fd(), cgroup, (family, libc::SOCK_STREAM, 0)).expect("open a socket");
            tcp::listen(socket.as_fd(), address).unwrap_or_else(|e| panic!("listen on {address}: {e}"));
            (address, socket)
        });
        Self { sockets: sockets.into() }
    }

    /// For enrolment.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.sockets.iter().map(|(_, fd)| fd.as_fd()).collect()
    }

    /// Serves captured connections; each begins with a line that [`Proxy`] describes.
    pub fn serve(self, capture: Arc<Capture>, cookie: u64) -> Proxy {
        let without_destination = Arc::new(AtomicU64::new(0));
        let refused = Arc::clone(&without_destination);
        let server = Server::start(self.sockets, move |port, mut stream| {
            let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
            let line = if port == OUTBOUND_PORT {
                let Some(original) = capture.original_dst(cookie, peer).map_err(io::Error::other)? else {
                    refused.fetch_add(1, Ordering::SeqCst);
                    reset(&stream)?;
                    return Ok(None);
                };
                format!("out {original}\n")
            } else {
                format!("in {port} {local} {peer}\n")
            };
            stream.write_all(line.as_bytes())?;
            Ok(Some(stream))
        });
        Proxy { server, without_destination }
    }
}

/// The proxy. It greets with `out DESTINATION` or `in LISTENER LOCAL PEER`, then echoes.
pub struct Proxy {
    server: Server,
    without_destination: Arc<AtomicU64>,
}

impl Proxy {
    /// Connections that it accepted.
    pub fn accepted(&self) -> u64 {
        self.server.accepted()
    }

    /// Captured connections that had no note and were reset.
    pub fn without_destination(&self) -> u64 {
        self.without_destination.load(Ordering::SeqCst)
    }

    /// Duplicates of its listeners.
    pub fn listeners(&self) -> Vec<OwnedFd> {
        self.server.listeners.iter().map(|fd| fd.try_clone().expect("duplicate a listener")).collect()
    }

    /// Ends it and its listeners.
    pub fn stop(self) {
        for listener in &self.server.listeners {
            // A process that another test starts just now holds copies for a moment; closing ours would not be enough.
            let ended = nix::sys::socket::shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
            assert_eq!(ended, Ok(()), "end a listener");
        }
    }

    /// Ends it as a crash would: listeners that a supervisor has duplicates of live on.
    pub fn crash(self) {
        drop(self);
    }
}

/// An application that greets with `app` and echoes.
pub fn application(bed: &Bed, netns: &Netns, group: Group, addresses: &[SocketAddr]) -> Server {
    let sockets = addresses.iter().map(|address| {
        let socket = bed.tcp(netns, group, address.is_ipv6());
        tcp::listen(socket.as_fd(), *address).unwrap_or_else(|e| panic!("listen on {address}: {e}"));
        (*address, socket)
    });
    Server::start(sockets.collect(), |_, mut stream| {
        stream.write_all(b"app\n")?;
        Ok(Some(stream))
    })
}

/// What a server closes at, instead of echoing it.
const CLOSE_WORD: &[u8] = b"close\n";

/// Asks the other end to close first, closes too, and waits until this end's port is free for another connection.
pub fn ask_to_close(stream: &mut TcpStream) -> io::Result<()> {
    use std::io::Read as _;
    stream.write_all(CLOSE_WORD)?;
    stream.set_read_timeout(Some(super::PATIENCE))?;
    if stream.read(&mut [0])? != 0 {
        return Err(io::Error::other("the other end sent more"));
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // A socket without a connection has no peer: the last acknowledgement has come.
    super::eventually("the other end acknowledges the end", || stream.peer_addr().is_err());
    Ok(())
}

/// Closes with a reset.
pub fn reset(stream: &TcpStream) -> io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    Ok(nix::sys::socket::setsockopt(stream, nix::sys::socket::sockopt::Linger, &linger)?)
}

/// Accepts on some sockets and echoes, in one thread, until dropped.
pub struct Server {
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicU64>,
    listeners: Vec<Arc<OwnedFd>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(
        sockets: Vec<(SocketAddr, OwnedFd)>,
        mut greet: impl FnMut(u16, TcpStream) -> io::Result<Option<TcpStream>> + Send + 'static,
    ) -> Self {
        let sockets: Vec<(u16, Arc<OwnedFd>)> = sockets.into_iter().map(|(a, fd)| (a.port(), Arc::new(fd))).collect();
        let listeners = sockets.iter().map(|(_, fd)| Arc::clone(fd)).collect();
        let (stop, accepted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopping, counting) = (Arc::clone(&stop), Arc::clone(&accepted));
        let thread = thread::spawn(move || {
            let mut streams: Vec<TcpStream> = Vec::new();
            while !stopping.load(Ordering::SeqCst) {
                let ready = wait(&sockets, &streams);
                for (port, socket) in &sockets {
                    while let Some(stream) = accept(socket) {
                        counting.fetch_add(1, Ordering::SeqCst);
                        // A client that is gone already is not this server's trouble.
                        if let Ok(Some(stream)) = greet(*port, stream) {
                            streams.push(stream);
                        }
                    }
                }
                if ready {
                    streams.retain_mut(echo);
                }
            }
        });
        Self { stop, accepted, listeners, thread: Some(thread) }
    }

    /// Connections that it accepted.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed; the test fails by what it waits for.
            let _printed = thread.join();
        }
    }
}

fn wait(sockets: &[(u16, Arc<OwnedFd>)], streams: &[TcpStream]) -> bool {
    let listening = sockets.iter().map(|(_, fd)| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
    let talking = streams.iter().map(|stream| PollFd::new(stream.as_fd(), PollFlags::POLLIN));
    let mut all: Vec<PollFd<'_>> = listening.chain(talking).collect();
    poll(&mut all, PollTimeout::from(LOOK_MILLIS)).is_ok_and(|ready| ready > 0)
}

fn accept(socket: &OwnedFd) -> Option<TcpStream> {
    use nix::sys::socket::{SockFlag, accept4};
    tcp::set_nonblocking(socket.as_fd(), true).ok()?;
    let fd = accept4(socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK).ok()?;
    // SAFETY: the kernel has just returned this descriptor to us alone.
    let stream = TcpStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    stream.set_write_timeout(Some(Duration::from_secs(1))).ok()?;
    Some(stream)
}

/// False when the stream has ended.
fn echo(stream: &mut TcpStream) -> bool {
    use std::io::Read as _;
    let mut buffer = [0_u8; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(length) if &buffer[..length] == CLOSE_WORD => return false,
            Ok(length) => {
                if stream.write_all(&buffer[..length]).is_err() {
                    return false;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
            Err(_) => return false,
        }
    }
}
