//! Keys and values of the maps: `repr(C)`, no padding, network byte order, IPv4 as v4-mapped IPv6.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address as four 32-bit words in network byte order; IPv4 is `::ffff:a.b.c.d`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Addr {
    /// The words as they lie in memory, each in network byte order.
    pub words: [u32; 4],
}

/// The third word of every v4-mapped address.
pub const MAPPED: u32 = 0x0000_ffff_u32.to_be();
const V4_LOOPBACK: u32 = 0x7f00_0001_u32.to_be();

impl Addr {
    /// `::ffff:127.0.0.1`
    pub const LOCALHOST_V4: Self = Self::v4(V4_LOOPBACK);
    /// `::1`
    pub const LOCALHOST_V6: Self = Self { words: [0, 0, 0, 1_u32.to_be()] };

    /// An IPv4 address given in network byte order.
    #[inline(always)]
    pub const fn v4(network_order: u32) -> Self {
        Self { words: [0, 0, MAPPED, network_order] }
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// `127.0.0.0/8`, `::1`, and the unspecified addresses, which `connect` takes for loopback.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        let last = u32::from_be(self.words[3]);
        if self.is_v4() {
            return last >> 24 == 127 || last == 0;
        }
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == 0 && last <= 1
    }

    /// Exactly `127.0.0.1` or `::1`, the address that a rewritten connection gets as its source.
    #[inline(always)]
    pub const fn is_default_loopback(&self) -> bool {
        let [a, b, c, d] = self.words;
        a == 0 && b == 0 && ((c == MAPPED && d == V4_LOOPBACK) || (c == 0 && d == 1_u32.to_be()))
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        let octets = match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let word = |i: usize| u32::from_ne_bytes([octets[i], octets[i + 1], octets[i + 2], octets[i + 3]]);
        Self { words: [word(0), word(4), word(8), word(12)] }
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> Self {
        if addr.is_v4() {
            return IpAddr::V4(Ipv4Addr::from_bits(u32::from_be(addr.words[3])));
        }
        let high = (u64::from(u32::from_be(addr.words[0])) << 32) | u64::from(u32::from_be(addr.words[1]));
        let low = (u64::from(u32::from_be(addr.words[2])) << 32) | u64::from(u32::from_be(addr.words[3]));
        IpAddr::V6(Ipv6Addr::from_bits((u128::from(high) << 64) | u128::from(low)))
    }
}

/// Value of `workloads`, keyed by network namespace cookie: an enrolled workload.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// Its IPv4 address in network byte order; 0 when it has none.
    pub v4: u32,
    /// Its place in `note_counts`; no other workload has it.
    pub slot: u32,
    /// Its IPv6 address; all zero when it has none.
    pub v6: Addr,
    /// Counts enrolments of this namespace; [`Workload::LET_GO`] is none.
    pub generation: u64,
}

impl Workload {
    /// The workload has left the mesh: what was captured goes on, and nothing new is.
    pub const LET_GO: u64 = 0;

    /// Whether it is here for connections of before only.
    #[inline(always)]
    pub const fn is_let_go(&self) -> bool {
        self.generation == Self::LET_GO
    }

    /// Whether `addr` is one of the workload's own addresses.
    #[inline(always)]
    pub const fn owns(&self, addr: &Addr) -> bool {
        if addr.is_v4() {
            return self.v4 != 0 && self.v4 == addr.words[3];
        }
        let [a, b, c, d] = self.v6.words;
        let [e, f, g, h] = addr.words;
        (a | b | c | d) != 0 && a == e && b == f && c == g && d == h
    }
}

/// Socket storage of a captured connection, and what `getpeername` answers from.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Captured {
    /// Where the application wanted to go.
    pub dst: Addr,
    /// Cookie of the application's network namespace.
    pub netns_cookie: u64,
    /// Port of `dst`, network byte order.
    pub port: u16,
    /// Reserved, 0.
    pub reserved: u16,
    /// [`Workload::slot`]
    pub slot: u32,
}

/// Key of `captured`: how the proxy sees an accepted connection's peer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PeerKey {
    /// The peer's address: loopback, or the address that the application bound.
    pub addr: Addr,
    /// Cookie of the network namespace in which it is valid.
    pub netns_cookie: u64,
    /// The peer's port, network byte order.
    pub port: u16,
    /// Reserved, 0.
    pub reserved: [u16; 3],
}

/// Value of `captured`: the original destination of one connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OriginalDst {
    /// Where the application wanted to go.
    pub dst: Addr,
    /// Cookie of the application's socket: only its own close removes the entry.
    pub socket_cookie: u64,
    /// Port of `dst`, network byte order.
    pub port: u16,
    /// Reserved, 0.
    pub reserved: u16,
    /// [`Workload::slot`]: who removes the entry counts it off.
    pub slot: u32,
}

