//! Carries bytes between two ends until both directions have ended.
//!
//! Half-close, reset and back-pressure pass through as they are: an end of one direction ends that direction at the other
//! end; a reset resets it; an end that does not read stops the other end from being read. An idle connection owns no
//! buffer: readiness comes first, then a read into a buffer of the worker.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::connections::{CloseReason, Live, Way};
use crate::hbone::windows::Share;

/// Most that is read at once: several TLS records, so that one system call feeds them all.
const READ_BYTES: usize = 128 * 1024;
/// Reads below this are copied out of the worker's buffer, so that a few bytes that wait do not hold all of it.
const SHARE_FROM_BYTES: usize = 16 * 1024;
/// DATA frames written by one system call.
const WRITE_SLICES: usize = 32;

/// How a relay ended, if not in order.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The TCP side failed: reset by the application or its network.
    #[error("connection: {0}")]
    Tcp(#[source] io::Error),
    /// The stream was reset by the other node proxy, or its tunnel broke.
    #[error("tunnel: {0}")]
    Stream(#[source] h2::Error),
    /// Ended from outside.
    #[error("{0}")]
    Closed(CloseReason),
}

/// The tunnel's end of a carried connection.
#[derive(Debug)]
pub struct Stream {
    /// Towards the other node proxy.
    pub send: SendStream<Bytes>,
    /// From it.
    pub recv: RecvStream,
    /// Told when bytes from it are not taken.
    pub share: Share,
}

/// Carries between a TCP connection and a stream. `from_tcp` says which way the bytes read from TCP go.
pub async fn tcp_and_stream(tcp: TcpStream, stream: Stream, live: &Live, from_tcp: Way) -> Result<(), RelayError> {
    let Stream { mut send, mut recv, mut share } = stream;
    reset_on_close(&tcp);
    let to_tcp = match from_tcp {
        Way::ToServer => Way::ToClient,
        Way::ToClient => Way::ToServer,
    };
    let result = {
        let mut up = TcpToStream::default();
        let mut down = StreamToTcp::default();
        let mut gone = Gone::default();
        poll_fn(|cx| {
            if let Some(reason) = live.closing(cx) {
                return Poll::Ready(Err(RelayError::Closed(reason.clone())));
            }
            if !up.done && up.poll(&tcp, &mut send, live, from_tcp, cx)?.is_ready() {
                up.done = true;
            }
            if !down.done && down.poll(&tcp, &mut recv, live, to_tcp, cx)?.is_ready() {
                down.done = true;
            }
            share.set_stuck(!down.waiting.is_empty());
            if up.done && down.done {
                return Poll::Ready(Ok(()));
            }
            if up.done || up.blocked {
                gone.poll(&tcp, cx)?;
            }
            // Reading the stream does not show its reset behind bytes that nobody takes.
            if (down.done || down.is_stuck())
                && let Poll::Ready(reset) = send.poll_reset(cx)
            {
                return Poll::Ready(Err(RelayError::Stream(match reset {
                    Ok(reason) => reason.into(),
                    Err(error) => error,
                })));
            }
            Poll::Pending
        })
        .await
    };
    match &result {
        Ok(()) => end_on_close(&tcp),
        Err(_) => send.send_reset(Reason::CANCEL),
    }
    result
}

/// Carries between two TCP connections.
pub async fn tcp_and_tcp(client: TcpStream, server: TcpStream, live: &Live) -> Result<(), RelayError> {
    [&client, &server].into_iter().for_each(reset_on_close);
    let result = {
        let (mut up, mut down) = (TcpToTcp::default(), TcpToTcp::default());
        let (mut client_gone, mut server_gone) = (Gone::default(), Gone::default());
        poll_fn(|cx| {
            if let Some(reason) = live.closing(cx) {
                return Poll::Ready(Err(RelayError::Closed(reason.clone())));
            }
            if !up.done && up.poll(&client, &server, live, Way::ToServer, cx)?.is_ready() {
                up.done = true;
            }
            if !down.done && down.poll(&server, &client, live, Way::ToClient, cx)?.is_ready() {
                down.done = true;
            }
            if up.done && down.done {
                return Poll::Ready(Ok(()));
            }
            if up.done || !up.waiting.is_empty() {
                client_gone.poll(&client, cx)?;
            }
            if down.done || !down.waiting.is_empty() {
                server_gone.poll(&server, cx)?;
            }
            Poll::Pending
        })
        .await
    };
    if result.is_ok() {
        [&client, &server].into_iter().for_each(end_on_close);
    }
    result
}

/// Makes the close of a connection a reset, also the one by the kernel when this process is killed: half of what was to be
/// carried must not look like all of it. So it is from the beginning to the end of both directions.
pub fn reset_on_close(tcp: &TcpStream) {
    // A connection that is gone already cannot be reset, and need not be.
    let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
}

/// Takes [`reset_on_close`] back.
fn end_on_close(tcp: &TcpStream) {
    let _ = SockRef::from(tcp).set_linger(None);
}

/// Notices a reset of a connection that is not being read: epoll reports it, but no read would.
#[derive(Default)]
struct Gone<'a>(Option<Pin<Box<dyn Future<Output = io::Result<()>> + Send + 'a>>>);

