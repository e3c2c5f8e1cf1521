//! What a failed wait shows: nodes, pods, events, and the last lines of every log.

use std::collections::VecDeque;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::record::Record;
use super::shell;

/// Lines of each log.
const LOG_LINES: usize = 15;
/// Events, newest last.
const EVENTS: usize = 30;
/// Programs that are asked about the API's objects end by themselves in this time.
const REQUEST_TIMEOUT: &str = "--request-timeout=5s";

/// Of a cluster as it is now. What cannot be read is left out.
pub(super) fn of(record: &Record) -> String {
    let directory = Record::directory(record.addresses.id());
    let mut text = String::new();
    for (what, query, most) in [
        ("nodes", "get nodes -o wide", usize::MAX),
        ("pods", "get pods -A -o wide", usize::MAX),
        ("events", "get events -A --sort-by=.lastTimestamp", EVENTS),
    ] {
        let mut kubectl = Command::new(record.programs.join("kubectl"));
        kubectl.env("KUBECONFIG", directory.join("admin.conf")).arg(REQUEST_TIMEOUT).args(query.split(' '));
        let said = shell::output(&mut kubectl).unwrap_or_else(|error| format!("{error:#}"));
        section(&mut text, what, &said, most);
    }
    for log in logs(&directory) {
        let content = fs::read(&log).unwrap_or_default();
        section(&mut text, &log.to_string_lossy(), &String::from_utf8_lossy(&content), LOG_LINES);
    }
    text
}

fn section(text: &mut String, title: &str, content: &str, most: usize) {
    let mut last = VecDeque::new();
    for line in content.lines() {
        last.push_back(line);
        if last.len() > most {
            last.pop_front();
        }
    }
    // Writing to a string cannot fail.
    let _written = writeln!(text, "--- {title}");
    for line in last {
        let _written = writeln!(text, "{line}");
    }
}

/// Of the control plane and of every node.
fn logs(directory: &Path) -> Vec<PathBuf> {
    let list =
        |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect::<Vec<_>>();
    let tops = list(directory);
    let nodes = tops.iter().filter(|path| path.is_dir() && path.join("node.sh").exists()).flat_map(|path| list(path));
    let mut logs: Vec<_> = nodes.chain(tops.iter().cloned()).collect();
    logs.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.sort();
    logs
}
