//! Says when a directory changes, and where.
//!
//! The kernel's notifications are hints only: they may be lost (queue overflow, a file system without them), so the
//! directories are looked at as a whole every [`RESCAN`], whatever was notified.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use super::Changed;

/// Quiet time after which a burst of changes counts as finished.
const QUIET: Duration = Duration::from_millis(50);
/// Longest wait for a burst to end.
const MAX_DEBOUNCE: Duration = Duration::from_millis(200);
/// Longest time between two looks at everything.
pub const RESCAN: Duration = Duration::from_secs(5);
/// Paths of one burst that are told apart; with more, everything is looked at.
const MAX_PATHS: usize = 1000;

/// Watches directories.
pub struct Watch {
    watcher: Option<RecommendedWatcher>,
    dirs: Vec<PathBuf>,
    /// Device and inode of the directories that are watched.
    attached: BTreeMap<PathBuf, (u64, u64)>,
    woken: mpsc::Receiver<()>,
    seen: Arc<Mutex<Seen>>,
    rescan_at: Instant,
}

/// What was notified and not told yet.
#[derive(Debug)]
struct Seen {
    changed: Changed,
    /// There is a new link, perhaps to a directory that is not watched. New directories are, by the watcher itself.
    relink: bool,
}

impl Watch {
    /// Watches directories and all that is below them, links included. A directory that does not exist yet is found by
    /// the periodic look.
    pub fn new(dirs: &[PathBuf]) -> Self {
        // One pending wake-up says all there is to say.
        let (wake, woken) = mpsc::channel(1);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let noted = seen.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if noted.lock().unwrap_or_else(PoisonError::into_inner).note(event) {
                let _ = wake.try_send(());
            }
        });
        let watcher = watcher.inspect_err(|error| {
            tracing::warn!(%error, "no file notifications; directories are read every {} s", RESCAN.as_secs());
        });
        let (dirs, attached) = (dirs.to_vec(), BTreeMap::new());
        let mut watch = Self { watcher: watcher.ok(), dirs, attached, woken, seen, rescan_at: Instant::now() + RESCAN };
        watch.attach(true);
        watch
    }

    /// A directory that was replaced needs a new watch, and so does what a new link leads to. To watch one again costs a walk
    /// through all that is below it.
    fn attach(&mut self, relink: bool) {
        let Some(watcher) = &mut self.watcher else { return };
        for dir in &self.dirs {
            let identity = fs::metadata(dir).map(|metadata| (metadata.dev(), metadata.ino())).ok();
            if !relink && identity.is_some() && self.attached.get(dir) == identity.as_ref() {
                continue;
            }
            self.attached.remove(dir);
            match (watch_dir(watcher, dir), identity) {
                (Ok(()), Some(identity)) => drop(self.attached.insert(dir.clone(), identity)),
                (Ok(()), None) => {}
                (Err(error), _) => tracing::debug!(dir = %dir.display(), %error, "not watched"),
            }
        }
    }

    /// Waits for a change, and until it has settled.
    pub async fn changed(&mut self) -> Changed {
        let notified = tokio::select! {
            () = sleep_until(self.rescan_at) => false,
            woken = self.woken.recv() => {
                if woken.is_none() {
                    // No notifications at all: nothing but the clock.
                    sleep_until(self.rescan_at).await;
                }
                woken.is_some()
            }
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
        let Seen { mut changed, relink } =
            std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        self.attach(relink);
        if Instant::now() >= self.rescan_at {
            changed = Changed::Anything;
        }
        if changed == Changed::Anything {
            self.rescan_at = Instant::now() + RESCAN;
        }
        changed
    }
}

impl Default for Seen {
    fn default() -> Self {
        Self { changed: Changed::Paths(BTreeSet::new()), relink: false }
    }
}

