//! Waiting for what must happen: looking again and again, with a deadline.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Pause between looks.
const POLL: Duration = Duration::from_millis(50);

/// Looks until there is something; the last thing in the way is part of the error.
pub(super) fn until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        let why = match look() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => String::new(),
            Err(error) => format!(": {error:#}"),
        };
        if Instant::now() > deadline {
            bail!("{what}: not after {} s{why}", limit.as_secs());
        }
        std::thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_reason_is_told() {
        let error = until::<()>("the sun rises", Duration::ZERO, || bail!("it is night")).unwrap_err();
        assert_eq!(error.to_string(), "the sun rises: not after 0 s: it is night");
    }
}
