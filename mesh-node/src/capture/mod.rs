//! Capture: loads the kernel programs, enrols workloads, and answers where a captured connection wanted to go.
//!
//! Everything that must outlive this process is pinned in bpffs: with the proxy gone, the programs stay and refuse.
//! A new process adopts the pinned maps and puts its own programs in the place of the old ones.
//! All functions block (system calls, and threads that enter a namespace); none is for a runtime's thread except
//! [`Capture::original_dst`], which is one system call. It decides nothing about traffic: that is
//! `mesh_ebpf_common::decide`.
#![allow(unsafe_code)]

mod cgroup;
mod cleanup;
mod clsact;
mod enroll;
mod error;
mod events;
mod gate;
mod guard;
mod inner_route;
mod inspect;
mod netlink;
mod netns;
mod node_end;
mod notes;
mod pins;
mod programs;
mod sock_diag;
mod sys;
mod sysctl;
mod tc;
mod watch;

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use mesh_ebpf_common::abi::Workload;
use mesh_ebpf_common::{LAYOUT_VERSION, maps};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

pub use cgroup::{kubernetes_cgroup, own_cgroup};
pub use cleanup::{cleanup, is_serving};
pub use enroll::{EnrollRequest, Enrollment};
pub use error::CaptureError;
pub use events::{CaptureEvent, Events};
pub use inspect::{Count, MapRow, ProgramRow, attached_to_cgroup};
pub use netns::{Interface, LinkLayer, in_netns, netns_cookie};
pub use programs::object_size;

use error::context;
use pins::Pins;
use programs::Programs;
use watch::Watches;

/// How programs attach to interfaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TcMode {
    /// tcx where the kernel has it (6.6), else clsact.
    #[default]
    Auto,
    /// clsact everywhere.
    Clsact,
}

/// What the loader needs to know.
#[derive(Clone, Debug)]
pub struct CaptureConfig {
    /// A directory on a BPF file system; pins go to `v3/` below it.
    pub bpffs: PathBuf,
    /// The cgroup v2 directory above all workloads.
    pub pods_cgroup: PathBuf,
    /// The cgroup v2 directory of the proxy: sockets of processes in it are the proxy's. See [`own_cgroup`].
    pub proxy_cgroup: PathBuf,
    /// How to attach to interfaces.
    pub tc: TcMode,
    /// Entries of maps by name, where the defaults do not fit. Maps that are pinned already keep their size.
    pub map_entries: Vec<(&'static str, u32)>,
}

impl CaptureConfig {
    /// With defaults.
    pub fn new(bpffs: impl Into<PathBuf>, pods_cgroup: impl Into<PathBuf>, proxy_cgroup: impl Into<PathBuf>) -> Self {
        Self {
            bpffs: bpffs.into(),
            pods_cgroup: pods_cgroup.into(),
            proxy_cgroup: proxy_cgroup.into(),
            tc: TcMode::Auto,
            map_entries: Vec::new(),
        }
    }
}

/// The kernel's part of the mesh on this node.
pub struct Capture {
    pins: Pins,
    /// The network namespace of the node, where workloads' links end.
    node: OwnedFd,
    tc: TcMode,
    /// The proxy's.
    proxy_cgroup: PathBuf,
    programs: Mutex<Programs>,
    maps: PinnedMaps,
    watches: Watches,
}

/// Descriptors of the maps that user space reads and writes.
struct PinnedMaps {
    workloads: OwnedFd,
    proxy_cgroups: OwnedFd,
    captured: OwnedFd,
    note_counts: sys::Counters,
    listener_tags: OwnedFd,
    listeners: OwnedFd,
    preexisting: OwnedFd,
    counters: OwnedFd,
    event_budget: OwnedFd,
    layout: OwnedFd,
}

/// A workload that the kernel knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Adopted {
    /// Cookie of its network namespace.
    pub cookie: u64,
    /// Its IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub v6: Option<Ipv6Addr>,
}

/// What a table says of a key by having it; any value would do.
const PRESENT: u64 = 1;

impl Capture {
    /// Loads the programs and attaches them, or adopts what an earlier process pinned and replaces its programs. The
    /// calling thread's network namespace is the node's.
    ///
    /// From the first call on, connections of enrolled workloads are captured without a gap.
    pub fn open(config: &CaptureConfig) -> Result<Self, CaptureError> {
        cgroup::check_apart(&config.proxy_cgroup, &config.pods_cgroup)?;
        check_bpffs(&config.bpffs)?;
        check_layout_directories(&config.bpffs)?;
        let pins = Pins::new(&config.bpffs);
        context(pins.create(), || format!("create {}", pins.root().display()))?;
        let _alone = lock(pins.root())?;
        let pods =
            context(cgroup::id(&config.pods_cgroup), || format!("open cgroup {}", config.pods_cgroup.display()))?;
        let programs = Programs::load(&pins, pods, &config.map_entries)?;
        let maps = PinnedMaps::open(&pins)?;
        maps.check_layout(&pins)?;
        let describe = || format!("register the proxy's cgroup {}", config.proxy_cgroup.display());
        let proxy_cgroup = context(cgroup::id(&config.proxy_cgroup), describe)?;
        insert(&maps.proxy_cgroups, maps::PROXY_CGROUPS, &proxy_cgroup, &PRESENT)?;
        programs.replace_in_workloads(&pins)?;
        programs.attach_to_cgroup(&pins, &config.pods_cgroup)?;
        let node = context(File::open("/proc/thread-self/ns/net"), || "open the node's network namespace".to_owned())?;
        let watches = context(Watches::new(), || "watch interfaces".to_owned())?;
        let proxy_cgroup = config.proxy_cgroup.clone();
        let programs = Mutex::new(programs);
        Ok(Self { pins, node: node.into(), tc: config.tc, proxy_cgroup, programs, maps, watches })
    }

