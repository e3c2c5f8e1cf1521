//! The capture decision on plain values.
//!
//! The programs gather facts (what the kernel's socket look-up found, which cgroup a socket is of) and ask here.
//! Where a fact is expensive, the answer may be a question: [`Ingress::AskPreexisting`], [`Ingress::AskListener`].

use crate::abi::{Addr, Workload};
use crate::outcome::Reason;
use crate::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT};

/// TCP flag: no more data from the sender.
pub const FIN: u8 = 0x01;
/// TCP flag: first segment of a direction.
pub const SYN: u8 = 0x02;
/// TCP flag: abort.
pub const RST: u8 = 0x04;
/// TCP flag: the acknowledgement number is valid.
pub const ACK: u8 = 0x10;

/// What becomes of an enrolled workload's `connect` over TCP. The port is in host byte order.
#[inline(always)]
pub const fn connect(workload: &Workload, dst: &Addr, port: u16) -> Reason {
    let own = dst.is_loopback();
    if (own || workload.owns(dst)) && is_proxys(port) {
        return Reason::OwnProxyPort;
    }
    if own {
        return Reason::Loopback;
    }
    if port == HBONE_PORT {
        return Reason::HbonePort;
    }
    Reason::Captured
}

/// Whose a socket is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Its cgroup is a proxy's.
    Proxy,
    /// Any other.
    Other,
}

/// What the kernel's own look-up finds for a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// No socket.
    Nothing,
    /// A connection that has ended.
    TimeWait,
    /// A listening socket.
    Listener(Owner),
    /// A connection, established or being established.
    Live(Owner),
}

impl Found {
    /// From `bpf_sock.state` and the owner.
    #[inline(always)]
    pub const fn socket(state: u32, owner: Owner) -> Self {
        const TCP_TIME_WAIT: u32 = 6;
        const TCP_LISTEN: u32 = 10;
        match state {
            TCP_TIME_WAIT => Self::TimeWait,
            TCP_LISTEN => Self::Listener(owner),
            // All other states are of one connection: established, opening or closing.
            _ => Self::Live(owner),
        }
    }
}

/// The next step for a segment that arrives at a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ingress {
    /// Decided.
    Settled(Reason),
    /// Passes if the connection is from before enrolment, else it is [`Reason::ForeignSocket`].
    AskPreexisting,
    /// Goes to the proxy's plaintext listener by `bpf_sk_assign`; [`Reason::NoListener`] if there is none.
    AskListener,
    /// Goes to the proxy's plaintext listener by a note for `sk_lookup`: beside a TIME_WAIT the kernel refuses the
    /// request socket of an assigned listener, but its own path from TIME_WAIT asks `sk_lookup`.
    NoteListener,
}

/// Judges a segment that arrives at a workload. The destination port is in host byte order.
#[inline(always)]
pub const fn ingress(found: Found, flags: u8, dst_port: u16, payload: bool) -> Ingress {
    let opens = opens(flags);
    match found {
        Found::Live(Owner::Proxy) => return Ingress::Settled(Reason::ProxySocket),
        Found::Live(Owner::Other) => return Ingress::AskPreexisting,
        Found::TimeWait if !opens => return Ingress::Settled(Reason::TimeWait),
        Found::TimeWait | Found::Listener(_) | Found::Nothing => {}
    }
    if dst_port == OUTBOUND_PORT || dst_port == INBOUND_PORT {
        return Ingress::Settled(Reason::ReservedPort);
    }
    match found {
        Found::TimeWait if payload => Ingress::Settled(Reason::SynPayload),
        Found::TimeWait if dst_port == HBONE_PORT => Ingress::Settled(Reason::TimeWait),
        Found::TimeWait => Ingress::NoteListener,
        Found::Listener(Owner::Proxy) if dst_port == HBONE_PORT => Ingress::Settled(Reason::HboneListener),
        Found::Listener(_) | Found::Nothing if dst_port == HBONE_PORT => Ingress::Settled(Reason::NoListener),
        Found::Listener(_) | Found::Nothing => Ingress::AskListener,
        Found::Live(_) => Ingress::Settled(Reason::Unknown),
    }
}

