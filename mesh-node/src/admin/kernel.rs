//! Kernel programs, maps and counters as the admin interface shows them.

use std::collections::BTreeMap;

use http::StatusCode;
use mesh_api::admin::{BpfCounter, BpfMap, BpfProgram, BpfState};
use mesh_ebpf_common::maps;
use mesh_ebpf_common::outcome::Verdict;

use crate::capture::{Capture, CaptureError, ProgramRow};
use crate::http_server::Answer;

/// The page, with the rows of one map if it is named.
pub(super) fn page(capture: &Capture, map: Option<&str>) -> Answer {
    match map {
        Some(name) if !maps::ALL.contains(&name) => {
            Answer::text(StatusCode::NOT_FOUND, format_args!("no map {name}; there are {}", maps::ALL.join(", ")))
        }
        map => match state(capture, map) {
            Ok(state) => Answer::json(&state),
            Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, error),
        },
    }
}

pub(super) fn state(capture: &Capture, map: Option<&str>) -> Result<BpfState, CaptureError> {
    let mut rows = match map {
        Some(name) => decoded(capture, name)?,
        None => Vec::new(),
    };
    let maps = capture.maps()?.into_iter().map(|row| BpfMap {
        name: row.name.to_owned(),
        kind: row.kind.to_owned(),
        entries: row.entries.unwrap_or_default() as u64,
        capacity: u64::from(row.capacity),
        rows: if Some(row.name) == map { std::mem::take(&mut rows) } else { Vec::new() },
    });
    let counters = capture.counters()?.into_iter().map(|count| BpfCounter {
        hook: count.hook.name().to_owned(),
        reason: count.reason.name().to_owned(),
        verdict: verdict(count.verdict).to_owned(),
        count: count.count,
    });
    Ok(BpfState {
        pins: capture.pin_directory().display().to_string(),
        maps: maps.collect(),
        counters: counters.collect(),
        programs: programs(capture.programs_attached()?),
    })
}

fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Pass => "pass",
        Verdict::Proxy => "redirect",
        Verdict::Refuse => "refuse",
        Verdict::Drop => "drop",
    }
}

/// One row for each program, with all places that it is attached to.
fn programs(attached: Vec<ProgramRow>) -> Vec<BpfProgram> {
    let mut programs: BTreeMap<(u32, String), BpfProgram> = BTreeMap::new();
    for row in attached {
        let pinned = row.pin.display().to_string();
        let program = programs.entry((row.id, row.tag.clone())).or_insert_with(|| BpfProgram {
            hook: row.attached_to.split(' ').next().unwrap_or_default().to_owned(),
            program: row.name,
            id: row.id,
            tag: row.tag,
            pinned,
            attached_to: Vec::new(),
        });
        program.attached_to.push(row.attached_to);
    }
    programs.into_values().collect()
}

/// Rows of the maps whose entries mean something to a person; others show their fill only.
fn decoded(capture: &Capture, name: &str) -> Result<Vec<BTreeMap<String, String>>, CaptureError> {
    if name != maps::WORKLOADS {
        return Ok(Vec::new());
    }
    let text = |ip: Option<String>| ip.unwrap_or_else(|| "-".to_owned());
    Ok(capture
        .adopt()?
        .into_iter()
        .map(|workload| {
            BTreeMap::from([
                ("cookie".to_owned(), workload.cookie.to_string()),
                ("ipv4".to_owned(), text(workload.v4.map(|ip| ip.to_string()))),
                ("ipv6".to_owned(), text(workload.v6.map(|ip| ip.to_string()))),
            ])
        })
        .collect())
}
