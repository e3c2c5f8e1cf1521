//! Asking the agent until it gives an answer that counts, or time is up.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::wire::{ANSWER_WITHIN, Answer, MAX_LINE, Request};

/// Pause before the agent is asked again: a pod starts soon after the agent is there.
const POLL: Duration = Duration::from_millis(250);
/// An agent that does not answer within this time hangs; one that is alive answers sooner, be it with "not yet".
const ATTEMPT: Duration = Duration::from_secs(15);
/// An agent that was reached in time is heard to the end, which is a little later than it means to answer.
const HEARD_OUT: Duration = ANSWER_WITHIN.saturating_add(Duration::from_secs(1));

/// How asking ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    Proceed,
    Refused(String),
    /// Nobody has said that the pod belongs to the mesh, and what is known of its namespace says that it does not.
    OutsideAsKnown {
        why_not_asked: String,
    },
    TimedOut {
        last: String,
    },
}

/// How long to ask.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub(crate) deadline: Instant,
    /// Then a pod that nobody has called a member is taken for an outsider; none: never.
    pub(crate) outside_at: Option<Instant>,
}

impl Patience {
    fn end(&self, is_member: bool) -> Instant {
        self.outside_at.filter(|_| !is_member).map_or(self.deadline, |outside| outside.min(self.deadline))
    }

    /// When an attempt that begins now is given up: an answer that is under way may say that the pod is a member.
    fn attempt_end(&self, now: Instant, is_member: bool) -> Instant {
        (now + ATTEMPT).min(self.end(is_member).max(now + HEARD_OUT)).min(self.deadline)
    }
}

pub(crate) fn ask(socket: &Path, request: &Request, patience: Patience) -> Said {
    let (mut is_member, mut last) = (false, None);
    loop {
        match attempt(socket, request, patience.attempt_end(Instant::now(), is_member)) {
            Ok(Answer::Proceed) => return Said::Proceed,
            Ok(Answer::Refused { reason }) => return Said::Refused(reason),
            Ok(Answer::Wait { reason, is_member: says_member }) => {
                is_member |= says_member;
                last = Some(reason);
            }
            // The last attempt may have had no time left; what was said before tells more.
            Err(error) if error.kind() == io::ErrorKind::TimedOut && last.is_some() => {}
            Err(error) => last = Some(format!("the agent is not there ({}: {error})", socket.display())),
        }
        let end = patience.end(is_member);
        thread::sleep(POLL.min(end.saturating_duration_since(Instant::now())));
        let now = Instant::now();
        if now >= end {
            let last = last.unwrap_or_default();
            let is_outside = !is_member && patience.outside_at.is_some_and(|outside| now >= outside);
            return if is_outside { Said::OutsideAsKnown { why_not_asked: last } } else { Said::TimedOut { last } };
        }
    }
}

/// Asks once. On a thread of its own: a connection to an agent that hangs may wait for a place in its queue, for which the
/// standard library has no bound. The process ends soon after, and the thread with it.
pub(crate) fn attempt(socket: &Path, request: &Request, until: Instant) -> io::Result<Answer> {
    let (sender, receiver) = channel();
    let (socket, request) = (PathBuf::from(socket), request.clone());
    thread::Builder::new().spawn(move || drop(sender.send(exchange(&socket, &request, until))))?;
    match receiver.recv_timeout(until.saturating_duration_since(Instant::now())) {
        Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => Err(no_answer()),
        Ok(answer) => answer,
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Err(no_answer()),
    }
}

/// In time.
fn no_answer() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no answer")
}

fn exchange(socket: &Path, request: &Request, until: Instant) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_write_timeout(Some(left))?;
    stream.set_read_timeout(Some(left))?;
    stream.write_all(format!("{}\n", serde_json::to_string(request)?).as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_LINE)).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection"));
    }
    Ok(serde_json::from_str(&line)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_that_began_before_a_pod_counts_as_an_outsider_is_heard_to_its_end() {
        let (start, secs) = (Instant::now(), Duration::from_secs);
        let check = |deadline: u64, outside_at: Option<u64>, (now, is_member): (u64, bool), expected: u64| {
            let patience =
                Patience { deadline: start + secs(deadline), outside_at: outside_at.map(|at| start + secs(at)) };
            assert_eq!(patience.attempt_end(start + secs(now), is_member) - start, secs(expected));
        };
        check(90, None, (0, false), 15);
        check(90, Some(5), (0, false), 5);
        check(90, Some(5), (4, false), 8);
        check(90, Some(5), (4, true), 19);
        // Nothing goes on after the deadline.
        check(6, Some(5), (4, false), 6);
    }
}
