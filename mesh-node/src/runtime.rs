//! What the data path and the parts around it share: the view of the world, and the types of what is handed over.
//!
//! There is one mutable cell in the process, [`Shared`]. Who learns something builds the next [`View`] and swaps it in;
//! who carries connections loads the view once and decides by it. No I/O here.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use mesh_core::identity::SpiffeId;
use mesh_core::snapshot::Snapshot;
use mesh_core::workload::{Workload, WorkloadUid};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, TrustAnchor};

/// The one shared mutable cell, swapped whole.
#[derive(Debug, Default)]
pub struct Shared {
    /// What is known now.
    pub view: ArcSwap<View>,
}

impl Shared {
    /// A cell that holds `view`.
    pub fn new(view: View) -> Self {
        Self { view: ArcSwap::from_pointee(view) }
    }

    /// Replaces the view by one made from it; `next` may run more than once when two writers meet.
    pub fn update(&self, next: impl Fn(&View) -> View) {
        self.view.rcu(|view| Arc::new(View { generation: view.generation + 1, ..next(view) }));
    }
}

/// Everything that a decision reads, consistent with itself.
#[derive(Debug, Default)]
pub struct View {
    /// Configuration.
    pub snapshot: Arc<Snapshot>,
    /// Workloads captured on this node, by the UID of the enrolment protocol (the pod's UID).
    pub enrolled: BTreeMap<WorkloadUid, Arc<Enrolled>>,
    /// Certificates of the enrolled workloads' identities.
    pub certs: BTreeMap<SpiffeId, Arc<CertifiedIdentity>>,
    /// What peers' certificates must chain to.
    pub roots: Arc<RootStore>,
    /// The first full synchronisation is done, or a stored snapshot was read.
    pub synced: bool,
    /// How many views of this process came before it.
    pub generation: u64,
    /// Enrolment UID to the configuration's workload, and back. Derived.
    workloads: HashMap<WorkloadUid, Arc<Workload>>,
    enrolments: HashMap<WorkloadUid, Arc<Enrolled>>,
}

impl View {
    /// Puts a view together.
    pub fn new(
        snapshot: Arc<Snapshot>,
        enrolled: BTreeMap<WorkloadUid, Arc<Enrolled>>,
        certs: BTreeMap<SpiffeId, Arc<CertifiedIdentity>>,
        roots: Arc<RootStore>,
        synced: bool,
    ) -> Self {
        let mut workloads = HashMap::new();
        let mut enrolments = HashMap::new();
        for (uid, pod) in &enrolled {
            if let Some(workload) = snapshot.workload_named(&pod.namespace, &pod.name, &pod.service_account) {
                workloads.insert(uid.clone(), Arc::clone(workload));
                enrolments.insert(workload.uid.clone(), Arc::clone(pod));
            }
        }
        Self { snapshot, enrolled, certs, roots, synced, generation: 0, workloads, enrolments }
    }

    /// The same with another configuration.
    pub fn with_snapshot(&self, snapshot: Arc<Snapshot>, synced: bool) -> Self {
        Self::new(snapshot, self.enrolled.clone(), self.certs.clone(), Arc::clone(&self.roots), synced)
    }

    /// The same with other enrolled workloads.
    pub fn with_enrolled(&self, enrolled: BTreeMap<WorkloadUid, Arc<Enrolled>>) -> Self {
        Self::new(Arc::clone(&self.snapshot), enrolled, self.certs.clone(), Arc::clone(&self.roots), self.synced)
    }

    /// The same with other certificates and roots.
    pub fn with_certs(&self, certs: BTreeMap<SpiffeId, Arc<CertifiedIdentity>>, roots: Arc<RootStore>) -> Self {
        Self::new(Arc::clone(&self.snapshot), self.enrolled.clone(), certs, roots, self.synced)
    }

    /// The configuration's workload for an enrolment; `None` until it has arrived.
    pub fn workload_of(&self, enrolment: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.workloads.get(enrolment)
    }

    /// The enrolment of a workload of the configuration; `None` where it is not captured on this node.
    pub fn enrolment_of(&self, workload: &WorkloadUid) -> Option<&Arc<Enrolled>> {
        self.enrolments.get(workload)
    }
}