impl Seen {
    /// Takes in a notification; false if it says nothing.
    fn note(&mut self, event: notify::Result<notify::Event>) -> bool {
        match event {
            // Reading files must not wake the reader again.
            Ok(event) if event.kind.is_access() => return false,
            Ok(event) if !event.need_rescan() && !event.paths.is_empty() => {
                self.relink |= event.paths.iter().any(|path| path.is_symlink());
                if let Changed::Paths(paths) = &mut self.changed {
                    paths.extend(event.paths);
                    if paths.len() > MAX_PATHS {
                        self.changed = Changed::Anything;
                    }
                }
            }
            // Some were lost.
            Ok(_) | Err(_) => *self = Self { changed: Changed::Anything, relink: true },
        }
        true
    }
}

fn watch_dir(watcher: &mut RecommendedWatcher, dir: &Path) -> notify::Result<()> {
    watcher.watch(dir, RecursiveMode::Recursive)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::testing::TempDir;

    /// Changes until one names the path; looks at everything name it, too.
    async fn until_told(watch: &mut Watch, path: &Path) -> Changed {
        let told = async {
            loop {
                let changed = watch.changed().await;
                match &changed {
                    Changed::Paths(paths) if !paths.contains(path) => {}
                    Changed::Paths(_) | Changed::Anything => return changed,
                }
            }
        };
        timeout(Duration::from_secs(20), told).await.expect("told in time")
    }

    #[tokio::test]
    async fn a_change_is_told_with_its_place_and_in_the_end_everything_is_looked_at() {
        let temp = TempDir::new();
        let mut watch = Watch::new(&[temp.path().to_owned()]);
        let file = temp.path().join("a.yaml");
        fs::write(&file, "a").unwrap();
        assert!(matches!(until_told(&mut watch, &file).await, Changed::Paths(_)));
        // Also while there is no end of changes.
        let end = Instant::now() + 2 * RESCAN;
        while watch.changed().await != Changed::Anything {
            assert!(Instant::now() < end);
            fs::write(&file, "a").unwrap();
        }
    }

    #[tokio::test]
    async fn what_is_put_in_place_of_a_directory_or_behind_a_link_is_watched() {
        let (temp, elsewhere) = (TempDir::new(), TempDir::new());
        let dir = temp.path().join("config");
        fs::create_dir(&dir).unwrap();
        let mut watch = Watch::new(std::slice::from_ref(&dir));
        fs::rename(&dir, temp.path().join("old")).unwrap();
        fs::create_dir(&dir).unwrap();
        symlink(elsewhere.path(), dir.join("link")).unwrap();
        // By its notification or by the clock, the new directory is found.
        while watch.changed().await != Changed::Anything {}
        let behind = dir.join("link/a.yaml");
        for file in [dir.join("a.yaml"), behind.clone()] {
            fs::write(&file, "a").unwrap();
            assert!(matches!(until_told(&mut watch, &file).await, Changed::Paths(_)), "{}", file.display());
        }
        // Another link: what it leads to is watched from then on.
        let third = TempDir::new();
        fs::remove_file(dir.join("link")).unwrap();
        symlink(third.path(), dir.join("link")).unwrap();
        until_told(&mut watch, &dir.join("link")).await;
        fs::write(&behind, "b").unwrap();
        assert!(matches!(until_told(&mut watch, &behind).await, Changed::Paths(_)));
    }

    #[test]
    fn too_many_or_lost_notifications_mean_anything() {
        let event = |path: String| notify::Event::new(notify::EventKind::Any).add_path(path.into());
        let mut seen = Seen::default();
        for i in 0..=MAX_PATHS {
            assert!(matches!(seen.changed, Changed::Paths(_)), "{i}");
            assert!(seen.note(Ok(event(format!("/c/{i}")))));
        }
        assert_eq!(seen.changed, Changed::Anything);
        let mut seen = Seen::default();
        seen.note(Ok(event("/c/a".to_owned()).set_flag(notify::event::Flag::Rescan)));
        assert_eq!((seen.changed, seen.relink), (Changed::Anything, true));
        let access = notify::EventKind::Access(notify::event::AccessKind::Any);
        assert!(!Seen::default().note(Ok(notify::Event::new(access))), "reading wakes nobody");
    }
}
