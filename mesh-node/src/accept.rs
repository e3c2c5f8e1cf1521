//! Accept loops of a workload's listeners.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::sleep;

use crate::hbone::server::Phase;
use crate::metrics::count;
use crate::relay::reset_on_close;
use crate::workers::{Serving, Worker};
use crate::{inbound, outbound};

/// Pause after an accept failed for want of descriptors or memory, or for another reason that stays: trying at once would
/// only burn the CPU that others need to end connections.
const RESOURCES_PAUSE: Duration = Duration::from_millis(50);

/// What a listener is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Outbound,
    Plaintext,
    Hbone,
}

/// An accepted connection and its place among the workload's connections.
#[derive(Debug)]
pub struct Accepted {
    /// The connection.
    pub tcp: TcpStream,
    /// Its other end.
    pub peer: SocketAddr,
    /// Given back when dropped.
    pub permit: OwnedSemaphorePermit,
}

/// Starts the accept loops of a workload in this worker; they end with its phase.
pub fn serve(worker: &Arc<Worker>, serving: &Arc<Serving>) {
    let listeners = &serving.enrolled.listeners;
    let all = [
        (Role::Outbound, Some(&listeners.outbound4)),
        (Role::Outbound, listeners.outbound6.as_ref()),
        (Role::Plaintext, Some(&listeners.inbound4)),
        (Role::Plaintext, listeners.inbound6.as_ref()),
        (Role::Hbone, Some(&listeners.hbone4)),
        (Role::Hbone, listeners.hbone6.as_ref()),
    ];
    for (role, fd) in all {
        let Some(fd) = fd else { continue };
        match listen(fd) {
            Ok(listener) => {
                tokio::spawn(accept_all(Arc::clone(worker), Arc::clone(serving), listener, role));
            }
            Err(error) => {
                tracing::error!(workload = %serving.enrolled.name, ?role, %error, "listener cannot be used");
            }
        }
    }
}

fn listen(fd: &OwnedFd) -> io::Result<TcpListener> {
    let listener = std::net::TcpListener::from(fd.as_fd().try_clone_to_owned()?);
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

async fn accept_all(worker: Arc<Worker>, serving: Arc<Serving>, listener: TcpListener, role: Role) {
    let mut phase = serving.phase.subscribe();
    let mut tls = inbound::TlsConfigs::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // Ending the loop closes only this worker's copy of the socket.
            _ = phase.wait_for(|phase| *phase != Phase::Serving) => return,
        };
        let (tcp, peer) = match accepted {
            Ok(accepted) => accepted,
            // The listener is shut, and this came first.
            Err(_) if *phase.borrow() != Phase::Serving => return,
            Err(error) => {
                if !concerns_one_connection(&error) {
                    count(&worker.metrics.counters.accept_failures);
                    complain(&worker, &error);
                    sleep(RESOURCES_PAUSE).await;
                }
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&serving.permits).try_acquire_owned() else {
            if role == Role::Outbound {
                // Its destination, which nobody else would look up.
                let _ = (worker.original_dst)(serving.enrolled.cookie, peer);
            }
            count(&worker.metrics.counters.connections_shed);
            reset_on_close(&tcp);
            continue;
        };
        let accepted = Accepted { tcp, peer, permit };
        match role {
            Role::Outbound => {
                tokio::spawn(outbound::carry(Arc::clone(&worker), Arc::clone(&serving), accepted));
            }
            Role::Plaintext => {
                tokio::spawn(inbound::plaintext(Arc::clone(&worker), Arc::clone(&serving), accepted));
            }
            Role::Hbone => {
                // One connection a listener waits for a place here, the others where they cost nothing: in the backlog.
                // No place is held for connections that may never come: there are more listeners than places.
                let place = tokio::select! {
                    place = worker.handshakes.enter(peer.ip()) => place,
                    _ = phase.wait_for(|phase| *phase != Phase::Serving) => return,
                };
                let Some(place) = place else {
                    count(&worker.metrics.counters.connections_shed);
                    reset_on_close(&accepted.tcp);
                    continue;
                };
                tls.accept(&worker, &serving, accepted, place);
            }
        }
    }
}

/// Logs it once a minute: while connections wait, it comes again after every pause, on every listener.
fn complain(worker: &Worker, error: &io::Error) {
    let nobody = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    if worker.logged.first(nobody, "accept", worker.started.elapsed().as_secs()) {
        tracing::warn!(%error, "accept failed, pausing");
    }
}

/// Errors of one connection that is gone, which accept(2) hands on; the next connection may be fine. Every other error
/// (no descriptors, no memory, and whatever nobody thought of) would come again at once.
fn concerns_one_connection(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::EHOSTDOWN
                | libc::EHOSTUNREACH
                | libc::EINTR
                | libc::ENETDOWN
                | libc::ENETUNREACH
                | libc::ENONET
                | libc::ENOPROTOOPT
                | libc::EOPNOTSUPP
                | libc::EPERM
                | libc::EPROTO
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_of_one_connection_are_passed_over_at_once() {
        let check = |code, expected| {
            assert_eq!(concerns_one_connection(&io::Error::from_raw_os_error(code)), expected, "{code}");
        };
        for code in [libc::ECONNABORTED, libc::EPROTO, libc::EPERM, libc::EHOSTUNREACH] {
            check(code, true);
        }
        for code in [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM, libc::EINVAL, libc::EBADF] {
            check(code, false);
        }
        assert!(!concerns_one_connection(&io::Error::other("without a code")));
    }
}
