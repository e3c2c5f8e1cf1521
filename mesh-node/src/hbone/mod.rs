//! HBONE: TCP connections as HTTP/2 CONNECT streams over mutual TLS (Istio's ambient tunnel, port 15008).
//!
//! Nothing outside of this module and [`crate::relay`] knows about HTTP/2: a tunnel is asked to carry a planned
//! connection and answers with a [`crate::relay::Stream`].

pub mod client;
pub mod head;
mod keepalive;
pub mod pool;
pub mod server;
pub mod windows;

use std::time::Duration;

/// Flow-control window of a stream, bytes (ztunnel's); smaller while others are stuck.
pub const STREAM_WINDOW: u32 = 4 * 1024 * 1024;
/// Flow-control window of a connection, bytes (ztunnel's is 16 MiB): room for what stuck streams hold ([`windows`]), and
/// for what arrives until the peer knows of smaller windows.
pub const CONNECTION_WINDOW: u32 = 24 * 1024 * 1024;
/// Largest DATA frame that is accepted, bytes (ztunnel's).
pub const FRAME_BYTES: u32 = 1024 * 1024;
/// Largest header list of a request, bytes (ztunnel's).
pub const REQUEST_HEADER_BYTES: u32 = 64 * 1024;
/// Largest header list of a response, bytes (ztunnel's).
pub const RESPONSE_HEADER_BYTES: u32 = 16 * 1024;
/// Streams that a client puts on one tunnel (ztunnel's).
pub const CLIENT_STREAMS: u32 = 100;
/// Streams that a server takes on one tunnel: more than any known client opens.
pub const SERVER_STREAMS: u32 = 200;
/// Bytes that a stream may have waiting for its tunnel.
pub const SEND_BUFFER_BYTES: usize = 512 * 1024;
/// What small DATA frames may cost in memory while an application does not read, bytes in one tunnel. Their payload is
/// bounded by the windows; h2's own allowance would end a whole tunnel because of one stream that stalls.
pub const FRAME_OVERHEAD_BYTES: usize = 64 * 1024 * 1024;
/// Time for a TLS handshake and for the HTTP/2 preface, each.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time from a tunnel's handshake to its first request.
pub const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a quiet tunnel is asked whether it still lives (ztunnel's).
pub const PING_EVERY: Duration = Duration::from_secs(10);
/// How long it may take to answer (ztunnel's).
pub const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a tunnel without streams is kept (ztunnel's).
pub const IDLE_RELEASE: Duration = Duration::from_secs(5 * 60);
