//! The `bpf(2)` calls that aya does not offer: links of every kind in one way, and maps by descriptor and ABI type.

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::AtomicI64;

use mesh_ebpf_common::abi::{Addr, ListenerKey, ListenerTag, OriginalDst, PeerKey, Workload};

const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;

/// Where a link attaches, `enum bpf_attach_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum AttachType {
    SockOps = 3,
    Connect4 = 10,
    Connect6 = 11,
    Getpeername4 = 29,
    Getpeername6 = 30,
    Getsockname4 = 31,
    Getsockname6 = 32,
    SkLookup = 36,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// Attach before every program that is there.
pub(super) const BPF_F_BEFORE: u32 = 1 << 3;
/// Create or replace.
pub(super) const BPF_ANY: u64 = 0;

/// A type that is laid out as the kernel has it: `repr(C)` without padding, every bit pattern valid.
///
/// # Safety
/// The implementor promises just that.
pub(super) unsafe trait Plain: Copy + Default {}
// SAFETY: integers and the structs of `mesh_ebpf_common::abi`, whose sizes are asserted there.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for Addr {}
// SAFETY: as above.
unsafe impl Plain for ListenerKey {}
// SAFETY: as above.
unsafe impl Plain for ListenerTag {}
// SAFETY: as above.
unsafe impl Plain for OriginalDst {}
// SAFETY: as above.
unsafe impl Plain for PeerKey {}
// SAFETY: as above.
unsafe impl Plain for Workload {}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ProgramAttr {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct LinkCreateAttr {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    pad: u32,
    expected_revision: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IdAttr {
    id: u32,
    next_id: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct QueryAttr {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    pad: u32,
    prog_attach_flags: u64,
    link_ids: u64,
}

/// The head of `struct bpf_link_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LinkInfo {
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) prog_id: u32,
    pad: u32,
    /// cgroup: its id; tcx: ifindex (low half); netns: inode (low half). 0 when the target is gone.
    pub(super) target: u64,
    pub(super) attach_type: u32,
    tail: [u32; 9],
}

/// The head of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ProgramInfo {
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) tag: [u8; 8],
}

/// The head of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MapInfo {
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
    pub(super) flags: u32,
}

fn bpf<A>(command: libc::c_int, attr: &mut A) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a prefix of `union bpf_attr` for this command, and its size is given; pointers inside it are
    // to buffers that the callers in this file keep alive and that have the sizes the kernel expects.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the kernel has just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value) as u64
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Pins a program, map or link.
pub(super) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr { path: path.as_ptr() as u64, fd: raw(fd), flags: 0 };
    bpf(BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Opens what is pinned at `path`.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr { path: path.as_ptr() as u64, ..ObjectAttr::default() };
    descriptor(bpf(BPF_OBJ_GET, &mut attr)?)
}

/// Loads an `sk_lookup` program that was put together here.
pub(super) fn load_lookup(name: [u8; 16], instructions: &[u64]) -> io::Result<OwnedFd> {
    const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
    let mut attr = ProgramAttr {
        kind: BPF_PROG_TYPE_SK_LOOKUP,
        instruction_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        name,
        attach_type: AttachType::SkLookup as u32,
        ..ProgramAttr::default()
    };
    descriptor(bpf(BPF_PROG_LOAD, &mut attr)?)
}

/// What a link attaches to.
#[derive(Clone, Copy)]
pub(super) enum Target<'a> {
    /// A cgroup directory or a network namespace.
    Fd(BorrowedFd<'a>),
    /// An interface of the calling thread's network namespace.
    Interface(u32),
}

/// Attaches a program.
pub(super) fn link(program: BorrowedFd<'_>, target: Target<'_>, kind: AttachType, flags: u32) -> io::Result<OwnedFd> {
    let target = match target {
        Target::Fd(fd) => raw(fd),
        Target::Interface(index) => index,
    };
    let mut attr =
        LinkCreateAttr { prog_fd: raw(program), target, attach_type: kind as u32, flags, ..LinkCreateAttr::default() };
    descriptor(bpf(BPF_LINK_CREATE, &mut attr)?)
}

/// Replaces a link's program in place: every event is seen by the old or the new one.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr { link_fd: raw(link), new_prog_fd: raw(program), ..LinkUpdateAttr::default() };
    bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
}

fn info<T: Default>(fd: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let length = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let mut attr = InfoAttr { fd: raw(fd), length, info: std::ptr::from_mut(&mut info) as u64 };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    info(link)
}

pub(super) fn program_info(program: BorrowedFd<'_>) -> io::Result<ProgramInfo> {
    info(program)
}

pub(super) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    info(map)
}

pub(super) fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    descriptor(bpf(BPF_PROG_GET_FD_BY_ID, &mut IdAttr { id, ..IdAttr::default() })?)
}

/// Programs that a cgroup or an interface reports at one place, however many more there are.
const MAX_QUERIED: usize = 64;

/// Ids of the programs that are attached to a cgroup at one place.
pub(super) fn attached(cgroup: BorrowedFd<'_>, kind: AttachType) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; MAX_QUERIED];
    let mut attr = QueryAttr {
        target_fd: raw(cgroup),
        attach_type: kind as u32,
        prog_ids: ids.as_mut_ptr() as u64,
        count: u32::try_from(ids.len()).map_err(io::Error::other)?,
        ..QueryAttr::default()
    };
    bpf(BPF_PROG_QUERY, &mut attr)?;
    let count = usize::try_from(attr.count).unwrap_or_default().min(ids.len());
    Ok(ids[..count].to_vec())
}

