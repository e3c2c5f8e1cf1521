//! The two guards of what a workload sends: tc egress on its interface, and tc ingress on the node's end of its link. TCP
//! leaves only from the proxy's sockets, from connections of before enrolment, as answers to processes of the node's own
//! (`host`), and as replies of the kernel without data.
//!
//! Both judge alike: a packet keeps its socket across a veth pair (Linux 4.19). The one inside sees forwarded packets as
//! such; the one outside is out of the workload's reach, and sees what does not pass tc egress (packet sockets with
//! `PACKET_QDISC_BYPASS`, `AF_XDP`) or was changed behind it.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_sk_fullsock, bpf_skb_cgroup_id};
use aya_ebpf::programs::TcContext;
use mesh_ebpf_common::INNER_MARK;
use mesh_ebpf_common::decide::{self, Found, Owner, Sender};
use mesh_ebpf_common::outcome::{Hook, Reason, Verdict};

use crate::host;
use crate::ingress::{DROP, NEXT, proxy_cgroup};
use crate::maps::PREEXISTING;
use crate::report::{Subject, count, refuse, refuse_unread};
use crate::segment::{ETH_P_IP, ETH_P_IPV6, Ends, Parsed, Segment, Start, load, packet_in_frame, parse};

/// For interfaces with Ethernet headers.
#[inline(always)]
pub(crate) fn on_frame(ctx: &TcContext, hook: Hook) -> i32 {
    match packet_in_frame(ctx) {
        Some((offset, protocol)) => judge(ctx, hook, offset, protocol),
        None => drop_unread(hook, Reason::Malformed, &Ends::default()),
    }
}

/// For devices without a link layer header the version field says what it is.
#[inline(always)]
pub(crate) fn on_packet(ctx: &TcContext) -> i32 {
    match load::<u8>(ctx, Start::Link, 0).map(|byte| byte >> 4) {
        Some(4) => judge(ctx, Hook::Egress, 0, ETH_P_IP),
        Some(6) => judge(ctx, Hook::Egress, 0, ETH_P_IPV6),
        // Not IP, and such a device carries nothing else to a TCP stack.
        None | Some(_) => drop_unread(Hook::Egress, Reason::Malformed, &Ends::default()),
    }
}

#[inline(always)]
fn drop_unread(hook: Hook, reason: Reason, ends: &Ends) -> i32 {
    refuse_unread(hook, reason, ends);
    DROP
}

#[inline(always)]
fn judge(ctx: &TcContext, hook: Hook, offset: u32, protocol: u16) -> i32 {
    let segment = match parse(ctx, Start::Link, offset, protocol) {
        Parsed::Tcp(segment) => segment,
        Parsed::Other => {
            count(hook, Reason::NotTcp);
            return NEXT;
        }
        Parsed::Bad(reason, ends) => return drop_unread(hook, reason, &ends),
    };
    let sender = sender(ctx, hook, &segment);
    let reason =
        decide::egress(sender, segment.flags, segment.payload).unwrap_or_else(|| application(ctx, hook, &segment));
    match reason.verdict() {
        Verdict::Pass => {
            if matches!(hook, Hook::HostIngress) {
                host::from_workload(&segment);
            }
            count(hook, reason);
            NEXT
        }
        // There is nothing to redirect to and nobody to answer: what does not pass is dropped.
        Verdict::Proxy | Verdict::Refuse | Verdict::Drop => {
            let subject = Subject {
                netns_cookie: 0,
                src: &segment.src,
                dst: &segment.dst,
                src_port: segment.src_port,
                dst_port: segment.dst_port,
                tcp_flags: segment.flags,
            };
            refuse(hook, reason, &subject);
            DROP
        }
    }
}

/// Judges a segment of a socket that is neither the proxy's nor captured.
#[inline(always)]
fn application(ctx: &TcContext, hook: Hook, segment: &Segment) -> Reason {
    if is_preexisting(ctx) {
        return Reason::Preexisting;
    }
    // SAFETY: the context is valid while the program runs; the verifier insists on the null check.
    let own = unsafe {
        let sk = (*ctx.skb.skb).__bindgen_anon_2.sk;
        !sk.is_null() && is_of(sk, segment)
    };
    if own && host::is_answer(ctx, hook, segment) { Reason::HostFlow } else { Reason::OutsideCgroup }
}

#[inline(always)]
fn sender(ctx: &TcContext, hook: Hook, segment: &Segment) -> Sender {
    // SAFETY: the context is valid while the program runs. 0 means that there is no full socket, not even a listener
    // behind a request socket.
    let cgroup = unsafe { bpf_skb_cgroup_id(ctx.skb.skb) };
    // SAFETY: as above; the verifier insists on both null checks.
    unsafe {
        let sk = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            // The kernel's replies came in nowhere; at the node's end everything has just come in.
            let forwarded = matches!(hook, Hook::Egress) && (*ctx.skb.skb).ingress_ifindex != 0;
            return if forwarded { Sender::Forwarded } else { Sender::None };
        }
        let full = bpf_sk_fullsock(sk);
        if let Owner::Proxy = proxy_cgroup(cgroup) {
            if !full.is_null() && (*full).mark == INNER_MARK {
                return Sender::Inner;
            }
            return match Found::socket((*sk).state, Owner::Proxy) {
                // A reset that a listener causes has the listener's cgroup, and no connection's addresses.
                Found::Listener(_) => Sender::None,
                Found::Live(_) | Found::TimeWait | Found::Nothing if is_of(sk, segment) => Sender::Proxy,
                Found::Live(_) | Found::TimeWait | Found::Nothing => Sender::Rewritten,
            };
        }
        if full.is_null() {
            // A request socket has its listener's cgroup, a TIME_WAIT none.
            return if cgroup == 0 { Sender::None } else { Sender::Tcp };
        }
        Sender::socket((*full).family, (*full).type_, cgroup)
    }
}

/// Whether a segment has the socket's addresses and ports.
///
/// # Safety
/// `sk` is the packet's socket.
#[inline(always)]
unsafe fn is_of(sk: *mut bpf_sock, segment: &Segment) -> bool {
    // SAFETY: the fields are readable in every kind of socket. The local port is in host byte order, the other is not.
    unsafe {
        // A socket that has ended meanwhile has given its port back; the other end stays its own.
        let port = (*sk).src_port as u16;
        if (port != 0 && port != u16::from_be(segment.src_port)) || (*sk).dst_port != segment.dst_port {
            return false;
        }
        if !segment.v6 {
            return (*sk).src_ip4 == segment.src.words[3] && (*sk).dst_ip4 == segment.dst.words[3];
        }
        let (src, dst) = (&raw const (*sk).src_ip6, &raw const (*sk).dst_ip6);
        let word = |words: *const [u32; 4], i: usize| core::ptr::read_volatile(words.cast::<u32>().add(i));
        let same = |i: usize| word(src, i) == segment.src.words[i] && word(dst, i) == segment.dst.words[i];
        same(0) && same(1) && same(2) && same(3)
    }
}

/// Whether the packet's socket had its connection before enrolment. Not known by its addresses: an application can bind
/// those of an old connection, and another workload can have had a connection with the same.
#[inline(always)]
pub(crate) fn is_preexisting(ctx: &TcContext) -> bool {
    // SAFETY: only presence is asked; the helper reads the program's own context.
    unsafe { PREEXISTING.get(bpf_get_socket_cookie(ctx.as_ptr())) }.is_some()
}
