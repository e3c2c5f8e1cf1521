//! This node, as enrolment acts on it.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use mesh_core::identity::SpiffeId;
use mesh_core::workload::WorkloadUid;

use crate::capture::Capture;
use crate::certificates::CertificatesHandle;
use crate::enrol::{self, Captured, CertificateAnswer, Host, NotCaptured};
use crate::runtime::Enrolled;
use crate::supervisor::client::StoreClient;
use crate::workers::DataPath;

/// Kernel, supervisor, data path and certificates.
pub(super) struct NodeHost {
    pub(super) capture: Arc<Capture>,
    pub(super) store: Arc<StoreClient>,
    pub(super) datapath: Arc<DataPath>,
    pub(super) certificates: CertificatesHandle,
}

impl Host for NodeHost {
    fn capture(&self, uid: &WorkloadUid, netns: OwnedFd) -> Result<Captured, NotCaptured> {
        enrol::capture(&self.capture, uid, netns)
    }

    fn renew(&self, workload: &Enrolled) -> Result<(), String> {
        enrol::renew(&self.capture, workload)
    }

    fn let_go(&self, cookie: u64, netns: BorrowedFd<'_>) -> Result<(), String> {
        self.capture.let_go(cookie, netns).map_err(|error| enrol::chain(&error))
    }

    fn is_gone(&self, netns: BorrowedFd<'_>) -> bool {
        enrol::is_gone(netns)
    }

    fn release(&self, cookie: u64, netns: Option<BorrowedFd<'_>>) -> Result<(), String> {
        self.capture.unenroll(cookie, netns).map_err(|error| enrol::chain(&error))
    }

    fn captured(&self) -> Result<Vec<u64>, String> {
        let adopted = self.capture.adopt().map_err(|error| enrol::chain(&error))?;
        Ok(adopted.into_iter().map(|workload| workload.cookie).collect())
    }

    fn retire_proxies(&self) -> Result<(), String> {
        let retired = self.capture.retire_proxies().map_err(|error| enrol::chain(&error))?;
        if !retired.is_empty() {
            tracing::info!(cgroups = ?retired, "proxies of the past are retired");
        }
        Ok(())
    }

    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.store.put(name, &fd)
    }

    fn forget(&self, name: &str) -> io::Result<()> {
        self.store.del(name)
    }

    fn serve(&self, workload: Arc<Enrolled>) {
        self.datapath.serve(workload);
    }

    fn stop(&self, uid: &WorkloadUid) {
        self.datapath.stop(uid);
    }

    fn stop_listening(&self, workload: &Arc<Enrolled>) {
        self.datapath.stop_listening(workload);
    }

    fn carries(&self, workload: &Arc<Enrolled>) -> usize {
        self.datapath.carries(workload)
    }

    fn cut(&self, workload: &Arc<Enrolled>) {
        self.datapath.cut(workload);
    }

    fn certificate(&self, id: SpiffeId) -> CertificateAnswer {
        Box::pin(self.certificates.want(id))
    }

    fn give_up_certificate(&self, id: &SpiffeId) {
        self.certificates.release(id);
    }
}
