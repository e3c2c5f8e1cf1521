//! Entries of a pinned map, written behind everybody's back: how a test fills one.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_OBJ_GET: libc::c_int = 7;

/// Attributes of the commands above: a map and an entry, or a path.
#[repr(C)]
#[derive(Default)]
struct Attr {
    first: u64,
    second: u64,
    third: u64,
    flags: u64,
}

/// A map.
pub struct BpfMap(OwnedFd);

impl BpfMap {
    /// Opens what is pinned at `path`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
        let fd = bpf(BPF_OBJ_GET, &mut Attr { first: path.as_ptr() as u64, ..Attr::default() })?;
        // SAFETY: the kernel has just returned this descriptor to us alone.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) }))
    }

    /// Creates or replaces an entry; key and value as the map has them.
    pub fn put(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        bpf(BPF_MAP_UPDATE_ELEM, &mut self.entry(key, value.as_ptr() as u64)).map(drop)
    }

    /// Removes an entry.
    pub fn remove(&self, key: &[u8]) -> io::Result<()> {
        bpf(BPF_MAP_DELETE_ELEM, &mut self.entry(key, 0)).map(drop)
    }

    fn entry(&self, key: &[u8], value: u64) -> Attr {
        let map = u64::from(self.0.as_raw_fd().cast_unsigned());
        Attr { first: map, second: key.as_ptr() as u64, third: value, flags: 0 }
    }
}

fn bpf(command: libc::c_int, attr: &mut Attr) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a prefix of `union bpf_attr` for these commands (a 32-bit descriptor and its padding are one
    // 64-bit word on little-endian machines), its size is given, and the callers keep the buffers alive.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<Attr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
