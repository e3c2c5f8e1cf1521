//! The access log: one line when a connection ends or fails, with ztunnel's keys.
//!
//! Records go through a bounded queue to a thread of its own; a full queue drops the record and the caller counts it.
//! The data path never waits for a disk, and does not wake the writer for each record: that would cost more than the
//! rest of a short connection's log.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use mesh_core::identity::SpiffeId;
use mesh_core::workload::Workload;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::connections::Description;
use crate::metrics::Reporter;
use crate::runtime::{AccessLogConfig, AccessLogFormat};

/// Records that wait for the writer: about a second at 10,000 connections a second.
const QUEUE_RECORDS: usize = 8192;
/// Records at which the writer is woken before its time.
const WAKE_AT_RECORDS: usize = QUEUE_RECORDS / 4;
/// How often the writer looks: the longest time that a record waits.
const WRITE_EVERY: Duration = Duration::from_millis(50);

/// The sending end; clones feed the same writer.
#[derive(Debug, Clone)]
pub struct AccessLog(Arc<Sender>);

#[derive(Debug)]
struct Sender(Arc<Queue>);

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    wake: Condvar,
    /// All that was taken out is written.
    written: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    records: Vec<Record>,
    /// Some were taken out and are not written yet.
    is_writing: bool,
    /// The last sender is gone.
    closed: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.wake.notify_one();
    }
}

impl AccessLog {
    /// Opens the log and starts its writer, which ends when the last clone is gone.
    pub fn open(config: &AccessLogConfig) -> io::Result<Self> {
        let out: Box<dyn Write + Send> = match &config.path {
            Some(path) => Box::new(OpenOptions::new().create(true).append(true).open(path)?),
            None => Box::new(io::stdout()),
        };
        let queue = Arc::new(Queue::default());
        let (format, to_write) = (config.format, Arc::clone(&queue));
        std::thread::Builder::new().name("access-log".to_owned()).spawn(move || write_all(&to_write, out, format))?;
        Ok(Self(Arc::new(Sender(queue))))
    }

    /// Hands a record over; false when the writer is behind and the record is lost.
    pub fn write(&self, record: Record) -> bool {
        let queue = &self.0.0;
        let mut waiting = queue.lock();
        if waiting.records.len() >= QUEUE_RECORDS {
            return false;
        }
        waiting.records.push(record);
        if waiting.records.len() == WAKE_AT_RECORDS {
            queue.wake.notify_one();
        }
        true
    }

