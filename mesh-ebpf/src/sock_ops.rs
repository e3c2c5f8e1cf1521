//! `sock_ops`: turns the note at a captured socket into one that the proxy can find by the peer it accepts.

use core::arch::asm;
use core::ffi::c_void;
use core::ptr;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{
    BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, BPF_TCP_FIN_WAIT2,
    bpf_sock_ops,
};
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_sock_ops_cb_flags_set};
use aya_ebpf::programs::SockOpsContext;
use mesh_ebpf_common::abi::{Addr, Captured, OriginalDst, PeerKey};
use mesh_ebpf_common::maps::MAX_CAPTURED_PER_WORKLOAD;
use mesh_ebpf_common::outcome::{Hook, Reason, Verdict};

use crate::maps::{CAPTURED, NOTE_COUNTS, WORKLOADS, captured_sockets};
use crate::report::{Subject, count, refuse};

const AF_INET: u32 = 2;
const BPF_NOEXIST: u64 = 1;
const EEXIST: i32 = -17;
/// `sock_ops` ignores the value for these callbacks.
const DONE: u32 = 1;

#[inline(always)]
pub(crate) fn on_event(ctx: &SockOpsContext) -> u32 {
    let ops = ctx.ops;
    // SAFETY: the context is valid while the program runs.
    let (op, [before, state, ..]) = unsafe { ((*ops).op, (*ops).__bindgen_anon_1.args) };
    if op == BPF_SOCK_OPS_TCP_CONNECT_CB {
        if let Some(note) = note(ops) {
            on_connect(ctx, &note);
        }
    } else if op == BPF_SOCK_OPS_STATE_CB
        && state == BPF_TCP_CLOSE
        // The client has said all, and the listener's side has acknowledged it: what it said waits for the proxy's
        // `accept` and needs its destination.
        && before != BPF_TCP_FIN_WAIT2
        && let Some(note) = note(ops)
    {
        on_close(ctx, &note);
    }
    DONE
}

#[inline(always)]
fn note(ops: *mut bpf_sock_ops) -> Option<Captured> {
    // SAFETY: as above; the verifier insists on the null check.
    let sk = unsafe { (*ops).__bindgen_anon_2.sk }.cast::<c_void>();
    if sk.is_null() {
        return None;
    }
    let stored = captured_sockets().get(sk);
    // SAFETY: into this socket's storage, which lives as long as the socket.
    (!stored.is_null()).then(|| unsafe { *stored })
}

#[inline(always)]
fn key(ops: *mut bpf_sock_ops, note: &Captured) -> PeerKey {
    // SAFETY: as above; word by word for the verifier. `local_port` is in host byte order.
    let (addr, port) = unsafe {
        let addr = if (*ops).family == AF_INET {
            Addr::v4((*ops).local_ip4)
        } else {
            let words = (&raw const (*ops).local_ip6).cast::<u32>();
            let word = |i: usize| ptr::read_volatile(words.add(i));
            Addr { words: [word(0), word(1), word(2), word(3)] }
        };
        (addr, (*ops).local_port as u16)
    };
    PeerKey { addr, netns_cookie: note.netns_cookie, port: port.to_be(), reserved: [0; 3] }
}

#[inline(always)]
fn on_connect(ctx: &SockOpsContext, note: &Captured) {
    // SAFETY: read at once; an entry that is being replaced has the same slot.
    let slot = unsafe { WORKLOADS.get(note.netns_cookie) }.map(|workload| workload.slot);
    if slot != Some(note.slot) {
        // The workload left and this socket is used again. Its slot may be another workload's now.
        return;
    }
    let key = key(ctx.ops, note);
    // SAFETY: a helper on the program's own context.
    let socket_cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let value = OriginalDst { dst: note.dst, socket_cookie, port: note.port, reserved: 0, slot: note.slot };
    let reason = file(&key, &value);
    if let Reason::Noted = reason {
        // SAFETY: as above. Other programs at this cgroup or below it may have asked for callbacks, too.
        unsafe {
            let flags = (*ctx.ops).bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG;
            bpf_sock_ops_cb_flags_set(ctx.ops, flags as i32);
        }
    }
    match reason.verdict() {
        Verdict::Pass | Verdict::Proxy => count(Hook::SockOps, reason),
        Verdict::Refuse | Verdict::Drop => {
            let subject = Subject {
                netns_cookie: note.netns_cookie,
                src: &key.addr,
                dst: &note.dst,
                src_port: key.port,
                dst_port: note.port,
                tcp_flags: 0,
            };
            refuse(Hook::SockOps, reason, &subject);
        }
    }
}

/// Enters a note, if the workload has not too many.
#[inline(always)]
fn file(key: &PeerKey, value: &OriginalDst) -> Reason {
    let Some(notes) = NOTE_COUNTS.get_ptr_mut(value.slot) else { return Reason::NotesFull };
    // Several CPUs may find room for one and enter one each: the bound is on memory, not on fairness.
    // SAFETY: a value of the map, aligned; others change it in one piece.
    if unsafe { ptr::read_volatile(notes) } >= MAX_CAPTURED_PER_WORKLOAD {
        return Reason::NotesFull;
    }
    match CAPTURED.insert(key, value, BPF_NOEXIST) {
        Ok(()) => {
            // SAFETY: a value of the map.
            unsafe { add(notes, 1) };
            Reason::Noted
        }
        Err(EEXIST) => {
            // Which of the two the proxy will see is unknown, so it shall find neither.
            if CAPTURED.remove(key).is_ok() {
                // SAFETY: as above.
                unsafe { add(notes, -1) };
            }
            Reason::NoteConflict
        }
        // E2BIG, or ENOMEM: there is no room.
        Err(_) => Reason::NotesFull,
    }
}

/// Adds in one piece. `core` has no such operation for this target, which cannot compare and swap.
///
/// # Safety
/// `counter` is a value of a map.
#[inline(always)]
unsafe fn add(counter: *mut i64, change: i64) {
    // SAFETY: as above; the instruction touches nothing else.
    unsafe { asm!("lock *(u64 *)({counter} + 0) += {change}", counter = in(reg) counter, change = in(reg) change) }
}

#[inline(always)]
fn on_close(ctx: &SockOpsContext, note: &Captured) {
    let key = key(ctx.ops, note);
    // SAFETY: a helper on the program's own context.
    let socket_cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: only one field is read, at once.
    let ours = unsafe { CAPTURED.get(key) }.is_some_and(|value| value.socket_cookie == socket_cookie);
    if ours && CAPTURED.remove(key).is_ok() {
        if let Some(notes) = NOTE_COUNTS.get_ptr_mut(note.slot) {
            // SAFETY: a value of the map.
            unsafe { add(notes, -1) };
        }
        count(Hook::SockOps, Reason::NoteRemoved);
    }
}