/// Where a segment that leaves a workload comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// No full socket: the kernel's own reply.
    None,
    /// No socket here: the packet came in by another interface.
    Forwarded,
    /// The kernel's control socket for IPv4 replies: raw, in the root cgroup.
    KernelControl,
    /// A socket of a proxy's cgroup, and the segment is as the socket made it.
    Proxy,
    /// A socket of a proxy's cgroup, but the segment has other addresses than the socket: the workload can have address
    /// translation in its namespace, which would lead the proxy's connections elsewhere, or give them another sender.
    Rewritten,
    /// The proxy's connection to the application, which the workload's routes can lead out and back in to the proxy.
    Inner,
    /// A packet socket.
    Packet,
    /// A raw socket.
    Raw,
    /// Any other TCP socket.
    Tcp,
}

impl Sender {
    /// From a full socket's family, type and cgroup.
    #[inline(always)]
    pub const fn socket(family: u32, kind: u32, cgroup: u64) -> Self {
        const AF_PACKET: u32 = 17;
        const SOCK_RAW: u32 = 3;
        /// kernfs numbers the root first.
        const ROOT_CGROUP: u64 = 1;
        if family == AF_PACKET {
            return Self::Packet;
        }
        if kind == SOCK_RAW {
            return if cgroup == ROOT_CGROUP { Self::KernelControl } else { Self::Raw };
        }
        Self::Tcp
    }
}

/// Judges a TCP segment that leaves a workload; `None` asks whether the connection is from before enrolment, and if it
/// is not, the answer is [`Reason::OutsideCgroup`].
#[inline(always)]
pub const fn egress(sender: Sender, flags: u8, payload: bool) -> Option<Reason> {
    // RST, the ACK of a TIME_WAIT and the SYN-ACK of a SYN cookie: nothing of the application's is in them.
    let reply = !payload && flags & (RST | ACK) != 0;
    match sender {
        Sender::Proxy => Some(Reason::ProxySocket),
        Sender::Rewritten => Some(Reason::Rewritten),
        Sender::Inner => Some(Reason::InnerConnection),
        Sender::None | Sender::KernelControl if reply => Some(Reason::KernelReply),
        // Even without data it is somebody's: 40 bytes fit into the options of each segment.
        Sender::None | Sender::Forwarded => Some(Reason::NoSocket),
        Sender::Packet => Some(Reason::PacketSocket),
        Sender::Raw | Sender::KernelControl => Some(Reason::RawSocket),
        Sender::Tcp => None,
    }
}

/// Who sent a segment that the node's end of a link is about to hand to the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A TCP socket of the node's namespace, outside the pods' cgroup.
    Process,
    /// The node's kernel, which answers for a socket that has ended, or a raw socket of the node's.
    Kernel,
    /// A socket of the node's namespace, of a pod (with `hostNetwork`) or of a proxy.
    Pod,
    /// It came in by another interface of the node.
    Forwarded,
}

/// What is known of a segment's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// Nothing, or it ended long ago.
    Nothing,
    /// A process of the node opened it.
    Open,
    /// A process of the node opened it, and it has ended just now.
    Ended,
}

/// The next step for a segment at the node's end, on its way to a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostEgress {
    /// Decided.
    Settled(Reason),
    /// The connection is noted as one of the node's own: [`Reason::HostFlow`].
    Note,
    /// Addresses and ports have another owner now: the note goes, and it is [`Reason::NotHost`].
    Forget,
}

/// Whether a port, in host byte order, is one of the proxy's.
#[inline(always)]
pub const fn is_proxys(port: u16) -> bool {
    port == OUTBOUND_PORT || port == INBOUND_PORT || port == HBONE_PORT
}

/// Whether a segment opens a connection.
#[inline(always)]
pub const fn opens(flags: u8) -> bool {
    flags & (SYN | ACK | RST) == SYN
}

