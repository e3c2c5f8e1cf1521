//! What the plugin may go by while the agent is away: kept up to date here.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use mesh_cni::store::Store;
use mesh_cni::unasked::{self, Note};

use super::cni::lock;
use super::pods::Pods;

/// The file is written again after this time, so that it is never old while the agent lives: it is believed for a day.
const WRITE_ANYWAY: Duration = Duration::from_secs(3600);
/// A pod that was noted and that the watch has not heard of after this time is gone.
const NOTED_FOR: Duration = Duration::from_secs(300);

/// The files of a node. Whoever reads or writes them waits for a disk, so not on the runtime's thread.
pub(super) struct Files {
    dir: PathBuf,
    is_closed: Mutex<bool>,
}

/// What is in them.
pub(super) struct Known {
    files: Arc<Files>,
    members: BTreeSet<String>,
    outside: BTreeSet<String>,
    written: Option<Instant>,
}

impl Files {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, is_closed: Mutex::default() }
    }

    /// Waits for whoever writes; after it nobody does, so what is removed stays away.
    pub(super) fn close(&self) {
        *self.is_closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// The notes, and whether the store is there: an agent of another installation takes it away when it ends.
    fn look(&self) -> (Vec<Note>, bool) {
        let notes = unasked::read(&self.dir).unwrap_or_else(|error| {
            tracing::warn!(%error, "pods that started while the agent was away are not known");
            Vec::new()
        });
        (notes, mesh_cni::store::path(&self.dir).exists())
    }

    /// Whether the store, if there is a new one, was written.
    fn write(&self, store: Option<&Store>, settled: &[Note]) -> io::Result<()> {
        let is_closed = self.is_closed.lock().unwrap_or_else(PoisonError::into_inner);
        if *is_closed {
            return Ok(());
        }
        if !settled.is_empty()
            && let Err(error) = unasked::strike(&self.dir, settled)
        {
            tracing::warn!(%error, "pods that started while the agent was away will be reported again");
        }
        store.map_or(Ok(()), |store| store.write(&self.dir))
    }
}

impl Known {
    /// Goes on from what an agent before this one has written.
    pub(super) fn read(files: Arc<Files>) -> Self {
        let members = Store::read(&files.dir).map(|store| store.members).unwrap_or_default();
        Self { files, members, outside: BTreeSet::new(), written: None }
    }

    /// Takes in what is known now, and says which pods have started without anybody being asked and belong to the mesh.
    pub(super) async fn follow(&mut self, pods: &Mutex<Pods>) -> Result<()> {
        let files = Arc::clone(&self.files);
        let (notes, is_there) = tokio::task::spawn_blocking(move || files.look()).await.context("read notes")?;
        self.written = self.written.filter(|_| is_there);
        let (store, settled) = {
            let pods = lock(pods);
            (self.update(&pods), settle(notes, &pods, SystemTime::now()))
        };
        if store.is_none() && settled.is_empty() {
            return Ok(());
        }
        let (files, is_new) = (Arc::clone(&self.files), store.is_some());
        let write = move || files.write(store.as_ref(), &settled);
        match tokio::task::spawn_blocking(write).await.context("write what is known")? {
            Ok(()) if is_new => self.written = Some(Instant::now()),
            Ok(()) => {}
            Err(error) => {
                tracing::error!(dir = %self.files.dir.display(), %error, "namespaces are not kept for the CNI plugin");
            }
        }
        Ok(())
    }

    /// What has to be written.
    fn update(&mut self, pods: &Pods) -> Option<Store> {
        let (members, outside) = pods.standings(&self.members);
        let is_same = (&members, &outside) == (&self.members, &self.outside);
        if is_same && self.written.is_some_and(|at| at.elapsed() < WRITE_ANYWAY) {
            return None;
        }
        (self.members, self.outside) = (members, outside);
        // It is tried again until it is written.
        self.written = None;
        Some(Store::new(self.members.clone(), self.outside.clone(), SystemTime::now()))
    }
}

/// What a noted pod is.
#[derive(Debug, PartialEq, Eq)]
enum Noted {
    Member,
    Outside,
    /// The watch may hear of it yet.
    Unheard,
    Gone,
}

