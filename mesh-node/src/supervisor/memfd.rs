//! Sealed memory: keys and certificates that outlive the proxy and never touch a disk.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Most bytes that a sealed object may hold: a key with its chain and a bundle of roots is a few kilobytes.
pub const MAX_SEALED_BYTES: usize = 256 * 1024;

/// Nobody may change, grow or shrink it, nor lift that.
fn all_seals() -> SealFlag {
    SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE
}

/// Puts `bytes` into a new sealed memory object. `name` shows in `/proc/PID/fd` and must not be secret.
pub fn seal(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    if bytes.len() > MAX_SEALED_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name}: more than {MAX_SEALED_BYTES} bytes")));
    }
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(all_seals()))?;
    Ok(file.into())
}

/// Reads a sealed object. One that is not sealed is refused: its content could change between check and use.
pub fn unseal(fd: &OwnedFd) -> io::Result<Vec<u8>> {
    let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let seals = fcntl(fd.as_fd(), FcntlArg::F_GET_SEALS).map_err(|_| invalid("not a sealed memory object"))?;
    if !SealFlag::from_bits_truncate(seals).contains(all_seals()) {
        return Err(invalid("memory object is not sealed"));
    }
    let mut file = File::from(fd.try_clone()?);
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(MAX_SEALED_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > MAX_SEALED_BYTES { Err(invalid("memory object is too large")) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_memory_reads_back_and_nobody_can_write_it() {
        let fd = seal("cert", b"content").expect("seal");
        assert_eq!(unseal(&fd).expect("unseal"), b"content");
        assert_eq!(unseal(&fd).expect("unseal again"), b"content");
        let mut file = File::from(fd.try_clone().expect("dup"));
        assert_eq!(file.write_all(b"x").expect_err("write").kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(file.set_len(0).expect_err("shrink").kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(file.set_len(99).expect_err("grow").kind(), io::ErrorKind::PermissionDenied);
        fcntl(fd.as_fd(), FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).expect_err("seals are final");
    }

    #[test]
    fn what_is_not_sealed_is_refused() {
        let open = memfd_create("open", MFdFlags::MFD_ALLOW_SEALING).expect("memfd");
        assert!(unseal(&open).is_err());
        let (socket, _other) = crate::seqpacket::pair().expect("pair");
        assert!(unseal(&socket).is_err());
    }

    #[test]
    fn an_object_over_the_bound_is_refused() {
        assert!(seal("big", &vec![0; MAX_SEALED_BYTES + 1]).is_err());
    }
}
