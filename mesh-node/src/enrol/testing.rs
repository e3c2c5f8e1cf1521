//! Stand-ins for tests of enrolment: descriptors that are only told apart, and a host that writes down what it is asked.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use mesh_core::identity::SpiffeId;
use mesh_core::workload::WorkloadUid;

use super::{Captured, CertificateAnswer, Host, NotCaptured};
use crate::runtime::{Enrolled, Listeners};
use crate::supervisor::memfd;

/// A file of its own, as every namespace is one.
pub(super) fn file() -> OwnedFd {
    memfd::seal("test", b"").expect("memfd")
}

pub(super) fn listeners(v6: bool) -> Listeners {
    let null = || OwnedFd::from(File::open("/dev/null").expect("open"));
    let six = || v6.then(null);
    Listeners { outbound4: null(), outbound6: six(), inbound4: null(), inbound6: six(), hbone4: null(), hbone6: six() }
}

pub(super) fn workload(uid: &str, name: &str, v6: bool) -> Enrolled {
    Enrolled {
        uid: WorkloadUid(uid.into()),
        name: name.into(),
        namespace: "default".into(),
        service_account: "web".into(),
        netns: file(),
        cookie: 7,
        listeners: listeners(v6),
    }
}

/// Writes down what is asked of it, and fails as told.
#[derive(Default)]
pub(super) struct FakeHost {
    pub(super) log: Mutex<Vec<String>>,
    pub(super) fails: Mutex<BTreeSet<&'static str>>,
    pub(super) captured: Mutex<BTreeSet<u64>>,
    pub(super) kept: Mutex<BTreeSet<String>>,
    /// Connections that every workload has.
    pub(super) carried: Mutex<usize>,
    /// Workloads that have none nevertheless.
    pub(super) idle: Mutex<BTreeSet<String>>,
}

impl FakeHost {
    pub(super) fn fail(&self, what: &'static str) {
        self.fails.lock().expect("lock").insert(what);
    }

    pub(super) fn mend(&self) {
        self.fails.lock().expect("lock").clear();
    }

    /// What was asked since the last look.
    pub(super) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().expect("lock"))
    }

    fn note(&self, what: String) {
        self.log.lock().expect("lock").push(what);
    }

    fn outcome(&self, what: &'static str) -> Result<(), String> {
        if self.fails.lock().expect("lock").contains(what) { Err(format!("{what} fails")) } else { Ok(()) }
    }
}

/// A cookie that is the same for the same file.
fn cookie(netns: BorrowedFd<'_>) -> u64 {
    nix::sys::stat::fstat(netns).expect("fstat").st_ino
}

impl Host for FakeHost {
    fn capture(&self, uid: &WorkloadUid, netns: OwnedFd) -> Result<Captured, NotCaptured> {
        self.note(format!("capture {}", uid.0));
        let cookie = cookie(std::os::fd::AsFd::as_fd(&netns));
        self.captured.lock().expect("lock").insert(cookie);
        match self.outcome("capture") {
            Ok(()) => Ok(Captured { netns, cookie, listeners: listeners(true) }),
            Err(reason) => Err(NotCaptured { reason, netns, cookie: Some(cookie) }),
        }
    }

    fn renew(&self, workload: &Enrolled) -> Result<(), String> {
        self.note(format!("renew {}", workload.uid.0));
        self.captured.lock().expect("lock").insert(workload.cookie);
        self.outcome("renew")
    }

    fn let_go(&self, _cookie: u64, _netns: BorrowedFd<'_>) -> Result<(), String> {
        self.note("let go".into());
        self.outcome("let go")
    }

    fn is_gone(&self, _netns: BorrowedFd<'_>) -> bool {
        self.outcome("alive").is_err()
    }

    fn release(&self, cookie: u64, netns: Option<BorrowedFd<'_>>) -> Result<(), String> {
        self.note(format!("release{}", if netns.is_some() { "" } else { " unknown" }));
        self.captured.lock().expect("lock").remove(&cookie);
        self.outcome("release")
    }

    fn captured(&self) -> Result<Vec<u64>, String> {
        Ok(self.captured.lock().expect("lock").iter().copied().collect())
    }

    fn retire_proxies(&self) -> Result<(), String> {
        self.note("retire".into());
        Ok(())
    }

    fn keep(&self, name: &str, _fd: BorrowedFd<'_>) -> io::Result<()> {
        self.kept.lock().expect("lock").insert(name.to_owned());
        self.outcome("keep").map_err(io::Error::other)
    }

    fn forget(&self, name: &str) -> io::Result<()> {
        self.kept.lock().expect("lock").remove(name);
        Ok(())
    }

    fn serve(&self, workload: Arc<Enrolled>) {
        self.note(format!("serve {}", workload.uid.0));
    }

    fn stop(&self, uid: &WorkloadUid) {
        self.note(format!("stop {}", uid.0));
    }

    fn stop_listening(&self, workload: &Arc<Enrolled>) {
        self.note(format!("stop listening {}", workload.uid.0));
    }

    fn carries(&self, workload: &Arc<Enrolled>) -> usize {
        let is_idle = self.idle.lock().expect("lock").contains(&*workload.uid.0);
        if is_idle { 0 } else { *self.carried.lock().expect("lock") }
    }

    fn cut(&self, workload: &Arc<Enrolled>) {
        self.note(format!("cut {}", workload.uid.0));
    }

    fn certificate(&self, id: SpiffeId) -> CertificateAnswer {
        self.note(format!("certificate {}", id.service_account));
        let hangs = self.outcome("hang").is_err();
        let outcome = self.outcome("certificate");
        Box::pin(async move {
            if hangs {
                std::future::pending::<()>().await;
            }
            outcome
        })
    }

    fn give_up_certificate(&self, id: &SpiffeId) {
        self.note(format!("give up {}", id.service_account));
    }
}