fn noted(note: &Note, pods: &Pods, now: SystemTime) -> Noted {
    let request = &note.request;
    match pods.find(&request.namespace, &request.pod, &request.uid) {
        Some((_, found)) if pods.is_member(found) => Noted::Member,
        Some(_) => Noted::Outside,
        None if note.age(now) < NOTED_FOR => Noted::Unheard,
        None => Noted::Gone,
    }
}

/// Reports pods, and gives back the notes of which nothing more will be known.
fn settle(mut notes: Vec<Note>, pods: &Pods, now: SystemTime) -> Vec<Note> {
    notes.retain(|note| {
        let pod = format!("{}/{}", note.request.namespace, note.request.pod);
        match noted(note, pods, now) {
            Noted::Unheard => return false,
            Noted::Member => tracing::error!(
                pod,
                "started before the mesh served it, because the agent was away and its namespace had no member: connections \
                 from before go around the mesh; delete the pod"
            ),
            Noted::Outside => tracing::info!(pod, "started while the agent was away"),
            Noted::Gone => tracing::info!(pod, "started while the agent was away, and is not known any more"),
        }
        true
    });
    notes
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use mesh_cni::wire::{Command, Request};
    use mesh_core::config::objects::{Meta, Pod};

    use super::*;

    fn note(pod: &str) -> Note {
        let (namespace, uid) = ("batch".to_owned(), format!("{pod}-1"));
        let (container, netns, ips) = (String::new(), String::new(), Vec::new());
        let request = Request { command: Command::Add, namespace, pod: pod.to_owned(), uid, container, netns, ips };
        Note { at_secs: 1000, request }
    }

    fn pods() -> Pods {
        let pod = |name: &str, mode: &str| {
            let labels = [("istio.io/dataplane-mode".into(), mode.into())].into();
            let meta = Meta { namespace: "batch".into(), name: name.into(), labels, ..Meta::default() };
            (format!("{name}-1"), Pod { meta, ..Pod::default() })
        };
        let mut pods = Pods::default();
        pods.set_pods([pod("asks", "ambient"), pod("plain", "none")].into(), Instant::now());
        pods
    }

    #[test]
    fn a_note_is_kept_until_the_watch_has_heard_of_its_pod_or_will_not() {
        let (pods, at) = (pods(), UNIX_EPOCH + Duration::from_secs(1000));
        for (pod, now, expected) in [
            ("asks", at, Noted::Member),
            ("plain", at, Noted::Outside),
            ("new", at + NOTED_FOR / 2, Noted::Unheard),
            ("new", at + NOTED_FOR, Noted::Gone),
        ] {
            assert_eq!(noted(&note(pod), &pods, now), expected, "{pod} at {now:?}");
        }
        let settled = settle(["asks", "plain", "new"].map(note).into(), &pods, at);
        assert_eq!(settled, ["asks", "plain"].map(note));
    }

    #[tokio::test]
    async fn what_is_known_is_written_again_until_it_is_and_not_after_the_close() {
        let dir = std::env::temp_dir().join(format!("mesh-agent-known-{}", std::process::id()));
        std::fs::write(&dir, "no directory").unwrap();
        let files = Arc::new(Files::new(dir.clone()));
        let (mut known, pods) = (Known::read(Arc::clone(&files)), Mutex::new(pods()));
        lock(&pods).add_namespace(mesh_core::config::objects::Namespace {
            meta: Meta { name: "batch".into(), ..Meta::default() },
        });
        known.follow(&pods).await.unwrap();
        assert!(known.written.is_none());
        std::fs::remove_file(&dir).unwrap();
        known.follow(&pods).await.unwrap();
        assert_eq!(Store::read(&dir).unwrap().members, ["batch".to_owned()].into());
        std::fs::remove_file(mesh_cni::store::path(&dir)).unwrap();
        known.follow(&pods).await.unwrap();
        assert!(Store::read(&dir).is_ok(), "it was taken away");
        unasked::note(&dir, &note("asks").request, SystemTime::now()).unwrap();
        known.follow(&pods).await.unwrap();
        assert_eq!(unasked::read(&dir).unwrap(), []);
        files.close();
        std::fs::remove_dir_all(&dir).unwrap();
        known.written = None;
        known.follow(&pods).await.unwrap();
        assert!(!dir.exists());
    }
}
