//! An `AF_XDP` socket that only sends: its frames go to the driver without passing queues or tc.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use super::{Bed, Group, Netns};

const SOL_XDP: i32 = 283;
const XDP_MMAP_OFFSETS: i32 = 1;
const XDP_TX_RING: i32 = 3;
const XDP_UMEM_REG: i32 = 4;
const XDP_UMEM_FILL_RING: i32 = 5;
const XDP_UMEM_COMPLETION_RING: i32 = 6;
const XDP_PGOFF_TX_RING: i64 = 0x8000_0000;
/// Through the socket layer, as every driver can.
const XDP_COPY: u16 = 1 << 1;
const FRAME_BYTES: usize = 4096;
const RING_ENTRIES: u32 = 4;

#[repr(C)]
#[derive(Default)]
struct UmemReg {
    addr: u64,
    len: u64,
    chunk_size: u32,
    headroom: u32,
    flags: u32,
    tx_metadata_len: u32,
}

/// `struct xdp_ring_offset`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RingOffset {
    producer: u64,
    consumer: u64,
    desc: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct Offsets {
    rx: RingOffset,
    tx: RingOffset,
    fill: RingOffset,
    completion: RingOffset,
}

#[repr(C)]
struct Desc {
    addr: u64,
    len: u32,
    options: u32,
}

#[repr(C)]
struct Address {
    family: u16,
    flags: u16,
    ifindex: u32,
    queue: u32,
    shared_umem: u32,
}

/// An open socket on `eth0` of a namespace.
pub struct Xdp {
    socket: OwnedFd,
    memory: Mapping,
    ring: Mapping,
    tx: RingOffset,
    sent: u32,
}

impl Xdp {
    /// Opens it.
    pub fn open(bed: &Bed, netns: &Netns, group: Group) -> io::Result<Self> {
        let socket = bed.socket(netns, group, (libc::AF_XDP, libc::SOCK_RAW, 0));
        let bytes = FRAME_BYTES * RING_ENTRIES as usize;
        let memory = Mapping::new(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)?;
        let umem = UmemReg {
            addr: memory.at as u64,
            len: bytes as u64,
            chunk_size: u32::try_from(FRAME_BYTES).expect("small"),
            ..UmemReg::default()
        };
        set(&socket, XDP_UMEM_REG, &umem)?;
        for ring in [XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING, XDP_TX_RING] {
            set(&socket, ring, &RING_ENTRIES)?;
        }
        let tx = offsets(&socket)?.tx;
        let bytes = offset(tx.desc) + RING_ENTRIES as usize * size_of::<Desc>();
        let ring = Mapping::new(bytes, libc::MAP_SHARED | libc::MAP_POPULATE, socket.as_raw_fd(), XDP_PGOFF_TX_RING)?;
        let address = Address {
            family: u16::try_from(libc::AF_XDP).expect("small"),
            flags: XDP_COPY,
            ifindex: netns.index("eth0"),
            queue: 0,
            shared_umem: 0,
        };
        let length = libc::socklen_t::try_from(size_of::<Address>()).expect("small");
        // SAFETY: pointer and length are of one live address.
        if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { socket, memory, ring, tx, sent: 0 })
    }

    /// Sends a frame; at most as many as the ring has entries, because nobody takes completions.
    pub fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        assert!(frame.len() <= FRAME_BYTES && self.sent < RING_ENTRIES, "has room");
        let at = self.sent as usize;
        let desc =
            Desc { addr: (at * FRAME_BYTES) as u64, len: u32::try_from(frame.len()).expect("small"), options: 0 };
        self.sent += 1;
        // SAFETY: frame, descriptor and producer are inside the mappings.
        unsafe {
            ptr::copy_nonoverlapping(frame.as_ptr(), self.memory.at.cast::<u8>().add(at * FRAME_BYTES), frame.len());
            let ring = self.ring.at.cast::<u8>();
            ring.add(offset(self.tx.desc)).cast::<Desc>().add(at).write(desc);
            ring.add(offset(self.tx.producer)).cast::<u32>().write_volatile(self.sent);
            // Without a message: it only wakes the kernel.
            if libc::sendto(self.socket.as_raw_fd(), ptr::null(), 0, libc::MSG_DONTWAIT, ptr::null(), 0) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

fn offset(kernels: u64) -> usize {
    usize::try_from(kernels).expect("small")
}

struct Mapping {
    at: *mut libc::c_void,
    bytes: usize,
}

impl Mapping {
    fn new(bytes: usize, flags: i32, fd: i32, offset: i64) -> io::Result<Self> {
        // SAFETY: a new mapping, where the kernel likes.
        let at = unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, fd, offset) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { at, bytes }) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length.
        unsafe { libc::munmap(self.at, self.bytes) };
    }
}

fn set<T>(socket: &OwnedFd, option: i32, value: &T) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<T>()).expect("small");
    // SAFETY: pointer and length are of one live value.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), SOL_XDP, option, ptr::from_ref(value).cast(), length) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn offsets(socket: &OwnedFd) -> io::Result<Offsets> {
    let mut offsets = Offsets::default();
    let mut length = libc::socklen_t::try_from(size_of::<Offsets>()).expect("small");
    // SAFETY: the buffer has the length given.
    let got = unsafe {
        let to = (&raw mut offsets).cast();
        libc::getsockopt(socket.as_raw_fd(), SOL_XDP, XDP_MMAP_OFFSETS, to, &raw mut length)
    };
    if got == 0 { Ok(offsets) } else { Err(io::Error::last_os_error()) }
}
