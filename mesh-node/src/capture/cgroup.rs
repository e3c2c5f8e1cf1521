//! Control groups: the captured one, and the proxy's own, by which the programs know the proxy's sockets.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::error::{CaptureError, context};

/// A cgroup's id: the inode of its directory, 64 bits wide and never used again.
pub(super) fn id(cgroup: &Path) -> io::Result<u64> {
    Ok(std::fs::metadata(cgroup)?.ino())
}

/// The cgroup v2 directory of this process.
pub fn own_cgroup() -> io::Result<PathBuf> {
    let membership = std::fs::read_to_string("/proc/self/cgroup")?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let path = membership
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .ok_or_else(|| io::Error::other("this process is in no cgroup v2"))?;
    let mount = mounts.lines().find_map(cgroup2_mount).ok_or_else(|| io::Error::other("cgroup v2 is not mounted"))?;
    Ok(mount.join(path))
}

/// The mount point, if the line of `mountinfo` is about cgroup v2.
fn cgroup2_mount(line: &str) -> Option<PathBuf> {
    let (before, after) = line.split_once(" - ")?;
    (after.split(' ').next()? == "cgroup2").then(|| before.split(' ').nth(4).map(PathBuf::from))?
}

/// Refuses a proxy that would capture itself, or that shares its cgroup with the rest of the machine.
pub(super) fn check_apart(proxy: &Path, pods: &Path) -> Result<(), CaptureError> {
    let canonical = |path: &Path| context(path.canonicalize(), || format!("open cgroup {}", path.display()));
    let (real_proxy, real_pods) = (canonical(proxy)?, canonical(pods)?);
    let root = !real_proxy.join("cgroup.events").exists();
    if root || overlap(&real_proxy, &real_pods) {
        return Err(CaptureError::ProxyCgroup { proxy: real_proxy, pods: real_pods });
    }
    Ok(())
}

fn overlap(a: &Path, b: &Path) -> bool {
    a.starts_with(b) || b.starts_with(a)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proxy_is_neither_inside_nor_above_what_it_captures() {
        for (proxy, pods, expected) in [
            ("/c/mesh/proxy", "/c/mesh/pods", false),
            ("/c/pods/proxy", "/c/pods", true),
            ("/c", "/c/pods", true),
            ("/c/pods", "/c/pods", true),
            ("/c/pods-proxy", "/c/pods", false),
        ] {
            assert_eq!(overlap(Path::new(proxy), Path::new(pods)), expected, "{proxy} {pods}");
        }
    }

    #[test]
    fn the_mount_of_cgroup_v2_is_found() {
        let hybrid = "40 30 0:35 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw";
        assert_eq!(cgroup2_mount(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(cgroup2_mount("31 30 0:27 / /sys/fs/cgroup/cpu rw shared:2 - cgroup cgroup rw,cpu"), None);
    }
}
