//! `logs`: connections of one workload, out of the nodes' access logs.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use mesh_api::admin::WorkloadRow;
use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::names::Directory;
use super::{Output, target};
use crate::cli::{Global, LogsArgs, Saved};
use crate::exit::Unavailable;
use crate::render::{self, Column, OnNode, Row, View};

/// `message` of a connection that was made; failed ones have another.
const COMPLETE: &str = "connection complete";
/// How far back [`ended`] looks.
const OBSERVED_FOR: Duration = Duration::from_secs(3600);

/// A record of an access log.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Record(BTreeMap<String, Value>);

impl Record {
    fn text(&self, key: &str) -> String {
        match self.0.get(key) {
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
            None => String::new(),
        }
    }

    /// Workload and address of an end.
    fn end(&self, side: &str) -> String {
        let (workload, namespace) = (self.text(&format!("{side}.workload")), self.text(&format!("{side}.namespace")));
        let address = self.text(&format!("{side}.addr"));
        if workload.is_empty() { address } else { format!("{workload}.{namespace} ({address})") }
    }

    fn concerns(&self, name: &str, namespace: &str) -> bool {
        ["src", "dst"].iter().any(|side| {
            self.text(&format!("{side}.workload")) == name && self.text(&format!("{side}.namespace")) == namespace
        })
    }
}

impl Row for OnNode<Record> {
    const KIND: &'static str = "AccessRecord";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("TIME"),
        Column::Narrow("NODE"),
        Column::Narrow("DIRECTION"),
        Column::Narrow("SOURCE"),
        Column::Narrow("DESTINATION"),
        Column::Narrow("RESULT"),
        Column::Wide("SOURCE IDENTITY"),
        Column::Wide("DESTINATION IDENTITY"),
        Column::Wide("TUNNEL"),
        Column::Wide("SENT"),
        Column::Wide("RECEIVED"),
        Column::Wide("DURATION"),
    ];

    fn cells(&self) -> Vec<String> {
        let r = &self.item;
        let error = r.text("error");
        let time = r.text("time");
        vec![
            time.split_once('.').map_or(time.clone(), |(seconds, _)| format!("{seconds}Z")),
            self.node.clone(),
            r.text("direction"),
            r.end("src"),
            r.end("dst"),
            if error.is_empty() { "ok".to_owned() } else { error },
            r.text("src.identity"),
            r.text("dst.identity"),
            r.text("dst.hbone_addr"),
            r.text("bytes_sent"),
            r.text("bytes_recv"),
            r.text("duration"),
        ]
    }
}

pub(super) async fn run(global: &Global, args: &LogsArgs) -> Output {
    let target = target(global, &Saved::default()).await?;
    let directory = Directory::of(&target, global).await?;
    let workload = directory.workload(&args.workload)?;
    let logs = target.access_logs();
    if logs.is_empty() {
        let why = "where the nodes write their access logs is not known: look there, or ask a sandbox";
        return Err(anyhow!(Unavailable(why.to_owned())).into());
    }
    let mut rows = Vec::new();
    for (node, log) in logs {
        let found = records(&log, &workload.name, &workload.namespace, args.tail)?;
        rows.extend(found.into_iter().map(|item| OnNode { node: node.clone(), item }));
    }
    rows.sort_by_key(|row| row.item.text("time"));
    Ok(render::list(&rows, View::of(global))?)
}

/// Connections of a pair that ended within the last hour, by what protected them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Ended {
    /// In a tunnel.
    pub(super) tunnelled: usize,
    /// On one node, with both identities.
    pub(super) on_one_node: usize,
    /// Without identities.
    pub(super) plain: usize,
}

impl Ended {
    fn add(&mut self, record: &Record) {
        let identified = !record.text("src.identity").is_empty() && !record.text("dst.identity").is_empty();
        match (record.text("dst.hbone_addr").is_empty(), identified) {
            (false, _) => self.tunnelled += 1,
            (true, true) => self.on_one_node += 1,
            (true, false) => self.plain += 1,
        }
    }
}

/// Completed connections from one workload to another in the nodes' access logs: as the client's node has them, and as
/// the server's has them.
pub(super) fn ended(logs: &BTreeMap<String, PathBuf>, from: &WorkloadRow, to: &WorkloadRow) -> Result<[Ended; 2]> {
    let since = (OffsetDateTime::now_utc() - OBSERVED_FOR).format(&Rfc3339).context("time")?;
    let ended = |node: &str, direction: &str| {
        let mut ended = Ended::default();
        let Some(log) = logs.get(node) else { return Ok(ended) };
        let of_pair = |r: &Record| {
            let end = |side: &str, w: &WorkloadRow| {
                r.text(&format!("{side}.workload")) == w.name && r.text(&format!("{side}.namespace")) == w.namespace
            };
            r.text("direction") == direction && end("src", from) && end("dst", to)
        };
        // Both times are RFC 3339 in UTC, so they compare as texts.
        let recent = |r: &Record| r.text("message") == COMPLETE && r.text("time") >= since;
        for_each(log, |record| {
            if of_pair(&record) && recent(&record) {
                ended.add(&record);
            }
        })?;
        anyhow::Ok(ended)
    };
    Ok([ended(&from.node, "outbound")?, ended(&to.node, "inbound")?])
}

/// Every record of a log; a log that was never written has none.
fn for_each(log: &Path, mut see: impl FnMut(Record)) -> Result<()> {
    let file = match File::open(log) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| log.display().to_string()),
    };
    for line in BufReader::new(file).lines() {
        // A line that is being written is read the next time.
        if let Ok(record) = serde_json::from_str::<BTreeMap<String, Value>>(&line?) {
            see(Record(record));
        }
    }
    Ok(())
}

/// The last `tail` records of a log that concern a workload.
fn records(log: &Path, name: &str, namespace: &str, tail: usize) -> Result<VecDeque<Record>> {
    let mut kept = VecDeque::new();
    for_each(log, |record| {
        if tail > 0 && record.concerns(name, namespace) {
            if kept.len() == tail {
                kept.pop_front();
            }
            kept.push_back(record);
        }
    })?;
    Ok(kept)
}
