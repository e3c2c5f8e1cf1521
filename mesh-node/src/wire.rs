//! The TCP socket under a tunnel's TLS: reads ahead, so that TLS takes its records from memory.
//!
//! rustls asks for few KiB at a time. One system call here fetches what several records need; the buffer is only there
//! while it holds something.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
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
