//! tc ingress on a workload's interface: every TCP segment is the proxy's, from before enrolment, of a process of the
//! node's own, or goes to the proxy's plaintext listener.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::generated::{
    bpf_ktime_get_ns, bpf_sk_assign, bpf_sk_fullsock, bpf_sk_release, bpf_skb_cgroup_id,
};
use aya_ebpf::programs::TcContext;
use mesh_ebpf_common::abi::SynNote;
use mesh_ebpf_common::decide::{self, Found, Ingress, Owner, RST};
use mesh_ebpf_common::outcome::{Hook, Reason, Verdict};
use mesh_ebpf_common::{HBONE_PORT, INBOUND_PORT, INNER_MARK};

use crate::egress::is_preexisting;
use crate::host;
use crate::maps::{PROXY_CGROUPS, SYN_NOTES, WORKLOADS, listener_tags};
use crate::report::{Subject, count, refuse, refuse_unread};
use crate::segment::{ETH_P_8021AD, ETH_P_8021Q, Ends, Parsed, Segment, Start, find_socket, parse};

/// `TCX_NEXT` and `TC_ACT_UNSPEC`: the next program decides.
pub(crate) const NEXT: i32 = -1;
/// `TCX_DROP` and `TC_ACT_SHOT`.
pub(crate) const DROP: i32 = 2;

/// A segment's judgement.
struct Judged {
    reason: Reason,
    netns_cookie: u64,
    /// Whether the kernel may go on with the segment to answer it: not when it holds a socket that is not the proxy's.
    answerable: bool,
}

impl Judged {
    #[inline(always)]
    fn new(reason: Reason) -> Self {
        Self { reason, netns_cookie: 0, answerable: true }
    }
}

#[inline(always)]
pub(crate) fn on_segment(ctx: &TcContext) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let protocol = u16::from_be(unsafe { (*ctx.skb.skb).protocol } as u16);
    if protocol == ETH_P_8021Q || protocol == ETH_P_8021AD {
        // The kernel has taken the outer tag off and takes a second one off, too, behind this program, when both only
        // give a priority (VLAN 0; Linux 6.18 `__netif_receive_skb_core`). Tags inside tags are nobody's network here.
        refuse_unread(Hook::Ingress, Reason::Malformed, &Ends::default());
        return DROP;
    }
    let segment = match parse(ctx, Start::Network, 0, protocol) {
        Parsed::Tcp(segment) => segment,
        Parsed::Other => {
            count(Hook::Ingress, Reason::NotTcp);
            return NEXT;
        }
        Parsed::Bad(reason, ends) => {
            refuse_unread(Hook::Ingress, reason, &ends);
            return DROP;
        }
    };
    let judged = judge(ctx, &segment);
    match judged.reason.verdict() {
        Verdict::Pass | Verdict::Proxy => {
            count(Hook::Ingress, judged.reason);
            NEXT
        }
        Verdict::Refuse => {
            report(&segment, &judged);
            // A reset is not answered; for anything else `sk_lookup` makes the kernel answer with one.
            let answer = judged.answerable && segment.flags & RST == 0 && !segment.payload;
            if answer && note(&segment, 0) { NEXT } else { DROP }
        }
        Verdict::Drop => {
            report(&segment, &judged);
            DROP
        }
    }
}

#[inline(always)]
fn report(segment: &Segment, judged: &Judged) {
    let subject = Subject {
        netns_cookie: judged.netns_cookie,
        src: &segment.src,
        dst: &segment.dst,
        src_port: segment.src_port,
        dst_port: segment.dst_port,
        tcp_flags: segment.flags,
    };
    refuse(Hook::Ingress, judged.reason, &subject);
}

