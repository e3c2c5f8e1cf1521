//! `sk_lookup`: carries out the notes of tc ingress. Without a note the kernel's own choice stands, because the
//! proxy's connections to the application come this way, too.

use core::ptr;

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::programs::SkLookupContext;
use mesh_ebpf_common::abi::{Addr, FlowKey, ListenerKey};
use mesh_ebpf_common::maps::SYN_NOTE_VALID_NS;
use mesh_ebpf_common::outcome::{Hook, Reason};

use crate::maps::{LISTENERS, SYN_NOTES};
use crate::report::count;

const IPPROTO_TCP: u32 = 6;
const AF_INET: u32 = 2;
const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;

#[inline(always)]
pub(crate) fn on_lookup(ctx: &SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    // SAFETY: the context is valid while the program runs.
    let (protocol, family) = unsafe { ((*lookup).protocol, (*lookup).family) };
    if protocol != IPPROTO_TCP {
        return SK_PASS;
    }
    let key = flow(ctx, family);
    // SAFETY: copied at once.
    let Some(note) = (unsafe { SYN_NOTES.get(key) }).copied() else { return SK_PASS };
    let _raced_away = SYN_NOTES.remove(key);
    // SAFETY: a helper without arguments.
    if unsafe { bpf_ktime_get_ns() }.wrapping_sub(note.noted_ns) > SYN_NOTE_VALID_NS {
        return SK_PASS;
    }
    let listener = ListenerKey { netns_cookie: note.netns_cookie, family, reserved: 0 };
    if note.netns_cookie != 0 && LISTENERS.redirect_sk_lookup(ctx, listener, 0).is_ok() {
        count(Hook::Lookup, Reason::LookupAssigned);
        return SK_PASS;
    }
    count(Hook::Lookup, Reason::LookupRefused);
    SK_DROP
}

#[inline(always)]
fn flow(ctx: &SkLookupContext, family: u32) -> FlowKey {
    let lookup = ctx.lookup;
    // SAFETY: as above; word by word for the verifier. The local port is in host byte order, the remote one is not.
    unsafe {
        let (local, remote) = if family == AF_INET {
            (Addr::v4((*lookup).local_ip4), Addr::v4((*lookup).remote_ip4))
        } else {
            let local = (&raw const (*lookup).local_ip6).cast::<u32>();
            let remote = (&raw const (*lookup).remote_ip6).cast::<u32>();
            let word = |words: *const u32, i: usize| ptr::read_volatile(words.add(i));
            (
                Addr { words: [word(local, 0), word(local, 1), word(local, 2), word(local, 3)] },
                Addr { words: [word(remote, 0), word(remote, 1), word(remote, 2), word(remote, 3)] },
            )
        };
        FlowKey {
            local,
            remote,
            local_port: ((*lookup).local_port as u16).to_be(),
            remote_port: (*lookup).remote_port,
            reserved: 0,
        }
    }
}
