//! What can fail in the kernel-facing part.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// An error of capture: what failed, on what, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The binary has no kernel programs in it.
    #[error("built without the eBPF object: run cargo xtask build")]
    NoObject,
    /// The kernel did not take the programs.
    #[error("load the kernel programs (needs CAP_BPF, CAP_NET_ADMIN and Linux 6.1 or newer)")]
    Load(#[source] Box<aya::EbpfError>),
    /// The kernel refused one program.
    #[error("load kernel program {program}")]
    Program {
        /// Its name.
        program: &'static str,
        /// The verifier's answer.
        source: Box<aya::programs::ProgramError>,
    },
    /// The object has no program of this name.
    #[error("the eBPF object has no program {0}: run cargo xtask build")]
    NoProgram(&'static str),
    /// The directory for pins is not on a bpffs.
    #[error("{0} is not on a BPF file system: mount -t bpf bpf {0}")]
    NotBpffs(PathBuf),
    /// Pinned by a version with another layout.
    #[error(
        "{path} was pinned by layout version {found}, this is version {ours}: run mesh-node cleanup, then start again"
    )]
    Layout {
        /// The directory.
        path: PathBuf,
        /// What is there.
        found: String,
        /// What this binary understands.
        ours: u32,
    },
    /// The pinned programs serve another cgroup.
    #[error("{pin} is attached to cgroup {found}, not to {wanted}: run mesh-node cleanup, then start again")]
    OtherCgroup {
        /// The pinned link.
        pin: PathBuf,
        /// Id of the cgroup that it is attached to.
        found: u64,
        /// The cgroup asked for.
        wanted: PathBuf,
    },
    /// The proxy would capture itself.
    #[error(
        "the proxy's cgroup {proxy} must be neither the root, nor the captured cgroup {pods}, nor above it: start the proxy in a cgroup of its own"
    )]
    ProxyCgroup {
        /// The proxy's.
        proxy: PathBuf,
        /// The captured one.
        pods: PathBuf,
    },
    /// An application listens on a port of the proxy.
    #[error("port {} in the network namespace of {uid} is held by an application (uid {owner}): the workload stays closed until it is released and the workload is enrolled again", address.port())]
    PortHeld {
        /// The workload.
        uid: String,
        /// What the application listens on.
        address: SocketAddr,
        /// User id of the application.
        owner: u32,
    },
    /// A map has no room.
    #[error("{map} is full ({entries} entries)")]
    MapFull {
        /// Its name.
        map: &'static str,
        /// Its size.
        entries: u32,
    },
    /// A workload of which only the cookie is known cannot be released.
    #[error(
        "the network namespace with cookie {cookie} is not gone, but no process is in it and it is not mounted at /run/netns: the filters on its interfaces stay until it is found or gone"
    )]
    NetnsNotFound {
        /// Its cookie.
        cookie: u64,
    },
    /// Anything else that the kernel refused.
    #[error("{what}")]
    Io {
        /// What was being done, on what.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Says what was being done when `result` failed.
pub(super) fn context<T>(result: io::Result<T>, what: impl FnOnce() -> String) -> Result<T, CaptureError> {
    result.map_err(|source| CaptureError::Io { what: what(), source })
}
