//! All maps. Names and sizes are those of `mesh_ebpf_common::maps`; the loader pins every one.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf, SkStorage, SockHash};
use aya_ebpf::helpers::generated::{bpf_sk_storage_delete, bpf_sk_storage_get};
use aya_ebpf::macros::btf_map;
use mesh_ebpf_common::abi::{
    Captured, Event, EventBudget, FlowKey, HostFlow, ListenerKey, ListenerTag, OriginalDst, PeerKey, SynNote, Workload,
};
use mesh_ebpf_common::maps as size;
use mesh_ebpf_common::outcome;

#[btf_map]
pub(crate) static WORKLOADS: HashMap<u64, Workload, { size::MAX_WORKLOADS }> = HashMap::new();
#[btf_map]
pub(crate) static PROXY_CGROUPS: HashMap<u64, u64, { size::MAX_PROXY_CGROUPS }> = HashMap::new();
#[btf_map]
pub(crate) static CAPTURED_SOCKETS: SkStorage<Captured> = SkStorage::new();
#[btf_map]
pub(crate) static CAPTURED: HashMap<PeerKey, OriginalDst, { size::MAX_CAPTURED }> = HashMap::new();
#[btf_map]
pub(crate) static NOTE_COUNTS: Array<i64, { size::MAX_WORKLOADS }, { BPF_F_MMAPABLE as usize }> = Array::new();
#[btf_map]
pub(crate) static LISTENER_TAGS: SkStorage<ListenerTag> = SkStorage::new();
#[btf_map]
pub(crate) static LISTENERS: SockHash<ListenerKey, { size::MAX_LISTENERS }> = SockHash::new();
#[btf_map]
pub(crate) static PREEXISTING: HashMap<u64, u64, { size::MAX_PREEXISTING }> = HashMap::new();
#[btf_map]
pub(crate) static SYN_NOTES: LruHashMap<FlowKey, SynNote, { size::MAX_SYN_NOTES }> = LruHashMap::new();
#[btf_map]
pub(crate) static HOST_FLOWS: LruHashMap<FlowKey, HostFlow, { size::MAX_HOST_FLOWS }> = LruHashMap::new();
#[btf_map]
pub(crate) static COUNTERS: PerCpuArray<u64, { outcome::COUNTERS }> = PerCpuArray::new();
#[btf_map]
pub(crate) static EVENTS: RingBuf<Event, { size::EVENT_RING_BYTES }> = RingBuf::new();
#[btf_map]
pub(crate) static EVENT_BUDGET: PerCpuArray<EventBudget, 1> = PerCpuArray::new();
#[btf_map]
pub(crate) static LAYOUT: Array<u32, 1> = Array::new();

/// Socket storage by socket pointer; `aya` offers it for `connect` hooks only.
pub(crate) struct Storage<T>(pub(crate) *const SkStorage<T>);

impl<T> Storage<T> {
    /// The stored value, null if there is none. `sk` is a full socket that the kernel gave to the program.
    #[inline(always)]
    pub(crate) fn get(&self, sk: *mut c_void) -> *mut T {
        // SAFETY: the map symbol is relocated to a socket storage map of `T`; the verifier checks `sk`.
        unsafe { bpf_sk_storage_get(self.0.cast_mut().cast(), sk, ptr::null_mut(), 0) }.cast()
    }

    /// Removes the stored value, if there is one.
    #[inline(always)]
    pub(crate) fn delete(&self, sk: *mut c_void) {
        // SAFETY: as above. A missing entry is what the caller wants.
        let _absent_is_fine = unsafe { bpf_sk_storage_delete(self.0.cast_mut().cast(), sk) };
    }
}

/// Storage of captured sockets.
#[inline(always)]
pub(crate) fn captured_sockets() -> Storage<Captured> {
    Storage(&raw const CAPTURED_SOCKETS)
}

/// Storage of the proxy's plaintext listeners.
#[inline(always)]
pub(crate) fn listener_tags() -> Storage<ListenerTag> {
    Storage(&raw const LISTENER_TAGS)
}
