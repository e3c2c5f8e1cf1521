//! Names and sizes of the maps, and the bounds that the programs keep.

/// Enrolled workloads: network namespace cookie -> [`crate::abi::Workload`].
pub const WORKLOADS: &str = "WORKLOADS";
/// Cgroups of proxies: cgroup id -> 1. More than one while a new proxy takes over from an old one.
pub const PROXY_CGROUPS: &str = "PROXY_CGROUPS";
/// Socket storage of captured connections: [`crate::abi::Captured`].
pub const CAPTURED_SOCKETS: &str = "CAPTURED_SOCKETS";
/// Notes for the proxy: [`crate::abi::PeerKey`] -> [`crate::abi::OriginalDst`].
pub const CAPTURED: &str = "CAPTURED";
/// Entries that each workload has in [`CAPTURED`], by [`crate::abi::Workload::slot`]. Mapped by the proxy, which counts off
/// what it takes.
pub const NOTE_COUNTS: &str = "NOTE_COUNTS";
/// Socket storage of the proxy's plaintext listeners: [`crate::abi::ListenerTag`].
pub const LISTENER_TAGS: &str = "LISTENER_TAGS";
/// The proxy's plaintext listeners: [`crate::abi::ListenerKey`] -> socket.
pub const LISTENERS: &str = "LISTENERS";
/// Connections from before enrolment: socket cookie, which no other socket gets -> network namespace cookie.
pub const PREEXISTING: &str = "PREEXISTING";
/// Segments on their way from tc ingress to `sk_lookup`: [`crate::abi::FlowKey`] -> [`crate::abi::SynNote`].
pub const SYN_NOTES: &str = "SYN_NOTES";
/// Connections that processes of the node opened to workloads: [`crate::abi::FlowKey`] -> [`crate::abi::HostFlow`]. Written
/// at the node's ends of links only.
pub const HOST_FLOWS: &str = "HOST_FLOWS";
/// Outcomes per CPU, by [`crate::outcome::counter_index`].
pub const COUNTERS: &str = "COUNTERS";
/// Drops and refusals: [`crate::abi::Event`].
pub const EVENTS: &str = "EVENTS";
/// Per CPU, one [`crate::abi::EventBudget`].
pub const EVENT_BUDGET: &str = "EVENT_BUDGET";
/// One `u32`: [`crate::LAYOUT_VERSION`] of who created the maps.
pub const LAYOUT: &str = "LAYOUT";

/// All maps that are pinned, in the order of this file.
pub const ALL: [&str; 14] = [
    WORKLOADS,
    PROXY_CGROUPS,
    CAPTURED_SOCKETS,
    CAPTURED,
    NOTE_COUNTS,
    LISTENER_TAGS,
    LISTENERS,
    PREEXISTING,
    SYN_NOTES,
    HOST_FLOWS,
    COUNTERS,
    EVENTS,
    EVENT_BUDGET,
    LAYOUT,
];

/// Workloads of one node; Kubernetes recommends at most 110 pods, large nodes run 500.
pub const MAX_WORKLOADS: usize = 4096;
/// Proxies whose sockets may still live: one for each take-over since the oldest workload's enrolment.
pub const MAX_PROXY_CGROUPS: usize = 1024;
/// Connections between `connect` and the proxy's look-up of their destination.
pub const MAX_CAPTURED: usize = 65536;
/// Of these, of one workload: as many as wait in the proxy's backlog. A workload that keeps the proxy from taking its notes
/// takes no room from others.
pub const MAX_CAPTURED_PER_WORKLOAD: i64 = 4096;
/// Two listeners (IPv4, IPv6) per workload.
pub const MAX_LISTENERS: usize = 2 * MAX_WORKLOADS;
/// Connections from before enrolment that go on, all workloads together.
pub const MAX_PREEXISTING: usize = 65536;
/// Of these, of one workload. Its further ones end.
pub const MAX_PREEXISTING_PER_WORKLOAD: usize = 16384;
/// Notes live for microseconds; the oldest gives way.
pub const MAX_SYN_NOTES: usize = 4096;
/// Connections of the node's own processes, all workloads together: some probes a second for each of 500 pods, and what
/// stays open. The one that was not used for the longest time gives way, and ends.
pub const MAX_HOST_FLOWS: usize = 16384;
/// Bytes of the event ring.
pub const EVENT_RING_BYTES: usize = 1 << 18;

/// A segment goes from tc ingress to `sk_lookup` within one softirq; a note older than this belongs to none, nanoseconds.
pub const SYN_NOTE_VALID_NS: u64 = 1_000_000_000;
/// How long a connection of the node's goes on when both have closed it, for the last acknowledgement and lost ones,
/// nanoseconds.
pub const HOST_FLOW_LINGER_NS: u64 = 10_000_000_000;
/// Levels of cgroups that are compared with the pods'; a socket deeper down counts as a pod's. Kubernetes has eight, in nested
/// nodes.
pub const MAX_CGROUP_LEVELS: i32 = 32;
/// Length of the window in which events are limited, nanoseconds.
pub const EVENT_WINDOW_NS: u64 = 1_000_000_000;
/// Events per window and CPU; the rest is counted only.
pub const EVENTS_PER_WINDOW: u64 = 100;
/// IPv6 extension headers that are followed before a segment is dropped.
pub const MAX_EXTENSION_HEADERS: usize = 6;
