//! HTTP/2 frames by hand (RFC 9113), for a peer that sends what no library would.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// What a client says first, before its SETTINGS (RFC 9113 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Flag of DATA and HEADERS: the last frame of the stream.
pub const END_STREAM: u8 = 0x1;
/// Flag of SETTINGS and PING.
pub const ACK: u8 = 0x1;
/// Flag of HEADERS and CONTINUATION: the header block is complete.
pub const END_HEADERS: u8 = 0x4;
/// Error code: what came is against the rules.
pub const PROTOCOL_ERROR: u32 = 0x1;
/// Error code: the stream was not looked at.
pub const REFUSED_STREAM: u32 = 0x7;
/// Error code: the stream is not wanted any more.
pub const CANCEL: u32 = 0x8;
/// Error code: the peer makes too much work.
pub const ENHANCE_YOUR_CALM: u32 = 0xb;
/// Setting: streams that the other end may open.
pub const MAX_CONCURRENT_STREAMS: u16 = 0x3;
/// Setting: bytes that each new stream may send.
pub const INITIAL_WINDOW_SIZE: u16 = 0x4;
/// Largest window, bytes.
pub const MAX_WINDOW: u32 = 0x7fff_ffff;
/// The first entry of the dynamic table (RFC 7541 2.3.3), as an indexed field.
pub const NEWEST_FIELD: u8 = 0x80 | 62;
/// `:status: 200` as an indexed field (RFC 7541 appendix A).
pub const STATUS_200: u8 = 0x80 | 8;
/// Bytes before a frame's payload.
const HEAD_BYTES: usize = 9;

/// Frame types (RFC 9113 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bytes of a stream.
    Data,
    /// Begins a header block.
    Headers,
    /// A hint that nobody follows any more.
    Priority,
    /// RST_STREAM.
    Reset,
    /// Settings of the sender.
    Settings,
    /// A stream that the server opens.
    PushPromise,
    /// Asks for an answer.
    Ping,
    /// The end of the connection.
    GoAway,
    /// More may be sent.
    WindowUpdate,
    /// Goes on with a header block.
    Continuation,
    /// A type that the RFC does not have.
    Other(u8),
}

impl Kind {
    const KNOWN: [Self; 10] = [
        Self::Data,
        Self::Headers,
        Self::Priority,
        Self::Reset,
        Self::Settings,
        Self::PushPromise,
        Self::Ping,
        Self::GoAway,
        Self::WindowUpdate,
        Self::Continuation,
    ];

    fn of(code: u8) -> Self {
        Self::KNOWN.get(usize::from(code)).copied().unwrap_or(Self::Other(code))
    }

    fn code(self) -> u8 {
        let known = || Self::KNOWN.iter().position(|kind| *kind == self).and_then(|code| u8::try_from(code).ok());
        match self {
            Self::Other(code) => code,
            _known => known().unwrap_or(u8::MAX),
        }
    }
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// Its flags.
    pub flags: u8,
    /// Its stream; 0: the connection.
    pub stream: u32,
    /// The rest.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame.
    pub fn new(kind: Kind, flags: u8, stream: u32, payload: impl Into<Vec<u8>>) -> Self {
        Self { kind, flags, stream, payload: payload.into() }
    }

    /// HEADERS with a whole block.
    pub fn headers(stream: u32, block: impl Into<Vec<u8>>) -> Self {
        Self::new(Kind::Headers, END_HEADERS, stream, block)
    }

    /// RST_STREAM.
    pub fn reset(stream: u32, code: u32) -> Self {
        Self::new(Kind::Reset, 0, stream, code.to_be_bytes())
    }

    /// GOAWAY that promises streams up to `last`.
    pub fn go_away(last: u32, code: u32) -> Self {
        Self::new(Kind::GoAway, 0, 0, [last.to_be_bytes(), code.to_be_bytes()].concat())
    }

    /// SETTINGS.
    pub fn settings(settings: &[(u16, u32)]) -> Self {
        let one = |(name, value): &(u16, u32)| [&name.to_be_bytes()[..], &value.to_be_bytes()].concat();
        Self::new(Kind::Settings, 0, 0, settings.iter().flat_map(one).collect::<Vec<u8>>())
    }

