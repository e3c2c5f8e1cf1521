//! The cgroup hooks around `connect`: note the original destination, rewrite to the proxy, and answer `getpeername`
//! and `getsockname` as if nothing had been rewritten.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::generated::{bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_set_retval, bpf_setsockopt};
use aya_ebpf::programs::SockAddrContext;
use mesh_ebpf_common::OUTBOUND_PORT;
use mesh_ebpf_common::abi::{Addr, Captured, MAPPED, Workload};
use mesh_ebpf_common::decide;
use mesh_ebpf_common::outcome::{Hook, Reason, Verdict};

use crate::maps::{CAPTURED_SOCKETS, PROXY_CGROUPS, WORKLOADS, captured_sockets};
use crate::report::{Subject, count, refuse};

const IPPROTO_TCP: u32 = 6;
/// `IPPROTO_MPTCP` is 262, but a program for an older kernel may see its low byte only.
const IPPROTO_MPTCP: u32 = 262;
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
/// Every network namespace's loopback device.
const LOOPBACK_IFINDEX: u32 = 1;
const ECONNREFUSED: i32 = 111;
const ALLOW: i32 = 1;
const DENY: i32 = 0;

/// Where the rewritten connection goes.
#[derive(Clone, Copy)]
enum Rewrite {
    V4,
    Mapped,
    V6,
}

#[inline(always)]
fn raw(ctx: &SockAddrContext) -> *mut bpf_sock_addr {
    ctx.sock_addr
}

#[inline(always)]
fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: the context of a `bpf_sock_addr` program is valid while it runs.
    unsafe { (*raw(ctx)).__bindgen_anon_1.sk }
}

#[inline(always)]
fn port(ctx: &SockAddrContext) -> u16 {
    // SAFETY: as above. The kernel keeps the port in the low half, in network byte order.
    unsafe { (*raw(ctx)).user_port as u16 }
}

#[inline(always)]
fn set_port(ctx: &SockAddrContext, network_order: u16) {
    // SAFETY: as above; the field is writable in these hooks.
    unsafe { ptr::write_volatile(&raw mut (*raw(ctx)).user_port, u32::from(network_order)) };
}

#[inline(always)]
fn set_v4(ctx: &SockAddrContext, network_order: u32) {
    // SAFETY: as above.
    unsafe { ptr::write_volatile(&raw mut (*raw(ctx)).user_ip4, network_order) };
}

#[inline(always)]
fn addr6(ctx: &SockAddrContext) -> Addr {
    // SAFETY: as above. Word by word, because the verifier checks each access to the context.
    unsafe {
        let words = &raw const (*raw(ctx)).user_ip6;
        let word = |i: usize| ptr::read_volatile(words.cast::<u32>().add(i));
        Addr { words: [word(0), word(1), word(2), word(3)] }
    }
}

#[inline(always)]
fn set_v6(ctx: &SockAddrContext, addr: &Addr) {
    // SAFETY: as above.
    unsafe {
        let words = (&raw mut (*raw(ctx)).user_ip6).cast::<u32>();
        ptr::write_volatile(words, addr.words[0]);
        ptr::write_volatile(words.add(1), addr.words[1]);
        ptr::write_volatile(words.add(2), addr.words[2]);
        ptr::write_volatile(words.add(3), addr.words[3]);
    }
}

#[inline(always)]
pub(crate) fn connect4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: as above.
    let dst = Addr::v4(unsafe { (*raw(ctx)).user_ip4 });
    connect(ctx, Hook::Connect4, &dst, Rewrite::V4)
}

#[inline(always)]
pub(crate) fn connect6(ctx: &SockAddrContext) -> i32 {
    let dst = addr6(ctx);
    connect(ctx, Hook::Connect6, &dst, if dst.is_v4() { Rewrite::Mapped } else { Rewrite::V6 })
}

#[inline(always)]
fn connect(ctx: &SockAddrContext, hook: Hook, dst: &Addr, rewrite: Rewrite) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let (protocol, netns_cookie) = unsafe { ((*raw(ctx)).protocol, bpf_get_netns_cookie(ctx.as_ptr())) };
    if protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP {
        count(hook, Reason::NotTcp);
        return ALLOW;
    }
    // SAFETY: the value is copied at once; an entry that is being replaced has the same addresses.
    let Some(workload) = (unsafe { WORKLOADS.get(netns_cookie) }).copied() else {
        count(hook, Reason::NotEnrolled);
        return ALLOW;
    };
    let reason = if workload.is_let_go() {
        Reason::NotEnrolled
    } else if is_proxy() {
        Reason::ProxySocket
    } else {
        judge(ctx, &workload, netns_cookie, dst, protocol)
    };
    match reason.verdict() {
        Verdict::Pass => {
            // A socket can be disconnected and used again; then it answers for itself.
            captured_sockets().delete(socket(ctx).cast::<c_void>());
            count(hook, reason);
            ALLOW
        }
        Verdict::Proxy => {
            match rewrite {
                Rewrite::V4 => set_v4(ctx, Addr::LOCALHOST_V4.words[3]),
                Rewrite::Mapped => set_v6(ctx, &Addr::LOCALHOST_V4),
                Rewrite::V6 => set_v6(ctx, &Addr::LOCALHOST_V6),
            }
            set_port(ctx, OUTBOUND_PORT.to_be());
            count(hook, reason);
            ALLOW
        }
        Verdict::Refuse | Verdict::Drop => {
            let src = Addr { words: [0, 0, MAPPED, workload.v4] };
            let src = if dst.is_v4() { &src } else { &workload.v6 };
            let subject = Subject { netns_cookie, src, dst, src_port: 0, dst_port: port(ctx), tcp_flags: 0 };
            refuse(hook, reason, &subject);
            // SAFETY: a helper on the running program's return value (Linux 5.18).
            unsafe { bpf_set_retval(-ECONNREFUSED) };
            DENY
        }
    }
}

