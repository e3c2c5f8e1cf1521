//! What of an enrolment outlives the proxy: descriptors in the supervisor's store, and adopting them.
//!
//! Names: `netns/UID`, `listen/UID/KIND`, `info/UID`. The last one is put last and says that the rest is complete.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use mesh_core::workload::WorkloadUid;
use serde::{Deserialize, Serialize};

use super::protocol::{self, WorkloadInfo};
use crate::runtime::{Enrolled, Listeners};
use crate::supervisor::client::Kept;
use crate::supervisor::memfd;

const NETNS: &str = "netns/";
const LISTEN: &str = "listen/";
const INFO: &str = "info/";
const KINDS: [&str; 6] = ["outbound4", "outbound6", "inbound4", "inbound6", "hbone4", "hbone6"];

/// The part of an enrolment that is not a descriptor.
#[derive(Debug, Serialize, Deserialize)]
struct Info {
    name: String,
    namespace: String,
    service_account: String,
    cookie: u64,
}

/// What was found in the store.
#[derive(Debug, Default)]
pub struct Adopted {
    /// Workloads that can be served at once.
    pub workloads: Vec<Enrolled>,
    /// Names of descriptors without the rest of their enrolment.
    pub leftovers: Vec<String>,
}

/// All names of a workload's descriptors that can occur; `info` first, so that forgetting in this order never leaves an
/// enrolment that looks complete.
pub(super) fn names(uid: &WorkloadUid) -> Vec<String> {
    let listeners = KINDS.iter().map(|kind| format!("{LISTEN}{}/{kind}", uid.0));
    [format!("{INFO}{}", uid.0), format!("{NETNS}{}", uid.0)].into_iter().chain(listeners).collect()
}

/// Descriptors of a workload with their names, `info` last.
pub(super) fn descriptors(workload: &Enrolled) -> io::Result<Vec<(String, OwnedFd)>> {
    let uid = &workload.uid.0;
    let mut all = vec![(format!("{NETNS}{uid}"), workload.netns.try_clone()?)];
    for (kind, fd) in listeners(&workload.listeners) {
        all.push((format!("{LISTEN}{uid}/{kind}"), fd.try_clone_to_owned()?));
    }
    let info = Info {
        name: workload.name.to_string(),
        namespace: workload.namespace.to_string(),
        service_account: workload.service_account.to_string(),
        cookie: workload.cookie,
    };
    all.push((format!("{INFO}{uid}"), memfd::seal("workload", &serde_json::to_vec(&info)?)?));
    Ok(all)
}

/// Takes every enrolment out of what the supervisor kept.
pub fn adopt(kept: &mut Kept) -> Adopted {
    let mut adopted = Adopted::default();
    let infos: Vec<String> = kept.keys().filter_map(|name| name.strip_prefix(INFO).map(str::to_owned)).collect();
    let mut complete = BTreeSet::new();
    for uid in infos {
        match adopt_one(kept, &uid) {
            Ok(workload) => {
                complete.extend(names(&workload.uid));
                adopted.workloads.push(workload);
            }
            Err(error) => tracing::warn!(uid, %error, "kept enrolment cannot be used"),
        }
    }
    adopted.leftovers =
        kept.keys().filter(|name| is_ours(name)).filter(|name| !complete.contains(*name)).cloned().collect();
    kept.retain(|name, _| !is_ours(name));
    adopted
}

/// Whether a descriptor of this name belongs to an enrolment.
pub(super) fn is_ours(name: &str) -> bool {
    [NETNS, LISTEN, INFO].iter().any(|prefix| name.starts_with(prefix))
}

/// The workload whose enrolment a descriptor of this name makes complete, and whose end its end is.
pub(super) fn completes(name: &str) -> Option<WorkloadUid> {
    name.strip_prefix(INFO).map(|uid| WorkloadUid(uid.into()))
}

