//! Notes of original destinations: `sock_ops` makes them, the proxy takes them when it accepts the connection.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use mesh_ebpf_common::abi::{Addr, OriginalDst, PeerKey};
use mesh_ebpf_common::maps;

use super::error::{CaptureError, context};
use super::sock_diag::TcpSocket;
use super::{Capture, sys};

impl Capture {
    /// Where the connection that the proxy accepted from `peer` wanted to go; each note can be taken once.
    ///
    /// `None` means refuse: the map was full, or the peer did not come by capture.
    pub fn original_dst(&self, cookie: u64, peer: SocketAddr) -> Result<Option<SocketAddr>, CaptureError> {
        let key =
            PeerKey { addr: Addr::from(peer.ip()), netns_cookie: cookie, port: peer.port().to_be(), reserved: [0; 3] };
        let taken: Option<OriginalDst> =
            context(sys::take(self.maps.captured.as_fd(), &key), || format!("look up the destination of {peer}"))?;
        if let Some(note) = &taken {
            self.count_off(note);
        }
        Ok(taken.map(|original| SocketAddr::new(IpAddr::from(original.dst), u16::from_be(original.port))))
    }

    fn count_off(&self, removed: &OriginalDst) {
        if let Some(count) = self.maps.note_counts.get(removed.slot) {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Begins a workload's count anew: a proxy that was killed may have taken a note and not counted it off. Notes that
    /// come and go meanwhile make it wrong by as many, until the next time.
    pub(super) fn count_anew(&self, slot: u32, notes: usize) {
        if let Some(count) = self.maps.note_counts.get(slot) {
            count.store(i64::try_from(notes).unwrap_or(i64::MAX), Ordering::Relaxed);
        }
    }

    /// Original destinations that wait for the proxy: how it sees the peer, and the cookie of the peer's socket.
    pub(super) fn notes(&self, cookie: u64) -> Result<Vec<(PeerKey, u64)>, CaptureError> {
        let map = self.maps.captured.as_fd();
        let read = || -> io::Result<_> {
            let mut notes = Vec::new();
            for key in sys::keys::<PeerKey>(map, maps::MAX_CAPTURED)?.into_iter().filter(|k| k.netns_cookie == cookie) {
                notes.extend(sys::lookup::<_, OriginalDst>(map, &key)?.map(|note| (key, note.socket_cookie)));
            }
            Ok(notes)
        };
        context(read(), || format!("read notes of the workload with cookie {cookie}"))
    }

    /// Removes notes that nobody will take: the client had closed its connection, which then went with a listener. All
    /// of `notes` were there before `sockets` were listed.
    pub(super) fn forget_orphans(&self, notes: &[(PeerKey, u64)], sockets: &[TcpSocket]) -> Result<(), CaptureError> {
        let ends: BTreeSet<(Addr, u16)> = sockets
            .iter()
            .flat_map(|socket| [socket.local, socket.remote])
            .map(|end| (Addr::from(end.ip()), end.port().to_be()))
            .collect();
        let map = self.maps.captured.as_fd();
        for (key, socket_cookie) in notes.iter().filter(|(key, _)| !ends.contains(&(key.addr, key.port))) {
            let remove = || -> io::Result<()> {
                let now: Option<OriginalDst> = sys::lookup(map, key)?;
                if let Some(note) = now.filter(|note| note.socket_cookie == *socket_cookie)
                    && sys::remove(map, key)?
                {
                    self.count_off(&note);
                }
                Ok(())
            };
            context(remove(), || "remove a note that nobody takes".to_owned())?;
        }
        Ok(())
    }

    /// Removes the notes of a workload that is no longer enrolled.
    pub(super) fn forget_notes(&self, cookie: u64) -> Result<(), CaptureError> {
        let what = || format!("forget notes of the workload with cookie {cookie}");
        for key in context(sys::keys::<PeerKey>(self.maps.captured.as_fd(), maps::MAX_CAPTURED), what)? {
            if key.netns_cookie == cookie {
                context(sys::remove(self.maps.captured.as_fd(), &key), what)?;
            }
        }
        Ok(())
    }
}
