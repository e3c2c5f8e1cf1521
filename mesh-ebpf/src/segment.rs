//! Reads the headers of a TCP segment.

use core::ffi::c_void;
use core::mem::MaybeUninit;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::generated::{bpf_skb_load_bytes_relative, bpf_skc_lookup_tcp};
use aya_ebpf::programs::TcContext;
use mesh_ebpf_common::abi::{Addr, FlowKey};
use mesh_ebpf_common::maps::MAX_EXTENSION_HEADERS;
use mesh_ebpf_common::outcome::Reason;

pub(crate) const ETH_P_IP: u16 = 0x0800;
pub(crate) const ETH_P_IPV6: u16 = 0x86dd;
pub(crate) const ETH_P_8021Q: u16 = 0x8100;
pub(crate) const ETH_P_8021AD: u16 = 0x88a8;
const IPPROTO_HOPOPTS: u8 = 0;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_ROUTING: u8 = 43;
const IPPROTO_FRAGMENT: u8 = 44;
const IPPROTO_AH: u8 = 51;
const IPPROTO_DSTOPTS: u8 = 60;
const TCP_HEADER_BYTES: u32 = 20;
const IPV6_HEADER_BYTES: u32 = 40;
const BPF_F_CURRENT_NETNS: u64 = u64::MAX;

/// From where offsets are counted.
#[derive(Clone, Copy)]
pub(crate) enum Start {
    /// The link layer header, or the network header where there is none.
    Link = 0,
    /// The network header.
    Network = 1,
}

/// What is needed of a segment.
#[derive(Clone, Copy)]
pub(crate) struct Segment {
    pub(crate) src: Addr,
    pub(crate) dst: Addr,
    /// Network byte order.
    pub(crate) src_port: u16,
    /// Network byte order.
    pub(crate) dst_port: u16,
    pub(crate) flags: u8,
    pub(crate) payload: bool,
    pub(crate) v6: bool,
}

impl Segment {
    /// Its connection, when it goes into the workload.
    #[inline(always)]
    pub(crate) fn inward(&self) -> FlowKey {
        FlowKey {
            local: self.dst,
            remote: self.src,
            local_port: self.dst_port,
            remote_port: self.src_port,
            reserved: 0,
        }
    }

    /// Its connection, when it comes out of the workload.
    #[inline(always)]
    pub(crate) fn outward(&self) -> FlowKey {
        FlowKey {
            local: self.src,
            remote: self.dst,
            local_port: self.src_port,
            remote_port: self.dst_port,
            reserved: 0,
        }
    }
}

/// Between whom a packet goes.
#[derive(Clone, Copy, Default)]
pub(crate) struct Ends {
    pub(crate) src: Addr,
    pub(crate) dst: Addr,
}

/// What a packet is.
pub(crate) enum Parsed {
    /// TCP, whole.
    Tcp(Segment),
    /// Not TCP.
    Other,
    /// TCP, or perhaps TCP, that cannot be judged; unspecified addresses where they could not be read.
    Bad(Reason, Ends),
}

/// Reads `T` at `offset`. `T` is plain bytes or integers.
#[inline(always)]
pub(crate) fn load<T: Copy>(ctx: &TcContext, start: Start, offset: u32) -> Option<T> {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: the buffer has the length given; the helper fills it whole or fails.
    unsafe {
        let done = bpf_skb_load_bytes_relative(
            ctx.as_ptr().cast_const(),
            offset,
            value.as_mut_ptr().cast(),
            size_of::<T>() as u32,
            start as u32,
        );
        (done == 0).then(|| value.assume_init())
    }
}

const ETHERTYPE_OFFSET: u32 = 12;
const ETHERNET_BYTES: u32 = 14;
const VLAN_TAG_BYTES: u32 = 4;

/// Where a frame's packet begins, and its protocol: the frame itself says what it is, because a packet socket can claim any
/// protocol for one that it built.
#[inline(always)]
pub(crate) fn packet_in_frame(ctx: &TcContext) -> Option<(u32, u16)> {
    let ethertype = load::<u16>(ctx, Start::Link, ETHERTYPE_OFFSET).map(u16::from_be)?;
    if ethertype != ETH_P_8021Q && ethertype != ETH_P_8021AD {
        return Some((ETHERNET_BYTES, ethertype));
    }
    match load::<u16>(ctx, Start::Link, ETHERTYPE_OFFSET + VLAN_TAG_BYTES).map(u16::from_be) {
        // Two tags and more are nobody's network here.
        None | Some(ETH_P_8021Q | ETH_P_8021AD) => None,
        Some(inner) => Some((ETHERNET_BYTES + VLAN_TAG_BYTES, inner)),
    }
}