    /// Workloads that are enrolled in the kernel, by this process or an earlier one.
    pub fn adopt(&self) -> Result<Vec<Adopted>, CaptureError> {
        let what = || "read the enrolled workloads".to_owned();
        let map = self.maps.workloads.as_fd();
        let cookies = context(sys::keys::<u64>(map, maps::MAX_WORKLOADS), what)?;
        let mut adopted = Vec::with_capacity(cookies.len());
        for cookie in cookies {
            if let Some(workload) = context(sys::lookup::<_, Workload>(map, &cookie), what)? {
                adopted.push(Adopted { cookie, v4: v4_of(&workload), v6: v6_of(&workload) });
            }
        }
        adopted.sort_by_key(|workload| workload.cookie);
        Ok(adopted)
    }

    /// Where this node's pins are.
    pub fn pin_directory(&self) -> &Path {
        self.pins.root()
    }

    fn lock(&self) -> Result<Flock<File>, CaptureError> {
        lock(self.pins.root())
    }

    fn programs(&self) -> std::sync::MutexGuard<'_, Programs> {
        // A panic while holding it leaves loaded programs, which are never half-written.
        self.programs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PinnedMaps {
    fn open(pins: &Pins) -> Result<Self, CaptureError> {
        let open = |name: &str| {
            let path = pins.map(name);
            context(sys::open_pin(&path), || format!("open {}", path.display()))
        };
        Ok(Self {
            workloads: open(maps::WORKLOADS)?,
            proxy_cgroups: open(maps::PROXY_CGROUPS)?,
            captured: open(maps::CAPTURED)?,
            note_counts: context(sys::Counters::map(open(maps::NOTE_COUNTS)?.as_fd()), || {
                format!("map {}", pins.map(maps::NOTE_COUNTS).display())
            })?,
            listener_tags: open(maps::LISTENER_TAGS)?,
            listeners: open(maps::LISTENERS)?,
            preexisting: open(maps::PREEXISTING)?,
            counters: open(maps::COUNTERS)?,
            event_budget: open(maps::EVENT_BUDGET)?,
            layout: open(maps::LAYOUT)?,
        })
    }

    /// Writes the layout version into new maps, and refuses those of another one.
    fn check_layout(&self, pins: &Pins) -> Result<(), CaptureError> {
        let what = || "read the layout version".to_owned();
        match context(sys::lookup::<u32, u32>(self.layout.as_fd(), &0), what)?.unwrap_or_default() {
            0 => context(sys::update(self.layout.as_fd(), &0_u32, &LAYOUT_VERSION, sys::BPF_ANY), what),
            LAYOUT_VERSION => Ok(()),
            found => Err(CaptureError::Layout {
                path: pins.root().to_owned(),
                found: found.to_string(),
                ours: LAYOUT_VERSION,
            }),
        }
    }
}

fn v4_of(workload: &Workload) -> Option<Ipv4Addr> {
    (workload.v4 != 0).then(|| Ipv4Addr::from_bits(u32::from_be(workload.v4)))
}

fn v6_of(workload: &Workload) -> Option<Ipv6Addr> {
    match IpAddr::from(workload.v6) {
        IpAddr::V6(v6) if !v6.is_unspecified() => Some(v6),
        IpAddr::V4(_) | IpAddr::V6(_) => None,
    }
}

/// Creates or replaces an entry; a full map has an error of its own.
fn insert<K: sys::Plain, V: sys::Plain>(
    map: &OwnedFd,
    name: &'static str,
    key: &K,
    value: &V,
) -> Result<(), CaptureError> {
    match sys::update(map.as_fd(), key, value, sys::BPF_ANY) {
        Ok(()) => Ok(()),
        Err(e) if e.raw_os_error() == Some(libc::E2BIG) => {
            let entries = sys::map_info(map.as_fd()).map(|info| info.max_entries).unwrap_or_default();
            Err(CaptureError::MapFull { map: name, entries })
        }
        Err(source) => Err(CaptureError::Io { what: format!("write to {name}"), source }),
    }
}

/// Keeps two processes from attaching to the same place at once.
fn lock(dir: &Path) -> Result<Flock<File>, CaptureError> {
    let what = || format!("lock {}", dir.display());
    let file = context(File::open(dir), what)?;
    context(Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into()), what)
}

/// The directory is made where there is a BPF file system to make it in.
fn check_bpffs(path: &Path) -> Result<(), CaptureError> {
    let is_bpffs = |path: &Path| statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC);
    if !path.exists() && path.parent().is_some_and(is_bpffs) {
        context(std::fs::create_dir(path), || format!("create {}", path.display()))?;
    }
    if is_bpffs(path) { Ok(()) } else { Err(CaptureError::NotBpffs(path.to_owned())) }
}

/// Two layouts side by side would capture twice.
fn check_layout_directories(bpffs: &Path) -> Result<(), CaptureError> {
    let what = || format!("read {}", bpffs.display());
    for path in context(pins::entries(bpffs), what)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let version = name.strip_prefix('v').is_some_and(|digits| digits.parse::<u32>().is_ok());
        if version && name != pins::version_name() {
            return Err(CaptureError::Layout { path, found: name, ours: LAYOUT_VERSION });
        }
    }
    Ok(())
}

/// Borrowed descriptors of a workload's listeners, as [`EnrollRequest`] wants them.
pub type ListenerFds<'a> = &'a [BorrowedFd<'a>];
