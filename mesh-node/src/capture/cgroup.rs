//! Control groups: the captured one, and the proxy's own, by which the programs know the proxy's sockets.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use mesh_ebpf_common::maps;

use super::error::{CaptureError, context};
use super::netns::in_netns;
use super::sock_diag::SockDiag;
use super::{Capture, sys};

/// A cgroup's id: the inode of its directory, 64 bits wide and never used again.
pub(super) fn id(cgroup: &Path) -> io::Result<u64> {
    Ok(std::fs::metadata(cgroup)?.ino())
}

impl Capture {
    /// Takes away what cgroups of earlier proxies may do, once they are gone and the last of their sockets is, too.
    /// Returns their ids.
    ///
    /// A listener is of the cgroup that it was made in, whoever holds it now, and hands it on to what it accepts. So nothing
    /// happens while the kernel knows a workload that this process has not looked into.
    pub fn retire_proxies(&self) -> Result<Vec<u64>, CaptureError> {
        let what = || "look for proxies that have ended".to_owned();
        let ended = context(self.ended_proxies(), what)?;
        for id in &ended {
            context(sys::remove(self.maps.proxy_cgroups.as_fd(), id), || format!("retire the proxy of cgroup {id}"))?;
        }
        Ok(ended.into_iter().collect())
    }

    fn ended_proxies(&self) -> io::Result<BTreeSet<u64>> {
        let own = File::open(&self.proxy_cgroup)?;
        let mut ended = BTreeSet::new();
        for id in sys::keys(self.maps.proxy_cgroups.as_fd(), maps::MAX_PROXY_CGROUPS)? {
            if !exists(own.as_fd(), id)? {
                ended.insert(id);
            }
        }
        if ended.is_empty() {
            return Ok(ended);
        }
        for cookie in sys::keys(self.maps.workloads.as_fd(), maps::MAX_WORKLOADS)? {
            let Some(netns) = self.watches.netns(cookie)? else { return Ok(BTreeSet::new()) };
            for socket in in_netns(netns.as_fd(), || SockDiag::open()?.sockets())?? {
                socket.cgroup.map(|id| ended.remove(&id));
            }
        }
        Ok(ended)
    }
}

/// Whether a cgroup is still there. One that cannot be asked for (that takes `CAP_DAC_READ_SEARCH`) may be.
fn exists(any_cgroup: BorrowedFd<'_>, id: u64) -> io::Result<bool> {
    /// `FILEID_KERNFS`: the handle is the id.
    const KERNFS: libc::c_int = 0xfe;
    /// `struct file_handle` of this type.
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: libc::c_int,
        id: u64,
    }
    let mut handle = Handle { bytes: 8, kind: KERNFS, id };
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the handle has the length that it says.
    let fd = unsafe { libc::open_by_handle_at(any_cgroup.as_raw_fd(), (&raw mut handle).cast(), flags) };
    if fd >= 0 {
        // SAFETY: the kernel has just returned this descriptor to us alone.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ESTALE) => Ok(false),
        error if error.kind() == io::ErrorKind::PermissionDenied => Ok(true),
        error => Err(error),
    }
}

/// The cgroup v2 directory of this process. A container may see several trees, and its path in one of them only.
pub fn own_cgroup() -> io::Result<PathBuf> {
    let membership = std::fs::read_to_string("/proc/self/cgroup")?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let path = membership
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .ok_or_else(|| io::Error::other("this process is in no cgroup v2"))?;
    let own_pid = std::process::id().to_string();
    let is_ours = |directory: &PathBuf| {
        let members = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
        members.lines().any(|pid| pid == own_pid)
    };
    let mut candidates = mounts.lines().filter_map(cgroup2_mount).map(|mount| mount.join(path)).peekable();
    if candidates.peek().is_none() {
        return Err(io::Error::other("cgroup v2 is not mounted"));
    }
    candidates.find(is_ours).ok_or_else(|| {
        io::Error::other(format!("no mounted cgroup v2 tree has this process at /{path} (mount the node's, read-only)"))
    })
}

/// The cgroup v2 directory above all pods, where kubelets have it (by the cgroupfs and the systemd driver).
pub fn kubernetes_cgroup() -> io::Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let mut candidates = mounts
        .lines()
        .filter_map(cgroup2_mount)
        .flat_map(|mount| ["kubepods", "kubepods.slice"].map(|name| mount.join(name)));
    candidates.find(|directory| directory.join("cgroup.procs").exists()).ok_or_else(|| {
        io::Error::other(
            "no mounted cgroup v2 tree has kubepods or kubepods.slice: name the pods' directory with --cgroup",
        )
    })
}

/// The mount point, if the line of `mountinfo` is about cgroup v2.
fn cgroup2_mount(line: &str) -> Option<PathBuf> {
    let (before, after) = line.split_once(" - ")?;
    (after.split(' ').next()? == "cgroup2").then(|| before.split(' ').nth(4).map(PathBuf::from))?
}

/// Refuses a proxy that shares its cgroup with what it captures, or with the rest of the machine.
pub(super) fn check_apart(proxy: &Path, pods: &Path) -> Result<(), CaptureError> {
    let canonical = |path: &Path| context(path.canonicalize(), || format!("open cgroup {}", path.display()));
    let (real_proxy, real_pods) = (canonical(proxy)?, canonical(pods)?);
    let root = !real_proxy.join("cgroup.events").exists();
    // It may be one of those below: the programs know it by its cgroup.
    if root || real_pods.starts_with(&real_proxy) {
        return Err(CaptureError::ProxyCgroup { proxy: real_proxy, pods: real_pods });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_of_cgroup_v2_is_found() {
        let hybrid = "40 30 0:35 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw";
        assert_eq!(cgroup2_mount(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(cgroup2_mount("31 30 0:27 / /sys/fs/cgroup/cpu rw shared:2 - cgroup cgroup rw,cpu"), None);
    }
}