impl<'a> Gone<'a> {
    fn poll(&mut self, tcp: &'a TcpStream, cx: &mut Context<'_>) -> Result<(), RelayError> {
        let watch = self.0.get_or_insert_with(|| Box::pin(async move { tcp.ready(Interest::ERROR).await.map(|_| ()) }));
        if watch.as_mut().poll(cx).is_pending() {
            return Ok(());
        }
        self.0 = None;
        match tcp.take_error() {
            Ok(Some(error)) | Err(error) => Err(RelayError::Tcp(error)),
            Ok(None) => Err(RelayError::Tcp(io::ErrorKind::ConnectionReset.into())),
        }
    }
}

/// Takes note that a read came back short: the socket is drained, and the next read would only say so. tokio then waits
/// for the next event. Sound on a runtime with one thread only: no event can come in between.
fn drained(tcp: &TcpStream) {
    let _ = tcp.try_io(Interest::READABLE, || io::Result::<()>::Err(io::ErrorKind::WouldBlock.into()));
}

thread_local! {
    static SHARED_BUFFER: RefCell<BytesMut> = RefCell::new(BytesMut::new());
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into_boxed_slice());
}

/// Reads up to `most` bytes; `Ok(None)`: the end.
fn read_chunk(tcp: &TcpStream, most: usize) -> io::Result<Option<Bytes>> {
    SHARED_BUFFER.with_borrow_mut(|buffer| {
        if buffer.capacity() < SHARE_FROM_BYTES {
            buffer.reserve(READ_BYTES);
        }
        let most = most.min(buffer.capacity());
        let read = tcp.try_read_buf(&mut (&mut *buffer).limit(most))?;
        if read == 0 {
            return Ok(None);
        }
        if read < most {
            drained(tcp);
        }
        if read >= SHARE_FROM_BYTES {
            return Ok(Some(buffer.split().freeze()));
        }
        let chunk = Bytes::copy_from_slice(buffer);
        buffer.clear();
        Ok(Some(chunk))
    })
}

#[derive(Default)]
struct TcpToStream {
    done: bool,
    /// Bytes wait in the socket, but the other end does not take any.
    blocked: bool,
    /// Capacity of the tunnel is kept for this connection.
    reserved: bool,
}

impl TcpToStream {
    fn poll(
        &mut self,
        tcp: &TcpStream,
        send: &mut SendStream<Bytes>,
        live: &Live,
        way: Way,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), RelayError>> {
        loop {
            if !self.blocked {
                // Capacity is taken from the whole tunnel's window: an idle connection must not hold any, or a hundred of
                // them stop the next one.
                let Poll::Ready(readable) = tcp.poll_read_ready(cx) else {
                    self.release(send);
                    return Poll::Pending;
                };
                readable.map_err(RelayError::Tcp)?;
                send.reserve_capacity(READ_BYTES);
                self.reserved = true;
            }
            self.blocked = send.capacity() == 0;
            while send.capacity() == 0 {
                match ready!(send.poll_capacity(cx)) {
                    Some(capacity) => capacity.map_err(RelayError::Stream).map(|_| ())?,
                    None => return Poll::Ready(Err(RelayError::Stream(Reason::CANCEL.into()))),
                }
            }
            self.blocked = false;
            match read_chunk(tcp, send.capacity().min(READ_BYTES)) {
                Ok(Some(chunk)) => {
                    live.carried(way, chunk.len());
                    send.send_data(chunk, false).map_err(RelayError::Stream)?;
                }
                Ok(None) => {
                    self.release(send);
                    send.send_data(Bytes::new(), true).map_err(RelayError::Stream)?;
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.release(send),
                Err(error) => return Poll::Ready(Err(RelayError::Tcp(error))),
            }
        }
    }

    fn release(&mut self, send: &mut SendStream<Bytes>) {
        if std::mem::take(&mut self.reserved) {
            send.reserve_capacity(0);
        }
    }
}

#[derive(Default)]
struct StreamToTcp {
    done: bool,
    ended: bool,
    waiting: VecDeque<Bytes>,
}

impl StreamToTcp {
    fn poll(
        &mut self,
        tcp: &TcpStream,
        recv: &mut RecvStream,
        live: &Live,
        way: Way,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), RelayError>> {
        loop {
            self.gather(recv, cx)?;
            if self.waiting.is_empty() {
                if !self.ended {
                    self.waiting = VecDeque::new();
                    return Poll::Pending;
                }
                shutdown(tcp)?;
                return Poll::Ready(Ok(()));
            }
            let mut slices = [IoSlice::new(&[]); WRITE_SLICES];
            let count = self.waiting.len().min(WRITE_SLICES);
            for (slice, chunk) in slices.iter_mut().zip(&self.waiting) {
                *slice = IoSlice::new(chunk);
            }
            match tcp.try_write_vectored(&slices[..count]) {
                Ok(written) => {
                    self.written(written);
                    live.carried(way, written);
                    recv.flow_control().release_capacity(written).map_err(RelayError::Stream)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(tcp.poll_write_ready(cx)).map_err(RelayError::Tcp)?;
                }
                Err(error) => return Poll::Ready(Err(RelayError::Tcp(error))),
            }
        }
    }