    /// WINDOW_UPDATE.
    pub fn window_update(stream: u32, by: u32) -> Self {
        Self::new(Kind::WindowUpdate, 0, stream, by.to_be_bytes())
    }

    /// Appends it to bytes that will be sent.
    ///
    /// # Panics
    /// The payload is longer than a frame can say.
    pub fn put(&self, to: &mut Vec<u8>) {
        let length = u32::try_from(self.payload.len()).expect("length").to_be_bytes();
        assert_eq!(length[0], 0, "payload of {} bytes", self.payload.len());
        to.extend_from_slice(&length[1..]);
        to.extend([self.kind.code(), self.flags]);
        to.extend(self.stream.to_be_bytes());
        to.extend_from_slice(&self.payload);
    }

    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD_BYTES + self.payload.len());
        self.put(&mut bytes);
        bytes
    }

    /// Reads one.
    ///
    /// # Errors
    /// The connection fails or ends.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        let mut head = [0; HEAD_BYTES];
        from.read_exact(&mut head).await?;
        let [a, b, c, kind, flags, s0, s1, s2, s3] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        from.read_exact(&mut payload).await?;
        let stream = u32::from_be_bytes([s0, s1, s2, s3]) & MAX_WINDOW;
        Ok(Self { kind: Kind::of(kind), flags, stream, payload })
    }

    /// The error code of GOAWAY or RST_STREAM.
    pub fn error_code(&self) -> Option<u32> {
        let at = match self.kind {
            Kind::GoAway => 4,
            Kind::Reset => 0,
            _without => return None,
        };
        self.payload.get(at..at + 4).and_then(|code| code.try_into().ok()).map(u32::from_be_bytes)
    }
}

/// A header block, every field in full (RFC 7541 6.2.2).
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    fields.iter().flat_map(|(name, value)| literal(0, name.as_bytes(), value.as_bytes())).collect()
}

/// A field in full that becomes [`NEWEST_FIELD`] (RFC 7541 6.2.1).
pub fn remembered(name: &str, value: &str) -> Vec<u8> {
    literal(0x40, name.as_bytes(), value.as_bytes())
}

/// The head of a CONNECT.
pub fn connect(authority: &str) -> Vec<u8> {
    block(&[(":method", "CONNECT"), (":authority", authority)])
}

fn literal(first: u8, name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    for text in [name, value] {
        put_length(&mut bytes, text.len());
        bytes.extend_from_slice(text);
    }
    bytes
}

/// An integer with a prefix of seven bits (RFC 7541 5.1).
fn put_length(to: &mut Vec<u8>, length: usize) {
    const PREFIX: usize = 0x7f;
    let low = |value: usize| u8::try_from(value & PREFIX).expect("seven bits");
    if length < PREFIX {
        to.push(low(length));
        return;
    }
    to.push(low(PREFIX));
    let mut rest = length - PREFIX;
    while rest > PREFIX {
        to.push(low(rest) | 0x80);
        rest >>= 7;
    }
    to.push(low(rest));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_those_of_the_rfc() {
        // RFC 7541 C.1.2 has 1337 with five bits; with seven it is 127 and 1210.
        for (length, expected) in [(10, vec![10]), (127, vec![127, 0]), (1337, vec![127, 0xba, 9])] {
            let mut bytes = Vec::new();
            put_length(&mut bytes, length);
            assert_eq!(bytes, expected, "{length}");
        }
    }

    #[tokio::test]
    async fn a_frame_is_read_as_it_was_written() {
        let frames = [
            Frame::headers(5, connect("10.0.0.1:80")),
            Frame::go_away(7, CANCEL),
            Frame::new(Kind::Other(99), 3, 0, [1]),
        ];
        let bytes: Vec<u8> = frames.iter().flat_map(Frame::bytes).collect();
        let mut rest = &bytes[..];
        for frame in &frames {
            assert_eq!(Frame::read(&mut rest).await.unwrap(), *frame);
        }
        assert_eq!(frames[1].error_code(), Some(CANCEL));
    }
}
