//! Links of a namespace, up and down.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use mesh_node::capture::in_netns;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Sets a link of a namespace up or down.
pub fn set_up_or_down(netns: &Path, link: &str, up: bool) -> io::Result<()> {
    let file = File::open(netns)?;
    in_netns(file.as_fd(), || change(link, up))?
}

fn change(link: &str, up: bool) -> io::Result<()> {
    let control = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: all zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if link.len() >= request.ifr_name.len() {
        return Err(io::Error::other(format!("name {link} is too long")));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(link.bytes()) {
        *to = from.cast_signed();
    }
    let up_flag = libc::c_short::try_from(libc::IFF_UP).map_err(io::Error::other)?;
    // SAFETY: the request is an `ifreq`; the first call fills the flags that are read and changed then, and the second
    // one hands them back.
    unsafe {
        if libc::ioctl(control.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) != 0 {
            return Err(io::Error::last_os_error());
        }
        if up {
            request.ifr_ifru.ifru_flags |= up_flag;
        } else {
            request.ifr_ifru.ifru_flags &= !up_flag;
        }
        if libc::ioctl(control.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