    /// Bytes wait, but the other end does not take any, and there may be more. What is whole is still delivered.
    fn is_stuck(&self) -> bool {
        !self.ended && !self.waiting.is_empty()
    }

    fn gather(&mut self, recv: &mut RecvStream, cx: &mut Context<'_>) -> Result<(), RelayError> {
        while !self.ended && self.waiting.len() < WRITE_SLICES {
            match recv.poll_data(cx) {
                Poll::Ready(Some(Ok(chunk))) if chunk.is_empty() => {}
                Poll::Ready(Some(Ok(chunk))) => self.waiting.push_back(chunk),
                Poll::Ready(Some(Err(error))) => return Err(RelayError::Stream(error)),
                Poll::Ready(None) => self.ended = true,
                Poll::Pending => break,
            }
        }
        Ok(())
    }

    fn written(&mut self, mut bytes: usize) {
        while bytes > 0
            && let Some(chunk) = self.waiting.front_mut()
        {
            let part = bytes.min(chunk.len());
            chunk.advance(part);
            bytes -= part;
            if chunk.is_empty() {
                self.waiting.pop_front();
            }
        }
    }
}

#[derive(Default)]
struct TcpToTcp {
    done: bool,
    /// Read, but not taken by the other end.
    waiting: Bytes,
}

impl TcpToTcp {
    fn poll(
        &mut self,
        from: &TcpStream,
        to: &TcpStream,
        live: &Live,
        way: Way,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), RelayError>> {
        loop {
            while !self.waiting.is_empty() {
                match to.try_write(&self.waiting) {
                    Ok(written) => {
                        live.carried(way, written);
                        self.waiting.advance(written);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        ready!(to.poll_write_ready(cx)).map_err(RelayError::Tcp)?;
                    }
                    Err(error) => return Poll::Ready(Err(RelayError::Tcp(error))),
                }
            }
            self.waiting = Bytes::new();
            ready!(from.poll_read_ready(cx)).map_err(RelayError::Tcp)?;
            if self.transfer(from, to, live, way).map_err(RelayError::Tcp)? {
                shutdown(to)?;
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// One read and the write that follows; true at the end.
    fn transfer(&mut self, from: &TcpStream, to: &TcpStream, live: &Live, way: Way) -> io::Result<bool> {
        SCRATCH.with_borrow_mut(|scratch| {
            let read = match from.try_read(scratch) {
                Ok(0) => return Ok(true),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            };
            if read < scratch.len() {
                drained(from);
            }
            let written = match to.try_write(&scratch[..read]) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error),
            };
            live.carried(way, written);
            if written < read {
                self.waiting = Bytes::copy_from_slice(&scratch[written..read]);
            }
            Ok(false)
        })
    }
}

/// Ends one direction; that the peer has gone meanwhile shows in the other one.
fn shutdown(tcp: &TcpStream) -> Result<(), RelayError> {
    match SockRef::from(tcp).shutdown(std::net::Shutdown::Write) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        Err(error) => Err(RelayError::Tcp(error)),
    }
}
