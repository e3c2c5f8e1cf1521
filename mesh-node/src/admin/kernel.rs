//! Kernel programs, maps and counters as the admin interface shows them.

use std::collections::BTreeMap;
use std::path::Path;

use http::StatusCode;
use mesh_api::admin::{BpfCounter, BpfMap, BpfProgram, BpfState};
use mesh_ebpf_common::maps;
use mesh_ebpf_common::outcome::Verdict;

use crate::capture::{Capture, CaptureError, ProgramRow};
use crate::http_server::Answer;
use crate::runtime::View;

/// The page, with the rows of one map if it is named.
pub(super) fn page(capture: &Capture, view: &View, map: Option<&str>) -> Answer {
    match map {
        Some(name) if !maps::ALL.contains(&name) => {
            Answer::text(StatusCode::NOT_FOUND, format_args!("no map {name}; there are {}", maps::ALL.join(", ")))
        }
        map => match state(capture, view, map) {
            Ok(state) => Answer::json(&state),
            Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, error),
        },
    }
}

pub(super) fn state(capture: &Capture, view: &View, map: Option<&str>) -> Result<BpfState, CaptureError> {
    let mut rows = match map {
        Some(name) => decoded(capture, view, name)?,
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
        verdict: verdict_name(count.verdict).to_owned(),
        count: count.count,
    });
    Ok(BpfState {
        pins: capture.pin_directory().display().to_string(),
        maps: maps.collect(),
        counters: counters.collect(),
        programs: programs(view, capture.programs_attached()?),
    })
}

/// The name in metrics and `mesh-ctl`.
pub(super) fn verdict_name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Pass => "pass",
        Verdict::Proxy => "redirect",
        Verdict::Refuse => "refuse",
        Verdict::Drop => "drop",
    }
}

/// One row for each program, with all places that it is attached to.
fn programs(view: &View, attached: Vec<ProgramRow>) -> Vec<BpfProgram> {
    let mut programs: BTreeMap<(u32, String), BpfProgram> = BTreeMap::new();
    for row in attached {
        let pinned = row.pin.display().to_string();
        let place = match cookie_of(&row.pin) {
            Some(cookie) => format!("{} ({})", workload(view, cookie), row.attached_to),
            None => row.attached_to,
        };
        let program = programs.entry((row.id, row.tag.clone())).or_insert_with(|| {
            let name = plain_name(&row.name);
            BpfProgram {
                hook: hook(name),
                program: name.to_owned(),
                id: row.id,
                tag: row.tag,
                pinned,
                attached_to: Vec::new(),
            }
        });
        program.attached_to.push(place);
    }
    programs.into_values().collect()
}

/// Pins of a workload's programs lie in a directory that is named by its namespace's cookie.
fn cookie_of(pin: &Path) -> Option<u64> {
    pin.parent()?.file_name()?.to_str()?.parse().ok()
}

/// The workload of a namespace cookie, or the cookie where it is not known any more.
fn workload(view: &View, cookie: u64) -> String {
    let enrolled = view.enrolled.values().find(|enrolled| enrolled.cookie == cookie);
    enrolled.map_or_else(|| cookie.to_string(), |enrolled| format!("{}.{}", enrolled.name, enrolled.namespace))
}

/// The name of a pin without interface and kind of attachment: `2_tc_ingress_clsact` is `tc_ingress`.
fn plain_name(pin: &str) -> &str {
    pin.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start_matches('_').trim_end_matches("_clsact")
}

fn hook(program: &str) -> String {
    match program {
        "lookup" | "gate" => "sk_lookup".to_owned(),
        "tc_ingress" => "tc/ingress".to_owned(),
        "tc_host_ingress" => "tc/host_ingress".to_owned(),
        "tc_host_egress" => "tc/host_egress".to_owned(),
        egress if egress.starts_with("tc_egress") => "tc/egress".to_owned(),
        cgroup => format!("cgroup/{cgroup}"),
    }
}

/// Rows of the maps whose entries mean something to a person; others show their fill only.
fn decoded(capture: &Capture, view: &View, name: &str) -> Result<Vec<BTreeMap<String, String>>, CaptureError> {
    if name != maps::WORKLOADS {
        return Ok(Vec::new());
    }
    let text = |ip: Option<String>| ip.unwrap_or_else(|| "-".to_owned());
    Ok(capture
        .adopt()?
        .into_iter()
        .map(|adopted| {
            BTreeMap::from([
                ("cookie".to_owned(), adopted.cookie.to_string()),
                ("workload".to_owned(), workload(view, adopted.cookie)),
                ("ipv4".to_owned(), text(adopted.v4.map(|ip| ip.to_string()))),
                ("ipv6".to_owned(), text(adopted.v6.map(|ip| ip.to_string()))),
            ])
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_named_by_what_they_do_and_where_they_hang() {
        for (pin, name, at) in [
            ("connect4", "connect4", "cgroup/connect4"),
            ("sock_ops", "sock_ops", "cgroup/sock_ops"),
            ("2_tc_ingress", "tc_ingress", "tc/ingress"),
            ("17_tc_egress_l2", "tc_egress_l2", "tc/egress"),
            ("5_tc_host_ingress", "tc_host_ingress", "tc/host_ingress"),
            ("5_tc_host_egress_clsact", "tc_host_egress", "tc/host_egress"),
            ("2_tc_ingress_clsact", "tc_ingress", "tc/ingress"),
            ("lookup", "lookup", "sk_lookup"),
            ("gate", "gate", "sk_lookup"),
        ] {
            assert_eq!((plain_name(pin), hook(plain_name(pin)).as_str()), (name, at), "{pin}");
        }
        assert_eq!(cookie_of(Path::new("/b/v1/workloads/9726/2_tc_ingress")), Some(9726));
        assert_eq!(cookie_of(Path::new("/b/v1/links/connect4")), None);
    }
}
