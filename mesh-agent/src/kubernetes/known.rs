//! What the plugin may go by while the agent is away: kept up to date here.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use mesh_cni::store::Store;
use mesh_cni::unasked;

use super::pods::Pods;

/// The file is written again after this time, so that it is never old while the agent lives: it is believed for a day.
const WRITE_ANYWAY: Duration = Duration::from_secs(3600);

/// The file of one node.
pub(super) struct Known {
    dir: PathBuf,
    members: BTreeSet<String>,
    outside: BTreeSet<String>,
    written: Option<Instant>,
}

impl Known {
    /// Goes on from what an agent before this one has written.
    pub(super) fn read(dir: PathBuf) -> Self {
        let members = Store::read(&dir).map(|store| store.members).unwrap_or_default();
        Self { dir, members, outside: BTreeSet::new(), written: None }
    }

    /// Takes in what is known now.
    pub(super) fn update(&mut self, pods: &Pods) {
        let (members, outside) = pods.standings(&self.members);
        let is_same = (&members, &outside) == (&self.members, &self.outside);
        if is_same && self.written.is_some_and(|at| at.elapsed() < WRITE_ANYWAY) {
            return;
        }
        (self.members, self.outside) = (members, outside);
        match Store::new(self.members.clone(), self.outside.clone(), SystemTime::now()).write(&self.dir) {
            Ok(()) => self.written = Some(Instant::now()),
            Err(error) => {
                tracing::error!(dir = %self.dir.display(), %error, "namespaces are not kept for the CNI plugin");
            }
        }
    }

    /// Says which pods have started without anybody being asked and belong to the mesh.
    pub(super) fn report_unasked(&self, pods: &Pods) {
        let noted = unasked::take(&self.dir).unwrap_or_else(|error| {
            tracing::warn!(%error, "pods that started while the agent was away are not known");
            Vec::new()
        });
        for request in noted {
            let pod = format!("{}/{}", request.namespace, request.pod);
            match pods.find(&request.namespace, &request.pod, &request.uid) {
                Some((_, found)) if pods.is_member(found) => tracing::error!(
                    pod,
                    "started before the mesh served it, because the agent was away and its namespace had no member: \
                     connections from before go around the mesh; delete the pod"
                ),
                Some(_) | None => tracing::info!(pod, "started while the agent was away"),
            }
        }
    }
}