/// Whether the proxy itself connects: on Kubernetes its cgroup is among those of the pods.
#[inline(always)]
fn is_proxy() -> bool {
    // SAFETY: a helper about the calling task; `connect` is called by the task that wants it.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    // SAFETY: only whether there is a value is asked.
    unsafe { PROXY_CGROUPS.get(cgroup) }.is_some()
}

/// Decides, and for a captured connection leaves the note at the socket.
#[inline(always)]
fn judge(ctx: &SockAddrContext, workload: &Workload, netns_cookie: u64, dst: &Addr, protocol: u32) -> Reason {
    let reason = decide::connect(workload, dst, u16::from_be(port(ctx)));
    if !matches!(reason, Reason::Captured) {
        return reason;
    }
    if protocol == IPPROTO_MPTCP {
        return Reason::MptcpSocket;
    }
    let sk = socket(ctx);
    // SAFETY: the kernel gives a full socket to these hooks.
    let bound = unsafe { (*sk).bound_dev_if };
    if bound != 0 && bound != LOOPBACK_IFINDEX && !unbind(ctx) {
        return Reason::BoundDevice;
    }
    let mut note = Captured { dst: *dst, netns_cookie, port: port(ctx), reserved: 0, slot: workload.slot };
    // SAFETY: as above.
    let stored = unsafe { CAPTURED_SOCKETS.get_or_insert_ptr_mut(ctx, Some(&mut note)) };
    if stored.is_null() {
        return Reason::StorageFull;
    }
    // A second `connect` of a socket finds its first note.
    // SAFETY: not null, and nobody else writes to this socket's storage while its `connect` holds the socket.
    unsafe { *stored = note };
    Reason::Captured
}

/// A socket bound to the workload's interface cannot reach loopback. Fails for an application without `CAP_NET_RAW`.
#[inline(always)]
fn unbind(ctx: &SockAddrContext) -> bool {
    let mut nowhere = [0_u8; 4];
    // SAFETY: the buffer is larger than the length given.
    unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, SO_BINDTODEVICE, nowhere.as_mut_ptr().cast(), 4) == 0 }
}

#[inline(always)]
fn note(ctx: &SockAddrContext) -> Option<Captured> {
    let stored = captured_sockets().get(socket(ctx).cast());
    // SAFETY: the pointer is into this socket's storage, which lives as long as the socket.
    (!stored.is_null()).then(|| unsafe { *stored })
}

#[inline(always)]
pub(crate) fn getpeername4(ctx: &SockAddrContext) -> i32 {
    if let Some(note) = note(ctx) {
        set_v4(ctx, note.dst.words[3]);
        set_port(ctx, note.port);
    }
    ALLOW
}

#[inline(always)]
pub(crate) fn getpeername6(ctx: &SockAddrContext) -> i32 {
    if let Some(note) = note(ctx) {
        set_v6(ctx, &note.dst);
        set_port(ctx, note.port);
    }
    ALLOW
}

#[inline(always)]
fn own_workload(ctx: &SockAddrContext) -> Option<Workload> {
    let note = note(ctx)?;
    // SAFETY: copied at once.
    unsafe { WORKLOADS.get(note.netns_cookie) }.copied()
}

#[inline(always)]
pub(crate) fn getsockname4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let local = Addr::v4(unsafe { (*raw(ctx)).user_ip4 });
    if local.is_default_loopback()
        && let Some(workload) = own_workload(ctx)
        && workload.v4 != 0
    {
        set_v4(ctx, workload.v4);
    }
    ALLOW
}

#[inline(always)]
pub(crate) fn getsockname6(ctx: &SockAddrContext) -> i32 {
    let local = addr6(ctx);
    if local.is_default_loopback()
        && let Some(workload) = own_workload(ctx)
    {
        if local.is_v4() {
            if workload.v4 != 0 {
                set_v6(ctx, &Addr::v4(workload.v4));
            }
        } else if workload.v6.words[0] != 0 {
            set_v6(ctx, &workload.v6);
        }
    }
    ALLOW
}