#[inline(always)]
fn judge(ctx: &TcContext, segment: &Segment) -> Judged {
    let port = u16::from_be(segment.dst_port);
    let sk = find_socket(ctx, segment, segment.src_port, segment.dst_port);
    if !decide::is_proxys(port) && host::is_known(&segment.inward()) {
        let inner = is_inner(sk);
        if !sk.is_null() {
            // SAFETY: the reference came from the look-up and is given back once.
            unsafe { bpf_sk_release(sk.cast()) };
        }
        return Judged::new(if inner { Reason::ForeignSocket } else { Reason::HostFlow });
    }
    let mut assigned = false;
    let found = if sk.is_null() {
        Found::Nothing
    } else {
        let found = match Found::socket(state(sk), Owner::Other) {
            // Whose a listener is matters on the tunnel's port only; on others the proxy's takes its place anyway.
            Found::Live(_) => Found::Live(owner(ctx, sk, &mut assigned)),
            Found::Listener(_) if port == HBONE_PORT => Found::Listener(owner(ctx, sk, &mut assigned)),
            other => other,
        };
        // SAFETY: the reference came from the look-up and is given back once.
        unsafe { bpf_sk_release(sk.cast()) };
        found
    };
    match decide::ingress(found, segment.flags, port, segment.payload) {
        Ingress::Settled(reason) => Judged { answerable: !assigned, ..Judged::new(reason) },
        Ingress::AskPreexisting => {
            // The packet has the socket now; without one it has cookie 0, which nobody has.
            Judged::new(if is_preexisting(ctx) { Reason::Preexisting } else { Reason::ForeignSocket })
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

/// Whether a socket is the application's side of the proxy's connection to it, which has taken a client's address: also that
/// of the node, when a pod with `hostNetwork` called.
#[inline(always)]
fn is_inner(sk: *mut bpf_sock) -> bool {
    if sk.is_null() {
        return false;
    }
    // SAFETY: the verifier insists on both null checks.
    unsafe {
        let full = bpf_sk_fullsock(sk);
        !full.is_null() && (*full).mark == INNER_MARK
    }
}

/// Whose a socket is. The kernel tells tc the cgroup of a packet's socket only (`bpf_sk_cgroup_id` is for cgroup
/// programs, Linux 6.18 `tc_cls_act_func_proto`), so the packet gets the socket, which is the one that the kernel would
/// find for it. A request socket answers for its listener.
#[inline(always)]
fn owner(ctx: &TcContext, sk: *mut bpf_sock, assigned: &mut bool) -> Owner {
    // SAFETY: both pointers are the kernel's.
    if unsafe { bpf_sk_assign(ctx.as_ptr(), sk.cast(), 0) } != 0 {
        return Owner::Other;
    }
    *assigned = true;
    // SAFETY: the context is valid while the program runs.
    proxy_cgroup(unsafe { bpf_skb_cgroup_id(ctx.skb.skb) })
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
fn to_listener(ctx: &TcContext, segment: &Segment, way: Way) -> Judged {
    // Port 0 is in no connection, so that this finds a listener only.
    let listener = find_socket(ctx, segment, 0, INBOUND_PORT.to_be());
    if listener.is_null() {
        return Judged::new(Reason::NoListener);
    }
    let judged = match Found::socket(state(listener), Owner::Other) {
        Found::Listener(_) => hand_over(ctx, segment, listener, way),
        Found::Live(_) | Found::TimeWait | Found::Nothing => Judged::new(Reason::NoListener),
    };
    // SAFETY: the reference came from the look-up and is given back once.
    unsafe { bpf_sk_release(listener.cast()) };
    judged
}

#[inline(always)]
fn hand_over(ctx: &TcContext, segment: &Segment, listener: *mut bpf_sock, way: Way) -> Judged {
    let tag = listener_tags().get(listener.cast());
    if tag.is_null() {
        // Not one of the listeners that the loader was given.
        return Judged::new(Reason::NoListener);
    }
    // SAFETY: into the listener's storage; the listener is held.
    let netns_cookie = unsafe { (*tag).netns_cookie };
    let reason = match way {
        Way::Assign => {
            // SAFETY: both pointers are the kernel's.
            let assigned = unsafe { bpf_sk_assign(ctx.as_ptr(), listener.cast(), 0) } == 0;
            if assigned { Reason::Assigned } else { Reason::AssignFailed }
        }
        Way::Note => {
            // A note is found by addresses alone, so it is made for the workload's own addresses only: no other
            // namespace of this node has them.
            // SAFETY: copied at once.
            let own = unsafe { WORKLOADS.get(netns_cookie) }.copied().is_some_and(|w| w.owns(&segment.dst));
            if own && note(segment, netns_cookie) { Reason::TimeWaitSyn } else { Reason::NoteFailed }
        }
    };
    Judged { reason, netns_cookie, answerable: true }
}

/// Tells `sk_lookup`, which runs next for this segment, what to do with it.
#[inline(always)]
fn note(segment: &Segment, netns_cookie: u64) -> bool {
    // SAFETY: a helper without arguments.
    let noted_ns = unsafe { bpf_ktime_get_ns() };
    SYN_NOTES.insert(segment.inward(), SynNote { noted_ns, netns_cookie }, 0).is_ok()
}