/// Storage on the proxy's plaintext listener, written by the loader: whose it is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListenerTag {
    /// Cookie of the network namespace that the listener serves.
    pub netns_cookie: u64,
}

/// Key of `listeners`: the proxy's plaintext listener of one namespace and family.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ListenerKey {
    /// Cookie of the network namespace.
    pub netns_cookie: u64,
    /// `AF_INET` or `AF_INET6`.
    pub family: u32,
    /// Reserved, 0.
    pub reserved: u32,
}

/// A connection as the workload's interface sees it. Key of `syn_notes` and `host_flows`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The workload's side.
    pub local: Addr,
    /// The other side.
    pub remote: Addr,
    /// Port of `local`, network byte order.
    pub local_port: u16,
    /// Port of `remote`, network byte order.
    pub remote_port: u16,
    /// Reserved, 0.
    pub reserved: u32,
}

/// Value of `syn_notes`: what `sk_lookup` shall do with the segment that tc ingress has just passed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SynNote {
    /// `CLOCK_MONOTONIC`, nanoseconds; valid for [`crate::maps::SYN_NOTE_VALID_NS`].
    pub noted_ns: u64,
    /// Namespace whose listener takes the segment; 0 refuses it.
    pub netns_cookie: u64,
}

/// Value of `host_flows`: a connection that a process of the node opened to a workload.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostFlow {
    /// `CLOCK_MONOTONIC`, nanoseconds, of its end: a reset, or both sides had said all; 0 before.
    pub ended_ns: u64,
    /// The node's end of the link that it took.
    pub ifindex: u32,
    /// 1 when the process has said all.
    pub process_done: u16,
    /// 1 when the workload has said all.
    pub workload_done: u16,
}

/// One record of the `events` ring buffer: something was dropped or refused.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub at_ns: u64,
    /// Cookie of the network namespace, 0 where the hook cannot know it.
    pub netns_cookie: u64,
    /// Sender.
    pub src: Addr,
    /// Receiver.
    pub dst: Addr,
    /// Port of `src`, network byte order.
    pub src_port: u16,
    /// Port of `dst`, network byte order.
    pub dst_port: u16,
    /// [`crate::outcome::Hook`] as a number.
    pub hook: u8,
    /// [`crate::outcome::Reason`] as a number.
    pub reason: u8,
    /// TCP flags of the segment, 0 at connect.
    pub tcp_flags: u8,
    /// Reserved, 0.
    pub reserved: u8,
}

/// Per-CPU value of `event_budget`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventBudget {
    /// Start of the current window, `CLOCK_MONOTONIC` nanoseconds.
    pub window_ns: u64,
    /// Events sent in this window.
    pub sent: u64,
    /// Events that were counted but not sent, ever.
    pub suppressed: u64,
}

const _: () = assert!(size_of::<Addr>() == 16);
const _: () = assert!(size_of::<Workload>() == 32);
const _: () = assert!(size_of::<Captured>() == 32);
const _: () = assert!(size_of::<PeerKey>() == 32);
const _: () = assert!(size_of::<OriginalDst>() == 32);
const _: () = assert!(size_of::<ListenerTag>() == 8);
const _: () = assert!(size_of::<ListenerKey>() == 16);
const _: () = assert!(size_of::<FlowKey>() == 40);
const _: () = assert!(size_of::<SynNote>() == 16);
const _: () = assert!(size_of::<HostFlow>() == 16);
const _: () = assert!(size_of::<Event>() == 56);
const _: () = assert!(size_of::<EventBudget>() == 24);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_round_trip() {
        for text in ["10.1.2.3", "::1", "2001:db8::5", "255.255.255.255", "::ffff:1.2.3.4"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Addr::from(ip)), ip.to_canonical(), "{text}");
        }
    }

    #[test]
    fn loopback_is_the_whole_net_and_what_connect_takes_for_it() {
        for (text, expected) in [
            ("127.0.0.1", true),
            ("127.9.9.9", true),
            ("0.0.0.0", true),
            ("::", true),
            ("::1", true),
            ("::2", false),
            ("::ffff:127.0.0.1", true),
            ("128.0.0.1", false),
            ("10.0.0.1", false),
            ("fe80::1", false),
        ] {
            let addr = Addr::from(text.parse::<IpAddr>().unwrap());
            assert_eq!(addr.is_loopback(), expected, "{text}");
        }
    }
}
