//! Access logs of node proxies: files of this machine, or the output of their containers. Both forms are read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use crate::render::OnNode;
use crate::target::{AccessLog, Door, Gathered, Mesh, Node};

/// Lines of a container's log that are looked through, the last ones: some MiB.
const CONTAINER_LINES: i64 = 20_000;

/// A record of an access log.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub(super) struct Record(BTreeMap<String, Value>);

impl Record {
    /// A line as JSON, or as `TIME LEVEL access MESSAGE KEY=VALUE ...`; none if it is another log's.
    pub(super) fn parse(line: &str) -> Option<Self> {
        if line.starts_with('{') {
            return serde_json::from_str(line).ok().map(Self);
        }
        let mut parts = line.splitn(5, '\t');
        let (time, level, scope) = (parts.next()?, parts.next()?, parts.next()?);
        if scope != "access" {
            return None;
        }
        let (message, mut rest) = (parts.next()?, parts.next()?);
        let mut fields = BTreeMap::new();
        for (key, value) in [("time", time), ("level", level), ("scope", scope), ("message", message)] {
            fields.insert(key.to_owned(), value.into());
        }
        while let Some((key, after)) = rest.split_once('=') {
            let (value, after) = value(after)?;
            fields.insert(key.trim_start().to_owned(), value);
            rest = after;
        }
        Some(Self(fields))
    }

    pub(super) fn text(&self, key: &str) -> String {
        match self.0.get(key) {
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
            None => String::new(),
        }
    }

    /// Whether an end of the connection is a workload.
    pub(super) fn is_end(&self, side: &str, name: &str, namespace: &str) -> bool {
        self.text(&format!("{side}.workload")) == name && self.text(&format!("{side}.namespace")) == namespace
    }
}

/// A value at the start of a text, and what comes after it: a number, a bare word, or a quoted one as Rust writes it.
fn value(text: &str) -> Option<(Value, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let (word, after) = text.split_at(text.find(' ').unwrap_or(text.len()));
        let number = word.parse::<u64>().ok().map(Value::from);
        return Some((number.unwrap_or_else(|| word.into()), after));
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return Some((value.into(), &quoted[at + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                't' => '\t',
                'r' => '\r',
                '0' => '\0',
                'u' => {
                    let digits = chars.by_ref().map(|(_, char)| char).skip_while(|char| *char == '{');
                    let digits: String = digits.take_while(|char| *char != '}').collect();
                    u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32)?
                }
                // Quotes and the backslash itself.
                other => other,
            }),
            // Everything else stands for itself.
            other => value.push(other),
        }
    }
    None
}

/// The records of every node whose log can be read, at most so old where a log can tell, as far as they are kept.
pub(super) async fn read<T>(mesh: &Mesh, since: Option<Duration>, keep: impl Fn(&mut T, Record)) -> Gathered<T>
where
    T: Default,
{
    let keep = &keep;
    let gathered = mesh.each(|node| async move {
        let mut kept = T::default();
        let known = of_node(node, since, |record| keep(&mut kept, record)).await?;
        Ok(OnNode { node: node.label(), item: known.then_some(kept) })
    });
    let Gathered { answers, errors } = gathered.await;
    let known = |OnNode { node, item }: OnNode<Option<T>>| Some(OnNode { node, item: item? });
    Gathered { answers: answers.into_iter().filter_map(known).collect(), errors }
}

/// Whether the node's log is known.
async fn of_node(node: &Node, since: Option<Duration>, mut see: impl FnMut(Record)) -> Result<bool> {
    match (&node.access_log, &node.door) {
        (AccessLog::File(path), _) => of_file(path, see).map(|()| true),
        (AccessLog::Container, Door::Pod(pod)) => {
            let since = since.and_then(|since| i64::try_from(since.as_secs()).ok());
            let log = pod.log(CONTAINER_LINES, since).await?;
            log.lines().filter_map(Record::parse).for_each(&mut see);
            Ok(true)
        }
        (AccessLog::Container | AccessLog::Unknown, Door::Shut(_)) => {
            node.door.send("GET", "/status", Vec::new()).await.map(|_| false)
        }
        (AccessLog::Container | AccessLog::Unknown, Door::Pod(_) | Door::Socket(_)) => Ok(false),
    }
}

/// A log that was never written has no records.
fn of_file(log: &Path, see: impl FnMut(Record)) -> Result<()> {
    let file = match File::open(log) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| log.display().to_string()),
    };
    // A line that is being written is read the next time.
    let lines = BufReader::new(file).lines().collect::<std::io::Result<Vec<_>>>();
    lines.with_context(|| log.display().to_string())?.iter().filter_map(|line| Record::parse(line)).for_each(see);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_say_the_same() {
        let text = concat!(
            "2026-01-01T00:00:00Z\terror\taccess\tconnection complete\tsrc.addr=10.0.0.1:5 src.workload=\"a\" ",
            "bytes_sent=12 error=\"he said \\\"no\\\"\\n\\u{1f600} = so\" direction=\"outbound\"",
        );
        let json = concat!(
            r#"{"time":"2026-01-01T00:00:00Z","level":"error","scope":"access","message":"connection complete","#,
            r#""src.addr":"10.0.0.1:5","src.workload":"a","bytes_sent":12,"error":"he said \"no\"\n😀 = so","#,
            r#""direction":"outbound"}"#,
        );
        assert_eq!(Record::parse(text).expect("a record"), Record::parse(json).expect("a record"));
    }

    #[test]
    fn lines_of_other_logs_and_halves_of_lines_are_no_records() {
        for line in [
            "",
            "2026-01-01T00:00:00Z  INFO mesh_node: ready",
            "2026-01-01T00:00:00Z\tinfo\tother\tx\ta=1",
            "2026-01-01T00:00:00Z\tinfo\taccess\tconnection complete",
            "2026-01-01T00:00:00Z\tinfo\taccess\tconnection complete\terror=\"half",
            "{\"time\":",
        ] {
            assert_eq!(Record::parse(line), None, "{line}");
        }
    }
}
