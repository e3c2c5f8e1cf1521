//! The load generator: a server for every kind of work, and a client that does one kind for a given time.
//!
//! One thread and one event loop each, so that a process can be pinned to one CPU and its CPU time is its own.
//! The first byte that a connection sends names the kind of work.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Bytes of a request and of its response.
pub const MESSAGE_BYTES: usize = 64;
/// Bytes of one write of a bulk stream.
const BULK_BYTES: usize = 128 * 1024;
/// Samples of latency that one run keeps; later ones overwrite the oldest.
const MAX_SAMPLES: usize = 1 << 20;

/// A kind of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// One direction, as much as goes; a unit is a byte that the server confirmed.
    Bulk,
    /// 64 bytes there and back on one connection; a unit is a round trip.
    RequestResponse,
    /// Connect, 64 bytes there and back, close; a unit is a connection.
    ConnectRequestClose,
    /// Connections that are open and silent; a unit is a connection.
    Idle,
}

impl Work {
    fn tag(self) -> u8 {
        match self {
            Self::Bulk => b'b',
            Self::RequestResponse | Self::ConnectRequestClose => b'r',
            Self::Idle => b'i',
        }
    }
}

/// What a client did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Units of work that were completed.
    pub units: u64,
    /// Seconds that they took.
    pub secs: f64,
    /// Median latency of a unit, microseconds; 0 where it has no meaning.
    pub p50_us: f64,
    /// 99th percentile, microseconds.
    pub p99_us: f64,
    /// Failed connections or requests.
    pub errors: u64,
}

/// Serves until it is ended.
pub async fn serve(addr: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(addr).await.with_context(|| format!("listen on {addr}"))?;
    loop {
        let (stream, _) = listener.accept().await.context("accept")?;
        tokio::spawn(async move {
            // A client that goes away mid-work is how most runs end.
            let _ended = serve_one(stream).await;
        });
    }
}

async fn serve_one(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut message = [0; MESSAGE_BYTES];
    stream.read_exact(&mut message[..1]).await?;
    match message[0] {
        b'b' => sink(stream).await,
        b'r' => {
            let mut have = 1;
            loop {
                while have < MESSAGE_BYTES {
                    match stream.read(&mut message[have..]).await? {
                        0 => return Ok(()),
                        n => have += n,
                    }
                }
                stream.write_all(&message).await?;
                have = 0;
            }
        }
        _ => {
            stream.write_all(b"i").await?;
            stream.read_exact(&mut message[..1]).await.map(drop)
        }
    }
}

async fn sink(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; BULK_BYTES];
    let mut total = 1_u64;
    loop {
        match stream.read(&mut buffer).await? {
            0 => break,
            n => total += n as u64,
        }
    }
    stream.write_all(&total.to_be_bytes()).await?;
    stream.shutdown().await
}

/// What a client is to do.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Kind of work.
    pub work: Work,
    /// Where the server listens.
    pub target: SocketAddr,
    /// Connections at once.
    pub connections: usize,
    /// How long.
    pub duration: Duration,
}

/// Runs a load to its end. `opened` is called when idle connections are all open.
///
/// # Errors
/// When not one unit was completed.
pub async fn run(load: Load, opened: impl FnOnce()) -> Result<Outcome> {
    let outcome = match load.work {
        Work::Bulk => bulk(load).await?,
        Work::RequestResponse => many(load, request_response).await,
        Work::ConnectRequestClose => many(load, connect_request_close).await,
        Work::Idle => idle(load, opened).await?,
    };
    ensure!(outcome.units > 0, "no unit of {:?} towards {} was completed", load.work, load.target);
    Ok(outcome)
}

async fn connect(load: Load) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(load.target).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn bulk(load: Load) -> Result<Outcome> {
    let start = Instant::now();
    let mut streams = JoinSet::new();
    for _ in 0..load.connections {
        streams.spawn(async move {
            let mut stream = connect(load).await?;
            let buffer = vec![Work::Bulk.tag(); BULK_BYTES];
            let end = Instant::now() + load.duration;
            while Instant::now() < end {
                stream.write_all(&buffer).await?;
            }
            stream.shutdown().await?;
            stream.read_u64().await
        });
    }
    let mut outcome = Outcome { units: 0, secs: 0.0, p50_us: 0.0, p99_us: 0.0, errors: 0 };
    while let Some(done) = streams.join_next().await {
        match done? {
            Ok(bytes) => outcome.units += bytes,
            Err(_) => outcome.errors += 1,
        }
    }
    outcome.secs = start.elapsed().as_secs_f64();
    Ok(outcome)
}

