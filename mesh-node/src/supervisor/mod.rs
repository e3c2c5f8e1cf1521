//! The first process: tiny, without an async runtime, so that it outlives the proxy that it starts.
//!
//! Here: it keeps descriptors (listeners, namespaces, sealed keys), starts the proxy and starts it again, sheds waiting
//! connections while none serves, hands everything to the next supervisor. Not here: anything about traffic.

pub mod client;
pub mod handover;
pub mod lifecycle;
pub mod lock;
pub mod memfd;
pub mod message;
pub mod peer;
pub mod process;
pub mod store;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::signal::Signal;
use tracing::{debug, error, info, warn};

use self::handover::HandoverServer;
use self::lifecycle::{Due, Lifecycle};
use self::lock::{LockError, StateLock};
use self::message::StoreMessage;
use self::peer::{Change, Heard, Peer};
use self::process::{Proxy, Signals};
use self::store::FdStore;

/// Exit status of a proxy that cannot work with its configuration (`EX_CONFIG` of sysexits.h): starting it again would
/// not help.
pub const EXIT_CONFIG: u8 = 78;
/// How long a supervisor that was to take over waits for the state directory of one that is dying.
const LOCK_WITHIN: Duration = Duration::from_secs(5);
/// Pause between two tries to get it.
const LOCK_PAUSE: Duration = Duration::from_millis(50);
/// Messages that one peer is heard before the others have their turn.
const MESSAGES_PER_TURN: usize = 256;

/// What the supervisor runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Directory of the lock and the hand-over socket.
    pub state_dir: PathBuf,
    /// Take everything over from the supervisor that runs now, if there is one.
    pub takeover: bool,
    /// When another supervisor has taken over, wait to be told to end: whoever started this one would start it again.
    pub stay: bool,
    /// Program of the proxy.
    pub program: PathBuf,
    /// Its arguments. Its standard input is the descriptor store's socket.
    pub args: Vec<OsString>,
    /// Time that the proxy gets to drain.
    pub drain: Duration,
}

/// Runs until told to end or until another supervisor took over. Returns the exit status.
pub fn run(options: Options) -> anyhow::Result<u8> {
    process::raise_descriptor_limit();
    let signals = Signals::block()?;
    let mut supervisor = Supervisor::new(options, signals)?;
    loop {
        if let Some(status) = supervisor.turn()? {
            return Ok(status);
        }
    }
}

struct Supervisor {
    options: Options,
    signals: Signals,
    lifecycle: Lifecycle,
    store: FdStore,
    proxy: Option<Proxy>,
    /// Ours as long as no other supervisor took over.
    lock: Option<StateLock>,
    /// Listens for the next supervisor; absent before a take-over is complete and after it was handed on.
    handover: Option<HandoverServer>,
    /// The supervisor that we take over from, until it has closed the connection.
    predecessor: Option<Predecessor>,
    /// Told to end by a signal, not by a successor.
    told: bool,
}

/// The supervisor before this one.
struct Predecessor {
    peer: Peer,
    /// Our proxy is ready, and it was told so: it says what changed until then, and goes.
    told: bool,
}

/// What a descriptor of the poll set stands for.
#[derive(Debug, Clone, Copy)]
enum Source {
    Signals,
    Proxy,
    Predecessor,
    Listener,
    Successor(usize),
}

