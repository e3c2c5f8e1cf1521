//! The bed of the capture suite: namespaces, cgroups and a BPF file system of its own for each test, removed at its end.
//!
//! A socket belongs to the cgroup and the namespace of the process that opened it, so a test needs no processes of its
//! own in them: [`socket_in`] opens sockets anywhere, and the test uses them itself.
#![allow(unsafe_code)]

pub mod foreign;
pub mod nat;
pub mod netns;
pub mod packet;
pub mod proxy;
pub mod tcp;
pub mod xdp;

use std::fs;
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use mesh_ebpf_common::outcome::{Hook, Reason};
use mesh_node::capture::{Capture, CaptureConfig, CaptureError, EnrollRequest, Enrollment, TcMode, cleanup, in_netns};
pub use netns::Netns;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// How long a test waits for what must happen; only a failing test waits so long.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// The workload's addresses.
pub const POD_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// The workload's addresses.
pub const POD_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2);
/// The other end's addresses.
pub const PEER_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The other end's addresses.
pub const PEER_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);

/// The workload's addresses on [`Bed::add_link`].
pub const LATE_POD_V4: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);
/// The workload's addresses on [`Bed::add_link`].
pub const LATE_POD_V6: Ipv6Addr = Ipv6Addr::new(0xfd78, 0, 0, 0, 0, 0, 0, 2);
const LATE_PEER_V4: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
const LATE_PEER_V6: Ipv6Addr = Ipv6Addr::new(0xfd78, 0, 0, 0, 0, 0, 0, 1);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A workload's namespace `pod`, a namespace `peer` at the other end of its link, and cgroups.
pub struct Bed {
    name: String,
    /// `pods/app` (the application), `pods/neighbour`, `proxy`, `outside`.
    cgroups: PathBuf,
    run: PathBuf,
    /// The workload.
    pub pod: Netns,
    /// The node, outside the mesh.
    pub peer: Netns,
}

/// Which cgroup a socket shall be of.
#[derive(Clone, Copy, Debug)]
pub enum Group {
    /// A workload's.
    App,
    /// Another pod's; in the namespace `peer`, one with `hostNetwork`.
    Neighbour,
    /// The proxy's.
    Proxy,
    /// Neither; in the namespace `peer`, a process of the node itself.
    Outside,
}

