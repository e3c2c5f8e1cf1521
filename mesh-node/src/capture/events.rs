//! Drops and refusals as they happen.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use aya::maps::{Map, MapData, RingBuf};
use mesh_ebpf_common::abi::Event;
use mesh_ebpf_common::maps;
use mesh_ebpf_common::outcome::{Hook, Reason};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Capture;
use super::error::{CaptureError, context};

/// One drop or refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptureEvent {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub at_ns: u64,
    /// Cookie of the network namespace, where the hook knew it.
    pub cookie: Option<u64>,
    /// Sender. At `connect` its port is not chosen yet and 0.
    pub src: SocketAddr,
    /// Receiver, as the sender meant it.
    pub dst: SocketAddr,
    /// Where; `None` for a hook of a newer version.
    pub hook: Option<Hook>,
    /// Why.
    pub reason: Reason,
    /// Flags of the TCP segment; 0 at `connect`.
    pub tcp_flags: u8,
}

impl From<Event> for CaptureEvent {
    fn from(event: Event) -> Self {
        Self {
            at_ns: event.at_ns,
            cookie: (event.netns_cookie != 0).then_some(event.netns_cookie),
            src: SocketAddr::new(IpAddr::from(event.src), u16::from_be(event.src_port)),
            dst: SocketAddr::new(IpAddr::from(event.dst), u16::from_be(event.dst_port)),
            hook: Hook::from_number(event.hook),
            reason: Reason::from_number(event.reason),
            tcp_flags: event.tcp_flags,
        }
    }
}

/// Reader of the event ring. One reader at a time: each event is read once. Its descriptor polls readable when there
/// are events.
pub struct Events {
    ring: RingBuf<MapData>,
}

impl Events {
    /// The next event, if there is one.
    pub fn poll(&mut self) -> Option<CaptureEvent> {
        loop {
            let item = self.ring.next()?;
            if item.len() >= size_of::<Event>() {
                // SAFETY: the record is as long as an `Event`, for which every bit pattern is valid.
                let event = unsafe { std::ptr::read_unaligned(item.as_ptr().cast::<Event>()) };
                return Some(event.into());
            }
        }
    }
}

impl Events {
    /// For waiting on a runtime.
    pub fn into_async(self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: `as_raw_fd` is the ring's descriptor, which `self` owns: the same one, open, as long as `self` lives.
        let registered = unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) };
        Ok(registered?)
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor lives as long as the ring, which `self` owns.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Capture {
    /// Opens the event ring.
    pub fn events(&self) -> Result<Events, CaptureError> {
        let path = self.pins.map(maps::EVENTS);
        let ring = MapData::from_pin(&path)
            .and_then(|map| RingBuf::try_from(Map::RingBuf(map)))
            .map_err(std::io::Error::other);
        Ok(Events { ring: context(ring, || format!("open {}", path.display()))? })
    }
}
