//! A lock on a file that an agent holds as long as it lives, so that the node proxy of its pod can end after it: until then the
//! agent may have something to say.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Pause between two looks at the lock.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Takes the lock; the kernel gives it back when the process ends, however it does.
///
/// # Errors
/// The file cannot be made or locked.
pub fn hold(path: &Path) -> Result<Flock<File>> {
    let file = open(path)?;
    // Whoever looks has it for a moment.
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error).with_context(|| describe(path))
}

/// Waits until nobody holds the lock, or until the time is over; whether nobody does.
///
/// # Errors
/// The file cannot be made or locked.
pub fn wait_for_end(path: &Path, within: Duration) -> Result<bool> {
    let until = Instant::now() + within;
    loop {
        match Flock::lock(open(path)?, FlockArg::LockSharedNonblock) {
            Ok(_) => return Ok(true),
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() >= until => return Ok(false),
            Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) => std::thread::sleep(LOOK_EVERY),
            Err((_, error)) => return Err(error).with_context(|| describe(path)),
        }
    }
}

fn open(path: &Path) -> Result<File> {
    File::options().write(true).create(true).truncate(false).open(path).with_context(|| describe(path))
}

fn describe(path: &Path) -> String {
    format!("lock {}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_lives_as_long_as_it_holds_the_lock() {
        let path = std::env::temp_dir().join(format!("mesh-agent-alive-{}", std::process::id()));
        assert!(wait_for_end(&path, Duration::ZERO).unwrap(), "there was none yet");
        let held = hold(&path).unwrap();
        assert!(!wait_for_end(&path, LOOK_EVERY * 2).unwrap());
        let waiting = std::thread::spawn({
            let path = path.clone();
            move || wait_for_end(&path, Duration::from_secs(10))
        });
        drop(held);
        assert!(waiting.join().unwrap().unwrap());
        std::fs::remove_file(path).unwrap();
    }
}
