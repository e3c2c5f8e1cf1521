//! The network namespaces of pods, found by the processes in them.
//!
//! A container runtime puts a pod's processes into a cgroup that is named after the pod. The first of them is the sandbox's
//! own, which the runtime has started in the pod's namespace; later ones may have moved to others of their own making.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Namespaces of the pods with these UIDs, as far as they have any yet. Pods in the namespace of `host` have none of their
/// own. Reads all of `/proc`: blocks.
///
/// # Errors
/// `/proc` cannot be read, or is not the node's.
pub fn find(wanted: &BTreeSet<String>) -> io::Result<BTreeMap<String, Arc<File>>> {
    find_in(Path::new("/proc"), wanted)
}

fn find_in(proc: &Path, wanted: &BTreeSet<String>) -> io::Result<BTreeMap<String, Arc<File>>> {
    let host = fs::metadata(proc.join("1/ns/net"))?.ino();
    // The oldest process of each pod, by its start.
    let mut oldest: BTreeMap<String, (u64, PathBuf)> = BTreeMap::new();
    for entry in fs::read_dir(proc)? {
        let path = entry?.path();
        let is_process =
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.parse::<u32>().is_ok());
        if !is_process {
            continue;
        }
        // A process may end while it is looked at.
        let Ok(cgroups) = fs::read_to_string(path.join("cgroup")) else { continue };
        let Some(uid) = pod_of(&cgroups).filter(|uid| wanted.contains(uid)) else { continue };
        let Some(started) = fs::read_to_string(path.join("stat")).ok().and_then(|stat| start_of(&stat)) else {
            continue;
        };
        match oldest.get(&uid) {
            Some((known, _)) if *known <= started => {}
            Some(_) | None => drop(oldest.insert(uid, (started, path))),
        }
    }
    let mut found = BTreeMap::new();
    for (uid, (_, path)) in oldest {
        let Ok(file) = File::open(path.join("ns/net")) else { continue };
        if file.metadata()?.ino() != host {
            found.insert(uid, Arc::new(file));
        }
    }
    Ok(found)
}

/// The pod of a process by `/proc/PID/cgroup`: the outermost part of a path that is named after one, because what is below may
/// be the pod's own making.
fn pod_of(cgroups: &str) -> Option<String> {
    cgroups.lines().find_map(|line| line.splitn(3, ':').nth(2)?.split('/').find_map(uid_in))
}

/// `pod<uid>` (cgroupfs) or `kubepods-burstable-pod<uid with _>.slice` (systemd).
fn uid_in(part: &str) -> Option<String> {
    let part = part.strip_suffix(".slice").unwrap_or(part);
    let uid = part
        .strip_prefix("pod")
        .or_else(|| part.starts_with("kubepods").then(|| part.rsplit_once("-pod"))?.map(|p| p.1));
    let uid = uid?.replace('_', "-");
    // A UUID, or the hash of a static pod's manifest.
    let is_uid = uid.len() >= 32 && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    is_uid.then_some(uid)
}

/// Start of a process in clock ticks since boot: field 22 of `/proc/PID/stat`, behind the name, which may hold anything.
fn start_of(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0b8d3b8c-4b0e-4f6e-9d0a-6f1f4a1d2c3b";

    #[test]
    fn a_pod_is_known_by_the_outermost_cgroup_that_is_named_after_one() {
        let check = |cgroups: &str, expected: Option<&str>| {
            assert_eq!(pod_of(cgroups).as_deref(), expected, "{cgroups}");
        };
        check(&format!("0::/kubepods/burstable/pod{UID}/abc\n"), Some(UID));
        check(&format!("12:cpu:/kubepods/pod{UID}/abc\n0::/\n"), Some(UID));
        let systemd =
            format!("0::/kubepods.slice/kubepods-pod{}.slice/cri-containerd-x.scope\n", UID.replace('-', "_"));
        check(&systemd, Some(UID));
        let other = UID.replace('0', "1");
        check(&format!("0::/kubepods/pod{UID}/abc/pod{other}\n"), Some(UID));
        check("0::/kubepods/pod0123456789abcdef0123456789abcdef/x\n", Some("0123456789abcdef0123456789abcdef"));
        check("0::/system.slice/podman.service\n", None);
        check("0::/user.slice\n", None);
        check("", None);
    }

    #[test]
    fn a_start_is_read_behind_any_name() {
        let rest = "S 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 1 1";
        assert_eq!(start_of(&format!("7 (sleep) {rest}")), Some(777));
        assert_eq!(start_of(&format!("7 (a) b ) S 1 (x) {rest}")), Some(777));
        assert_eq!(start_of("7 (sleep) S"), None);
    }

    /// This very process stands for a pod's, and the namespace of process 1 for the host's.
    #[test]
    fn the_oldest_process_counts_and_the_hosts_namespace_does_not() {
        let root = std::env::temp_dir().join(format!("mesh-agent-{}", std::process::id()));
        let process = |pid: u32, uid: &str, started: u64, ns: &str| {
            let dir = root.join(pid.to_string());
            fs::create_dir_all(dir.join("ns")).unwrap();
            fs::write(dir.join("cgroup"), format!("0::/kubepods/pod{uid}/c\n")).unwrap();
            fs::write(dir.join("stat"), format!("{pid} (x) S 1 1 1 0 -1 0 1 0 0 0 0 0 0 0 20 0 1 0 {started} 1 1"))
                .unwrap();
            fs::write(dir.join("ns/real"), ns).unwrap();
            let target = root.join(ns);
            fs::write(&target, "").unwrap();
            std::os::unix::fs::symlink(target, dir.join("ns/net")).unwrap();
        };
        let (other, on_host) = (UID.replace('0', "1"), UID.replace('0', "2"));
        process(1, "", 1, "host");
        process(30, UID, 500, "made-by-itself");
        process(40, UID, 100, "sandbox");
        process(50, &other, 100, "not-wanted");
        process(60, &on_host, 100, "host");
        let found = find_in(&root, &[UID.to_owned(), on_host].into()).unwrap();
        let numbers: Vec<_> = found.iter().map(|(uid, file)| (uid.as_str(), file.metadata().unwrap().ino())).collect();
        assert_eq!(numbers, [(UID, fs::metadata(root.join("sandbox")).unwrap().ino())]);
        fs::remove_dir_all(root).unwrap();
    }
}
