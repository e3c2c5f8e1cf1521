//! The kernel ABI: what the eBPF programs and the loader in `mesh-node` agree on.
//!
//! Keys and values of the maps ([`abi`]), names and sizes of the maps ([`maps`]), what can happen at a hook and which
//! verdict follows ([`outcome`]), and the capture decision on plain values ([`decide`]). Nothing here does I/O or
//! allocates: the same code runs in the kernel and in host unit tests.
#![no_std]

pub mod abi;
pub mod decide;
pub mod maps;
pub mod outcome;

/// Version of everything in this crate that outlives a process: the pinned maps' layouts and the pin paths.
/// Programs of one version replace each other in place; another version needs a directory of its own.
pub const LAYOUT_VERSION: u32 = 3;

/// The proxy's listener for captured outgoing connections, on loopback only.
pub const OUTBOUND_PORT: u16 = 15001;
/// The proxy's listener for incoming plaintext connections.
pub const INBOUND_PORT: u16 = 15006;
/// HBONE: HTTP/2 CONNECT over mutual TLS between proxies (Istio's port).
pub const HBONE_PORT: u16 = 15008;
/// Every port that the proxy holds inside a workload's network namespace.
pub const PROXY_PORTS: [u16; 3] = [OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT];
/// Socket mark and routing table of the proxy's own connection to the application, which carries the client's address:
/// a rule in the workload's namespace sends the answers back to the proxy. ztunnel's mark is 0x539.
pub const INNER_MARK: u32 = 0x53a;