/// Judges a segment at the node's end, on its way to a workload. The destination port is in host byte order.
#[inline(always)]
pub const fn host_egress(origin: Origin, known: Known, flags: u8, dst_port: u16) -> HostEgress {
    if matches!(origin, Origin::Process) && opens(flags) && !is_proxys(dst_port) {
        return HostEgress::Note;
    }
    if matches!(known, Known::Nothing) {
        return HostEgress::Settled(Reason::NotHost);
    }
    match origin {
        Origin::Process | Origin::Kernel if !opens(flags) => HostEgress::Settled(Reason::HostFlow),
        // In one namespace no two sockets have the same addresses and ports, so that the process' socket is gone.
        Origin::Process | Origin::Kernel | Origin::Pod if opens(flags) => HostEgress::Forget,
        Origin::Forwarded if opens(flags) && matches!(known, Known::Ended) => HostEgress::Forget,
        Origin::Process | Origin::Kernel | Origin::Pod | Origin::Forwarded => {
            HostEgress::Settled(Reason::ForgedHostFlow)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::IpAddr;

    fn addr(text: &str) -> Addr {
        Addr::from(text.parse::<IpAddr>().unwrap())
    }

    #[test]
    fn connect_captures_all_but_the_workload_itself() {
        let own = Workload { v4: addr("10.0.0.2").words[3], v6: addr("fd00::2"), ..Workload::default() };
        for (dst, port, expected) in [
            ("10.0.0.3", 80, Reason::Captured),
            ("fd00::3", 80, Reason::Captured),
            ("::ffff:10.0.0.3", 80, Reason::Captured),
            ("10.0.0.2", 80, Reason::Captured),
            ("127.0.0.1", 80, Reason::Loopback),
            ("::1", 80, Reason::Loopback),
            ("127.0.0.1", 15001, Reason::OwnProxyPort),
            ("127.3.2.1", 15006, Reason::OwnProxyPort),
            ("::1", 15008, Reason::OwnProxyPort),
            ("::ffff:127.0.0.1", 15001, Reason::OwnProxyPort),
            ("0.0.0.0", 15001, Reason::OwnProxyPort),
            ("10.0.0.2", 15006, Reason::OwnProxyPort),
            ("fd00::2", 15001, Reason::OwnProxyPort),
            ("10.0.0.3", 15008, Reason::HbonePort),
            ("fd00::3", 15008, Reason::HbonePort),
            ("10.0.0.3", 15001, Reason::Captured),
        ] {
            assert_eq!(connect(&own, &addr(dst), port), expected, "{dst} {port}");
        }
    }

    #[test]
    fn a_workload_without_addresses_owns_none() {
        let none = Workload::default();
        for dst in ["0.0.0.0", "::", "10.0.0.1"] {
            assert!(!none.owns(&addr(dst)), "{dst}");
        }
    }

    #[test]
    fn no_segment_reaches_the_application_around_the_proxy() {
        use Ingress::{AskListener, AskPreexisting, NoteListener, Settled};
        for (name, found, flags, port, payload, expected) in [
            ("data of the proxy's", Found::Live(Owner::Proxy), ACK, 80, true, Settled(Reason::ProxySocket)),
            ("data of another's", Found::Live(Owner::Other), ACK, 80, true, AskPreexisting),
            ("SYN, application listens", Found::Listener(Owner::Other), SYN, 80, false, AskListener),
            ("SYN, nobody listens", Found::Nothing, SYN, 80, false, AskListener),
            ("ACK of a SYN cookie", Found::Listener(Owner::Other), ACK, 80, true, AskListener),
            ("SYN, TIME_WAIT", Found::TimeWait, SYN, 80, false, NoteListener),
            ("SYN with data, TIME_WAIT", Found::TimeWait, SYN, 80, true, Settled(Reason::SynPayload)),
            ("FIN again, TIME_WAIT", Found::TimeWait, FIN | ACK, 80, false, Settled(Reason::TimeWait)),
            ("tunnel", Found::Listener(Owner::Proxy), SYN, 15008, false, Settled(Reason::HboneListener)),
            ("tunnel, application's", Found::Listener(Owner::Other), SYN, 15008, false, Settled(Reason::NoListener)),
            ("tunnel, nobody", Found::Nothing, SYN, 15008, false, Settled(Reason::NoListener)),
            ("tunnel, TIME_WAIT", Found::TimeWait, SYN, 15008, false, Settled(Reason::TimeWait)),
            ("proxy port", Found::Listener(Owner::Proxy), SYN, 15006, false, Settled(Reason::ReservedPort)),
            ("outbound port", Found::Nothing, SYN, 15001, false, Settled(Reason::ReservedPort)),
        ] {
            assert_eq!(ingress(found, flags, port, payload), expected, "{name}");
        }
    }

    #[test]
    fn only_the_proxy_and_the_kernel_speak_tcp() {
        for (name, sender, flags, payload, expected) in [
            ("proxy", Sender::Proxy, SYN, false, Some(Reason::ProxySocket)),
            ("proxy, led elsewhere", Sender::Rewritten, SYN, false, Some(Reason::Rewritten)),
            ("reset of the proxy's, led elsewhere", Sender::Rewritten, RST, false, Some(Reason::Rewritten)),
            ("inner connection", Sender::Inner, ACK, true, Some(Reason::InnerConnection)),
            ("reset", Sender::None, RST, false, Some(Reason::KernelReply)),
            ("reset, control socket", Sender::KernelControl, RST | ACK, false, Some(Reason::KernelReply)),
            ("cookie", Sender::None, SYN | ACK, false, Some(Reason::KernelReply)),
            ("SYN of nobody", Sender::None, SYN, false, Some(Reason::NoSocket)),
            ("data of nobody", Sender::None, ACK, true, Some(Reason::NoSocket)),
            ("forwarded SYN", Sender::Forwarded, SYN, false, Some(Reason::NoSocket)),
            ("forwarded ACK", Sender::Forwarded, ACK, false, Some(Reason::NoSocket)),
            ("forwarded reset", Sender::Forwarded, RST | ACK, false, Some(Reason::NoSocket)),
            ("raw in the root cgroup", Sender::KernelControl, ACK, true, Some(Reason::RawSocket)),
            ("raw", Sender::Raw, RST, false, Some(Reason::RawSocket)),
            ("packet", Sender::Packet, RST, false, Some(Reason::PacketSocket)),
            ("other", Sender::Tcp, SYN, false, None),
        ] {
            assert_eq!(egress(sender, flags, payload), expected, "{name}");
        }
    }

    #[test]
    fn only_the_nodes_own_processes_open_host_flows() {
        use HostEgress::{Forget, Note, Settled};
        let (host, not_host, forged) =
            (Settled(Reason::HostFlow), Settled(Reason::NotHost), Settled(Reason::ForgedHostFlow));
        for (name, origin, known, flags, port, expected) in [
            ("probe", Origin::Process, Known::Nothing, SYN, 8080, Note),
            ("probe from a port used before", Origin::Process, Known::Ended, SYN, 8080, Note),
            ("probe of the tunnel's port", Origin::Process, Known::Nothing, SYN, 15008, not_host),
            ("the proxy's port, noted by nobody", Origin::Process, Known::Nothing, SYN, 15006, not_host),
            ("data", Origin::Process, Known::Open, ACK, 8080, host),
            ("data after the end", Origin::Process, Known::Ended, ACK, 8080, host),
            ("answer to a workload's SYN", Origin::Process, Known::Nothing, SYN | ACK, 8080, not_host),
            ("data of a connection from before", Origin::Process, Known::Nothing, ACK, 8080, not_host),
            ("reset by the kernel", Origin::Kernel, Known::Open, RST, 8080, host),
            ("reset by the kernel, not noted", Origin::Kernel, Known::Nothing, RST, 8080, not_host),
            ("SYN of a raw socket", Origin::Kernel, Known::Nothing, SYN, 8080, not_host),
            ("SYN of a raw socket, noted", Origin::Kernel, Known::Open, SYN, 8080, Forget),
            ("hostNetwork pod", Origin::Pod, Known::Nothing, SYN, 8080, not_host),
            ("hostNetwork pod, a port used before", Origin::Pod, Known::Open, SYN, 8080, Forget),
            ("hostNetwork pod, a port used just now", Origin::Pod, Known::Ended, SYN, 8080, Forget),
            ("data of a pod's in a noted flow", Origin::Pod, Known::Open, ACK, 8080, forged),
            ("forwarded", Origin::Forwarded, Known::Nothing, SYN, 8080, not_host),
            ("forwarded SYN in a noted flow", Origin::Forwarded, Known::Open, SYN, 8080, forged),
            ("forwarded data in a noted flow", Origin::Forwarded, Known::Open, ACK, 8080, forged),
            ("forwarded reset in a noted flow", Origin::Forwarded, Known::Open, RST, 8080, forged),
            ("forwarded SYN after the end", Origin::Forwarded, Known::Ended, SYN, 8080, Forget),
            ("forwarded data after the end", Origin::Forwarded, Known::Ended, ACK, 8080, forged),
        ] {
            assert_eq!(host_egress(origin, known, flags, port), expected, "{name}");
        }
    }
}
