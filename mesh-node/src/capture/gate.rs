//! The gate of a workload's namespace: new connections come in by interfaces that are guarded, or not at all.
//!
//! What is attached to interfaces guards those that were there. One that comes later has nothing until somebody
//! attaches to it, and nobody may be there to do that. `sk_lookup` is the namespace's: the kernel asks it for the listener
//! of every new connection, whatever the interface. Such a program cannot learn which namespace it runs for, so that each
//! has a gate of its own, put together here, with the guarded interfaces as constants.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use mesh_ebpf_common::outcome::{Hook, Reason, counter_index};

use super::pins::GATE;
use super::sys::{self, AttachType, Target};

const NAME: [u8; 16] = *b"mesh_gate\0\0\0\0\0\0\0";
/// `protocol` and `ingress_ifindex` in `struct bpf_sk_lookup`; the second since Linux 5.17. For a connection within the
/// namespace it is the interface that has the destination's address.
const PROTOCOL: i16 = 12;
const INGRESS_IFINDEX: i16 = 64;
/// Interfaces that are never the outside: none (a program asks, without a packet), and loopback.
const INSIDE: [u32; 2] = [0, 1];

/// Lets new connections in by `guarded` interfaces and loopback only; takes the place of the last gate without a gap.
pub(super) fn set(
    directory: &Path,
    netns: BorrowedFd<'_>,
    counters: BorrowedFd<'_>,
    guarded: &[u32],
) -> io::Result<()> {
    put(directory, netns, load(counters, guarded)?.as_fd())
}

/// A gate that is made beforehand, for a namespace that could not be captured as a whole: nothing comes in from outside. To
/// set it takes no more descriptors than it holds, because that these ran out may be the reason.
pub(super) struct ShutGate {
    program: OwnedFd,
    spare: OwnedFd,
}

impl ShutGate {
    /// Makes it.
    pub(super) fn prepare(counters: BorrowedFd<'_>) -> io::Result<Self> {
        let program = load(counters, &[])?;
        let spare = program.try_clone()?;
        Ok(Self { program, spare })
    }

    /// Sets it.
    pub(super) fn set(self, directory: &Path, netns: BorrowedFd<'_>) -> io::Result<()> {
        drop(self.spare);
        put(directory, netns, self.program.as_fd())
    }
}

fn load(counters: BorrowedFd<'_>, guarded: &[u32]) -> io::Result<OwnedFd> {
    let interfaces: Vec<u32> = INSIDE.iter().chain(guarded).copied().collect();
    sys::load_lookup(NAME, &instructions(&interfaces, counters)?)
}

fn put(directory: &Path, netns: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let pin = directory.join(GATE);
    match sys::open_pin(&pin) {
        Ok(link) => sys::update_link(link.as_fd(), program),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let link = sys::link(program, Target::Fd(netns), AttachType::SkLookup, 0)?;
            sys::pin(link.as_fd(), &pin)
        }
        Err(error) => Err(error),
    }
}

/// Passes what is not TCP and what comes by `interfaces`; counts and refuses the rest.
fn instructions(interfaces: &[u32], counters: BorrowedFd<'_>) -> io::Result<Vec<u64>> {
    use op::{ADD, CALL, EXIT, JEQ, JNE, LOAD_U32, LOAD_U64, MAP_FD, MOV, MOV_REGISTER, STORE_U32, STORE_U64};
    const R0: u8 = 0;
    const R1: u8 = 1;
    const R2: u8 = 2;
    const STACK: u8 = 10;
    const MAP_LOOKUP_ELEM: i32 = 1;
    const PSEUDO_MAP_FD: u8 = 1;
    let counter = counter_index(Hook::Lookup, Reason::UnguardedInterface).cast_signed();
    let refuse = [
        insn(STORE_U32, STACK, 0, -4, counter),
        insn(MOV_REGISTER, R2, STACK, 0, 0),
        insn(ADD, R2, 0, 0, -4),
        insn(MAP_FD, R1, PSEUDO_MAP_FD, 0, counters.as_raw_fd()),
        0,
        insn(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        insn(JEQ, R0, 0, 3, 0),
        insn(LOAD_U64, R1, R0, 0, 0),
        insn(ADD, R1, 0, 0, 1),
        insn(STORE_U64, R0, R1, 0, 0),
        insn(MOV, R0, 0, 0, 0),
        insn(EXIT, 0, 0, 0, 0),
    ];
    let pass = [insn(MOV, R0, 0, 0, 1), insn(EXIT, 0, 0, 0, 0)];
    // A jump counts from the instruction behind it.
    let to_pass = |behind: usize| i16::try_from(behind + refuse.len()).map_err(io::Error::other);
    let mut all = vec![
        insn(LOAD_U32, R2, R1, PROTOCOL, 0),
        insn(JNE, R2, 0, to_pass(1 + interfaces.len())?, libc::IPPROTO_TCP),
        insn(LOAD_U32, R2, R1, INGRESS_IFINDEX, 0),
    ];
    for (at, interface) in interfaces.iter().enumerate() {
        all.push(insn(JEQ, R2, 0, to_pass(interfaces.len() - 1 - at)?, interface.cast_signed()));
    }
    all.extend(refuse);
    all.extend(pass);
    Ok(all)
}

/// Operation codes of the kernel's virtual machine.
mod op {
    pub(super) const ADD: u8 = 0x07;
    pub(super) const JEQ: u8 = 0x15;
    pub(super) const MAP_FD: u8 = 0x18;
    pub(super) const JNE: u8 = 0x55;
    pub(super) const LOAD_U32: u8 = 0x61;
    pub(super) const STORE_U32: u8 = 0x62;
    pub(super) const LOAD_U64: u8 = 0x79;
    pub(super) const STORE_U64: u8 = 0x7b;
    pub(super) const CALL: u8 = 0x85;
    pub(super) const EXIT: u8 = 0x95;
    pub(super) const MOV: u8 = 0xb7;
    pub(super) const MOV_REGISTER: u8 = 0xbf;
}

/// `struct bpf_insn` on a little-endian machine.
fn insn(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> u64 {
    u64::from(code)
        | u64::from(src << 4 | dst) << 8
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(immediate.cast_unsigned()) << 32
}
