//! tc ingress on a workload's interface: every TCP segment is the proxy's, from before enrolment, or goes to the
//! proxy's plaintext listener.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_sk_assign, bpf_sk_cgroup_id, bpf_sk_release};
use aya_ebpf::programs::TcContext;
use mesh_ebpf_common::INBOUND_PORT;
use mesh_ebpf_common::abi::{FlowKey, SynNote};
use mesh_ebpf_common::decide::{self, Found, Ingress, Owner, RST};
use mesh_ebpf_common::outcome::{Hook, Reason, Verdict};

use crate::maps::{PREEXISTING, PROXY_CGROUPS, SYN_NOTES, WORKLOADS, listener_tags};
use crate::report::{Subject, count, refuse};
use crate::segment::{Parsed, Segment, Start, find_socket, parse};

/// `TCX_NEXT` and `TC_ACT_UNSPEC`: the next program decides.
pub(crate) const NEXT: i32 = -1;
/// `TCX_DROP` and `TC_ACT_SHOT`.
pub(crate) const DROP: i32 = 2;

#[inline(always)]
pub(crate) fn on_segment(ctx: &TcContext) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let protocol = u16::from_be(unsafe { (*ctx.skb.skb).protocol } as u16);
    let segment = match parse(ctx, Start::Network, 0, protocol) {
        Parsed::Tcp(segment) => segment,
        Parsed::Other => {
            count(Hook::Ingress, Reason::NotTcp);
            return NEXT;
        }
        Parsed::Bad(reason) => {
            count(Hook::Ingress, reason);
            return DROP;
        }
    };
    let (reason, netns_cookie) = judge(ctx, &segment);
    match reason.verdict() {
        Verdict::Pass | Verdict::Proxy => {
            count(Hook::Ingress, reason);
            NEXT
        }
        Verdict::Refuse => {
            report(&segment, reason, netns_cookie);
            // A reset is not answered; for anything else `sk_lookup` makes the kernel answer with one.
            let refusable = segment.flags & RST == 0 && !segment.payload;
            if refusable && note(&segment, 0) { NEXT } else { DROP }
        }
        Verdict::Drop => {
            report(&segment, reason, netns_cookie);
            DROP
        }
    }
}

#[inline(always)]
fn report(segment: &Segment, reason: Reason, netns_cookie: u64) {
    let subject = Subject {
        netns_cookie,
        src: &segment.src,
        dst: &segment.dst,
        src_port: segment.src_port,
        dst_port: segment.dst_port,
        tcp_flags: segment.flags,
    };
    refuse(Hook::Ingress, reason, &subject);
}

#[inline(always)]
fn flow(segment: &Segment) -> FlowKey {
    FlowKey {
        local: segment.dst,
        remote: segment.src,
        local_port: segment.dst_port,
        remote_port: segment.src_port,
        reserved: 0,
    }
}

#[inline(always)]
fn judge(ctx: &TcContext, segment: &Segment) -> (Reason, u64) {
    let sk = find_socket(ctx, segment, segment.src_port, segment.dst_port);
    let found = if sk.is_null() {
        Found::Nothing
    } else {
        let found = Found::socket(state(sk), owner(sk));
        // SAFETY: the reference came from the look-up and is given back once.
        unsafe { bpf_sk_release(sk.cast()) };
        found
    };
    match decide::ingress(found, segment.flags, u16::from_be(segment.dst_port), segment.payload) {
        Ingress::Settled(reason) => (reason, 0),
        Ingress::AskPreexisting => {
            // SAFETY: only presence is asked.
            let known = unsafe { PREEXISTING.get(flow(segment)) }.is_some();
            (if known { Reason::Preexisting } else { Reason::ForeignSocket }, 0)
        }
        Ingress::AskListener => to_listener(ctx, segment, Way::Assign),
        Ingress::NoteListener => to_listener(ctx, segment, Way::Note),
    }
}

#[inline(always)]
fn state(sk: *mut bpf_sock) -> u32 {
    // SAFETY: not null; the field is readable in every kind of socket.
    unsafe { core::ptr::read_volatile(&raw const (*sk).state) }
}

#[inline(always)]
fn owner(sk: *mut bpf_sock) -> Owner {
    // SAFETY: not null. A request socket answers for its listener, a TIME_WAIT with 0.
    let cgroup = unsafe { bpf_sk_cgroup_id(sk.cast()) };
    proxy_cgroup(cgroup)
}

/// Whether a cgroup is a proxy's.
#[inline(always)]
pub(crate) fn proxy_cgroup(cgroup: u64) -> Owner {
    // SAFETY: only presence is asked.
    if unsafe { PROXY_CGROUPS.get(cgroup) }.is_some() { Owner::Proxy } else { Owner::Other }
}

/// How a segment gets to the proxy's listener.
#[derive(Clone, Copy)]
enum Way {
    Assign,
    Note,
}

#[inline(always)]
fn to_listener(ctx: &TcContext, segment: &Segment, way: Way) -> (Reason, u64) {
    // Port 0 is in no connection, so that this finds a listener only.
    let listener = find_socket(ctx, segment, 0, INBOUND_PORT.to_be());
    if listener.is_null() {
        return (Reason::NoListener, 0);
    }
    let verdict = match Found::socket(state(listener), owner(listener)) {
        Found::Listener(Owner::Proxy) => hand_over(ctx, segment, listener, way),
        Found::Listener(Owner::Other) | Found::Live(_) | Found::TimeWait | Found::Nothing => (Reason::NoListener, 0),
    };
    // SAFETY: the reference came from the look-up and is given back once.
    unsafe { bpf_sk_release(listener.cast()) };
    verdict
}

#[inline(always)]
fn hand_over(ctx: &TcContext, segment: &Segment, listener: *mut bpf_sock, way: Way) -> (Reason, u64) {
    let tag = listener_tags().get(listener.cast());
    // SAFETY: into the listener's storage; the listener is held.
    let netns_cookie = if tag.is_null() { 0 } else { unsafe { (*tag).netns_cookie } };
    match way {
        Way::Assign => {
            // SAFETY: both pointers are the kernel's.
            let assigned = unsafe { bpf_sk_assign(ctx.as_ptr(), listener.cast(), 0) } == 0;
            (if assigned { Reason::Assigned } else { Reason::AssignFailed }, netns_cookie)
        }
        Way::Note => {
            // A note is found by addresses alone, so it is made for the workload's own addresses only: no other
            // namespace of this node has them.
            // SAFETY: copied at once.
            let own = unsafe { WORKLOADS.get(netns_cookie) }.copied().is_some_and(|w| w.owns(&segment.dst));
            let noted = own && note(segment, netns_cookie);
            (if noted { Reason::TimeWaitSyn } else { Reason::NoteFailed }, netns_cookie)
        }
    }
}

/// Tells `sk_lookup`, which runs next for this segment, what to do with it.
#[inline(always)]
fn note(segment: &Segment, netns_cookie: u64) -> bool {
    // SAFETY: a helper without arguments.
    let noted_ns = unsafe { bpf_ktime_get_ns() };
    SYN_NOTES.insert(flow(segment), SynNote { noted_ns, netns_cookie }, 0).is_ok()
}