impl Supervisor {
    fn new(options: Options, signals: Signals) -> anyhow::Result<Self> {
        let mut supervisor = Self {
            signals,
            lifecycle: Lifecycle::new(Instant::now()),
            store: FdStore::default(),
            proxy: None,
            lock: None,
            handover: None,
            predecessor: None,
            told: false,
            options,
        };
        let state_dir = supervisor.options.state_dir.clone();
        let mut tries_end = Instant::now();
        if supervisor.options.takeover {
            tries_end += LOCK_WITHIN;
        }
        loop {
            if supervisor.options.takeover
                && let Some(taken) = handover::take_over(&state_dir)?
            {
                supervisor.adopt(taken);
                return Ok(supervisor);
            }
            match StateLock::acquire(&state_dir) {
                Ok(lock) => {
                    supervisor.lock = Some(lock);
                    supervisor.handover = Some(HandoverServer::listen(&state_dir)?);
                    return Ok(supervisor);
                }
                // It is dying, or it has been taken over from and its successor does not listen yet.
                Err(LockError::InUse { .. }) if Instant::now() < tries_end => std::thread::sleep(LOCK_PAUSE),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn adopt(&mut self, taken: handover::Taken) {
        info!(descriptors = taken.store.names().count(), "taking over from the running supervisor");
        self.store = taken.store;
        self.lock = Some(taken.lock);
        self.predecessor = Some(Predecessor { peer: taken.predecessor, told: false });
    }

    /// One round: do what is due, wait, hear everybody. Returns the exit status at the end.
    fn turn(&mut self) -> anyhow::Result<Option<u8>> {
        while let Some(due) = self.lifecycle.due(Instant::now()) {
            match due {
                Due::Start => self.start_proxy(),
                Due::Shed => self.shed(),
                Due::Kill => {
                    warn!("proxy did not end within its drain time");
                    self.signal_proxy(Signal::SIGKILL);
                }
                Due::Exit if self.options.stay && !self.told => break,
                Due::Exit => return Ok(Some(0)),
            }
        }
        for (source, _flags) in self.wait()? {
            match source {
                Source::Signals => {
                    if let Some(status) = self.hear_signals() {
                        return Ok(Some(status));
                    }
                }
                Source::Proxy => self.hear_proxy(),
                Source::Predecessor => self.hear_predecessor(),
                Source::Listener => self.handover.iter_mut().for_each(HandoverServer::accept),
                Source::Successor(at) => self.hear_successor(at),
            }
        }
        Ok(None)
    }

    fn wait(&mut self) -> io::Result<Vec<(Source, PollFlags)>> {
        let timeout = match self.lifecycle.next_wakeup() {
            None => PollTimeout::NONE,
            Some(at) => {
                // Rounded up: waking a fraction of a millisecond early would spin.
                let wait = at.saturating_duration_since(Instant::now()).as_millis() + 1;
                PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
            }
        };
        let mut sources = vec![(Source::Signals, self.signals.as_fd(), false)];
        sources.extend(
            self.proxy.iter().filter(|p| !p.hung_up).map(|p| (Source::Proxy, p.peer.as_fd(), p.peer.wants_to_send())),
        );
        let predecessor = self.predecessor.iter().map(|predecessor| &predecessor.peer);
        sources.extend(predecessor.map(|peer| (Source::Predecessor, peer.as_fd(), peer.wants_to_send())));
        if let Some(handover) = &self.handover {
            sources.push((Source::Listener, handover.as_fd(), false));
            let successors = handover.successors.iter().enumerate();
            sources.extend(
                successors.map(|(at, next)| (Source::Successor(at), next.peer.as_fd(), next.peer.wants_to_send())),
            );
        }
        let mut fds: Vec<PollFd<'_>> = sources
            .iter()
            .map(|&(_, fd, send)| {
                PollFd::new(fd, if send { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN })
            })
            .collect();
        match nix::poll::poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = sources.iter().zip(&fds).filter_map(|((source, ..), fd)| {
            let flags = fd.revents().unwrap_or(PollFlags::empty());
            (!flags.is_empty()).then_some((*source, flags))
        });
        // Last successor first: dropping one must not move those that are still to be heard.
        Ok(ready.rev().collect())
    }

    fn start_proxy(&mut self) {
        match Proxy::spawn(&self.options.program, &self.options.args) {
            Ok(mut proxy) => {
                info!(pid = proxy.pid.as_raw(), "proxy started");
                proxy.peer.queue_store(&self.store);
                self.proxy = Some(proxy);
                self.lifecycle.started();
            }
            Err(error) => {
                let retry_in = self.lifecycle.exited(Instant::now());
                error!(%error, program = %self.options.program.display(), ?retry_in, "proxy cannot be started");
            }
        }
    }

    fn shed(&mut self) {
        // While we take over, the predecessor's proxy serves these listeners.
        if self.predecessor.as_ref().is_none_or(|predecessor| predecessor.told) {
            let connections = self.store.shed();
            if connections > 0 {
                warn!(connections, "no proxy accepts: waiting connections reset");
            }
        }
    }

    fn signal_proxy(&self, signal: Signal) {
        if let Some(proxy) = &self.proxy
            && let Err(error) = nix::sys::signal::kill(proxy.pid, signal)
        {
            debug!(%error, "proxy is gone already");
        }
    }

    /// Returns the exit status when the proxy says that it can never work.
    fn hear_signals(&mut self) -> Option<u8> {
        while let Some(signal) = self.signals.pending() {
            match signal {
                Signal::SIGCHLD => {
                    let exit =
                        process::reap().into_iter().find(|exit| Some(exit.pid) == self.proxy.as_ref().map(|p| p.pid));
                    if let Some(exit) = exit
                        && let Some(status) = self.proxy_exited(exit.status)
                    {
                        return Some(status);
                    }
                }
                // Only SIGTERM and SIGINT remain in the mask.
                _ => {
                    self.told = true;
                    self.terminate();
                }
            }
        }
        None
    }

    fn terminate(&mut self) {
        if self.lifecycle.terminate(Instant::now(), self.options.drain) {
            info!(drain = ?self.options.drain, "told to end: the proxy drains");
            self.signal_proxy(Signal::SIGTERM);
        }
    }

    fn proxy_exited(&mut self, status: process::ExitStatus) -> Option<u8> {
        // What it said last still counts.
        while self.proxy.is_some() && self.hear_proxy_once() {}
        self.proxy = None;
        let hopeless = status == process::ExitStatus::Code(i32::from(EXIT_CONFIG));
        if hopeless && !self.lifecycle.ever_ready() && !self.store.has_listeners() {
            return Some(EXIT_CONFIG);
        }
        match self.lifecycle.exited(Instant::now()) {
            None => info!(?status, "proxy ended"),
            Some(restart_in) => error!(?status, ?restart_in, "proxy died"),
        }
        None
    }

    fn hear_proxy(&mut self) {
        if let Some(proxy) = &mut self.proxy
            && let Err(error) = proxy.peer.flush(&self.store)
        {
            debug!(%error, "proxy does not take descriptors");
        }
        for _ in 0..MESSAGES_PER_TURN {
            if !self.hear_proxy_once() {
                return;
            }
        }
    }

    /// Returns whether there may be more.
    fn hear_proxy_once(&mut self) -> bool {
        let Some(proxy) = &mut self.proxy else { return false };
        match proxy.peer.hear() {
            Heard::Nothing => false,
            Heard::Closed => {
                // It is about to die, or closed its input: either way it can keep nothing any more.
                proxy.hung_up = true;
                self.signal_proxy(Signal::SIGKILL);
                false
            }
            Heard::Malformed(reason) => {
                warn!(%reason, "message from the proxy ignored");
                true
            }
            Heard::Message(message, fd) => {
                self.obey(message, fd);
                true
            }
        }
    }

    fn obey(&mut self, message: StoreMessage, fd: Option<OwnedFd>) {
        match (message, fd) {
            // Another supervisor has everything, and what this proxy still opens must not outlive it.
            (StoreMessage::Put(_) | StoreMessage::Del(_), _) if self.lock.is_none() => {}
            (StoreMessage::Ready, _) => self.proxy_ready(),
            (message, fd) => match self.change(message, fd) {
                Ok(change) => self.handover.iter_mut().for_each(|handover| handover.forward(&change, &self.store)),
                Err(message) => warn!(%message, "message from the proxy out of place"),
            },
        }
    }

    /// Carries out a change of the store, or returns what is none.
    fn change(&mut self, message: StoreMessage, fd: Option<OwnedFd>) -> Result<Change, StoreMessage> {
        match (message, fd) {
            (StoreMessage::Put(name), Some(fd)) => {
                if let Err(error) = self.store.put(name.clone(), fd) {
                    error!(%error, "descriptor store is full");
                }
                Ok(Change::Put(name))
            }
            (StoreMessage::Del(name), _) => {
                self.store.del(&name);
                Ok(Change::Del(name))
            }
            (message, _) => Err(message),
        }
    }

    fn proxy_ready(&mut self) {
        if self.lifecycle.is_ready() {
            return;
        }
        self.lifecycle.ready();
        info!("proxy is ready");
        let Some(predecessor) = self.predecessor.as_mut().filter(|predecessor| !predecessor.told) else { return };
        predecessor.told = true;
        predecessor.peer.queue(StoreMessage::TakenOver);
        if let Err(error) = predecessor.peer.flush(&self.store) {
            warn!(%error, "the previous supervisor is gone already");
        }
        self.own_state_dir();
    }

    /// From here on the lock file names us, and the next supervisor finds us.
    fn own_state_dir(&mut self) {
        if let Some(lock) = &mut self.lock
            && let Err(error) = lock.write_pid()
        {
            warn!(%error, "lock file still names the previous supervisor");
        }
        match HandoverServer::listen(&self.options.state_dir) {
            Ok(server) => self.handover = Some(server),
            Err(error) => error!(%error, "no hand-over socket: the next supervisor cannot take over"),
        }
    }

    fn hear_predecessor(&mut self) {
        if let Some(predecessor) = &mut self.predecessor
            && let Err(error) = predecessor.peer.flush(&self.store)
        {
            debug!(%error, "the previous supervisor does not hear us");
        }
        for _ in 0..MESSAGES_PER_TURN {
            let Some(predecessor) = &self.predecessor else { return };
            match predecessor.peer.hear() {
                Heard::Nothing => return,
                Heard::Malformed(reason) => warn!(%reason, "message from the previous supervisor ignored"),
                Heard::Message(message, fd) => match self.change(message, fd) {
                    Ok(change) => self.tell_proxy(&change),
                    Err(message) => debug!(%message, "message from the previous supervisor out of place"),
                },
                Heard::Closed => {
                    if self.predecessor.take().is_some_and(|predecessor| !predecessor.told) {
                        warn!("the previous supervisor went before we were ready");
                        self.own_state_dir();
                    }
                }
            }
        }
    }

    /// Our proxy has what was kept when it started; this came later.
    fn tell_proxy(&mut self, change: &Change) {
        if let Some(proxy) = &mut self.proxy {
            proxy.peer.queue_change(change);
            if let Err(error) = proxy.peer.flush(&self.store) {
                debug!(%error, "proxy does not take descriptors");
            }
        }
    }

    fn hear_successor(&mut self, at: usize) {
        let Some(handover) = &mut self.handover else { return };
        let Some(lock) = &self.lock else { return };
        if handover.hear(at, &self.store, lock) == handover::Progress::TakenOver {
            info!("another supervisor took over");
            // Its proxy serves the listeners; keeping ours open would hold their ports when it closes them.
            self.store.clear();
            self.handover = None;
            self.lock = None;
            self.terminate();
        }
    }
}
