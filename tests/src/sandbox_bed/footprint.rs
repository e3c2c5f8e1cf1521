//! What a sandbox occupies, noted while it lives, so that a test can ask afterwards what of it still exists.
//!
//! It is found by looking at the system, not by reading the sandbox's record: a handle that was never recorded shows.
#![allow(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use mesh_ctl::sandbox::Layout;

/// Things outside the sandbox's directory that go with it.
#[derive(Debug, Clone)]
pub struct Footprint {
    layout: Layout,
    /// Inodes of the network namespaces, by name.
    pub namespaces: BTreeMap<String, u64>,
    /// Processes in its cgroups, whoever started them.
    pub processes: BTreeSet<i32>,
    /// Pinned kernel objects, and the programs behind pinned links.
    pub objects: BTreeSet<KernelObject>,
}

/// A BPF object by the kernel's number for it; numbers are not given out again soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum KernelObject {
    /// A program.
    Program(u32),
    /// A map.
    Map(u32),
    /// A link.
    Link(u32),
}

impl Footprint {
    /// Of a sandbox that is up.
    pub fn of(layout: &Layout) -> Self {
        let bound = fs::read_dir(layout.run.join("netns")).into_iter().flatten().flatten();
        let namespaces = bound.filter_map(|entry| {
            let inode = fs::metadata(entry.path()).ok()?.ino();
            Some((entry.file_name().to_string_lossy().into_owned(), inode))
        });
        Self {
            layout: layout.clone(),
            namespaces: namespaces.collect(),
            processes: in_cgroup(&layout.cgroup),
            objects: files_below(&layout.bpf()).iter().flat_map(|pin| pinned(pin).unwrap_or_default()).collect(),
        }
    }

    /// What of it still exists, in words; empty: nothing.
    pub fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        let run = &self.layout.run;
        let lock = run.with_file_name(format!(".{}.lock", self.layout.name));
        let paths = [run, &self.layout.cgroup, &lock];
        left.extend(paths.iter().filter(|p| p.exists()).map(|p| p.display().to_string()));
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        left.extend(
            mounts.lines().filter(|l| l.contains(&format!("{}/", run.display()))).map(|l| format!("mount {l}")),
        );
        left.extend(self.processes.iter().filter(|pid| is_process(**pid)).map(|pid| format!("process {pid}")));
        left.extend(self.users_of_namespaces());
        left.extend(self.objects.iter().filter(|object| object.exists()).map(|object| format!("{object:?}")));
        left
    }

    /// Processes that are in one of the namespaces or hold one open; a namespace without them does not exist.
    fn users_of_namespaces(&self) -> Vec<String> {
        let inodes: BTreeMap<String, &String> =
            self.namespaces.iter().map(|(name, inode)| (format!("net:[{inode}]"), name)).collect();
        let mut users = Vec::new();
        for process in processes() {
            let links = fs::read_dir(process.join("fd")).into_iter().flatten().flatten().map(|fd| fd.path());
            for link in links.chain([process.join("ns/net")]) {
                let Ok(target) = fs::read_link(&link) else { continue };
                if let Some(name) = inodes.get(&*target.to_string_lossy()) {
                    users.push(format!("namespace {name} ({})", link.display()));
                }
            }
        }
        users
    }
}

impl KernelObject {
    /// Whether the kernel has it.
    pub fn exists(self) -> bool {
        // BPF_PROG_GET_FD_BY_ID, BPF_MAP_GET_FD_BY_ID, BPF_LINK_GET_FD_BY_ID of linux/bpf.h.
        let (command, id) = match self {
            Self::Program(id) => (13, id),
            Self::Map(id) => (14, id),
            Self::Link(id) => (30, id),
        };
        let mut attributes = [0u32; 4];
        attributes[0] = id;
        match bpf(command, &mut attributes) {
            Ok(_fd) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => panic!("ask the kernel for {self:?}: {error}"),
        }
    }
}

/// The kernel object behind a file of a bpffs, and the program of a link.
fn pinned(pin: &Path) -> io::Result<Vec<KernelObject>> {
    let path = std::ffi::CString::new(pin.as_os_str().as_bytes())?;
    let address = path.as_ptr() as u64;
    // `pathname` of BPF_OBJ_GET, a 64-bit pointer, then `bpf_fd` and `file_flags`.
    let mut attributes = [0u32; 4];
    let halves = address.to_ne_bytes();
    attributes[0] = u32::from_ne_bytes([halves[0], halves[1], halves[2], halves[3]]);
    attributes[1] = u32::from_ne_bytes([halves[4], halves[5], halves[6], halves[7]]);
    let fd = bpf(7, &mut attributes)?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let number = |key: &str| info.lines().find_map(|l| l.strip_prefix(key)?.trim().parse::<u32>().ok());
    let kinds: [(&str, fn(u32) -> KernelObject); 3] =
        [("link_id:", KernelObject::Link), ("map_id:", KernelObject::Map), ("prog_id:", KernelObject::Program)];
    Ok(kinds.into_iter().filter_map(|(key, object)| number(key).map(object)).collect())
}

fn bpf(command: i32, attributes: &mut [u32; 4]) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads 16 bytes of attributes, which are there; a path in them outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), 16) };
    let Ok(fd @ 0..) = i32::try_from(fd) else { return Err(io::Error::last_os_error()) };
    // SAFETY: the kernel just returned this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn in_cgroup(top: &Path) -> BTreeSet<i32> {
    let lists = files_below(top).into_iter().filter(|file| file.ends_with("cgroup.procs"));
    let read = |list: PathBuf| fs::read_to_string(list).unwrap_or_default();
    lists.flat_map(|list| read(list).lines().filter_map(|l| l.parse().ok()).collect::<Vec<i32>>()).collect()
}

fn processes() -> Vec<PathBuf> {
    let entries = fs::read_dir("/proc").expect("read /proc").flatten();
    entries.filter(|e| e.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit())).map(|e| e.path()).collect()
}

/// A zombie has given everything back; it only waits for whoever started it.
fn is_process(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn files_below(top: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(top).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files.extend(files_below(&entry.path())),
            Ok(_) | Err(_) => files.push(entry.path()),
        }
    }
    files
}

/// Whether a path is a network namespace that somebody bound there.
pub fn is_namespace(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| {
        nix::sys::statfs::fstatfs(&file).is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
    })
}
