//! Counters and events.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use mesh_ebpf_common::abi::{Addr, Event};
use mesh_ebpf_common::maps::{EVENT_WINDOW_NS, EVENTS_PER_WINDOW};
use mesh_ebpf_common::outcome::{Hook, Reason, counter_index};

use crate::maps::{COUNTERS, EVENT_BUDGET, EVENTS};
use crate::segment::Ends;

/// Counts an outcome on this CPU.
#[inline(always)]
pub(crate) fn count(hook: Hook, reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(counter_index(hook, reason)) {
        // SAFETY: the slot is this CPU's own, and programs are not preempted by others at the same slot's hook.
        unsafe { *counter += 1 };
    }
}

/// What an event says beside hook and reason.
pub(crate) struct Subject<'a> {
    pub(crate) netns_cookie: u64,
    pub(crate) src: &'a Addr,
    pub(crate) dst: &'a Addr,
    /// Network byte order.
    pub(crate) src_port: u16,
    /// Network byte order.
    pub(crate) dst_port: u16,
    pub(crate) tcp_flags: u8,
}

/// Counts a drop or refusal and, within this CPU's budget, sends an event.
#[inline(always)]
pub(crate) fn refuse(hook: Hook, reason: Reason, subject: &Subject<'_>) {
    count(hook, reason);
    let Some(budget) = EVENT_BUDGET.get_ptr_mut(0) else { return };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the slot is this CPU's own and not null.
    let budget = unsafe { &mut *budget };
    if now.wrapping_sub(budget.window_ns) > EVENT_WINDOW_NS {
        budget.window_ns = now;
        budget.sent = 0;
    }
    if budget.sent >= EVENTS_PER_WINDOW {
        budget.suppressed += 1;
        return;
    }
    let event = Event {
        at_ns: now,
        netns_cookie: subject.netns_cookie,
        src: *subject.src,
        dst: *subject.dst,
        src_port: subject.src_port,
        dst_port: subject.dst_port,
        hook: hook as u8,
        reason: reason as u8,
        tcp_flags: subject.tcp_flags,
        reserved: 0,
    };
    match EVENTS.output(event, 0) {
        Ok(()) => budget.sent += 1,
        Err(_ring_is_full) => budget.suppressed += 1,
    }
}

/// As [`refuse`], for a packet of which no more is known than between whom it goes.
#[inline(always)]
pub(crate) fn refuse_unread(hook: Hook, reason: Reason, ends: &Ends) {
    let subject = Subject { netns_cookie: 0, src: &ends.src, dst: &ends.dst, src_port: 0, dst_port: 0, tcp_flags: 0 };
    refuse(hook, reason, &subject);
}
