//! What lies under a tunnel's HTTP/2: turns on top, then TLS, then a TCP socket that reads ahead.
//!
//! rustls asks for few KiB at a time. One system call here fetches what several records need; the buffer is only there
//! while it holds something.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

/// Read ahead at most, bytes: eight full TLS records.
const READ_AHEAD_BYTES: usize = 8 * (16 * 1024 + 256);

thread_local! {
    static BUFFER: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// A connected socket that reads ahead.
#[derive(Debug)]
pub struct TunnelSocket {
    tcp: TcpStream,
    ahead: Bytes,
}

impl TunnelSocket {
    /// Wraps a connected socket.
    pub fn new(tcp: TcpStream) -> Self {
        Self { tcp, ahead: Bytes::new() }
    }

    /// The socket.
    pub fn tcp(&self) -> &TcpStream {
        &self.tcp
    }
}

impl AsyncRead for TunnelSocket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.ahead.is_empty() {
            ready!(self.tcp.poll_read_ready(cx))?;
            match read_ahead(&self.tcp) {
                Ok(Some(bytes)) => self.ahead = bytes,
                Ok(None) => return Poll::Ready(Ok(())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        let part = out.remaining().min(self.ahead.len());
        out.put_slice(&self.ahead[..part]);
        self.ahead.advance(part);
        if self.ahead.is_empty() {
            self.ahead = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

fn read_ahead(tcp: &TcpStream) -> io::Result<Option<Bytes>> {
    BUFFER.with_borrow_mut(|buffer| {
        buffer.reserve(READ_AHEAD_BYTES);
        let read = tcp.try_read_buf(&mut (&mut *buffer).limit(READ_AHEAD_BYTES))?;
        if read == 0 {
            return Ok(None);
        }
        if read < READ_AHEAD_BYTES {
            // The socket is drained; wait for its next event. See `relay::drained`.
            let _ = tcp.try_io(Interest::READABLE, || io::Result::<()>::Err(io::ErrorKind::WouldBlock.into()));
        }
        Ok(Some(buffer.split().freeze()))
    })
}

impl AsyncWrite for TunnelSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

/// Read at most before others on this thread get their turn, bytes. HTTP/2 reads for as long as there is something to read:
/// a peer that sends without end would keep the thread, and what its frames leave behind would not be looked at meanwhile.
const TURN_BYTES: usize = 256 * 1024;

/// A connection that is read in turns.
#[derive(Debug)]
pub struct Turns<IO> {
    io: IO,
    read_bytes: usize,
}

impl<IO> Turns<IO> {
    /// Wraps what HTTP/2 reads from. Below TLS a turn could not be ended: TLS goes on with what it has.
    pub fn new(io: IO) -> Self {
        Self { io, read_bytes: 0 }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Turns<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.read_bytes >= TURN_BYTES {
            self.read_bytes = 0;
            return end_turn(cx);
        }
        let filled = out.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, out);
        match read {
            Poll::Ready(_) => self.read_bytes += out.filled().len() - filled,
            Poll::Pending => self.read_bytes = 0,
        }
        read
    }
}

/// Wakes the task when the others had their turn. A plain wake would put it behind those that are ready now, and the event
/// loop looks at its sockets only when nobody is ready, or every 61 turns.
fn end_turn<T>(cx: &mut Context<'_>) -> Poll<T> {
    let yielded = pin!(tokio::task::yield_now()).poll(cx);
    if yielded.is_ready() {
        cx.waker().wake_by_ref();
    }
    Poll::Pending
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Turns<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn who_reads_without_end_lets_others_have_their_turn() {
        let mut endless = Turns::new(tokio::io::repeat(7));
        let others = Arc::new(AtomicUsize::new(0));
        let other = tokio::spawn({
            let others = Arc::clone(&others);
            async move {
                loop {
                    others.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                }
            }
        });
        let mut buffer = vec![0; 4096];
        let mut read = 0;
        // As HTTP/2 does it: until there is nothing to read now.
        let mut turn = async || {
            poll_fn(|cx| {
                loop {
                    let mut out = ReadBuf::new(&mut buffer);
                    match Pin::new(&mut endless).poll_read(cx, &mut out) {
                        Poll::Ready(_) => read += out.filled().len(),
                        Poll::Pending => return Poll::Ready(()),
                    }
                }
            })
            .await;
            tokio::task::yield_now().await;
            read
        };
        for turns in 1..=3 {
            assert_eq!(turn().await, turns * TURN_BYTES);
            assert!(others.load(Ordering::Relaxed) >= turns);
        }
        other.abort();
        let mut short = Turns::new(&b"the end"[..]);
        let mut text = String::new();
        short.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "the end");
    }
}