async fn idle(load: Load, opened: impl FnOnce()) -> Result<Outcome> {
    let start = Instant::now();
    let mut streams = Vec::with_capacity(load.connections);
    for n in 0..load.connections {
        let mut stream = connect(load).await.with_context(|| format!("connection {n} to {}", load.target))?;
        stream.write_all(&[Work::Idle.tag()]).await?;
        let mut answer = [0];
        stream.read_exact(&mut answer).await.with_context(|| format!("first byte of connection {n}"))?;
        streams.push(stream);
    }
    let secs = start.elapsed().as_secs_f64();
    opened();
    tokio::time::sleep(load.duration).await;
    Ok(Outcome { units: streams.len() as u64, secs, p50_us: 0.0, p99_us: 0.0, errors: 0 })
}

/// Latencies of one connection's units, and its failures.
#[derive(Default)]
struct Tally {
    units: u64,
    errors: u64,
    samples_us: Vec<f32>,
}

impl Tally {
    fn unit(&mut self, since: Instant) {
        #[allow(clippy::cast_possible_truncation, reason = "microseconds of a latency fit a float")]
        let us = (since.elapsed().as_secs_f64() * 1e6) as f32;
        let slot = usize::try_from(self.units).unwrap_or(usize::MAX) % MAX_SAMPLES;
        match self.samples_us.get_mut(slot) {
            Some(sample) => *sample = us,
            None => self.samples_us.push(us),
        }
        self.units += 1;
    }
}

async fn many<F>(load: Load, one: fn(Load, Instant) -> F) -> Outcome
where
    F: Future<Output = Tally> + Send + 'static,
{
    let start = Instant::now();
    let end = start + load.duration;
    let mut tasks = JoinSet::new();
    for _ in 0..load.connections {
        tasks.spawn(one(load, end));
    }
    let mut all = Tally::default();
    while let Some(done) = tasks.join_next().await {
        let tally = done.unwrap_or_else(|_| Tally { errors: 1, ..Tally::default() });
        all.units += tally.units;
        all.errors += tally.errors;
        all.samples_us.extend(tally.samples_us);
    }
    all.samples_us.sort_by(f32::total_cmp);
    let at = |share: f64| {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index below the length")]
        let index = (all.samples_us.len() as f64 * share) as usize;
        all.samples_us.get(index.min(all.samples_us.len().saturating_sub(1))).map_or(0.0, |us| f64::from(*us))
    };
    let (p50_us, p99_us) = (at(0.5), at(0.99));
    Outcome { units: all.units, secs: start.elapsed().as_secs_f64(), p50_us, p99_us, errors: all.errors }
}

async fn round_trip(stream: &mut TcpStream) -> io::Result<()> {
    let mut message = [Work::RequestResponse.tag(); MESSAGE_BYTES];
    stream.write_all(&message).await?;
    stream.read_exact(&mut message).await.map(drop)
}

async fn request_response(load: Load, end: Instant) -> Tally {
    let mut tally = Tally::default();
    let Ok(mut stream) = connect(load).await else {
        return Tally { errors: 1, ..tally };
    };
    while Instant::now() < end {
        let since = Instant::now();
        match round_trip(&mut stream).await {
            Ok(()) => tally.unit(since),
            Err(_) => {
                tally.errors += 1;
                break;
            }
        }
    }
    tally
}

async fn connect_request_close(load: Load, end: Instant) -> Tally {
    let mut tally = Tally::default();
    while Instant::now() < end {
        let since = Instant::now();
        let unit = async {
            let mut stream = connect(load).await?;
            round_trip(&mut stream).await
        };
        match unit.await {
            Ok(()) => tally.unit(since),
            Err(_) => tally.errors += 1,
        }
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::{Load, Work, run, serve};
    use std::time::Duration;

    /// Every kind of work ends with units that the server confirmed.
    #[tokio::test]
    async fn each_kind_of_work_completes_units_on_loopback() {
        let probe = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let target = probe.local_addr().expect("its address");
        drop(probe);
        let server = tokio::spawn(serve(target));
        while tokio::net::TcpStream::connect(target).await.is_err() {
            tokio::task::yield_now().await;
        }
        for work in [Work::Bulk, Work::RequestResponse, Work::ConnectRequestClose, Work::Idle] {
            let load = Load { work, target, connections: 2, duration: Duration::from_millis(50) };
            let outcome = run(load, || ()).await.unwrap_or_else(|e| panic!("{work:?}: {e:#}"));
            assert!(outcome.units >= 2 && outcome.errors == 0, "{work:?}: {outcome:?}");
        }
        server.abort();
    }
}
