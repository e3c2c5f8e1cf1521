//! The first request of a new sandbox, and who talked to whom over what: read from the node proxy's access log.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::sandbox::{Sandbox, binaries_beside};

/// The client's workload and the service that it asks.
const CLIENT: &str = "client";
const SERVICE: &str = "web";
/// Requests until one has crossed nodes; the service has an endpoint on each, chosen by chance.
const MAX_REQUESTS: usize = 32;
/// A request that goes nowhere is tried again for this long: the servers' first endpoints may still be on their way.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// The access log has the connection within this time after its end.
const LOGGED_WITHIN: Duration = Duration::from_secs(5);
/// Pause between looks.
const POLL: Duration = Duration::from_millis(20);

/// Asks until an answer came from another node, and says how it came.
pub(super) fn request(sandbox: &Sandbox) -> Result<String> {
    let node = &sandbox.workload(CLIENT)?.node;
    let log = sandbox.layout.node(node).join("access.log");
    let seen = lines(&log).len();
    let mut answer = String::new();
    for _ in 0..MAX_REQUESTS {
        answer = ask(sandbox)?;
        if served_elsewhere(sandbox, &answer, node) {
            break;
        }
    }
    let record = logged(&log, seen, &answer)?;
    Ok(describe(sandbox, &answer, &record))
}

fn ask(sandbox: &Sandbox) -> Result<String> {
    let own = binaries_beside()?.join("mesh-ctl");
    let deadline = Instant::now() + ANSWER_WITHIN;
    loop {
        let mut command = sandbox.command(CLIENT, &own.display().to_string())?;
        let output = command.args(["sandbox", "fetch", SERVICE, "80"]).output().context("run the client")?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
        }
        if Instant::now() > deadline {
            let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            bail!("the first request from {CLIENT} to {SERVICE} failed: {why}; see `mesh-ctl sandbox logs`");
        }
        std::thread::sleep(POLL);
    }
}

fn served_elsewhere(sandbox: &Sandbox, answer: &str, node: &str) -> bool {
    server(sandbox, answer).is_some_and(|(_, on)| on != node)
}

/// The workload that answered, and its node.
fn server<'a>(sandbox: &'a Sandbox, answer: &str) -> Option<(&'a str, &'a str)> {
    let workloads = sandbox.topology().workloads.iter().filter(|w| w.labels.get("app").is_some_and(|a| a == SERVICE));
    workloads.map(|w| (w.name.as_str(), w.node.as_str())).find(|(name, _)| answer.contains(name))
}

fn lines(log: &Path) -> Vec<String> {
    std::fs::read_to_string(log).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// The record of the last of our requests: to the workload that gave `answer`, after the first `seen` lines.
fn logged(log: &Path, seen: usize, answer: &str) -> Result<Value> {
    let deadline = Instant::now() + LOGGED_WITHIN;
    loop {
        let records = lines(log).into_iter().skip(seen).filter_map(|line| serde_json::from_str::<Value>(&line).ok());
        let mut ours = records.filter(|record| {
            let text = |key: &str| record[key].as_str().unwrap_or_default();
            text("direction") == "outbound"
                && text("src.workload") == CLIENT
                && !text("dst.workload").is_empty()
                && answer.contains(text("dst.workload"))
        });
        if let Some(record) = ours.next_back() {
            return Ok(record);
        }
        if Instant::now() > deadline {
            bail!("the request was answered, but {} has no record of it", log.display());
        }
        std::thread::sleep(POLL);
    }
}

fn describe(sandbox: &Sandbox, answer: &str, record: &Value) -> String {
    let text = |key: &str| record[key].as_str().unwrap_or("-");
    let node = |name: &str| sandbox.workload(name).map_or("-", |w| w.node.as_str());
    let over = match record["dst.hbone_addr"].as_str() {
        Some(tunnel) => format!("HBONE: HTTP/2 CONNECT in mutual TLS 1.3, to {tunnel}"),
        None => "one node: relayed there, authorized by both identities, no tunnel".to_owned(),
    };
    let mut out = String::new();
    let (client, server) = (text("src.workload"), text("dst.workload"));
    let width = client.len().max(server.len());
    // Writing to a `String` cannot fail.
    let _ = writeln!(out, "{CLIENT} asked http://{SERVICE}/ and {server} answered: {answer}");
    for (who, side, address) in [(client, "src", "src.addr"), (server, "dst", "dst.addr")] {
        let identity = text(&format!("{side}.identity"));
        let _ = writeln!(out, "  {who:width$}   {identity}   {}   {}", node(who), text(address));
    }
    let _ = writeln!(out, "  over {over}");
    out
}
