//! Enrolment of a workload: the kernel captures it from here on, and undoing that.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use mesh_ebpf_common::abi::{Addr, ListenerKey, ListenerTag, Workload};
use mesh_ebpf_common::{INBOUND_PORT, PROXY_PORTS, maps};
use nix::sys::socket::{SockaddrStorage, getsockname};

use super::error::{CaptureError, context};
use super::gate::ShutGate;
use super::guard::Place;
use super::netns::{Interface, find_netns, in_netns, interfaces, netns_cookie};
use super::pins::{CLSACT_SUFFIX, GATE, InterfacePin, LOOKUP, entries};
use super::programs::{INGRESS_PROGRAM, INTERFACE_PROGRAMS, LOOKUP_PROGRAM, Programs, existing_link, is_at_node_end};
use super::sock_diag::{LISTEN, SYN_RECV, SYN_SENT, SockDiag, TcpSocket};
use super::sys::{self, AttachType, Target};
use super::{Capture, ListenerFds, inner_route, insert, tc};

/// `SO_COOKIE`
const SO_COOKIE: libc::c_int = 57;

/// A workload to enrol.
#[derive(Clone, Copy)]
pub struct EnrollRequest<'a> {
    /// Names the workload in errors.
    pub uid: &'a str,
    /// Its network namespace.
    pub netns: BorrowedFd<'a>,
    /// Its IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub v6: Option<Ipv6Addr>,
    /// The proxy's listeners in the namespace, of any of its ports. Without one for [`INBOUND_PORT`] the workload is
    /// closed: connections in are refused.
    pub listeners: ListenerFds<'a>,
}

/// What enrolment did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrollment {
    /// Cookie of the workload's network namespace.
    pub cookie: u64,
    /// Interfaces that are guarded.
    pub interfaces: Vec<Interface>,
    /// Interfaces of the node that are guarded, too: the other ends of those.
    pub node_ends: Vec<Interface>,
    /// Connections that were there before and may go on.
    pub preexisting: usize,
}

/// One of the proxy's listeners.
struct Listener<'a> {
    fd: BorrowedFd<'a>,
    address: SocketAddr,
    socket_cookie: u64,
}

impl Capture {
    /// Enrols a workload, or renews its enrolment: new listeners, new programs.
    ///
    /// Order: the namespace is captured, connections of before are noted, interfaces are guarded, and connections that
    /// came in between are noted. An error leaves the workload closed, but for one: without room for it among all it is as
    /// if nothing had been asked.
    pub fn enroll(&self, request: &EnrollRequest<'_>) -> Result<Enrollment, CaptureError> {
        let uid = request.uid;
        let cookie = context(netns_cookie(request.netns), || format!("network namespace of {uid}"))?;
        let directory = self.pins.workload(cookie);
        let has_gate = || directory.join(GATE).exists();
        let shut_gate = (!has_gate()).then(|| ShutGate::prepare(self.maps.counters.as_fd()));
        let enrolled = self.enroll_at(cookie, &directory, request);
        if enrolled.is_err()
            && let Some(gate) = shut_gate.filter(|_| !has_gate())
            && let Err(error) = gate.and_then(|gate| gate.set(&directory, request.netns))
        {
            tracing::error!(workload = uid, %error, "not enrolled, and not closed to what comes in");
        }
        enrolled
    }

    fn enroll_at(
        &self,
        cookie: u64,
        directory: &Path,
        request: &EnrollRequest<'_>,
    ) -> Result<Enrollment, CaptureError> {
        let uid = request.uid;
        let listeners = context(describe(request.listeners), || format!("listeners of {uid}"));
        let programs = &*self.programs();
        let _alone = self.lock()?;
        let first_time = !directory.join(LOOKUP).exists();
        // Places of workloads are given out here, too. Before anything can fail: what the workload starts is captured.
        let slot = self.register(cookie, request)?;
        context(std::fs::create_dir_all(directory), || format!("create {}", directory.display()))?;
        let listeners = listeners?;
        self.register_listeners(cookie, &listeners)?;
        let place = Place { name: uid, cookie, netns: request.netns, directory };
        let inside = in_netns(request.netns, || {
            let diag = context(SockDiag::open(), || format!("list sockets of {uid}"))?;
            let sockets = || context(diag.sockets(), || format!("list sockets of {uid}"));
            let mut known = 0;
            if first_time {
                known += self.note_preexisting(cookie, &sockets()?)?;
            }
            let (found, ends) = self.guard(programs, &place)?;
            if first_time {
                let after = sockets()?;
                known = known.max(self.note_preexisting(cookie, &after)?);
                end_dials(&diag, &after);
            }
            let notes = self.notes(cookie)?;
            self.count_anew(slot, notes.len());
            let now = sockets()?;
            self.forget_orphans(&notes, &now)?;
            refuse_held_ports(uid, &now, &listeners)?;
            context(inner_route::set_up(), || format!("set up routing of {uid}"))?;
            Ok((found, ends, known))
        });
        let (interfaces, node_ends, preexisting) =
            context(inside, || format!("enter the network namespace of {uid}"))??;
        self.attach_lookup(programs, directory, request)?;
        Ok(Enrollment { cookie, interfaces, node_ends, preexisting })
    }

