//! What goes over the links of a node: every frame, looked at for a marker and for the ports of TCP.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use mesh_node::capture::in_netns;
use nix::sys::socket::{setsockopt, sockopt};

/// What `mesh-probe stream` sends over each connection, and gets back.
pub const MARKER: &[u8; 32] = b"mesh-wire-marker-7c1e55a2-plain!";

/// Room for frames that wait to be read: several seconds of the tests' load.
const BUFFER_BYTES: usize = 256 << 20;
/// Largest frame that is read whole; segmentation offload makes them this long.
const FRAME_BYTES: usize = 70_000;
/// How often the reader looks whether it shall end.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const ETHERNET_HEADER_BYTES: usize = 14;
const TCP: u8 = 6;
/// Record type 22 and the version that TLS 1.3 still writes into it (RFC 8446 5.1).
const TLS_HANDSHAKE: [u8; 2] = [22, 3];

/// Frames of a namespace's links, from now on.
pub struct Wire {
    end: Arc<AtomicBool>,
    reader: JoinHandle<Seen>,
}

/// What was on the links.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    /// Frames.
    pub frames: u64,
    /// Frames with the marker in them.
    pub markers: u64,
    /// TCP segments that begin with a TLS handshake record.
    pub tls: u64,
    /// TCP between pods: source, destination, and the ports, the lower one first.
    pub tcp: BTreeSet<(IpAddr, IpAddr, u16, u16)>,
    /// Frames that the kernel had no room for: anything could have been in them.
    pub lost: u64,
}

impl Wire {
    /// Listens on all links of a namespace.
    ///
    /// # Panics
    /// The socket cannot be opened.
    pub fn listen(netns: &Path) -> Self {
        let file = File::open(netns).expect("namespace");
        let socket = in_netns(file.as_fd(), open).expect("enter").expect("packet socket");
        let end = Arc::new(AtomicBool::new(false));
        let watch = Arc::clone(&end);
        Self { end, reader: std::thread::spawn(move || read(&socket, &watch)) }
    }

    /// Ends it and returns what was seen. Frames that were sent before this call are in it.
    ///
    /// # Panics
    /// The reader failed.
    pub fn end(self) -> Seen {
        self.end.store(true, Ordering::Relaxed);
        self.reader.join().expect("reader")
    }
}

impl Seen {
    /// Fails if anything went in clear between pods: the marker, or TCP without port 15008.
    ///
    /// # Panics
    /// It did, or something may have been missed.
    pub fn assert_only_tunnels(&self, what: &str) {
        assert_eq!(self.lost, 0, "{what}: frames were missed");
        assert_eq!(self.markers, 0, "{what}: the marker was on the wire in clear; TCP was {:?}", self.tcp);
        let plain: Vec<_> = self.tcp.iter().filter(|(_, _, low, high)| ![*low, *high].contains(&15008)).collect();
        assert!(plain.is_empty(), "{what}: TCP without port 15008: {plain:?}");
        assert!(self.tcp.iter().any(|(_, _, low, high)| [*low, *high].contains(&15008)), "{what}: no tunnel was seen");
    }
}

fn open() -> io::Result<OwnedFd> {
    let all = i32::from(u16::try_from(libc::ETH_P_ALL).map_err(io::Error::other)?.to_be());
    // SAFETY: plain system call with integers; the result is checked before it is owned.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, all) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor to us alone.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES)?;
    let timeout = nix::sys::time::TimeVal::new(0, i64::try_from(LOOK_EVERY.as_micros()).map_err(io::Error::other)?);
    setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
    Ok(socket)
}

fn read(socket: &OwnedFd, end: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    let mut buffer = vec![0_u8; FRAME_BYTES];
    loop {
        let last_round = end.load(Ordering::Relaxed);
        // SAFETY: pointer and length are of one live buffer.
        let length = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        match usize::try_from(length) {
            Ok(length) => look(&buffer[..length], &mut seen),
            // The timeout: nothing is left of what was there when the end was announced.
            Err(_) if last_round => break,
            Err(_) => {}
        }
    }
    seen.lost = lost(socket);
    seen
}

/// `PACKET_STATISTICS`: received and dropped since the last question.
fn lost(socket: &OwnedFd) -> u64 {
    const PACKET_STATISTICS: libc::c_int = 6;
    let mut statistics = [0_u32; 2];
    let mut length = libc::socklen_t::try_from(size_of_val(&statistics)).expect("small");
    // SAFETY: the buffer has the length given and holds two integers, as `struct tpacket_stats` does.
    let result = unsafe {
        let buffer = statistics.as_mut_ptr().cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_PACKET, PACKET_STATISTICS, buffer, &raw mut length)
    };
    assert_eq!(result, 0, "packet statistics");
    u64::from(statistics[1])
}

fn look(frame: &[u8], seen: &mut Seen) {
    seen.frames += 1;
    seen.markers += u64::from(frame.windows(MARKER.len()).any(|window| window == MARKER));
    if let Some(Segment { from, to, ports: [a, b], payload }) = tcp(frame) {
        seen.tls += u64::from(payload.starts_with(&TLS_HANDSHAKE));
        if is_pod(from) && is_pod(to) {
            seen.tcp.insert((from, to, a.min(b), a.max(b)));
        }
    }
}

/// A TCP segment in an Ethernet frame.
struct Segment<'a> {
    from: IpAddr,
    to: IpAddr,
    ports: [u16; 2],
    payload: &'a [u8],
}

fn tcp(frame: &[u8]) -> Option<Segment<'_>> {
    let kind = u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]);
    let packet = frame.get(ETHERNET_HEADER_BYTES..)?;
    let (from, to, protocol, segment): (IpAddr, IpAddr, u8, &[u8]) = match kind {
        0x0800 => {
            let words = |at: usize| packet.get(at..at + 4)?.try_into().ok().map(<[u8; 4]>::into);
            let (from, to): (Ipv4Addr, Ipv4Addr) = (words(12)?, words(16)?);
            let header = usize::from(packet.first()? & 0xf) * 4;
            (from.into(), to.into(), *packet.get(9)?, packet.get(header..)?)
        }
        0x86dd => {
            let words = |at: usize| packet.get(at..at + 16)?.try_into().ok().map(<[u8; 16]>::into);
            let (from, to): (Ipv6Addr, Ipv6Addr) = (words(8)?, words(24)?);
            (from.into(), to.into(), *packet.get(6)?, packet.get(40..)?)
        }
        // ARP and the like.
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes([*segment.get(at)?, *segment.get(at + 1)?]));
    if protocol != TCP {
        return None;
    }
    let header = usize::from(segment.get(12)? >> 4) * 4;
    Some(Segment { from, to, ports: [port(0)?, port(2)?], payload: segment.get(header..)? })
}

/// Addresses of the sandbox's pods.
fn is_pod(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.octets()[..2] == [10, 244],
        IpAddr::V6(v6) => v6.segments()[..3] == [0xfd00, 0x10, 0x244],
    }
}