/// Ids of the tcx links at one place of an interface of the calling thread's namespace; 0 for what is attached without
/// a link.
pub(super) fn links_at(interface: u32, kind: AttachType) -> io::Result<Vec<u32>> {
    let (mut programs, mut links) = ([0_u32; MAX_QUERIED], [0_u32; MAX_QUERIED]);
    let mut attr = QueryAttr {
        target_fd: interface,
        attach_type: kind as u32,
        prog_ids: programs.as_mut_ptr() as u64,
        count: u32::try_from(links.len()).map_err(io::Error::other)?,
        link_ids: links.as_mut_ptr() as u64,
        ..QueryAttr::default()
    };
    absent_is_none(bpf(BPF_PROG_QUERY, &mut attr))?;
    let count = usize::try_from(attr.count).unwrap_or_default().min(links.len());
    Ok(links[..count].to_vec())
}

fn element<K: Plain>(map: BorrowedFd<'_>, key: &K, value: u64, flags: u64) -> ElementAttr {
    ElementAttr { map_fd: raw(map), pad: 0, key: address(key), value, flags }
}

fn absent_is_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

pub(super) fn lookup<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = V::default();
    let mut attr = element(map, key, std::ptr::from_mut(&mut value) as u64, 0);
    Ok(absent_is_none(bpf(BPF_MAP_LOOKUP_ELEM, &mut attr))?.map(|_| value))
}

/// Linux 5.14 for hash maps.
pub(super) fn take<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = V::default();
    let mut attr = element(map, key, std::ptr::from_mut(&mut value) as u64, 0);
    Ok(absent_is_none(bpf(BPF_MAP_LOOKUP_AND_DELETE_ELEM, &mut attr))?.map(|_| value))
}

pub(super) fn update<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K, value: &V, flags: u64) -> io::Result<()> {
    bpf(BPF_MAP_UPDATE_ELEM, &mut element(map, key, address(value), flags)).map(drop)
}

/// Whether there was something to remove.
pub(super) fn remove<K: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    Ok(absent_is_none(bpf(BPF_MAP_DELETE_ELEM, &mut element(map, key, 0, 0)))?.is_some())
}

/// All keys; entries that come or go meanwhile may be missed. Bounded by `limit`, because a map that changes all the
/// time may never end.
pub(super) fn keys<K: Plain>(map: BorrowedFd<'_>, limit: usize) -> io::Result<Vec<K>> {
    let mut keys: Vec<K> = Vec::new();
    while keys.len() < limit {
        let mut next = K::default();
        let mut attr = ElementAttr {
            map_fd: raw(map),
            key: keys.last().map_or(0, address),
            value: std::ptr::from_mut(&mut next) as u64,
            ..ElementAttr::default()
        };
        match absent_is_none(bpf(BPF_MAP_GET_NEXT_KEY, &mut attr))? {
            Some(_) => keys.push(next),
            None => break,
        }
    }
    Ok(keys)
}

/// Number of entries of a map whose keys have `key_size` bytes.
pub(super) fn count_keys(map: BorrowedFd<'_>, key_size: usize, limit: usize) -> io::Result<usize> {
    let mut previous: Option<Vec<u8>> = None;
    let mut entries = 0;
    while entries < limit {
        let mut next = vec![0_u8; key_size];
        let mut attr = ElementAttr {
            map_fd: raw(map),
            key: previous.as_ref().map_or(0, |key| key.as_ptr() as u64),
            value: next.as_mut_ptr() as u64,
            ..ElementAttr::default()
        };
        match absent_is_none(bpf(BPF_MAP_GET_NEXT_KEY, &mut attr))? {
            Some(_) => entries += 1,
            None => break,
        }
        previous = Some(next);
    }
    Ok(entries)
}

/// The value of every CPU at `index` of a per-CPU array of `u64`.
pub(super) fn lookup_per_cpu(map: BorrowedFd<'_>, index: u32, words: &mut [u64]) -> io::Result<()> {
    bpf(BPF_MAP_LOOKUP_ELEM, &mut element(map, &index, words.as_mut_ptr() as u64, 0)).map(drop)
}

/// The values of an array of 64-bit counters (`BPF_F_MMAPABLE`, Linux 5.5), as the kernel programs see them.
pub(super) struct Counters {
    start: std::ptr::NonNull<AtomicI64>,
    entries: usize,
}

// SAFETY: shared memory of the kernel's that is only changed atomically, by all sides; it belongs to no thread.
unsafe impl Send for Counters {}
// SAFETY: as above.
unsafe impl Sync for Counters {}

impl Counters {
    pub(super) fn map(map: BorrowedFd<'_>) -> io::Result<Self> {
        let entries = usize::try_from(map_info(map)?.max_entries).map_err(io::Error::other)?;
        let (length, fd) = (entries * size_of::<AtomicI64>(), map.as_raw_fd());
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel likes; the kernel refuses more than the array has.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, access, libc::MAP_SHARED, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = std::ptr::NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, entries })
    }

    pub(super) fn get(&self, index: u32) -> Option<&AtomicI64> {
        let index = usize::try_from(index).ok().filter(|index| *index < self.entries)?;
        // SAFETY: inside the mapping, which lives as long as `self`; zeroed memory is a valid counter.
        Some(unsafe { self.start.add(index).as_ref() })
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and no reference outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.entries * size_of::<AtomicI64>()) };
    }
}

/// `getsockopt` of an integer at `SOL_SOCKET`.
pub(super) fn socket_option<T: Plain>(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: the buffer has the length given, and any bit pattern is a `T`.
    unsafe {
        let fd = socket.as_raw_fd();
        if libc::getsockopt(fd, libc::SOL_SOCKET, option, value.as_mut_ptr().cast(), &raw mut length) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(value.assume_init())
    }
}
