//! `logs`: connections of one workload, out of the nodes' access logs.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use mesh_api::admin::WorkloadRow;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::access_log::{self, Record};
use super::names::Directory;
use super::{Output, finish, target};
use crate::cli::{Global, LogsArgs, Saved};
use crate::exit::Unavailable;
use crate::render::{self, Column, OnNode, Row, View};
use crate::target::{Gathered, Mesh};

/// `message` of a connection that was made; failed ones have another.
const COMPLETE: &str = "connection complete";
/// How far back [`recent`] looks.
const OBSERVED_FOR: Duration = Duration::from_secs(3600);

/// Workload and address of an end.
fn end(record: &Record, side: &str) -> String {
    let (workload, namespace) = (record.text(&format!("{side}.workload")), record.text(&format!("{side}.namespace")));
    let address = record.text(&format!("{side}.addr"));
    if workload.is_empty() { address } else { format!("{workload}.{namespace} ({address})") }
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
            end(r, "src"),
            end(r, "dst"),
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
    let (name, namespace, tail) = (&workload.name, &workload.namespace, args.tail);
    let logs = access_log::read(target.live()?, None, |kept: &mut VecDeque<Record>, record| {
        let concerns = ["src", "dst"].iter().any(|side| record.is_end(side, name, namespace));
        if tail > 0 && concerns {
            if kept.len() == tail {
                kept.pop_front();
            }
            kept.push_back(record);
        }
    });
    let Gathered { answers, errors } = logs.await;
    if answers.is_empty() && errors.is_empty() {
        let why = "where the nodes write their access logs is not known: look there, or ask a sandbox or a cluster";
        return Err(anyhow!(Unavailable(why.to_owned())).into());
    }
    let of_node = |OnNode { node, item }: OnNode<VecDeque<Record>>| {
        item.into_iter().map(move |item| OnNode { node: node.clone(), item })
    };
    let mut rows: Vec<_> = answers.into_iter().flat_map(of_node).collect();
    rows.sort_by_key(|row| row.item.text("time"));
    finish(render::list(&rows, View::of(global))?, errors)
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

/// Connections that were completed within the last hour, by node; no entry for a node whose log is not known.
pub(super) type Recent = BTreeMap<String, Vec<Record>>;

/// What the nodes' access logs have of the last hour, and why some have nothing.
pub(super) async fn recent(mesh: &Mesh) -> Result<(Recent, Vec<anyhow::Error>)> {
    let since = (OffsetDateTime::now_utc() - OBSERVED_FOR).format(&Rfc3339).context("time")?;
    let logs = access_log::read(mesh, Some(OBSERVED_FOR), |kept: &mut Vec<Record>, record| {
        // Both times are RFC 3339 in UTC, so they compare as texts.
        if record.text("message") == COMPLETE && record.text("time") >= since {
            kept.push(record);
        }
    });
    let Gathered { answers, errors } = logs.await;
    Ok((answers.into_iter().map(|answer| (answer.node, answer.item)).collect(), errors))
}

/// Completed connections from one workload to another: as the client's node has them, and as the server's has them.
pub(super) fn ended(logs: &Recent, from: &WorkloadRow, to: &WorkloadRow) -> [Ended; 2] {
    let ended = |node: &str, direction: &str| {
        let mut ended = Ended::default();
        let is = |record: &Record, side: &str, w: &WorkloadRow| record.is_end(side, &w.name, &w.namespace);
        let of_pair = |r: &&Record| r.text("direction") == direction && is(r, "src", from) && is(r, "dst", to);
        logs.get(node).into_iter().flatten().filter(of_pair).for_each(|record| ended.add(record));
        ended
    };
    [ended(&from.node, "outbound"), ended(&to.node, "inbound")]
}
