//! The connection to the agent: greeting, requests one at a time, an answer to each; again after it breaks.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::protocol::{self, BadRequest, Request};
use super::{EnrolMetrics, EnrolmentStatus, Roster};
use crate::seqpacket::{self, Received};
use crate::supervisor::client::Changes;

/// Pause before the agent is tried again; doubles up to the longest. The agent is on this node: trying is cheap.
const RECONNECT_FIRST: Duration = Duration::from_millis(50);
/// Longest pause.
const RECONNECT_MAX: Duration = Duration::from_secs(1);
/// Time for the agent to take an answer.
const SEND_WITHIN: Duration = Duration::from_secs(5);
/// Bad messages are logged at most once in this time; all are counted.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// Speaks with the agent for the life of the process.
pub struct Session {
    agent: PathBuf,
    roster: Roster,
    status: watch::Sender<EnrolmentStatus>,
    metrics: EnrolMetrics,
    /// What a predecessor goes on doing until this process has taken over.
    predecessor: Changes,
    bad_logged: Option<Instant>,
    unreachable_logged: bool,
}

/// A message, as far as it was understood.
enum Heard {
    Request(Request),
    Bad(BadRequest),
    Closed,
    /// Not now.
    Nothing,
}

impl Session {
    /// A session with the agent at a socket, and its status from here on.
    pub fn new(
        agent: PathBuf,
        roster: Roster,
        predecessor: Changes,
        metrics: EnrolMetrics,
    ) -> (Self, watch::Receiver<EnrolmentStatus>) {
        let workloads = roster.rows();
        let status = EnrolmentStatus { adopted: workloads.len(), workloads, ..EnrolmentStatus::default() };
        let (status, watch) = watch::channel(status);
        (Self { agent, roster, status, metrics, predecessor, bad_logged: None, unreachable_logged: false }, watch)
    }

    /// Runs until cancelled, with the agent from `may_speak` on. A request that is being carried out then is given up: the agent repeats it to whoever
    /// comes next.
    pub async fn run(mut self, may_speak: impl Future<Output = ()>, cancel: CancellationToken) {
        let talk = async {
            self.roster.certify_adopted();
            self.following(may_speak).await;
            let mut pause = RECONNECT_FIRST;
            loop {
                match self.converse().await {
                    Ok(()) => pause = RECONNECT_FIRST,
                    Err(error) => self.log_unreachable(&error),
                }
                if !self.roster.settle_one().await {
                    self.following(tokio::time::sleep(pause)).await;
                    pause = (pause * 2).min(RECONNECT_MAX);
                }
            }
        };
        tokio::select! {
            () = cancel.cancelled() => {}
            () = talk => {}
        }
    }

    /// Waits for something; meanwhile does what a predecessor does, and looks after workloads that left.
    async fn following<T>(&mut self, something: impl Future<Output = T>) -> T {
        tokio::pin!(something);
        loop {
            let look = self.roster.next_look();
            let look = async {
                match look {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                change = self.predecessor.next() => {
                    self.roster.follow(change);
                    let workloads = self.roster.rows();
                    self.status.send_modify(|status| status.workloads = workloads);
                }
                done = &mut something => return done,
                () = look => {
                    self.roster.look_at_leaving(tokio::time::Instant::now()).await;
                    let workloads = self.roster.rows();
                    self.status.send_modify(|status| status.workloads = workloads);
                }
            }
        }
    }

    /// One connection; `Ok` when there was one and it ended.
    async fn converse(&mut self) -> io::Result<()> {
        let agent = seqpacket::asynchronous(seqpacket::connect(&self.agent)?)?;
        send(&agent, &protocol::hello()).await?;
        info!(agent = %self.agent.display(), "connected to the agent");
        self.unreachable_logged = false;
        self.roster.agent_connected();
        self.status.send_modify(|status| status.agent_connected = true);
        let ended = self.serve(&agent).await;
        self.status.send_modify(|status| status.agent_connected = false);
        match ended {
            Ok(()) => warn!("the agent closed the connection; enrolled workloads are served on"),
            Err(error) => warn!(%error, "connection to the agent broke; enrolled workloads are served on"),
        }
        Ok(())
    }

    async fn serve(&mut self, agent: &AsyncFd<OwnedFd>) -> io::Result<()> {
        loop {
            let heard = if self.roster.is_settled() { self.following(hear(agent)).await? } else { hear_now(agent)? };
            let answer = match heard {
                Heard::Nothing => {
                    self.roster.settle_one().await;
                    continue;
                }
                Heard::Closed => return Ok(()),
                Heard::Bad(error) => {
                    self.count_bad(&error);
                    protocol::answer(Err(&error.to_string()))
                }
                Heard::Request(request) => {
                    let all_announced = matches!(request, Request::SnapshotSent);
                    let outcome = self.roster.handle(request).await;
                    let workloads = self.roster.rows();
                    self.status.send_modify(|status| {
                        status.workloads = workloads;
                        status.announced |= all_announced;
                    });
                    protocol::answer(outcome.as_ref().copied().map_err(String::as_str))
                }
            };
            send(agent, &answer).await?;
        }
    }

    fn count_bad(&mut self, error: &BadRequest) {
        self.metrics.bad_messages.inc();
        self.status.send_modify(|status| status.bad_messages += 1);
        if self.bad_logged.is_none_or(|at| at.elapsed() >= LOG_EVERY) {
            self.bad_logged = Some(Instant::now());
            warn!(%error, "message of the agent refused");
        }
    }

    fn log_unreachable(&mut self, error: &io::Error) {
        if !self.unreachable_logged {
            self.unreachable_logged = true;
            warn!(agent = %self.agent.display(), %error, "no agent; enrolled workloads are served on");
        }
    }
}

async fn hear(agent: &AsyncFd<OwnedFd>) -> io::Result<Heard> {
    agent.async_io(Interest::READABLE, |fd| seqpacket::receive(fd.as_fd())).await.map(understand)
}

/// What has come already.
fn hear_now(agent: &AsyncFd<OwnedFd>) -> io::Result<Heard> {
    match seqpacket::receive(agent.as_fd()) {
        Ok(received) => Ok(understand(received)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Heard::Nothing),
        Err(error) => Err(error),
    }
}

fn understand(received: Received) -> Heard {
    match received {
        Received::Closed => Heard::Closed,
        Received::Oversized => Heard::Bad(BadRequest::Oversized),
        Received::Message(message) => match protocol::parse(&message.bytes, message.fds) {
            Ok(request) => Heard::Request(request),
            Err(error) => Heard::Bad(error),
        },
    }
}

async fn send(agent: &AsyncFd<OwnedFd>, bytes: &[u8]) -> io::Result<()> {
    let sending = agent.async_io(Interest::WRITABLE, |fd| seqpacket::send(fd.as_fd(), bytes, &[]));
    tokio::time::timeout(SEND_WITHIN, sending).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

#[cfg(test)]
mod tests;