/// Reads the packet whose network header is at `offset`.
#[inline(always)]
pub(crate) fn parse(ctx: &TcContext, start: Start, offset: u32, protocol: u16) -> Parsed {
    match protocol {
        ETH_P_IP => parse_v4(ctx, start, offset),
        ETH_P_IPV6 => parse_v6(ctx, start, offset),
        // ARP and whatever else cannot carry TCP to a socket.
        _ => Parsed::Other,
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Ipv4 {
    version_ihl: u8,
    tos: u8,
    total: u16,
    id: u16,
    fragment: u16,
    ttl: u8,
    protocol: u8,
    checksum: u16,
    src: u32,
    dst: u32,
}

#[inline(always)]
fn parse_v4(ctx: &TcContext, start: Start, offset: u32) -> Parsed {
    let Some(ip) = load::<Ipv4>(ctx, start, offset) else { return Parsed::Bad(Reason::Malformed, Ends::default()) };
    if ip.protocol != IPPROTO_TCP {
        return Parsed::Other;
    }
    let ends = Ends { src: Addr::v4(ip.src), dst: Addr::v4(ip.dst) };
    // More fragments, or not the first: reassembly forgets the socket that was assigned to a fragment.
    if u16::from_be(ip.fragment) & 0x3fff != 0 {
        return Parsed::Bad(Reason::Fragment, ends);
    }
    let header = u32::from(ip.version_ihl & 0x0f) * 4;
    parse_tcp(ctx, start, offset + header, ends, u32::from(u16::from_be(ip.total)).wrapping_sub(header))
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Ipv6 {
    version_class_flow: u32,
    payload: u16,
    next: u8,
    hops: u8,
    src: Addr,
    dst: Addr,
}

#[inline(always)]
fn parse_v6(ctx: &TcContext, start: Start, offset: u32) -> Parsed {
    let Some(ip) = load::<Ipv6>(ctx, start, offset) else { return Parsed::Bad(Reason::Malformed, Ends::default()) };
    let ends = Ends { src: ip.src, dst: ip.dst };
    let mut next = ip.next;
    let mut skipped = 0_u32;
    for _ in 0..MAX_EXTENSION_HEADERS {
        let at = offset + IPV6_HEADER_BYTES + skipped;
        match next {
            IPPROTO_TCP => {
                let rest = u32::from(u16::from_be(ip.payload)).wrapping_sub(skipped);
                return parse_tcp(ctx, start, at, ends, rest);
            }
            IPPROTO_HOPOPTS | IPPROTO_ROUTING | IPPROTO_DSTOPTS | IPPROTO_AH => {
                let Some([following, length]) = load::<[u8; 2]>(ctx, start, at) else {
                    return Parsed::Bad(Reason::Malformed, ends);
                };
                // RFC 8200 counts eight bytes beyond the first eight, RFC 4302 four bytes beyond the first eight.
                let unit = if next == IPPROTO_AH { 4 } else { 8 };
                skipped += 8 + u32::from(length) * unit;
                next = following;
            }
            IPPROTO_FRAGMENT => {
                let Some([following, _, high, low]) = load::<[u8; 4]>(ctx, start, at) else {
                    return Parsed::Bad(Reason::Malformed, ends);
                };
                let later = u16::from_be_bytes([high, low]) & 0xfff8 != 0;
                // Without its first fragment, which is judged, a later one comes to nothing.
                if later && following != IPPROTO_TCP {
                    return Parsed::Other;
                }
                if following == IPPROTO_TCP || chain_may_hold_tcp(following) {
                    return Parsed::Bad(Reason::Fragment, ends);
                }
                return Parsed::Other;
            }
            // Any other header ends the chain: UDP, ICMPv6, ESP, nothing.
            _ => return Parsed::Other,
        }
    }
    Parsed::Bad(Reason::HeaderChain, ends)
}

#[inline(always)]
fn chain_may_hold_tcp(next: u8) -> bool {
    matches!(next, IPPROTO_HOPOPTS | IPPROTO_ROUTING | IPPROTO_DSTOPTS | IPPROTO_AH | IPPROTO_FRAGMENT)
}

#[inline(always)]
fn parse_tcp(ctx: &TcContext, start: Start, offset: u32, ends: Ends, rest: u32) -> Parsed {
    // Ports, sequence and acknowledgement numbers, data offset and flags: 14 of the header's 20 bytes.
    let Some(bytes) = load::<[u16; 7]>(ctx, start, offset) else { return Parsed::Bad(Reason::Malformed, ends) };
    let [data_offset, flags] = bytes[6].to_ne_bytes();
    let header = u32::from(data_offset >> 4) * 4;
    if header < TCP_HEADER_BYTES {
        return Parsed::Bad(Reason::Malformed, ends);
    }
    Parsed::Tcp(Segment {
        src: ends.src,
        dst: ends.dst,
        src_port: bytes[0],
        dst_port: bytes[1],
        flags,
        // A length of zero (segmentation offload beyond 64 KiB) wraps around and counts as payload.
        payload: rest != header,
        v6: !ends.src.is_v4(),
    })
}

/// The kernel's look-up in the namespace of the packet's device; null, or a socket that must be released.
#[inline(always)]
pub(crate) fn find_socket(ctx: &TcContext, segment: &Segment, src_port: u16, dst_port: u16) -> *mut bpf_sock {
    let ports = u32::from_ne_bytes({
        let [a, b] = src_port.to_ne_bytes();
        let [c, d] = dst_port.to_ne_bytes();
        [a, b, c, d]
    });
    let (src, dst) = (segment.src.words, segment.dst.words);
    // SAFETY: the tuples have the lengths given, in the layout of `struct bpf_sock_tuple`.
    unsafe {
        if segment.v6 {
            let mut tuple: [u32; 9] = [src[0], src[1], src[2], src[3], dst[0], dst[1], dst[2], dst[3], ports];
            let tuple = tuple.as_mut_ptr().cast();
            bpf_skc_lookup_tcp(ctx.as_ptr().cast::<c_void>(), tuple, 36, BPF_F_CURRENT_NETNS, 0)
        } else {
            let mut tuple: [u32; 3] = [src[3], dst[3], ports];
            let tuple = tuple.as_mut_ptr().cast();
            bpf_skc_lookup_tcp(ctx.as_ptr().cast::<c_void>(), tuple, 12, BPF_F_CURRENT_NETNS, 0)
        }
    }
}
