//! One end of an HTTP/2 connection whose frames a test writes itself.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use super::frames::{ACK, Frame, Kind, PREFACE, STATUS_200};
use super::{Approach, PATIENCE, shake_hands};

/// Bytes that are written at once.
const BATCH_BYTES: usize = 64 * 1024;
/// A write that takes longer is not going to end: the other end reads no more.
const BLOCKED_AFTER: Duration = Duration::from_secs(3);

/// What the other end has said so far.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Code of its GOAWAY, and what else it says.
    pub go_away: Option<(u32, String)>,
    /// Streams that it has reset, with the code.
    pub resets: BTreeMap<u32, u32>,
    /// Streams with a head of its own, an answer or a request, and whether that says 200.
    pub heads: BTreeMap<u32, bool>,
    /// Answers to PING.
    pub pongs: u64,
    /// What its last PING held.
    pub ping: Option<Vec<u8>>,
    /// Its SETTINGS, and acknowledgements of ours.
    pub settings: u64,
    /// Bytes of DATA.
    pub data: u64,
    /// Why nothing more comes.
    pub ended: Option<String>,
}

impl Seen {
    /// The code of GOAWAY.
    pub fn go_away_code(&self) -> Option<u32> {
        self.go_away.as_ref().map(|(code, _)| *code)
    }

    fn take(&mut self, frame: &Frame) {
        match frame.kind {
            Kind::GoAway => {
                let text = String::from_utf8_lossy(frame.payload.get(8..).unwrap_or_default()).into_owned();
                self.go_away = frame.error_code().map(|code| (code, text));
            }
            Kind::Reset => {
                self.resets.insert(frame.stream, frame.error_code().unwrap_or_default());
            }
            Kind::Headers => {
                self.heads.entry(frame.stream).or_insert(frame.payload.first() == Some(&STATUS_200));
            }
            Kind::Data => self.data += frame.payload.len() as u64,
            Kind::Settings => self.settings += 1,
            Kind::Ping if frame.flags & ACK != 0 => self.pongs += 1,
            Kind::Ping => self.ping = Some(frame.payload.clone()),
            Kind::Priority | Kind::PushPromise | Kind::WindowUpdate | Kind::Continuation => {}
            Kind::Other(_) => {}
        }
    }
}

/// How a flood went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flooded {
    /// All of it was sent.
    Whole,
    /// The other end closed before this many were sent.
    Ended(u32),
    /// The other end stopped reading before this many were sent.
    Blocked(u32),
}

/// A connection to write frames on.
#[derive(Debug)]
pub struct Raw<IO> {
    write: WriteHalf<IO>,
    /// Read by nobody until somebody listens.
    unread: Option<ReadHalf<IO>>,
    /// Ends with the connection: a half that is held keeps it open.
    reader: Option<AbortHandle>,
    seen: watch::Sender<Seen>,
}

impl<IO> Drop for Raw<IO> {
    fn drop(&mut self) {
        if let Some(reader) = &self.reader {
            reader.abort();
        }
    }
}

/// A tunnel to a server.
pub type RawTunnel = Raw<TlsStream<TcpStream>>;

impl RawTunnel {
    /// Shakes hands and says the preface, with these settings.
    ///
    /// # Errors
    /// The handshake fails.
    pub async fn open(
        netns: &Path,
        to: SocketAddr,
        approach: Approach,
        settings: &[(u16, u32)],
    ) -> Result<Self, String> {
        let mut raw = Self::new(shake_hands(netns, to, approach).await?);
        raw.say(&[PREFACE, &Frame::settings(settings).bytes()].concat()).await?;
        Ok(raw)
    }
}