impl Bed {
    /// A bed for one test. Panics without the privileges for it: a test that cannot run has failed.
    pub fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "the capture suite needs root: run it with sudo");
        let name = format!("mt{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let cgroups = cgroup2_root().join(format!("mesh-test-{name}"));
        for group in ["pods/app", "pods/neighbour", "proxy", "outside"] {
            fs::create_dir_all(cgroups.join(group)).expect("create a cgroup");
        }
        let run = PathBuf::from(format!("/run/mesh-test-{name}"));
        fs::create_dir_all(run.join("bpf")).expect("create a directory for bpffs");
        mount(Some("bpf"), &run.join("bpf"), Some("bpf"), MsFlags::empty(), None::<&str>).expect("mount bpffs");
        let pod = Netns::create(format!("{name}-pod"));
        let peer = Netns::create(format!("{name}-peer"));
        pod.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", &peer.name]);
        for (netns, v4, v6) in [(&pod, POD_V4, POD_V6), (&peer, PEER_V4, PEER_V6)] {
            netns.ip(&["addr", "add", &format!("{v4}/24"), "dev", "eth0"]);
            netns.ip(&["addr", "add", &format!("{v6}/64"), "dev", "eth0", "nodad"]);
            netns.ip(&["link", "set", "eth0", "up"]);
        }
        pod.ip(&["route", "add", "default", "via", &PEER_V4.to_string()]);
        pod.ip(&["-6", "route", "add", "default", "via", &PEER_V6.to_string()]);
        Self { name, cgroups, run, pod, peer }
    }

    /// One more namespace, without links.
    pub fn another(&self, name: &str) -> Netns {
        Netns::create(format!("{}-{name}", self.name))
    }

    /// One more link between `pod` and `peer`, `late0` at both ends, with an index of the test's choice in `pod`.
    pub fn add_link(&self, index: u32) {
        let link =
            ["link", "add", "late0", "index", &index.to_string(), "type", "veth", "peer", "name", "late0", "netns"];
        self.pod.ip(&[&link[..], &[&self.peer.name]].concat());
        self.peer.ip(&["link", "set", "late0", "up"]);
        self.pod.ip(&["link", "set", "late0", "up"]);
        for (netns, v4, v6) in [(&self.pod, LATE_POD_V4, LATE_POD_V6), (&self.peer, LATE_PEER_V4, LATE_PEER_V6)] {
            netns.ip(&["addr", "add", &format!("{v4}/24"), "dev", "late0"]);
            netns.ip(&["addr", "add", &format!("{v6}/64"), "dev", "late0", "nodad"]);
        }
    }

    /// Where pins go.
    pub fn bpffs(&self) -> PathBuf {
        self.run.join("bpf")
    }

    /// The directory of a cgroup.
    pub fn cgroup(&self, group: Group) -> PathBuf {
        self.cgroups.join(match group {
            Group::App => "pods/app",
            Group::Neighbour => "pods/neighbour",
            Group::Proxy => "proxy",
            Group::Outside => "outside",
        })
    }

    /// The cgroup above all workloads.
    pub fn pods_cgroup(&self) -> PathBuf {
        self.cgroups.join("pods")
    }

    /// Configuration with this bed's paths.
    pub fn config(&self) -> CaptureConfig {
        CaptureConfig::new(self.bpffs(), self.pods_cgroup(), self.cgroup(Group::Proxy))
    }

    /// Loads the programs.
    pub fn capture(&self) -> Capture {
        self.capture_with(&self.config())
    }

    /// Loads the programs for clsact.
    pub fn capture_by_clsact(&self) -> Capture {
        self.capture_with(&CaptureConfig { tc: TcMode::Clsact, ..self.config() })
    }

    /// Loads the programs. The other end of the workload's link is in the namespace `peer`: that is the node's.
    pub fn capture_with(&self, config: &CaptureConfig) -> Capture {
        let opened = in_netns(self.peer.fd(), || Capture::open(config)).expect("enter the node's namespace");
        opened.unwrap_or_else(|e| panic!("{}", chain(&e)))
    }

    /// Removes all that capture made, and says what.
    pub fn cleanup(&self) -> Result<Vec<String>, CaptureError> {
        in_netns(self.peer.fd(), || cleanup(&self.bpffs())).expect("enter the node's namespace")
    }

    /// Enrols the workload with these listeners.
    pub fn enroll(&self, capture: &Capture, listeners: &[BorrowedFd<'_>]) -> Enrollment {
        capture.enroll(&self.request(listeners)).unwrap_or_else(|e| panic!("{}", chain(&e)))
    }

    /// What [`Bed::enroll`] asks for.
    pub fn request<'a>(&'a self, listeners: &'a [BorrowedFd<'a>]) -> EnrollRequest<'a> {
        EnrollRequest { uid: "test/pod", netns: self.pod.fd(), v4: Some(POD_V4), v6: Some(POD_V6), listeners }
    }

    /// A TCP socket in a namespace.
    pub fn tcp(&self, netns: &Netns, group: Group, v6: bool) -> OwnedFd {
        let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
        self.socket(netns, group, (family, libc::SOCK_STREAM, 0))
    }

    /// Any socket in a namespace: family, type, protocol.
    pub fn socket(&self, netns: &Netns, group: Group, kind: (i32, i32, i32)) -> OwnedFd {
        socket_in(netns.fd(), &self.cgroup(group), kind).unwrap_or_else(|e| panic!("open a socket as {group:?}: {e}"))
    }

    /// Many TCP sockets over IPv4.
    pub fn many_tcp(&self, netns: &Netns, group: Group, count: usize) -> Vec<OwnedFd> {
        let kind = (libc::AF_INET, libc::SOCK_STREAM, 0);
        let opened = sockets_in(netns.fd(), &self.cgroup(group), kind, count);
        opened.unwrap_or_else(|e| panic!("open {count} sockets as {group:?}: {e}"))
    }
}

impl Default for Bed {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // Each step for itself: what a failed test left must go, too.
        if let Err(error) = self.cleanup() {
            eprintln!("clean up {}: {}", self.name, chain(&error));
        }
        if let Err(error) = umount2(&self.bpffs(), MntFlags::MNT_DETACH) {
            eprintln!("unmount {}: {error}", self.bpffs().display());
        }
        let cgroups =
            ["pods/app", "pods/neighbour", "pods", "proxy", "outside", ""].map(|group| self.cgroups.join(group));
        for dir in cgroups.iter().chain([&self.run.join("bpf"), &self.run]) {
            if let Err(error) = fs::remove_dir(dir) {
                eprintln!("remove {}: {error}", dir.display());
            }
        }
    }
}

/// A namespace without a name that no process is in: it lives as long as its descriptor.
pub fn nameless_netns() -> OwnedFd {
    let made = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
        fs::File::open("/proc/thread-self/ns/net")
    });
    made.join().expect("join").expect("a new namespace").into()
}

/// How often a hook had an outcome.
pub fn count(capture: &Capture, hook: Hook, reason: Reason) -> u64 {
    let counters = capture.counters().expect("read the counters");
    counters.iter().find(|c| c.hook == hook && c.reason == reason).map_or(0, |c| c.count)
}

/// Everything that was counted, for the message of a failing test.
pub fn counts(capture: &Capture) -> String {
    let rows = capture.counters().expect("read the counters");
    rows.iter().map(|c| format!("{}/{}={}", c.hook.name(), c.reason.name(), c.count)).collect::<Vec<_>>().join(" ")
}

/// Waits until `condition` holds; panics with `what` if it does not.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// An IP address of the other end, of the family asked for.
pub fn peer_ip(v6: bool) -> IpAddr {
    if v6 { PEER_V6.into() } else { PEER_V4.into() }
}

