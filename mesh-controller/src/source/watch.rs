//! Wakes the reader when a directory changes.
//!
//! The kernel's notifications are hints only: they may be lost (queue overflow, a file system without them), so the
//! directories are read every [`RESCAN`] as well. Reading costs no parsing where nothing changed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

/// Quiet time after which a burst of changes counts as finished.
const QUIET: Duration = Duration::from_millis(50);
/// Longest wait for a burst to end.
const MAX_DEBOUNCE: Duration = Duration::from_millis(200);
/// Reading without a notification.
pub const RESCAN: Duration = Duration::from_secs(5);

/// Watches directories.
pub struct Watch {
    watcher: Option<RecommendedWatcher>,
    dirs: Vec<PathBuf>,
    woken: mpsc::Receiver<()>,
}

impl Watch {
    /// Watches directories and all that is below them, links included. A directory that does not exist yet is found by
    /// the periodic reading.
    pub fn new(dirs: &[PathBuf]) -> Self {
        // One pending wake-up says all there is to say.
        let (wake, woken) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading files must not wake the reader again.
            if event.map_or(true, |event| !event.kind.is_access()) {
                let _ = wake.try_send(());
            }
        });
        let watcher = watcher.inspect_err(|error| {
            tracing::warn!(%error, "no file notifications; directories are read every {} s", RESCAN.as_secs());
        });
        let mut watch = Self { watcher: watcher.ok(), dirs: dirs.to_vec(), woken };
        watch.attach();
        watch
    }

    /// A directory that was replaced needs a new watch; one that is watched already is left as it is.
    fn attach(&mut self) {
        let Some(watcher) = &mut self.watcher else { return };
        for dir in &self.dirs {
            if let Err(error) = watch_dir(watcher, dir) {
                tracing::debug!(dir = %dir.display(), %error, "not watched");
            }
        }
    }

    /// Waits for a change, and until it has settled.
    pub async fn changed(&mut self) {
        let notified = match timeout(RESCAN, self.woken.recv()).await {
            Ok(Some(())) => true,
            // No notifications at all: nothing but the clock.
            Ok(None) => {
                tokio::time::sleep(RESCAN).await;
                false
            }
            Err(_) => false,
        };
        if notified {
            let deadline = Instant::now() + MAX_DEBOUNCE;
            loop {
                tokio::select! {
                    () = sleep_until(deadline) => break,
                    more = timeout(QUIET, self.woken.recv()) => if more.is_err() { break },
                }
            }
        }
        self.attach();
    }
}

fn watch_dir(watcher: &mut RecommendedWatcher, dir: &Path) -> notify::Result<()> {
    watcher.watch(dir, RecursiveMode::Recursive)
}