    /// Captures no more connections of a workload, and leaves what those need that were captured already: their routes and
    /// their notes. [`Self::unenroll`] takes these away.
    pub fn let_go(&self, cookie: u64, netns: BorrowedFd<'_>) -> Result<(), CaptureError> {
        let _no_guard_meanwhile = self.programs();
        let _alone = self.lock()?;
        self.watches.remove(cookie);
        detach_all(&self.pins.workload(cookie), Some(netns), self.node.as_fd())?;
        // Last: what is captured until now the proxy carries, guarded or not.
        let what = || format!("let go the workload with cookie {cookie}");
        let known: Option<Workload> = context(sys::lookup(self.maps.workloads.as_fd(), &cookie), what)?;
        let Some(known) = known else { return Ok(()) };
        let let_go = Workload { generation: Workload::LET_GO, ..known };
        insert(&self.maps.workloads, maps::WORKLOADS, &cookie, &let_go)
    }

    /// Ends the enrolment of a workload; its connections are no longer captured. `netns` is needed to undo routing and
    /// clsact filters; without it the namespace is looked for.
    pub fn unenroll(&self, cookie: u64, netns: Option<BorrowedFd<'_>>) -> Result<(), CaptureError> {
        let found = if netns.is_none() { find_netns(cookie) } else { None };
        let netns = netns.or(found.as_ref().map(AsFd::as_fd));
        let _no_guard_meanwhile = self.programs();
        let _alone = self.lock()?;
        let directory = self.pins.workload(cookie);
        if netns.is_none() && has_filters(&directory)? && !is_gone(&directory)? {
            return Err(CaptureError::NetnsNotFound { cookie });
        }
        self.watches.remove(cookie);
        remove_pins(&directory, netns, self.node.as_fd())?;
        let what = || format!("unenrol the workload with cookie {cookie}");
        for family in [libc::AF_INET, libc::AF_INET6] {
            let key = ListenerKey { netns_cookie: cookie, family: family.cast_unsigned(), reserved: 0 };
            // The entry leaves by itself when its listener is closed.
            context(sys::remove(self.maps.listeners.as_fd(), &key), what)?;
        }
        self.forget_flows(cookie)?;
        // Last: by it the next process finds what an unfinished one has left.
        context(sys::remove(self.maps.workloads.as_fd(), &cookie), what)?;
        // What was noted in between.
        self.forget_flows(cookie)
    }

    /// Tells the programs of the workload; returns its place among all.
    ///
    /// Its addresses are those of the first time: at a renewal its root may have others in the namespace, also such as belong
    /// to another workload.
    fn register(&self, cookie: u64, request: &EnrollRequest<'_>) -> Result<u32, CaptureError> {
        let what = || format!("register {}", request.uid);
        let before: Option<Workload> = context(sys::lookup(self.maps.workloads.as_fd(), &cookie), what)?;
        let workload = match before {
            Some(known) => Workload { generation: known.generation + 1, ..known },
            None => Workload {
                v4: request.v4.map_or(0, |v4| v4.to_bits().to_be()),
                slot: self.free_slot()?,
                v6: request.v6.map_or_else(Addr::default, |v6| Addr::from(IpAddr::V6(v6))),
                generation: 1,
            },
        };
        insert(&self.maps.workloads, maps::WORKLOADS, &cookie, &workload)?;
        Ok(workload.slot)
    }

