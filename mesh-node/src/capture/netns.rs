//! Work inside a workload's network namespace: always on a thread of its own, because the namespace is the thread's.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread;

use futures_util::TryStreamExt;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use rtnetlink::packet_route::link::{LinkLayerType, LinkMessage};

use super::netlink::{errno_of, name_of, with_netlink};
use super::sys;

/// Runs `work` in the network namespace and waits for it. Blocks: not for a runtime's thread.
pub fn in_netns<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, move || {
                setns(netns, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            })?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The number that identifies a network namespace until the next boot (`SO_NETNS_COOKIE`, Linux 5.14).
pub fn netns_cookie(netns: BorrowedFd<'_>) -> io::Result<u64> {
    in_netns(netns, || {
        let probe = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        sys::socket_option(probe.as_fd(), libc::SO_NETNS_COOKIE)
    })?
}

/// The link layer of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// Frames begin with an Ethernet header.
    Ethernet,
    /// Packets begin with the IP header.
    None,
}

/// An interface of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its index in its namespace.
    pub index: u32,
    /// Its name there.
    pub name: String,
    /// What its frames begin with.
    pub link_layer: LinkLayer,
}

/// All interfaces of the calling thread's namespace but loopback. One request tells index, name and kind together: whoever
/// renames interfaces meanwhile cannot have one taken for another.
pub(super) fn interfaces() -> io::Result<Vec<Interface>> {
    with_netlink(|handle| async move {
        let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await.map_err(errno_of)?;
        Ok(links.iter().filter_map(outside).collect())
    })
}

/// `None` for loopback.
fn outside(link: &LinkMessage) -> Option<Interface> {
    let link_layer = match link.header.link_layer_type {
        LinkLayerType::Loopback => return None,
        LinkLayerType::Ether => LinkLayer::Ethernet,
        // Tunnels and raw IP devices; what is not IP on them, the program drops.
        _ => LinkLayer::None,
    };
    Some(Interface { index: link.header.index, name: name_of(link).unwrap_or_default(), link_layer })
}

fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::other(format!("interface name {name} is too long")));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

/// Whether an interface of the calling thread's namespace merges what it receives (GRO; XDP brings it along).
pub(super) fn merges_received(interface: &str) -> io::Result<bool> {
    const ETHTOOL_GGRO: u32 = 0x2b;
    /// `struct ethtool_value`
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    let probe = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut request = interface_request(interface)?;
    let mut value = Value { command: ETHTOOL_GGRO, data: 0 };
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request is an `ifreq` that points to what this command fills.
    if unsafe { libc::ioctl(probe.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value.data != 0)
}

/// Finds a namespace by its cookie among those that processes are in and that are mounted at `/run/netns`.
pub(super) fn find_netns(cookie: u64) -> Option<OwnedFd> {
    let processes = std::fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path().join("ns/net"));
    let mounted = std::fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|entry| entry.path());
    let mut seen = std::collections::BTreeSet::new();
    for path in processes.chain(mounted) {
        // Processes end while we look; the next path may still lead there.
        let Ok(file) = File::open(&path) else { continue };
        let Ok(status) = nix::sys::stat::fstat(&file) else { continue };
        if seen.insert(status.st_ino) && netns_cookie(file.as_fd()).is_ok_and(|found| found == cookie) {
            return Some(file.into());
        }
    }
    None
}
