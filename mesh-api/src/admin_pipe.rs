//! `mesh-node admin` and `mesh-controller admin`: standard input and output are a connection to the admin interface.
//!
//! Whoever may start a process in this container, and nobody else, reaches the admin socket that way: there is neither a shell
//! nor a port.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Bytes that are carried at once.
const BUFFER_BYTES: usize = 16 * 1024;

/// Carries bytes both ways until the admin interface has said all.
///
/// # Errors
/// Nobody listens there, or an end breaks off.
pub fn run(socket: &Path) -> io::Result<()> {
    let mut questions =
        UnixStream::connect(socket).map_err(|error| said(&format!("connect to {}", socket.display()), &error))?;
    let mut answers = questions.try_clone()?;
    std::thread::Builder::new().name("questions".to_owned()).spawn(move || {
        // Whoever asks has gone, or has asked all: the other direction says how it ended.
        let _ = carry(&mut io::stdin().lock(), &mut questions);
        let _ = questions.shutdown(Shutdown::Write);
    })?;
    // `Stdout` would keep back what has no newline.
    let mut out = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    carry(&mut answers, &mut out).map_err(|error| said("carry answers", &error))
}

fn said(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// Each part as soon as it is there. (`io::copy` splices, and the kernel keeps a part back until there is more.)
fn carry(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = [0; BUFFER_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => to.write_all(&buffer[..read])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