    /// Tells the programs of the proxy's plaintext listeners.
    fn register_listeners(&self, cookie: u64, ours: &[Listener<'_>]) -> Result<(), CaptureError> {
        for listener in ours.iter().filter(|listener| listener.address.port() == INBOUND_PORT) {
            let fd = std::os::fd::AsRawFd::as_raw_fd(&listener.fd).cast_unsigned();
            let tag = ListenerTag { netns_cookie: cookie };
            insert(&self.maps.listener_tags, maps::LISTENER_TAGS, &fd, &tag)?;
            let family = if listener.address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
            let key = ListenerKey { netns_cookie: cookie, family: family.cast_unsigned(), reserved: 0 };
            insert(&self.maps.listeners, maps::LISTENERS, &key, &fd)?;
        }
        Ok(())
    }

    fn free_slot(&self) -> Result<u32, CaptureError> {
        let map = self.maps.workloads.as_fd();
        let taken = || -> io::Result<BTreeSet<u32>> {
            let mut taken = BTreeSet::new();
            for cookie in sys::keys::<u64>(map, maps::MAX_WORKLOADS)? {
                taken.extend(sys::lookup::<_, Workload>(map, &cookie)?.map(|workload| workload.slot));
            }
            Ok(taken)
        };
        let taken = context(taken(), || "read the enrolled workloads".to_owned())?;
        let entries = u32::try_from(maps::MAX_WORKLOADS).unwrap_or(u32::MAX);
        let free = (0..entries).find(|slot| !taken.contains(slot));
        free.ok_or(CaptureError::MapFull { map: maps::WORKLOADS, entries })
    }

    /// The last step of an enrolment: its pin says that the workload needs no second look at old connections.
    fn attach_lookup(
        &self,
        programs: &Programs,
        directory: &Path,
        request: &EnrollRequest<'_>,
    ) -> Result<(), CaptureError> {
        let what = || format!("attach {LOOKUP_PROGRAM} to the network namespace of {}", request.uid);
        let pin = directory.join(LOOKUP);
        let program = programs.fd(LOOKUP_PROGRAM)?;
        if let Some(link) = existing_link(&pin)? {
            return context(sys::update_link(link.as_fd(), program), what);
        }
        let link = context(sys::link(program, Target::Fd(request.netns), AttachType::SkLookup, 0), what)?;
        context(sys::pin(link.as_fd(), &pin), what)
    }

    /// Lets connections of before go on, as many as there is room for. Returns how many that are.
    fn note_preexisting(&self, cookie: u64, sockets: &[TcpSocket]) -> Result<usize, CaptureError> {
        let old: Vec<&TcpSocket> = sockets.iter().filter(|socket| is_old_connection(socket)).collect();
        let mut noted = 0;
        for socket in old.iter().take(maps::MAX_PREEXISTING_PER_WORKLOAD) {
            match insert(&self.maps.preexisting, maps::PREEXISTING, &socket.cookie, &cookie) {
                Ok(()) => noted += 1,
                Err(CaptureError::MapFull { .. }) => break,
                Err(error) => return Err(error),
            }
        }
        if noted < old.len() {
            tracing::warn!(
                cookie,
                noted,
                connections = old.len(),
                "more connections of before enrolment than may go on"
            );
        }
        Ok(noted)
    }

    /// Notes and old connections of a workload that is no longer enrolled.
    fn forget_flows(&self, cookie: u64) -> Result<(), CaptureError> {
        let what = || format!("forget connections of the workload with cookie {cookie}");
        let map = self.maps.preexisting.as_fd();
        for socket in context(sys::keys::<u64>(map, maps::MAX_PREEXISTING), what)? {
            if context(sys::lookup::<_, u64>(map, &socket), what)? == Some(cookie) {
                context(sys::remove(map, &socket), what)?;
            }
        }
        self.forget_notes(cookie)
    }
}

/// Whether a socket has a connection that its peer outside may go on with, or answers one that it has begun: what comes in now is
/// the proxy's.
fn is_old_connection(socket: &TcpSocket) -> bool {
    let is_proxys = socket.state == SYN_RECV && PROXY_PORTS.contains(&socket.local.port());
    !matches!(socket.state, LISTEN | SYN_SENT) && !is_proxys && !Addr::from(socket.local.ip()).is_loopback()
}

fn describe<'a>(fds: ListenerFds<'a>) -> io::Result<Vec<Listener<'a>>> {
    fds.iter()
        .map(|fd| {
            let name: SockaddrStorage = getsockname(std::os::fd::AsRawFd::as_raw_fd(fd))?;
            let address = name
                .as_sockaddr_in()
                .map(|v4| SocketAddr::from(std::net::SocketAddrV4::from(*v4)))
                .or_else(|| name.as_sockaddr_in6().map(|v6| SocketAddr::from(std::net::SocketAddrV6::from(*v6))))
                .ok_or_else(|| io::Error::other("a listener is not an IP socket"))?;
            Ok(Listener { fd: *fd, address, socket_cookie: sys::socket_option(*fd, SO_COOKIE)? })
        })
        .collect()
}