/// A workload captured on this node.
#[derive(Debug)]
pub struct Enrolled {
    /// UID of the enrolment protocol (the pod's UID).
    pub uid: WorkloadUid,
    /// Pod name.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Service account.
    pub service_account: Arc<str>,
    /// Its network namespace.
    pub netns: OwnedFd,
    /// Cookie of that namespace (`SO_NETNS_COOKIE`).
    pub cookie: u64,
    /// Sockets that listen inside it.
    pub listeners: Listeners,
}

/// Listening sockets inside a workload's namespace, non-blocking, TCP_NODELAY and keepalive set (both are inherited).
/// IPv6 ones are missing where the namespace has no IPv6.
#[derive(Debug)]
pub struct Listeners {
    /// 127.0.0.1:15001.
    pub outbound4: OwnedFd,
    /// [::1]:15001.
    pub outbound6: Option<OwnedFd>,
    /// 15006, IP_TRANSPARENT.
    pub inbound4: OwnedFd,
    /// 15006, IPV6_TRANSPARENT.
    pub inbound6: Option<OwnedFd>,
    /// 15008.
    pub hbone4: OwnedFd,
    /// 15008.
    pub hbone6: Option<OwnedFd>,
}

impl Listeners {
    /// Listens no more, whoever else has these sockets: connections that come are refused.
    pub fn shut(&self) {
        let Self { outbound4, outbound6, inbound4, inbound6, hbone4, hbone6 } = self;
        let all =
            [Some(outbound4), outbound6.as_ref(), Some(inbound4), inbound6.as_ref(), Some(hbone4), hbone6.as_ref()];
        for listener in all.into_iter().flatten() {
            // One that listens no more is not connected, and that is the only error.
            let _ = nix::sys::socket::shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }
    }
}

/// An identity with the key that proves it.
#[derive(Debug)]
pub struct CertifiedIdentity {
    /// Whose.
    pub id: SpiffeId,
    /// Leaf first, then intermediates; no root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The same chain with its signing key.
    pub key: Arc<CertifiedKey>,
    /// Start of validity, seconds since 1970.
    pub not_before_secs: u64,
    /// End of validity, seconds since 1970.
    pub not_after_secs: u64,
    /// Serial number, hexadecimal.
    pub serial: String,
}

/// The mesh's trusted roots; two during a rotation.
#[derive(Debug, Default)]
pub struct RootStore {
    /// As received.
    pub certificates: Vec<CertificateDer<'static>>,
    /// What chains are built to.
    pub anchors: Vec<TrustAnchor<'static>>,
}

impl RootStore {
    /// Reads root certificates; one that does not parse spoils the set, because half a bundle would cut off peers.
    pub fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, webpki::Error> {
        let anchors = certificates
            .iter()
            .map(|der| webpki::anchor_from_trusted_cert(der).map(|anchor| anchor.to_owned()))
            .collect::<Result<_, _>>()?;
        Ok(Self { certificates, anchors })
    }
}

/// Where a captured connection wanted to go: `(namespace cookie, address of the accepted peer)` to the destination that
/// the application named. Consumes the note. A function, so that the data path runs without kernel programs in tests.
pub type OriginalDst = Arc<dyn Fn(u64, SocketAddr) -> Option<SocketAddr> + Send + Sync>;

/// How the data path is set up.
#[derive(Debug, Clone)]
pub struct DataPathConfig {
    /// This node's name.
    pub node: Arc<str>,
    /// Cluster of workloads that do not say, e.g. `Kubernetes`.
    pub cluster: Arc<str>,
    /// The only trust domain that peers may come from.
    pub trust_domain: Arc<str>,
    /// Worker threads; `None`: one for each CPU that this process may use.
    pub workers: Option<NonZeroUsize>,
    /// Carry connections between two workloads of this node through a tunnel too.
    pub force_tunnel: bool,
    /// Where the access log goes; `None`: nowhere.
    pub access_log: Option<AccessLogConfig>,
}

/// The access log's place and form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessLogConfig {
    /// A file that lines are appended to; `None`: standard output.
    pub path: Option<PathBuf>,
    /// Form of a line.
    pub format: AccessLogFormat,
}

/// Form of an access log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AccessLogFormat {
    /// `key="value"` pairs.
    #[default]
    Text,
    /// One JSON object.
    Json,
}
