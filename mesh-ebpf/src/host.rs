//! tc egress on the node's end of a workload's link: which connections processes of the node's own open to the workload, so
//! that its interface lets them through to the application, and the application's answers out.
//!
//! A packet that a socket of this namespace sends has that socket, and came in by no interface. One that is forwarded came in
//! by one (`__netif_receive_skb_core` writes it down), also through a bridge, where it keeps the socket that it had in its own
//! namespace; routing takes the socket away (Linux 6.18 `ip_rcv_core`), and so does netfilter for bridges
//! (`setup_pre_routing`).

use core::ptr;

use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_sk_fullsock, bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id};
use aya_ebpf::programs::TcContext;
use mesh_ebpf_common::abi::{FlowKey, HostFlow};
use mesh_ebpf_common::decide::{self, FIN, HostEgress, Known, Origin, Owner, RST, Sender};
use mesh_ebpf_common::maps::{HOST_FLOW_LINGER_NS, MAX_CGROUP_LEVELS};
use mesh_ebpf_common::outcome::{Hook, Reason, Verdict};

use crate::ingress::{DROP, NEXT, proxy_cgroup};
use crate::maps::HOST_FLOWS;
use crate::report::{Subject, count, refuse};
use crate::segment::{Parsed, Segment, Start, packet_in_frame, parse};

/// Id of the pods' cgroup, which the loader fills in; with 0 everything is a pod's.
#[unsafe(no_mangle)]
static PODS_CGROUP: u64 = 0;

/// What cannot be read is passed on: the programs inside the workload read the same, and drop it.
#[inline(always)]
pub(crate) fn on_frame(ctx: &TcContext) -> i32 {
    let Some((offset, protocol)) = packet_in_frame(ctx) else {
        count(Hook::HostEgress, Reason::NotHost);
        return NEXT;
    };
    match parse(ctx, Start::Link, offset, protocol) {
        Parsed::Tcp(segment) => judge(ctx, &segment),
        Parsed::Other => {
            count(Hook::HostEgress, Reason::NotTcp);
            NEXT
        }
        Parsed::Bad(..) => {
            count(Hook::HostEgress, Reason::NotHost);
            NEXT
        }
    }
}

#[inline(always)]
fn judge(ctx: &TcContext, segment: &Segment) -> i32 {
    let flow = segment.inward();
    let port = u16::from_be(segment.dst_port);
    let reason = match decide::host_egress(origin(ctx), known(&flow), segment.flags, port) {
        HostEgress::Settled(reason) => reason,
        HostEgress::Note => note(ctx, &flow),
        HostEgress::Forget => {
            let _raced_away = HOST_FLOWS.remove(flow);
            Reason::NotHost
        }
    };
    match reason.verdict() {
        Verdict::Pass => {
            if matches!(reason, Reason::HostFlow) {
                follow(&flow, segment.flags, Side::Process);
            }
            count(Hook::HostEgress, reason);
            NEXT
        }
        // There is nothing to redirect to: what does not pass is dropped.
        Verdict::Proxy | Verdict::Refuse | Verdict::Drop => {
            let subject = Subject {
                netns_cookie: 0,
                src: &segment.src,
                dst: &segment.dst,
                src_port: segment.src_port,
                dst_port: segment.dst_port,
                tcp_flags: segment.flags,
            };
            refuse(Hook::HostEgress, reason, &subject);
            DROP
        }
    }
}

#[inline(always)]
fn origin(ctx: &TcContext) -> Origin {
    // SAFETY: the context is valid while the program runs; the verifier insists on both null checks.
    unsafe {
        if (*ctx.skb.skb).ingress_ifindex != 0 {
            return Origin::Forwarded;
        }
        let sk = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return Origin::Kernel;
        }
        let full = bpf_sk_fullsock(sk);
        if full.is_null() {
            return Origin::Kernel;
        }
        let cgroup = bpf_skb_cgroup_id(ctx.skb.skb);
        let kind = Sender::socket((*full).family, (*full).type_, cgroup);
        if matches!(proxy_cgroup(cgroup), Owner::Proxy) || is_of_a_pod(ctx) {
            return Origin::Pod;
        }
        if matches!(kind, Sender::Tcp) { Origin::Process } else { Origin::Kernel }
    }
}

