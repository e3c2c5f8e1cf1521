//! The proxy as a child process, and the signals that concern the supervisor.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::peer::Peer;
use super::store::MAX_KEPT_FDS;
use crate::seqpacket;

/// Descriptors that a process of ours may have open: the kept ones and the connections of the proxy.
const WANTED_DESCRIPTORS: u64 = 1 << 20;

/// jemalloc's settings for the proxy. What loading the kernel programs and a burst of connections needed goes back to
/// the kernel within a second, also when nothing else happens; by default it would stay for the life of the process.
const ALLOCATOR_SETTINGS: (&str, &str) =
    ("_RJEM_MALLOC_CONF", "background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0,narenas:4");

/// A running proxy.
#[derive(Debug)]
pub struct Proxy {
    /// Its process.
    pub pid: Pid,
    /// The descriptor store's socket.
    pub peer: Peer,
    /// The proxy closed its end: it is about to be gone.
    pub hung_up: bool,
}

impl Proxy {
    /// Starts a proxy with the other end of a socket pair as its standard input.
    pub fn spawn(program: &Path, args: &[OsString]) -> io::Result<Self> {
        let (ours, theirs) = seqpacket::pair()?;
        let peer = Peer::new(ours)?;
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::from(theirs));
        if std::env::var_os(ALLOCATOR_SETTINGS.0).is_none() {
            command.env(ALLOCATOR_SETTINGS.0, ALLOCATOR_SETTINGS.1);
        }
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(|_| io::ErrorKind::InvalidData)?;
        Ok(Self { pid: Pid::from_raw(pid), peer, hung_up: false })
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// By itself.
    Code(i32),
    /// By a signal.
    Signal(Signal),
}

/// A child that ended.
#[derive(Debug, Clone, Copy)]
pub struct Exit {
    /// Which.
    pub pid: Pid,
    /// How.
    pub status: ExitStatus,
}

/// Collects every child that ended, also ones that were given to us as the first process of a container.
pub fn reap() -> Vec<Exit> {
    let mut exits = Vec::new();
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => exits.push(Exit { pid, status: ExitStatus::Code(code) }),
            Ok(WaitStatus::Signaled(pid, signal, _)) => exits.push(Exit { pid, status: ExitStatus::Signal(signal) }),
            Ok(WaitStatus::StillAlive) | Err(_) => return exits,
            // Stopped, continued and traced children have not ended.
            Ok(_) => {}
        }
    }
}

/// SIGTERM, SIGINT and SIGCHLD as something to wait for.
#[derive(Debug)]
pub struct Signals {
    fd: SignalFd,
}

impl Signals {
    /// Blocks the signals in this thread and receives them here. Children inherit the mask: see [`unblock`].
    pub fn block() -> io::Result<Self> {
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
            mask.add(signal);
        }
        nix::sys::signal::pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&mask), None)?;
        let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Self { fd })
    }

    /// The next pending signal.
    pub fn pending(&mut self) -> Option<Signal> {
        let info = self.fd.read_signal().ok().flatten()?;
        i32::try_from(info.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok())
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Receives signals again that the process that started this one had blocked. Before the first thread starts.
pub fn unblock() -> io::Result<()> {
    Ok(SigSet::empty().thread_set_mask()?)
}

/// Raises the limit of open descriptors as far as allowed; children inherit it.
pub fn raise_descriptor_limit() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let wanted = hard.max(WANTED_DESCRIPTORS);
    let raised = setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_ok()
        || setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(soft, |(soft, _)| soft);
    if !raised || limit < MAX_KEPT_FDS as u64 {
        tracing::warn!(limit, needed = MAX_KEPT_FDS, "limit of open descriptors is low");
    }
}