impl<IO: AsyncRead + AsyncWrite + Send + 'static> Raw<IO> {
    /// A connection on which nothing was said yet. Nothing of it is read before [`Self::listen`].
    pub fn new(io: IO) -> Self {
        let (unread, write) = split(io);
        Self { write, unread: Some(unread), reader: None, seen: watch::Sender::default() }
    }

    /// Reads what the other end says from now on.
    pub fn listen(&mut self) -> &mut Self {
        if let Some(mut read) = self.unread.take() {
            let seen = self.seen.clone();
            let reader = tokio::spawn(async move {
                loop {
                    match Frame::read(&mut read).await {
                        Ok(frame) => seen.send_modify(|seen| seen.take(&frame)),
                        Err(error) => {
                            seen.send_modify(|seen| seen.ended = Some(error.to_string()));
                            return;
                        }
                    }
                }
            });
            self.reader = Some(reader.abort_handle());
        }
        self
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// The other end has closed, or reads no more.
    pub async fn say(&mut self, bytes: &[u8]) -> Result<(), String> {
        let write = async {
            self.write.write_all(bytes).await?;
            self.write.flush().await
        };
        match timeout(BLOCKED_AFTER, write).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("it reads no more".to_owned()),
        }
    }

    /// Writes a frame.
    ///
    /// # Errors
    /// As [`Self::say`].
    pub async fn send(&mut self, frame: &Frame) -> Result<(), String> {
        self.say(&frame.bytes()).await
    }

    /// Answers the PING that came last, as who wants to live longer than a keepalive must.
    ///
    /// # Errors
    /// As [`Self::say`].
    pub async fn answer_ping(&mut self) -> Result<(), String> {
        let mut ping = None;
        self.seen.send_if_modified(|seen| {
            ping = seen.ping.take();
            false
        });
        match ping {
            Some(payload) => self.send(&Frame::new(Kind::Ping, ACK, 0, payload)).await,
            None => Ok(()),
        }
    }

    /// Writes what `put` makes of each number below `count`, until the other end has had enough.
    pub async fn flood(&mut self, count: u32, mut put: impl FnMut(u32, &mut Vec<u8>)) -> Flooded {
        let mut batch = Vec::with_capacity(2 * BATCH_BYTES);
        for number in 0..count {
            put(number, &mut batch);
            if batch.len() < BATCH_BYTES && number + 1 < count {
                continue;
            }
            if self.seen.borrow().ended.is_some() {
                return Flooded::Ended(number);
            }
            let write = async {
                self.write.write_all(&batch).await?;
                self.write.flush().await
            };
            match timeout(BLOCKED_AFTER, write).await {
                Ok(Ok(())) => batch.clear(),
                Ok(Err(_)) => return Flooded::Ended(number),
                Err(_) => return Flooded::Blocked(number),
            }
        }
        Flooded::Whole
    }

    /// What was seen so far.
    pub fn seen(&self) -> Seen {
        self.seen.borrow().clone()
    }

    /// Waits until the other end has said something.
    ///
    /// # Panics
    /// It does not in time.
    pub async fn until(&mut self, what: &str, is_so: impl Fn(&Seen) -> bool) -> Seen {
        self.until_within(PATIENCE, what, is_so).await
    }

    /// As [`Self::until`], for what takes longer by its nature.
    ///
    /// # Panics
    /// It does not in time.
    pub async fn until_within(&mut self, patience: Duration, what: &str, is_so: impl Fn(&Seen) -> bool) -> Seen {
        match self.wait(patience, is_so).await {
            Some(seen) => seen,
            None => panic!("gave up waiting for {what}; {:?}", self.seen()),
        }
    }

    /// Waits until the other end has said something; `None` if it does not in time.
    pub async fn wait(&mut self, patience: Duration, is_so: impl Fn(&Seen) -> bool) -> Option<Seen> {
        self.listen();
        let mut seen = self.seen.subscribe();
        // What was found is copied as it is: a second look while the first is held waits for the reader, which waits for it.
        timeout(patience, seen.wait_for(is_so)).await.ok()?.ok().map(|seen| seen.clone())
    }
}
