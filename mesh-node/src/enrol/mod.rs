//! Enrolment: which workloads this node proxy serves, as the agent on the node says.
//!
//! Here: the agent's requests, carried out one at a time and acknowledged when everything is in place, and adopting
//! what a predecessor served. Not here: what a connection of a workload may do, how certificates are obtained.

mod kept;
mod kernel;
mod metrics;
pub mod protocol;
mod roster;
mod session;
#[cfg(test)]
mod testing;

use std::future::Future;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;

use mesh_api::admin::EnrolledWorkload;
use mesh_core::identity::SpiffeId;
use mesh_core::workload::WorkloadUid;

use crate::runtime::Enrolled;

pub use kept::{Adopted, adopt};
pub use kernel::{Captured, NotCaptured, capture, chain, is_gone, renew};
pub use metrics::EnrolMetrics;
pub use roster::Roster;
pub use session::Session;

/// Workloads that one node serves at most; the maps of the kernel programs and the descriptor store hold as many.
pub const MAX_WORKLOADS: usize = 4096;

/// The answer to the request for a certificate.
pub type CertificateAnswer = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

/// What enrolment acts on: the kernel, the supervisor's store, the data path and the certificates of this node.
/// A seam, so that the order of things is tested without any of them.
pub trait Host: Send + Sync + 'static {
    /// Opens listeners in a namespace and captures it. Blocks.
    fn capture(&self, uid: &WorkloadUid, netns: OwnedFd) -> Result<Captured, NotCaptured>;
    /// Captures again with what changed in the namespace. Blocks.
    fn renew(&self, workload: &Enrolled) -> Result<(), String>;
    /// Captures nothing new of a namespace, and leaves what captured connections need. Blocks.
    fn let_go(&self, cookie: u64, netns: BorrowedFd<'_>) -> Result<(), String>;
    /// Whether nothing leads out of a namespace any more: its workload is dead. Blocks.
    fn is_gone(&self, netns: BorrowedFd<'_>) -> bool;
    /// Ends the capture of a namespace. Blocks.
    fn release(&self, cookie: u64, netns: Option<BorrowedFd<'_>>) -> Result<(), String>;
    /// Cookies of the namespaces that the kernel captures. Blocks.
    fn captured(&self) -> Result<Vec<u64>, String>;
    /// Tells the kernel which proxies of the past are no more. Blocks.
    fn retire_proxies(&self) -> Result<(), String>;
    /// Puts a descriptor into the supervisor's store.
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()>;
    /// Takes a descriptor out of the supervisor's store.
    fn forget(&self, name: &str) -> io::Result<()>;
    /// Accepts connections of a workload.
    fn serve(&self, workload: Arc<Enrolled>);
    /// Stops accepting connections of a workload and closes those that there are.
    fn stop(&self, uid: &WorkloadUid);
    /// Closes the listeners of a workload. Its connections go on.
    fn stop_listening(&self, workload: &Arc<Enrolled>);
    /// Connections that a workload has, those that are being set up among them.
    fn carries(&self, workload: &Arc<Enrolled>) -> usize;
    /// Closes the connections of a workload that listens no more.
    fn cut(&self, workload: &Arc<Enrolled>);
    /// Makes sure that there is a certificate, and that it is renewed from now on; answers when there is one, or when
    /// the first attempt failed.
    fn certificate(&self, id: SpiffeId) -> CertificateAnswer;
    /// No workload needs this certificate.
    fn give_up_certificate(&self, id: &SpiffeId);
}

/// What the rest of the process sees of enrolment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EnrolmentStatus {
    /// The agent's socket is connected.
    pub agent_connected: bool,
    /// The agent has announced everything at least once since this process started.
    pub announced: bool,
    /// How many workloads of a predecessor were served from the start.
    pub adopted: usize,
    /// Workloads in order of their UIDs; state `ready`, or what is missing.
    pub workloads: Vec<EnrolledWorkload>,
    /// Messages of the agent that were refused.
    pub bad_messages: u64,
}
