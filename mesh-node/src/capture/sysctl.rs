//! Settings of the calling thread's network namespace, below `/proc/sys/net`.
//!
//! A container runtime mounts `/proc/sys` read-only unless the container is privileged. Who may mount anything can have a
//! procfs of its own, which is mounted nowhere and so shown to nobody.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

/// Sets `name`, such as `ipv4/tcp_fwmark_accept`.
pub(super) fn set(name: &str, value: &str) -> io::Result<()> {
    match std::fs::write(format!("/proc/sys/net/{name}"), value) {
        Err(error) if error.raw_os_error() == Some(libc::EROFS) => {
            let proc = procfs().map_err(|why| {
                io::Error::new(why.kind(), format!("/proc/sys is read-only, and a procfs of our own is refused: {why}"))
            })?;
            let path = format!("sys/net/{name}");
            let file = openat(&proc, path.as_str(), OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
            File::from(file).write_all(value.as_bytes())
        }
        result => result,
    }
}

/// A procfs that is mounted nowhere (`fsmount`, Linux 5.2).
fn procfs() -> io::Result<OwnedFd> {
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    // SAFETY: the name is a string that ends with a zero.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), FSOPEN_CLOEXEC) })?;
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: this command takes neither key nor value.
    let created = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), FSCONFIG_CMD_CREATE, none, none, 0) };
    if created != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is the context made above.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) })
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match libc::c_int::try_from(fd) {
        // SAFETY: the kernel has just returned this descriptor to us alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        Ok(_) | Err(_) => Err(io::Error::last_os_error()),
    }
}