/// Whether the packet's socket is of a cgroup below the pods', or of none that is known.
#[inline(always)]
fn is_of_a_pod(ctx: &TcContext) -> bool {
    // SAFETY: volatile, because the value that is compiled in is not the one that is loaded.
    let pods = unsafe { ptr::read_volatile(&raw const PODS_CGROUP) };
    if pods == 0 {
        return true;
    }
    for level in 0..MAX_CGROUP_LEVELS {
        // SAFETY: the context is valid while the program runs.
        let ancestor = unsafe { bpf_skb_ancestor_cgroup_id(ctx.skb.skb, level) };
        if ancestor == pods {
            return true;
        }
        if ancestor == 0 {
            // Deeper than the socket's own; but every socket has the root.
            return level == 0;
        }
    }
    true
}

#[inline(always)]
fn note(ctx: &TcContext, flow: &FlowKey) -> Reason {
    // SAFETY: the context is valid while the program runs.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    let fresh = HostFlow { ended_ns: 0, ifindex, process_done: 0, workload_done: 0 };
    // Without room it is a connection as any other.
    if HOST_FLOWS.insert(flow, fresh, 0).is_ok() { Reason::HostFlow } else { Reason::NotHost }
}

#[inline(always)]
fn known(flow: &FlowKey) -> Known {
    // SAFETY: copied at once.
    let Some(flow) = (unsafe { HOST_FLOWS.get(flow) }).copied() else { return Known::Nothing };
    known_as(&flow)
}

#[inline(always)]
fn known_as(flow: &HostFlow) -> Known {
    if flow.ended_ns == 0 {
        return Known::Open;
    }
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    // A later time is one that another CPU has written just now.
    if now.saturating_sub(flow.ended_ns) > HOST_FLOW_LINGER_NS { Known::Nothing } else { Known::Ended }
}

/// Whether a connection is one of the node's own.
#[inline(always)]
pub(crate) fn is_known(flow: &FlowKey) -> bool {
    !matches!(known(flow), Known::Nothing)
}

/// Whether a segment that leaves a workload is an answer to a process of the node: it opens nothing, and at the node's end it
/// comes by the link that the process' segments took.
#[inline(always)]
pub(crate) fn is_answer(ctx: &TcContext, hook: Hook, segment: &Segment) -> bool {
    if decide::opens(segment.flags) {
        return false;
    }
    // SAFETY: copied at once.
    let Some(flow) = (unsafe { HOST_FLOWS.get(segment.outward()) }).copied() else { return false };
    // SAFETY: the context is valid while the program runs.
    let here = unsafe { (*ctx.skb.skb).ifindex };
    if matches!(hook, Hook::HostIngress) && flow.ifindex != here {
        return false;
    }
    !matches!(known_as(&flow), Known::Nothing)
}

/// Who says that it has no more to say.
#[derive(Clone, Copy)]
enum Side {
    Process,
    Workload,
}

/// Follows a connection to its end by what the workload sends. At the node's end.
#[inline(always)]
pub(crate) fn from_workload(segment: &Segment) {
    follow(&segment.outward(), segment.flags, Side::Workload);
}

#[inline(always)]
fn follow(flow: &FlowKey, flags: u8, side: Side) {
    if flags & (FIN | RST) == 0 {
        return;
    }
    let Some(known) = HOST_FLOWS.get_ptr_mut(flow) else { return };
    // SAFETY: a value of the map, aligned; each side writes what is its own in one piece, and the end is about the same whoever
    // writes it.
    unsafe {
        let done = match side {
            Side::Process => &raw mut (*known).process_done,
            Side::Workload => &raw mut (*known).workload_done,
        };
        if flags & FIN != 0 {
            ptr::write_volatile(done, 1);
        }
        let both = ptr::read_volatile(&raw const (*known).process_done) != 0
            && ptr::read_volatile(&raw const (*known).workload_done) != 0;
        let ended = flags & RST != 0 || both;
        if ended && ptr::read_volatile(&raw const (*known).ended_ns) == 0 {
            ptr::write_volatile(&raw mut (*known).ended_ns, bpf_ktime_get_ns());
        }
    }
}