    /// Waits until everything that was handed over is written; false after this time. Blocks.
    pub fn flush(&self, at_most: Duration) -> bool {
        let queue = &self.0.0;
        let unwritten = |waiting: &mut Waiting| waiting.is_writing || !waiting.records.is_empty();
        let waited = queue.written.wait_timeout_while(queue.lock(), at_most, unwritten);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

fn write_all(queue: &Queue, out: Box<dyn Write + Send>, format: AccessLogFormat) {
    let mut out = BufWriter::with_capacity(64 * 1024, out);
    let mut line = String::new();
    let mut records = Vec::new();
    loop {
        let waiting = queue.lock();
        let enough = |waiting: &mut Waiting| !waiting.closed && waiting.records.len() < WAKE_AT_RECORDS;
        let (mut waiting, _timeout) =
            queue.wake.wait_timeout_while(waiting, WRITE_EVERY, enough).unwrap_or_else(PoisonError::into_inner);
        let closed = waiting.closed;
        waiting.is_writing = true;
        std::mem::swap(&mut records, &mut waiting.records);
        drop(waiting);
        let mut written = Ok(());
        for record in records.drain(..) {
            line.clear();
            record.render(format, &mut line);
            written = written.and(out.write_all(line.as_bytes()));
        }
        if let Err(error) = written.and(out.flush()) {
            tracing::error!(%error, "access log cannot be written");
        }
        queue.lock().is_writing = false;
        queue.written.notify_all();
        if closed {
            return;
        }
    }
}

/// What one line says.
#[derive(Debug, Clone)]
pub struct Record {
    time: SystemTime,
    complete: Option<Complete>,
    reporter: Reporter,
    source_addr: SocketAddr,
    destination_addr: SocketAddr,
    hbone_addr: Option<SocketAddr>,
    source: Option<Arc<Workload>>,
    destination: Option<Arc<Workload>>,
    service: Option<Arc<str>>,
    identities: Option<(SpiffeId, SpiffeId)>,
    cluster: Arc<str>,
    error: Option<String>,
}

#[derive(Debug, Clone)]
struct Complete {
    duration: Duration,
    to_server: u64,
    to_client: u64,
}

impl Record {
    /// A connection's end (`ended`: when it was opened, bytes to the server and to the client), or its failure.
    pub fn new(
        d: &Description,
        reporter: Reporter,
        ended: Option<(Instant, (u64, u64))>,
        error: Option<String>,
        cluster: &Arc<str>,
    ) -> Self {
        Self {
            time: SystemTime::now(),
            complete: ended.map(|(opened, (to_server, to_client))| Complete {
                duration: opened.elapsed(),
                to_server,
                to_client,
            }),
            reporter,
            source_addr: d.source_addr,
            destination_addr: d.destination_addr,
            hbone_addr: d.hbone_addr,
            source: d.source.clone(),
            destination: d.destination.clone(),
            service: d.service.as_ref().map(|s| Arc::clone(&s.key.hostname)),
            identities: d.identities.clone(),
            cluster: Arc::clone(cluster),
            error,
        }
    }

    /// Appends the line, newline included.
    pub fn render(&self, format: AccessLogFormat, out: &mut String) {
        let time = OffsetDateTime::from(self.time).format(&Rfc3339).unwrap_or_default();
        let level = match (&self.complete, &self.error) {
            (Some(_), None) => "info",
            (Some(_), Some(_)) => "error",
            (None, _) => "warn",
        };
        let message = if self.complete.is_some() { "connection complete" } else { "connection failed" };
        match format {
            AccessLogFormat::Text => {
                // Writing to a `String` cannot fail.
                let _ = write!(out, "{time}\t{level}\taccess\t{message}\t");
                let mut first = true;
                self.fields(&mut |key, value| {
                    let gap = if std::mem::take(&mut first) { "" } else { " " };
                    let _ = match value {
                        Value::Bare(value) => write!(out, "{gap}{key}={value}"),
                        Value::Text(value) => write!(out, "{gap}{key}={value:?}"),
                        Value::Number(value) => write!(out, "{gap}{key}={value}"),
                    };
                });
            }
            AccessLogFormat::Json => {
                let mut object = serde_json::Map::new();
                for (key, value) in [("level", level), ("time", &time), ("scope", "access"), ("message", message)] {
                    object.insert(key.to_owned(), value.into());
                }
                self.fields(&mut |key, value| {
                    let value = match value {
                        Value::Bare(text) | Value::Text(text) => text.into(),
                        Value::Number(number) => number.into(),
                    };
                    object.insert(key.to_owned(), value);
                });
                let _ = write!(out, "{}", serde_json::Value::Object(object));
            }
        }
        out.push('\n');
    }

    fn fields(&self, put: &mut impl FnMut(&str, Value<'_>)) {
        let (client, server) = self.identities.as_ref().map(|(c, s)| (c.to_string(), s.to_string())).unzip();
        put("src.addr", Value::Bare(&self.source_addr.to_string()));
        self.party("src", self.source.as_deref(), client.as_deref(), put);
        put("dst.addr", Value::Bare(&self.destination_addr.to_string()));
        if let Some(addr) = self.hbone_addr {
            put("dst.hbone_addr", Value::Bare(&addr.to_string()));
        }
        if let Some(service) = &self.service {
            put("dst.service", Value::Text(service));
        }
        self.party("dst", self.destination.as_deref(), server.as_deref(), put);
        let outbound = self.reporter == Reporter::Source;
        put("direction", Value::Text(if outbound { "outbound" } else { "inbound" }));
        if let Some(complete) = &self.complete {
            let (sent, received) = if outbound {
                (complete.to_server, complete.to_client)
            } else {
                (complete.to_client, complete.to_server)
            };
            put("bytes_sent", Value::Number(sent));
            put("bytes_recv", Value::Number(received));
            put("duration", Value::Text(&format!("{}ms", complete.duration.as_millis())));
        }
        if let Some(error) = &self.error {
            put("error", Value::Text(error));
        }
    }

    fn party(
        &self,
        end: &str,
        workload: Option<&Workload>,
        identity: Option<&str>,
        put: &mut impl FnMut(&str, Value<'_>),
    ) {
        if let Some(workload) = workload {
            put(&format!("{end}.workload"), Value::Text(&workload.name));
            put(&format!("{end}.namespace"), Value::Text(workload.namespace()));
        }
        if let Some(identity) = identity {
            put(&format!("{end}.identity"), Value::Text(identity));
        }
        if let Some(workload) = workload {
            let cluster = if workload.cluster.is_empty() { &self.cluster } else { &workload.cluster };
            put(&format!("{end}.cluster"), Value::Text(cluster));
        }
    }
}

enum Value<'a> {
    Bare(&'a str),
    Text(&'a str),
    Number(u64),
}
