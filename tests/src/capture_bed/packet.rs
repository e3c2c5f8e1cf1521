//! Hand-made TCP segments.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};

use super::{Bed, Group, Netns};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const IP_HEADER_BYTES: usize = 20;
const TCP_HEADER_BYTES: usize = 20;
/// "More fragments" in IPv4's flags.
const MORE_FRAGMENTS: u16 = 0x2000;

/// A TCP segment over IPv4.
#[derive(Clone, Debug)]
pub struct Segment {
    src: SocketAddr,
    dst: SocketAddr,
    flags: u8,
    payload: Vec<u8>,
    fragment: u16,
}

impl Segment {
    /// Without data.
    pub fn new(src: SocketAddr, dst: SocketAddr, flags: u8) -> Self {
        Self { src, dst, flags, payload: Vec::new(), fragment: 0 }
    }

    /// With data.
    #[must_use]
    pub fn with_payload(self, payload: &[u8]) -> Self {
        Self { payload: payload.to_vec(), ..self }
    }

    /// The first of several fragments.
    #[must_use]
    pub fn more_fragments(self) -> Self {
        Self { fragment: MORE_FRAGMENTS, ..self }
    }

    /// From the IP header on.
    pub fn bytes(&self) -> Vec<u8> {
        let (src, dst) = (v4(self.src), v4(self.dst));
        let total = u16::try_from(IP_HEADER_BYTES + TCP_HEADER_BYTES + self.payload.len()).expect("a small segment");
        let mut ip = vec![0x45, 0];
        ip.extend(total.to_be_bytes());
        ip.extend([0, 1]);
        ip.extend(self.fragment.to_be_bytes());
        ip.extend([64, 6, 0, 0]);
        ip.extend(src.octets());
        ip.extend(dst.octets());
        let sum = checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let mut tcp = Vec::new();
        tcp.extend(self.src.port().to_be_bytes());
        tcp.extend(self.dst.port().to_be_bytes());
        // Numbers that match no connection.
        tcp.extend(0x1234_5678_u32.to_be_bytes());
        tcp.extend(0x2345_6789_u32.to_be_bytes());
        tcp.extend([0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(&self.payload);
        let mut pseudo = [src.octets(), dst.octets()].concat();
        pseudo.extend([0, 6]);
        pseudo.extend(u16::try_from(tcp.len()).expect("a small segment").to_be_bytes());
        pseudo.extend(&tcp);
        let sum = checksum(&pseudo);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        ip.extend(tcp);
        ip
    }
}

fn v4(addr: SocketAddr) -> Ipv4Addr {
    match addr.ip() {
        IpAddr::V4(v4) => v4,
        IpAddr::V6(v6) => panic!("{v6}: hand-made segments are IPv4"),
    }
}

/// RFC 1071
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or_default()])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded to 16 bits")
}

/// A raw socket that sends whole IPv4 packets.
pub struct Raw {
    fd: OwnedFd,
}

impl Raw {
    /// In a namespace.
    pub fn open(bed: &Bed, netns: &Netns, group: Group) -> Self {
        Self { fd: bed.socket(netns, group, (libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW)) }
    }

    /// Sends a segment by the namespace's routes.
    pub fn send(&self, segment: &Segment) {
        let bytes = segment.bytes();
        let to = super::tcp::sockaddr(SocketAddr::new(segment.dst.ip(), 0));
        let sent = nix::sys::socket::sendto(self.fd.as_raw_fd(), &bytes, &to, nix::sys::socket::MsgFlags::empty());
        assert_eq!(sent, Ok(bytes.len()), "send {segment:?}");
    }
}

/// A SYN over IPv6, behind these extension headers: kind of each, and its bytes but the first, which names what follows.
pub fn syn_behind(src: SocketAddrV6, dst: SocketAddrV6, headers: &[(u8, &[u8])]) -> Vec<u8> {
    const IPPROTO_TCP: u8 = 6;
    const SYN: u8 = 0x02;
    let kinds = headers.iter().map(|(kind, _)| *kind).chain([IPPROTO_TCP]);
    let mut kinds = kinds.collect::<Vec<_>>().into_iter();
    let first = kinds.next().unwrap_or(IPPROTO_TCP);
    let mut rest = Vec::new();
    for ((_, bytes), following) in headers.iter().zip(kinds) {
        rest.push(following);
        rest.extend(*bytes);
    }
    rest.extend(src.port().to_be_bytes());
    rest.extend(dst.port().to_be_bytes());
    // Without a sum: who receives it would drop it, but must not be asked.
    rest.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, SYN, 0xff, 0xff, 0, 0, 0, 0]);
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(rest.len()).expect("a small packet").to_be_bytes());
    packet.extend([first, 64]);
    packet.extend(src.ip().octets());
    packet.extend(dst.ip().octets());
    packet.extend(rest);
    packet
}

/// An Ethernet frame with an IP packet in it.
pub fn frame(receiver: [u8; 6], tags: &[u16], packet: &[u8]) -> Vec<u8> {
    let mut frame = receiver.to_vec();
    frame.extend([2, 0, 0, 0, 0, 1]);
    for tag in tags {
        frame.extend(0x8100_u16.to_be_bytes());
        frame.extend(tag.to_be_bytes());
    }
    let ethertype = if packet.first().is_some_and(|first| first >> 4 == 6) { ETH_P_IPV6 } else { ETH_P_IP };
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    frame
}

/// A packet socket on an interface, which sends whole Ethernet frames.
pub struct Packet {
    fd: OwnedFd,
    index: i32,
}

impl Packet {
    /// On `eth0` of a namespace.
    pub fn open(bed: &Bed, netns: &Netns, group: Group) -> Self {
        let fd = bed.socket(netns, group, (libc::AF_PACKET, libc::SOCK_RAW, 0));
        let index = i32::try_from(netns.index("eth0")).expect("small");
        Self { fd, index }
    }

    /// Sends a frame with this EtherType in its header (and VLAN tag, if any) but `claimed` as the socket's protocol.
    pub fn send(&self, vlan: Option<u16>, claimed: u16, payload: &[u8]) -> io::Result<()> {
        self.send_frame(claimed, &frame([0xff; 6], vlan.as_slice(), payload))
    }

    /// From now on frames go to the driver at once: past queues and tc egress.
    pub fn bypass_queues(&self) {
        const PACKET_QDISC_BYPASS: i32 = 20;
        let on = 1_i32;
        // SAFETY: pointer and length are of one live value.
        let set = unsafe {
            let value = (&raw const on).cast();
            libc::setsockopt(self.fd.as_raw_fd(), libc::SOL_PACKET, PACKET_QDISC_BYPASS, value, 4)
        };
        assert_eq!(set, 0, "PACKET_QDISC_BYPASS");
    }

    /// Sends an IP packet to one receiver, inside these VLAN tags.
    pub fn send_to(&self, receiver: [u8; 6], tags: &[u16], packet: &[u8]) -> io::Result<()> {
        self.send_frame(ETH_P_IP, &frame(receiver, tags, packet))
    }

    fn send_frame(&self, claimed: u16, frame: &[u8]) -> io::Result<()> {
        // SAFETY: all zero is a valid address.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = u16::try_from(libc::AF_PACKET).expect("small");
        to.sll_protocol = claimed.to_be();
        to.sll_ifindex = self.index;
        let length = libc::socklen_t::try_from(size_of_val(&to)).expect("small");
        // SAFETY: pointers and lengths are of live buffers.
        let sent = unsafe {
            libc::sendto(self.fd.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, (&raw const to).cast(), length)
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