/// An IP address of the workload, of the family asked for.
pub fn pod_ip(v6: bool) -> IpAddr {
    if v6 { POD_V6.into() } else { POD_V4.into() }
}

fn cgroup2_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("read /proc/self/mounts");
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    PathBuf::from(line.and_then(|line| line.split(' ').nth(1)).expect("cgroup v2 is not mounted"))
}

/// Opens a socket as a process of a cgroup and a namespace would: a child joins both, opens it, and hands it over.
pub fn socket_in(netns: BorrowedFd<'_>, cgroup: &Path, kind: (i32, i32, i32)) -> io::Result<OwnedFd> {
    sockets_in(netns, cgroup, kind, 1)?.pop().ok_or_else(|| io::Error::other("no socket"))
}

/// As [`socket_in`], for many at once.
pub fn sockets_in(
    netns: BorrowedFd<'_>,
    cgroup: &Path,
    kind: (i32, i32, i32),
    count: usize,
) -> io::Result<Vec<OwnedFd>> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    let procs = std::ffi::CString::new(cgroup.join("cgroup.procs").as_os_str().as_bytes())?;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: the child makes only system calls on values prepared before, which is allowed after a fork of a process
    // with threads, and ends by `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above.
        unsafe {
            let mut done = enter(&procs, netns.as_raw_fd());
            for _ in 0..count {
                if done == 0 {
                    done = open_and_send(kind, theirs.as_raw_fd());
                }
            }
            libc::_exit(done);
        }
    }
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    drop(theirs);
    // The child ends early if it fails, and then its end of the pair is closed.
    let sockets: io::Result<Vec<OwnedFd>> = (0..count).map(|_| receive_fd(ours.as_fd())).collect();
    let mut status = 0;
    // SAFETY: the child is ours and not reaped yet.
    if unsafe { libc::waitpid(child, &raw mut status, 0) } != child {
        return Err(io::Error::last_os_error());
    }
    match libc::WEXITSTATUS(status) {
        0 => sockets,
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// The child's part: 0, or the error number.
///
/// # Safety
/// Only system calls: no allocation, no lock.
unsafe fn enter(procs: &std::ffi::CStr, netns: i32) -> i32 {
    // SAFETY: the pointers are to values that live through the calls.
    unsafe {
        let file = libc::open(procs.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if file < 0 || libc::write(file, c"0".as_ptr().cast(), 1) != 1 || libc::setns(netns, libc::CLONE_NEWNET) != 0 {
            return *libc::__errno_location();
        }
    }
    0
}

/// As [`enter`].
///
/// # Safety
/// Only system calls: no allocation, no lock.
unsafe fn open_and_send(kind: (i32, i32, i32), to: i32) -> i32 {
    // SAFETY: the pointers are to values that live through the calls.
    unsafe {
        let socket = libc::socket(kind.0, kind.1 | libc::SOCK_CLOEXEC, kind.2);
        if socket < 0 {
            return *libc::__errno_location();
        }
        let mut byte = 0_u8;
        let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let mut control = [0_u64; 4];
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(socket);
        let sent = libc::sendmsg(to, &raw const message, 0);
        let errno = if sent == 1 { 0 } else { *libc::__errno_location() };
        libc::close(socket);
        errno
    }
}

fn receive_fd(from: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut byte = [0_u8; 1];
    let mut parts = [io::IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(i32);
    let message = recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel has just installed this descriptor for us alone.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    Err(io::Error::other("the child sent no socket"))
}

/// Reads what a peer sends until a newline, at most for [`PATIENCE`].
pub fn read_line(stream: &mut std::net::TcpStream) -> io::Result<String> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = Vec::new();
    let mut byte = [0_u8; 1];
    loop {
        if stream.read(&mut byte)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed before a line came"));
        }
        if byte[0] == b'\n' {
            return Ok(String::from_utf8_lossy(&line).into_owned());
        }
        line.push(byte[0]);
    }
}

/// Runs `work` on a thread without `CAP_NET_RAW`, as most applications are.
pub fn without_net_raw<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
    const CAP_NET_RAW: u32 = 13;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let mut header = Header { version: CAPABILITY_VERSION_3, pid: 0 };
            // Effective, permitted and inheritable, low words first.
            let mut sets = [0_u32; 6];
            // SAFETY: the buffers are what version 3 of these calls expects; capabilities are the thread's own.
            unsafe {
                assert_eq!(libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()), 0, "capget");
                sets[0] &= !(1 << CAP_NET_RAW);
                assert_eq!(libc::syscall(libc::SYS_capset, &raw mut header, sets.as_mut_ptr()), 0, "capset");
            }
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Whether the kernel still has a program with this id.
pub fn program_exists(id: u32) -> bool {
    const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
    let attr = [id, 0, 0];
    // SAFETY: the attribute has the size given.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_GET_FD_BY_ID, attr.as_ptr(), size_of_val(&attr)) };
    let Some(fd) = i32::try_from(fd).ok().filter(|fd| *fd >= 0) else { return false };
    // SAFETY: the kernel has just returned this descriptor to us alone.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    true
}