fn adopt_one(kept: &Kept, uid: &str) -> io::Result<Enrolled> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let find = |name: &str| kept.get(name).ok_or_else(|| invalid(format!("{name} is missing")));
    let take = |kind: &str| find(&format!("{LISTEN}{uid}/{kind}"))?.try_clone();
    let take_v6 = |kind: &str| kept.get(&format!("{LISTEN}{uid}/{kind}")).map(OwnedFd::try_clone).transpose();
    let info: Info = serde_json::from_slice(&memfd::unseal(find(&format!("{INFO}{uid}"))?)?)?;
    Ok(Enrolled {
        uid: protocol::uid(uid).map_err(|error| invalid(error.to_string()))?,
        name: info.name.into(),
        namespace: info.namespace.into(),
        service_account: info.service_account.into(),
        netns: find(&format!("{NETNS}{uid}"))?.try_clone()?,
        cookie: info.cookie,
        listeners: Listeners {
            outbound4: take("outbound4")?,
            outbound6: take_v6("outbound6")?,
            inbound4: take("inbound4")?,
            inbound6: take_v6("inbound6")?,
            hbone4: take("hbone4")?,
            hbone6: take_v6("hbone6")?,
        },
    })
}

/// The listeners that are there, by kind.
pub(super) fn listeners(listeners: &Listeners) -> impl Iterator<Item = (&'static str, BorrowedFd<'_>)> {
    let Listeners { outbound4, outbound6, inbound4, inbound6, hbone4, hbone6 } = listeners;
    let all = [Some(outbound4), outbound6.as_ref(), Some(inbound4), inbound6.as_ref(), Some(hbone4), hbone6.as_ref()];
    KINDS.into_iter().zip(all).filter_map(|(kind, fd)| fd.map(|fd| (kind, fd.as_fd())))
}

/// Who an enrolled workload is.
pub(super) fn info(workload: &Enrolled) -> WorkloadInfo {
    WorkloadInfo {
        name: workload.name.clone(),
        namespace: workload.namespace.clone(),
        service_account: workload.service_account.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enrol::testing::workload;

    fn keep(kept: &mut Kept, workload: &Enrolled) {
        kept.extend(descriptors(workload).expect("descriptors"));
    }

    #[test]
    fn what_was_kept_is_adopted_with_and_without_ipv6() {
        let mut kept = Kept::new();
        keep(&mut kept, &workload("a", "web-1", true));
        keep(&mut kept, &workload("ns/b", "web-2", false));
        kept.insert("cert/x".into(), std::fs::File::open("/dev/null").expect("open").into());
        let adopted = adopt(&mut kept);
        let found: Vec<_> =
            adopted.workloads.iter().map(|w| (&*w.uid.0, &*w.name, w.listeners.hbone6.is_some())).collect();
        assert_eq!(found, [("a", "web-1", true), ("ns/b", "web-2", false)]);
        assert!(adopted.leftovers.is_empty(), "{:?}", adopted.leftovers);
        assert_eq!(kept.keys().collect::<Vec<_>>(), ["cert/x"], "others' descriptors stay");
    }

    #[test]
    fn half_an_enrolment_is_left_over_whatever_is_missing() {
        for missing in ["netns/a", "listen/a/outbound4", "listen/a/inbound4", "listen/a/hbone4", "info/a"] {
            let mut kept = Kept::new();
            keep(&mut kept, &workload("a", "web-1", true));
            kept.remove(missing).expect("was there");
            let adopted = adopt(&mut kept);
            assert!(adopted.workloads.is_empty(), "{missing}");
            assert_eq!(adopted.leftovers.len(), 7, "{missing}: {:?}", adopted.leftovers);
        }
    }

    #[test]
    fn info_that_is_not_sealed_or_not_ours_is_not_believed() {
        for bad in
            [memfd::seal("x", b"{\"name\":1}").expect("seal"), std::fs::File::open("/dev/null").expect("open").into()]
        {
            let mut kept = Kept::new();
            keep(&mut kept, &workload("a", "web-1", true));
            kept.insert("info/a".into(), bad);
            assert!(adopt(&mut kept).workloads.is_empty());
        }
    }

    #[test]
    fn info_is_put_last_and_forgotten_first() {
        let workload = workload("a", "web-1", true);
        let put: Vec<_> = descriptors(&workload).expect("descriptors").into_iter().map(|(name, _)| name).collect();
        assert_eq!(put.last().map(String::as_str), Some("info/a"));
        let forgotten = names(&workload.uid);
        assert_eq!(forgotten.first().map(String::as_str), Some("info/a"));
        assert_eq!(put.iter().collect::<BTreeSet<_>>(), forgotten.iter().collect::<BTreeSet<_>>());
    }
}
