//! One thread per connected node proxy: hello, announcements one at a time, each with its answer.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mesh_api::proto::workload::zds::workload_request::Payload;
use mesh_api::proto::workload::zds::{Version, WorkloadRequest, WorkloadResponse, ZdsHello, workload_response};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, listen as listen_on,
    recvmsg, sendmsg, socket,
};
use prost::Message;

use crate::announce::{Announcer, Desired};
use crate::board::Board;

/// Proxies of one node at a time: the one in force and those that start or drain during an upgrade.
const MAX_PROXIES: i32 = 8;
/// Largest answer in bytes.
const MAX_ANSWER: usize = 64 * 1024;
/// Pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A proxy has to greet within this time.
const HELLO_WITHIN: Duration = Duration::from_secs(5);
/// A proxy has to answer within this time: it waits up to 5 s for a certificate.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);

/// Listens for the proxies of a node, in place of an agent that was there before and without a moment in which nobody
/// does: an agent that is being replaced still runs. The socket's name is that of the latest, and an agent that ends leaves it.
///
/// # Errors
/// The socket cannot be made there.
pub fn listen(path: &Path) -> Result<OwnedFd> {
    let fresh = path.with_extension(format!("{}.new", std::process::id()));
    let _stale = std::fs::remove_file(&fresh);
    let open = || -> std::io::Result<OwnedFd> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(&fresh)?)?;
        listen_on(&fd, Backlog::new(MAX_PROXIES)?)?;
        std::fs::rename(&fresh, path)?;
        Ok(fd)
    };
    open().with_context(|| format!("listen at {}", path.display()))
}

