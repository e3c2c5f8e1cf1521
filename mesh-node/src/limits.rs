//! Bounds on what peers and workloads can make this process hold.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::hbone::CONNECTION_WINDOW;

/// Connections of one workload, all directions. At 20,000 the proxy holds some 100 MiB for it.
pub const MAX_CONNECTIONS_PER_WORKLOAD: usize = 20_000;
/// Tunnels from one address. A node proxy opens one for each 100 connections and pair of workloads, in each of its
/// workers, of which a big machine has a hundred.
pub const MAX_TUNNELS_PER_SOURCE: usize = 4096;
/// Bytes that tunnels from one address may have sent and no application read, all tunnels together; each of them may
/// have [`LEAST_WINDOW`] in any case.
pub const MAX_UNREAD_PER_SOURCE: u32 = 384 * 1024 * 1024;
/// Window of a tunnel when nothing is left of that, bytes: what HTTP/2 connections begin with, and can only be made more
/// (RFC 9113 6.9.2).
pub const LEAST_WINDOW: u32 = 65_535;
/// One part in so many of what is left is for one tunnel: dozens have windows that long fast ways need, and the last of
/// hundreds has some.
const WINDOW_SHARE: u32 = 8;

/// The tunnels of each peer, in all workers, and the windows that they were given.
#[derive(Debug, Default)]
pub struct TunnelsPerSource {
    taken: Mutex<HashMap<IpAddr, Taken>>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Taken {
    tunnels: usize,
    windows: u64,
}

/// A tunnel's place among those of its peer, given back when dropped.
#[derive(Debug)]
pub struct TunnelPlace {
    all: Arc<TunnelsPerSource>,
    source: IpAddr,
    /// Bytes that the peer may send before an application reads: the tunnel's flow-control window.
    pub window: u32,
}

impl TunnelsPerSource {
    /// Takes a place for a tunnel from `source`, if it has not too many.
    pub fn take(self: &Arc<Self>, source: IpAddr) -> Option<TunnelPlace> {
        let mut all = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = all.get(&source).copied().unwrap_or_default();
        if taken.tunnels >= MAX_TUNNELS_PER_SOURCE {
            return None;
        }
        let window = next_window(taken.windows);
        let after = Taken { tunnels: taken.tunnels + 1, windows: taken.windows + u64::from(window) };
        all.insert(source, after);
        Some(TunnelPlace { all: Arc::clone(self), source, window })
    }
}

impl Drop for TunnelPlace {
    fn drop(&mut self) {
        let mut all = self.all.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(taken) = all.get_mut(&self.source) {
            taken.tunnels -= 1;
            taken.windows -= u64::from(self.window);
            if taken.tunnels == 0 {
                all.remove(&self.source);
            }
        }
    }
}

/// The window of the next tunnel from an address whose tunnels were given `windows`, bytes.
fn next_window(windows: u64) -> u32 {
    let taken = u32::try_from(windows).unwrap_or(u32::MAX);
    (MAX_UNREAD_PER_SOURCE.saturating_sub(taken) / WINDOW_SHARE).clamp(LEAST_WINDOW, CONNECTION_WINDOW)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));

    #[test]
    fn all_tunnels_of_one_address_together_have_a_bounded_window() {
        let all = Arc::new(TunnelsPerSource::default());
        let places: Vec<_> = std::iter::from_fn(|| all.take(SOURCE)).collect();
        assert_eq!(places.len(), MAX_TUNNELS_PER_SOURCE);
        let least = u64::from(LEAST_WINDOW) * MAX_TUNNELS_PER_SOURCE as u64;
        let windows: u64 = places.iter().map(|place| u64::from(place.window)).sum();
        assert!(windows <= u64::from(MAX_UNREAD_PER_SOURCE) + least, "{windows}");
        assert!(places[..16].iter().all(|place| place.window >= CONNECTION_WINDOW / 4), "a few are not made slow");
        assert!(places.iter().all(|place| place.window >= LEAST_WINDOW));
        let other = all.take(Ipv4Addr::new(10, 0, 0, 2).into()).expect("another address");
        assert_eq!(other.window, CONNECTION_WINDOW);
    }

    #[test]
    fn what_a_tunnel_had_is_there_for_the_next() {
        let all = Arc::new(TunnelsPerSource::default());
        let places: Vec<_> = (0..MAX_TUNNELS_PER_SOURCE).filter_map(|_| all.take(SOURCE)).collect();
        drop(places);
        assert_eq!(all.take(SOURCE).expect("a place").window, CONNECTION_WINDOW);
    }
}
