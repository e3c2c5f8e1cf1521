//! A `sock_ops` program of somebody else at a workload's cgroup: it asks for a callback with each round-trip time and
//! counts how often it is called.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const MAP_TYPE_ARRAY: u32 = 2;
const PROG_TYPE_SOCK_OPS: u32 = 13;
const CGROUP_SOCK_OPS: u32 = 3;

/// The program; it is detached when this is dropped.
pub struct RttCounter {
    map: OwnedFd,
    _link: OwnedFd,
}

impl RttCounter {
    /// Attaches it.
    pub fn attach(cgroup: &Path) -> io::Result<Self> {
        let directory = File::open(cgroup)?;
        // Type, sizes of key and value, entries.
        let map = bpf_fd(BPF_MAP_CREATE, &mut [MAP_TYPE_ARRAY, 4, 8, 1])?;
        let instructions = instructions(map.as_raw_fd());
        let (code, license) = (split(instructions.as_ptr() as u64), split(c"GPL".as_ptr() as u64));
        let length = u32::try_from(instructions.len()).map_err(io::Error::other)?;
        let mut load = [PROG_TYPE_SOCK_OPS, length, code[0], code[1], license[0], license[1]];
        let program = bpf_fd(BPF_PROG_LOAD, &mut load)?;
        let mut link = [number(program.as_raw_fd()), number(directory.as_raw_fd()), CGROUP_SOCK_OPS, 0];
        Ok(Self { map, _link: bpf_fd(BPF_LINK_CREATE, &mut link)? })
    }

    /// How often it was called back.
    pub fn calls(&self) -> io::Result<u64> {
        let (key, mut value) = (0_u32, 0_u64);
        let (from, to) = (split((&raw const key) as u64), split((&raw mut value) as u64));
        bpf(BPF_MAP_LOOKUP_ELEM, &mut [number(self.map.as_raw_fd()), 0, from[0], from[1], to[0], to[1]])?;
        Ok(value)
    }
}

/// At `BPF_SOCK_OPS_TCP_CONNECT_CB` asks for `BPF_SOCK_OPS_RTT_CB`, at that one counts.
fn instructions(map: RawFd) -> [u64; 19] {
    /// `struct bpf_insn`: code, registers (source and destination), offset, immediate.
    fn insn(code: u8, registers: u8, offset: i16, immediate: i32) -> u64 {
        u64::from(code)
            | u64::from(registers) << 8
            | u64::from(offset.cast_unsigned()) << 16
            | u64::from(immediate.cast_unsigned()) << 32
    }
    [
        insn(0xbf, 0x16, 0, 0),   // r6 = r1
        insn(0x61, 0x62, 0, 0),   // r2 = op
        insn(0x15, 0x02, 11, 3),  // connect: to `set`
        insn(0x55, 0x02, 13, 12), // no round-trip time: to the end
        insn(0x62, 0x0a, -4, 0),  // key = 0
        insn(0xbf, 0xa2, 0, 0),   // r2 = stack
        insn(0x07, 0x02, 0, -4),  // r2 -= 4
        insn(0x18, 0x11, 0, map), // r1 = map
        0,
        insn(0x85, 0, 0, 1),    // bpf_map_lookup_elem
        insn(0x15, 0x00, 6, 0), // none: to the end
        insn(0x79, 0x01, 0, 0), // r1 = *r0
        insn(0x07, 0x01, 0, 1), // r1 += 1
        insn(0x7b, 0x10, 0, 0), // *r0 = r1
        insn(0xbf, 0x61, 0, 0), // set: r1 = r6
        insn(0xb7, 0x02, 0, 8), // r2 = BPF_SOCK_OPS_RTT_CB_FLAG
        insn(0x85, 0, 0, 59),   // bpf_sock_ops_cb_flags_set
        insn(0xb7, 0x00, 0, 1), // r0 = 1
        insn(0x95, 0, 0, 0),
    ]
}

fn number(fd: RawFd) -> u32 {
    fd.cast_unsigned()
}

/// A 64-bit field as two 32-bit ones.
fn split(word: u64) -> [u32; 2] {
    let bytes = word.to_ne_bytes();
    let half = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    [half(0), half(4)]
}

fn bpf(command: libc::c_int, fields: &mut [u32]) -> io::Result<RawFd> {
    // The kernel reads 64-bit fields, which must be aligned.
    let mut attr = [0_u64; 8];
    for (at, pair) in fields.chunks(2).enumerate() {
        attr[at] = u64::from(pair[0]) | u64::from(pair.get(1).copied().unwrap_or_default()) << 32;
    }
    // SAFETY: the fields are a prefix of `union bpf_attr` for the command, and what they point to lives in the caller.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(&attr)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { RawFd::try_from(result).map_err(io::Error::other) }
}

fn bpf_fd(command: libc::c_int, fields: &mut [u32]) -> io::Result<OwnedFd> {
    let fd = bpf(command, fields)?;
    // SAFETY: the kernel has just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
