//! Network namespaces as bind mounts, and threads inside them.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// Makes a network namespace and binds it to a file, which keeps it alive.
///
/// # Errors
/// Not permitted, or the file is a namespace already.
pub fn create(path: &Path) -> Result<()> {
    File::create(path).with_context(|| format!("create {}", path.display()))?;
    let make = || -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNET).context("unshare network namespace")?;
        let own = "/proc/thread-self/ns/net";
        mount(Some(own), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("bind a network namespace to {}", path.display()))
    };
    on_thread(make)
}

/// Releases a namespace. What is not there is no error.
///
/// # Errors
/// Not permitted.
pub fn remove(path: &Path) -> Result<()> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => break,
            Err(e) => return Err(e).with_context(|| format!("unmount {}", path.display())),
        }
    }
    match std::fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| format!("remove {}", path.display())),
    }
}

/// Opens a bound namespace.
///
/// # Errors
/// It is not there.
pub fn open(path: &Path) -> Result<File> {
    let file = File::open(path).with_context(|| format!("open network namespace {}", path.display()))?;
    // An unbound file would be entered as nothing and everything would happen in the caller's namespace.
    let kind = nix::sys::statfs::fstatfs(&file).context("statfs")?.filesystem_type();
    if kind != nix::sys::statfs::NSFS_MAGIC {
        return Err(anyhow!("{} is no network namespace (its mount is gone)", path.display()));
    }
    Ok(file)
}

/// Runs a function on a thread inside a namespace and waits for it.
///
/// # Errors
/// The namespace cannot be entered, or the function failed.
pub fn run_in<T: Send>(netns: &Path, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file = open(netns)?;
    on_thread(move || {
        setns(&file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {}", netns.display()))?;
        f()
    })
}

fn on_thread<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, f);
        let thread = thread.context("start a thread")?;
        thread.join().map_err(|_| anyhow!("the thread in the network namespace panicked"))?
    })
}