/// Accepts proxies for the life of the process.
pub fn accept(listener: &OwnedFd, node: &str, board: &Arc<Board>) {
    loop {
        let fd = match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Ok(fd) => owned(fd),
            Err(error) => {
                tracing::warn!("{node}: accept: {error}");
                // Out of descriptors, as a rule: they come back when something ends.
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        let (board, name) = (Arc::clone(board), node.to_string());
        let thread = std::thread::Builder::new().name(format!("proxy of {node}"));
        let started = thread.spawn(move || match serve(&fd, &name, &board) {
            Ok(()) => tracing::info!("{name}: node proxy disconnected"),
            Err(error) => tracing::warn!("{name}: node proxy disconnected: {error:#}"),
        });
        if let Err(error) = started {
            tracing::warn!("{node}: start a thread: {error}");
        }
    }
}

/// Takes a descriptor over that the kernel just returned.
#[allow(unsafe_code)]
fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: accept4 returned it and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn serve(proxy: &OwnedFd, node: &str, board: &Board) -> Result<()> {
    let hello = ZdsHello::decode(&receive(proxy, HELLO_WITHIN)?[..]).context("greeting")?;
    if hello.version() != Version::V1 {
        bail!("it speaks version {} of the enrolment protocol, only V1 is known", hello.version);
    }
    let (ours, waker) = UnixStream::pair().context("socket pair")?;
    ours.set_nonblocking(true)?;
    waker.set_nonblocking(true)?;
    let id = board.connected(waker);
    tracing::info!("{node}: node proxy connected");
    let result = announce(proxy, &ours, (node, id), board);
    board.disconnected(id);
    result
}

fn announce(proxy: &OwnedFd, wake: &UnixStream, (node, id): (&str, u64), board: &Board) -> Result<()> {
    let mut announcer = Announcer::default();
    loop {
        let (generation, desired) = board.current();
        while let Some(mut request) = announcer.next(&desired, Instant::now()) {
            if let Payload::Del(del) = &mut request {
                del.lives_on = board.living().contains(&del.uid);
            }
            let error = exchange(proxy, &request, &desired)?;
            tracing::info!("{node}: {} {}", words(&request), if error.is_empty() { "done" } else { &error });
            announcer.answered(&request, &desired, &error, Instant::now());
            board.report(id, None, announcer.answers());
        }
        board.report(id, Some(generation), announcer.answers());
        if !wait(proxy, wake, announcer.next_retry())? {
            return Ok(());
        }
    }
}

/// Waits for a reload or a retry; false when the proxy has gone.
fn wait(proxy: &OwnedFd, mut wake: &UnixStream, until: Option<Instant>) -> Result<bool> {
    let timeout = until.map_or(PollTimeout::NONE, |at| {
        // Rounded up, or the last millisecond would be spent spinning.
        let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    });
    let mut fds = [PollFd::new(proxy.as_fd(), PollFlags::POLLIN), PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, timeout) {
        Ok(_) | Err(nix::Error::EINTR) => {}
        Err(error) => return Err(error).context("poll"),
    }
    if fds[0].any() == Some(true) {
        // Between requests a proxy has nothing to say.
        let bytes = receive(proxy, Duration::ZERO)?;
        if !bytes.is_empty() {
            bail!("it sent {} bytes unasked", bytes.len());
        }
        return Ok(false);
    }
    let mut drained = [0u8; 64];
    while matches!(wake.read(&mut drained), Ok(n) if n == drained.len()) {}
    Ok(true)
}

/// Sends a request, for an `add` with the namespace, and returns the error of the answer, empty for none.
fn exchange(proxy: &OwnedFd, request: &Payload, desired: &Desired) -> Result<String> {
    let netns = match request {
        Payload::Add(add) => match desired.get(&add.uid).map(|enrol| enrol.netns.open()) {
            Some(Ok(file)) => Some(file),
            Some(Err(error)) => return Ok(format!("its network namespace: {error}")),
            None => return Ok("unknown workload".into()),
        },
        Payload::Del(_) | Payload::Keep(_) | Payload::SnapshotSent(_) => None,
    };
    send(proxy, &WorkloadRequest { payload: Some(request.clone()) }.encode_to_vec(), netns.as_deref())?;
    let bytes = receive(proxy, ANSWER_WITHIN)?;
    if bytes.is_empty() {
        bail!("it closed the connection instead of answering");
    }
    let response = WorkloadResponse::decode(&bytes[..]).context("answer")?;
    match response.payload {
        Some(workload_response::Payload::Ack(ack)) => Ok(ack.error),
        None => bail!("an answer without acknowledgement"),
    }
}

fn send(proxy: &OwnedFd, bytes: &[u8], fd: Option<&File>) -> Result<()> {
    let fds: Vec<RawFd> = fd.iter().map(|f| f.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<()>(proxy.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None).context("send")?;
    Ok(())
}

/// One datagram; empty when the peer has closed.
fn receive(proxy: &OwnedFd, within: Duration) -> Result<Vec<u8>> {
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(proxy.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) => bail!("nothing within {} s", within.as_secs()),
            Ok(_) => break,
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
    }
    let mut buffer = vec![0u8; MAX_ANSWER];
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let message = match recvmsg::<()>(proxy.as_raw_fd(), &mut slices, None, MsgFlags::MSG_CMSG_CLOEXEC) {
        Ok(message) => message,
        Err(nix::Error::ECONNRESET) => return Ok(Vec::new()),
        Err(error) => return Err(error).context("receive"),
    };
    if message.flags.contains(MsgFlags::MSG_TRUNC) {
        bail!("a datagram of more than {MAX_ANSWER} bytes");
    }
    let length = message.bytes;
    buffer.truncate(length);
    Ok(buffer)
}

fn words(request: &Payload) -> String {
    match request {
        Payload::Add(add) => {
            let info = add.workload_info.as_ref();
            format!("add {} ({})", info.map_or("", |i| &i.name), add.uid)
        }
        Payload::Del(del) if del.lives_on => format!("let go {}", del.uid),
        Payload::Del(del) => format!("del {}", del.uid),
        Payload::Keep(keep) => format!("keep {}", keep.uid),
        Payload::SnapshotSent(_) => "snapshot".into(),
    }
}
