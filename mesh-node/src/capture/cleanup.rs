//! `mesh-node cleanup`: removes all that was pinned or attached, of this layout version or any other.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use mesh_ebpf_common::abi::ListenerKey;
use mesh_ebpf_common::maps;

use super::enroll::remove_pins;
use super::error::{CaptureError, context};
use super::netns::find_netns;
use super::pins::{Pins, entries};
use super::sys;

/// Removes everything below `bpffs` that capture made and says what. Afterwards nothing is captured on this node.
///
/// Routing rules and clsact filters are undone in the namespaces that can still be found; the calling thread's is the
/// node's.
pub fn cleanup(bpffs: &Path) -> Result<Vec<String>, CaptureError> {
    let mut removed = Vec::new();
    let pins = Pins::new(bpffs);
    let node = context(File::open("/proc/thread-self/ns/net"), || "open the node's network namespace".to_owned())?;
    // The workloads' interfaces first: as long as these guard, nothing leaves uncaptured by half.
    for cookie in context(pins.cookies(), || format!("read {}", pins.workloads().display()))? {
        let netns = find_netns(cookie);
        removed.extend(remove_pins(&pins.workload(cookie), netns.as_ref().map(AsFd::as_fd), node.as_fd())?);
    }
    for path in context(entries(bpffs), || format!("read {}", bpffs.display()))? {
        let version = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix('v'));
        if version.is_some_and(|digits| digits.parse::<u32>().is_ok()) {
            remove_tree(&path, &mut removed)?;
        }
    }
    Ok(removed)
}

/// Whether a process serves workloads that are captured here: listeners leave their map when they are closed.
pub fn is_serving(bpffs: &Path) -> Result<bool, CaptureError> {
    let pin = Pins::new(bpffs).map(maps::LISTENERS);
    let what = || format!("read {}", pin.display());
    match sys::open_pin(&pin) {
        Ok(map) => Ok(!context(sys::keys::<ListenerKey>(map.as_fd(), maps::MAX_LISTENERS), what)?.is_empty()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => context(Err(error), what),
    }
}

fn remove_tree(path: &Path, removed: &mut Vec<String>) -> Result<(), CaptureError> {
    let what = || format!("remove {}", path.display());
    if context(std::fs::symlink_metadata(path), what)?.is_dir() {
        for entry in context(entries(path), what)? {
            remove_tree(&entry, removed)?;
        }
        context(std::fs::remove_dir(path), what)?;
    } else {
        context(std::fs::remove_file(path), what)?;
    }
    removed.push(path.display().to_string());
    Ok(())
}