/// Ends dials that were under way. They are no connections yet: one of a workload that starts, whose link is not up, would go out
/// around the proxy when it is. Whoever tries again meets the proxy.
fn end_dials(diag: &SockDiag, sockets: &[TcpSocket]) {
    let dials = |s: &&TcpSocket| s.state == SYN_SENT && !s.remote.ip().to_canonical().is_loopback();
    for socket in sockets.iter().filter(dials) {
        if let Err(error) = diag.destroy(socket) {
            // It ends by itself within the kernel's SYN retries, because its segments are dropped.
            tracing::debug!(%error, local = %socket.local, remote = %socket.remote, "a dial stays");
        }
    }
}

fn refuse_held_ports(uid: &str, sockets: &[TcpSocket], ours: &[Listener<'_>]) -> Result<(), CaptureError> {
    let own: BTreeSet<u64> = ours.iter().map(|listener| listener.socket_cookie).collect();
    let held =
        sockets.iter().find(|s| s.state == LISTEN && PROXY_PORTS.contains(&s.local.port()) && !own.contains(&s.cookie));
    match held {
        Some(socket) => Err(CaptureError::PortHeld { uid: uid.to_owned(), address: socket.local, owner: socket.uid }),
        None => Ok(()),
    }
}

/// Whether clsact filters of a workload are to be removed.
fn has_filters(directory: &Path) -> Result<bool, CaptureError> {
    let pins = context(entries(directory), || format!("read {}", directory.display()))?;
    Ok(pins.iter().any(|pin| pin.to_string_lossy().ends_with(CLSACT_SUFFIX)))
}

/// Whether the namespace of a workload is no more, as one of the links that were attached to it says.
fn is_gone(directory: &Path) -> Result<bool, CaptureError> {
    for name in [GATE, LOOKUP] {
        if let Some(link) = existing_link(&directory.join(name))? {
            let info = context(sys::link_info(link.as_fd()), || format!("read {}", directory.display()))?;
            // The low half is the namespace's inode.
            return Ok(info.target & u64::from(u32::MAX) == 0);
        }
    }
    Ok(false)
}

/// Detaches all that is pinned for a workload, and undoes its routing. Returns what it removed.
pub(super) fn remove_pins(
    directory: &Path,
    netns: Option<BorrowedFd<'_>>,
    node: BorrowedFd<'_>,
) -> Result<Vec<String>, CaptureError> {
    let mut removed = detach_all(directory, netns, node)?;
    if let Some(netns) = netns {
        let what = || format!("undo the routing of {}", directory.display());
        context(in_netns(netns, inner_route::tear_down).and_then(|done| done), what)?;
        removed.push(format!("routing rules in the namespace of {}", directory.display()));
    }
    Ok(removed)
}

/// Detaches all that is pinned for a workload. Returns what it removed.
///
/// What judges segments on their way in goes last: what it lets the application take must be answered.
fn detach_all(
    directory: &Path,
    netns: Option<BorrowedFd<'_>>,
    node: BorrowedFd<'_>,
) -> Result<Vec<String>, CaptureError> {
    let what = || format!("remove {}", directory.display());
    let mut pins = context(entries(directory), what)?;
    pins.sort_by_key(|pin| pin.to_string_lossy().contains(INGRESS_PROGRAM));
    let mut removed = Vec::new();
    let clsact = pins
        .iter()
        .filter_map(|pin| InterfacePin::parse(pin.file_name()?.to_str()?, &INTERFACE_PROGRAMS))
        .filter(|pin| pin.clsact);
    let (at_node, inside): (Vec<_>, Vec<_>) = clsact.partition(|pin| is_at_node_end(pin.program));
    if !at_node.is_empty() {
        context(in_netns(node, || detach(&at_node)).and_then(|done| done), what)?;
    }
    if let Some(netns) = netns {
        context(in_netns(netns, || detach(&inside)).and_then(|done| done), what)?;
    }
    for pin in &pins {
        context(std::fs::remove_file(pin), || format!("remove {}", pin.display()))?;
        removed.push(pin.display().to_string());
    }
    match std::fs::remove_dir(directory) {
        Ok(()) => removed.push(directory.display().to_string()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(CaptureError::Io { what: what(), source }),
    }
    Ok(removed)
}

/// Removes clsact filters in the calling thread's namespace; interfaces that are gone took theirs with them.
fn detach(pins: &[InterfacePin]) -> io::Result<()> {
    let present = interfaces()?;
    for pin in pins {
        if let Some(interface) = present.iter().find(|interface| interface.index == pin.index) {
            tc::detach_clsact(interface.index, pin.program)?;
        }
    }
    Ok(())
}
