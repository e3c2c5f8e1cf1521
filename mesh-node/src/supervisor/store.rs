//! The descriptors that outlive a proxy, by name.
//!
//! Names: `netns/UID`, `listen/UID/KIND`, `info/UID`, `cert/SPIFFE-ID`, `roots`, `tcp/KIND`. What they mean is the
//! proxy's business; the supervisor knows only that `listen/` ones are shed when no proxy serves them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::SockType;

/// Most descriptors that are kept: nine for each of 4,096 workloads, their certificates, and room.
pub const MAX_KEPT_FDS: usize = 48 * 1024;
/// Connections that are shed from one listener in one round, so that a flood cannot hold the supervisor up.
const MAX_SHED_PER_ROUND: usize = 1024;

/// Kept descriptors.
#[derive(Debug, Default)]
pub struct FdStore {
    kept: BTreeMap<String, OwnedFd>,
}

/// The store is full.
#[derive(Debug, thiserror::Error)]
#[error("{name}: not kept, {MAX_KEPT_FDS} descriptors are kept already")]
pub struct StoreFull {
    /// What was to be kept.
    pub name: String,
}

impl FdStore {
    /// Keeps a descriptor; one of the same name goes.
    pub fn put(&mut self, name: String, fd: OwnedFd) -> Result<(), StoreFull> {
        if self.kept.len() >= MAX_KEPT_FDS && !self.kept.contains_key(&name) {
            return Err(StoreFull { name });
        }
        self.kept.insert(name, fd);
        Ok(())
    }

    /// Forgets a descriptor. One that is not kept is no error: a proxy may tidy up what its predecessor left half done.
    pub fn del(&mut self, name: &str) {
        self.kept.remove(name);
    }

    /// The descriptor of a name.
    pub fn find(&self, name: &str) -> Option<&OwnedFd> {
        self.kept.get(name)
    }

    /// All names in order.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.kept.keys()
    }

    /// Whether workloads' listeners are kept.
    pub fn has_listeners(&self) -> bool {
        self.listeners().next().is_some()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.kept.clear();
    }

    /// Accepts what waits on the listeners and resets it. Returns how many.
    pub fn shed(&self) -> usize {
        self.listeners().map(shed_listener).sum()
    }

    fn listeners(&self) -> impl Iterator<Item = &OwnedFd> {
        self.kept.iter().filter(|(name, _)| name.starts_with("listen/")).map(|(_, fd)| fd)
    }
}

fn shed_listener(listener: &OwnedFd) -> usize {
    let listener = socket2::SockRef::from(listener);
    // A descriptor that is no listening stream socket could block `accept`; it is not ours to touch.
    let is_listener = matches!(listener.is_listener(), Ok(true))
        && matches!(listener.r#type(), Ok(kind) if i32::from(kind) == SockType::Stream as i32)
        && matches!(listener.nonblocking(), Ok(true));
    if !is_listener {
        return 0;
    }
    (0..MAX_SHED_PER_ROUND).take_while(|_| reset_one(&listener).is_ok()).count()
}

fn reset_one(listener: &socket2::SockRef<'_>) -> io::Result<()> {
    let (connection, _peer) = listener.accept()?;
    // Linger 0 makes close send RST, which the client sees at once, unlike a FIN that looks like an empty answer.
    connection.set_linger(Some(Duration::ZERO))
}

/// Duplicates a descriptor of the store.
pub fn duplicate(fd: &impl AsFd) -> io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn listener() -> (OwnedFd, std::net::SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        listener.set_nonblocking(true).expect("nonblocking");
        let addr = listener.local_addr().expect("addr");
        (listener.into(), addr)
    }

    #[test]
    fn waiting_connections_are_reset_on_workload_listeners_only() {
        let mut store = FdStore::default();
        let (workload, workload_addr) = listener();
        let (metrics, metrics_addr) = listener();
        store.put("listen/a/outbound4".into(), workload).expect("put");
        store.put("tcp/metrics".into(), metrics).expect("put");
        let mut clients: Vec<_> = (0..3).map(|_| TcpStream::connect(workload_addr).expect("connect")).collect();
        let waiting = TcpStream::connect(metrics_addr).expect("connect");
        assert_eq!(store.shed(), 3);
        assert_eq!(store.shed(), 0);
        for client in &mut clients {
            let error = client.read(&mut [0]).expect_err("reset");
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
        waiting.set_nonblocking(true).expect("nonblocking");
        assert_eq!((&waiting).read(&mut [0]).expect_err("still waits").kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn what_is_not_a_listener_is_left_alone() {
        let mut store = FdStore::default();
        let (a, _b) = crate::seqpacket::pair().expect("pair");
        store.put("listen/a/outbound4".into(), a).expect("put");
        store.put("listen/a/hbone4".into(), super::super::memfd::seal("x", b"x").expect("seal")).expect("put");
        assert_eq!(store.shed(), 0);
    }

    #[test]
    fn putting_a_name_again_replaces_and_deleting_twice_is_fine() {
        let mut store = FdStore::default();
        for content in [b"one", b"two"] {
            store.put("info/a".into(), super::super::memfd::seal("x", content).expect("seal")).expect("put");
        }
        let fd = store.find("info/a").expect("kept");
        assert_eq!(super::super::memfd::unseal(fd).expect("unseal"), b"two");
        store.del("info/a");
        store.del("info/a");
        assert_eq!(store.names().count(), 0);
    }
}
