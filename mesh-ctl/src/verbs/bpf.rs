//! `bpf`: what the kernel programs are attached to and what they did.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, anyhow};
use mesh_api::admin::{BpfCounter, BpfEvent, BpfMap, BpfProgram, BpfState};
use serde_json::json;

use super::{Output, finish, listed, target};
use crate::cli::{Bpf, Global};
use crate::exit::Usage;
use crate::render::{self, API_VERSION, Column, OnNode, Row, View};
use crate::target::{Gathered, Section};

/// Attachments of a program that a table names; `-o wide` has all.
const SHOWN_ATTACHMENTS: usize = 2;

pub(super) async fn run(global: &Global, what: &Bpf) -> Output {
    match what {
        Bpf::Status(saved) => status(global, target(global, saved).await?.gather::<BpfState>(Section::Bpf).await),
        Bpf::Map { name: None, saved } => {
            let states = target(global, saved).await?.gather::<BpfState>(Section::Bpf).await;
            listed(global, states.map(|state| state.maps).rows(), |row| row)
        }
        Bpf::Map { name: Some(name), saved } => {
            let path = format!("/bpf?map={name}");
            entries(global, name, target(global, saved).await?.gather_path::<BpfState>(Section::Bpf, &path).await)
        }
        Bpf::Events(saved) => {
            let events = target(global, saved).await?.gather::<Vec<BpfEvent>>(Section::Events).await;
            let mut rows = events.rows();
            rows.rows.sort_by(|a, b| a.item.time.cmp(&b.item.time));
            listed(global, rows, |row| row)
        }
    }
}

impl Row for OnNode<BpfProgram> {
    const KIND: &'static str = "Program";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("NODE"),
        Column::Narrow("HOOK"),
        Column::Narrow("PROG"),
        Column::Narrow("ID"),
        Column::Wide("TAG"),
        Column::Narrow("ATTACHED-TO"),
        Column::Wide("PINNED"),
        Column::Wide("ALL ATTACHMENTS"),
    ];

    fn cells(&self) -> Vec<String> {
        let p = &self.item;
        let more = p.attached_to.len().saturating_sub(SHOWN_ATTACHMENTS);
        let mut attached = p.attached_to[..p.attached_to.len() - more].join(", ");
        if more > 0 {
            attached += &format!(" and {more} more");
        }
        vec![
            self.node.clone(),
            p.hook.clone(),
            p.program.clone(),
            p.id.to_string(),
            p.tag.clone(),
            attached,
            p.pinned.clone(),
            p.attached_to.join(","),
        ]
    }
}

impl Row for OnNode<BpfCounter> {
    const KIND: &'static str = "Verdict";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("NODE"),
        Column::Narrow("HOOK"),
        Column::Narrow("VERDICT"),
        Column::Narrow("REASON"),
        Column::Narrow("COUNT"),
    ];

    fn cells(&self) -> Vec<String> {
        let c = &self.item;
        vec![self.node.clone(), c.hook.clone(), c.verdict.clone(), c.reason.clone(), c.count.to_string()]
    }
}

impl Row for OnNode<BpfMap> {
    const KIND: &'static str = "Map";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("NODE"),
        Column::Narrow("MAP"),
        Column::Narrow("KIND"),
        Column::Narrow("ENTRIES"),
        Column::Narrow("CAPACITY"),
        Column::Narrow("FILL"),
    ];

    fn cells(&self) -> Vec<String> {
        let m = &self.item;
        let fill = (m.entries * 100).checked_div(m.capacity).map(|percent| format!("{percent}%")).unwrap_or_default();
        vec![self.node.clone(), m.name.clone(), m.kind.clone(), m.entries.to_string(), m.capacity.to_string(), fill]
    }
}

impl Row for OnNode<BpfEvent> {
    const KIND: &'static str = "Event";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("TIME"),
        Column::Narrow("NODE"),
        Column::Narrow("WORKLOAD"),
        Column::Narrow("HOOK"),
        Column::Narrow("REASON"),
        Column::Narrow("SOURCE"),
        Column::Narrow("DESTINATION"),
    ];

    fn cells(&self) -> Vec<String> {
        let e = &self.item;
        vec![
            e.time.clone(),
            self.node.clone(),
            e.workload.clone(),
            e.hook.clone(),
            e.reason.clone(),
            e.source.clone(),
            e.destination.clone(),
        ]
    }
}

fn status(global: &Global, states: Gathered<BpfState>) -> Output {
    let view = View::of(global);
    if !view.is_table() {
        let items = json!({"apiVersion": API_VERSION, "kind": "BpfState", "items": states.answers});
        return finish(render::document(&items, view.format)?, states.errors);
    }
    let (mut programs, mut counters) = (Vec::new(), Vec::new());
    for OnNode { node, item } in states.answers {
        programs.extend(item.programs.into_iter().map(|item| OnNode { node: node.clone(), item }));
        counters.extend(item.counters.into_iter().map(|item| OnNode { node: node.clone(), item }));
    }
    let text = format!("{}\n{}", render::list(&programs, view)?, render::list(&counters, view)?);
    finish(text, states.errors)
}

fn entries(global: &Global, name: &str, states: Gathered<BpfState>) -> Output {
    let mut items: Vec<OnNode<BTreeMap<String, String>>> = Vec::new();
    let (mut held, mut known) = (0, BTreeSet::new());
    for OnNode { node, item } in states.answers {
        for map in item.maps {
            known.insert(map.name.clone());
            if map.name == name {
                held += map.entries;
                items.extend(map.rows.into_iter().map(|item| OnNode { node: node.clone(), item }));
            }
        }
    }
    if !known.is_empty() && !known.contains(name) {
        let known: Vec<_> = known.into_iter().collect();
        return Err(anyhow!(Usage(format!("no map `{name}`; there are {}", known.join(", ")))).into());
    }
    let view = View::of(global);
    if !view.is_table() {
        let document = json!({"apiVersion": API_VERSION, "kind": "MapEntry", "items": items});
        return finish(render::document(&document, view.format)?, states.errors);
    }
    if items.is_empty() && held > 0 {
        return finish(format!("{name} holds {held} entries, which are not decoded\n"), states.errors);
    }
    finish(lines(name, &items)?, states.errors)
}

fn lines(name: &str, items: &[OnNode<BTreeMap<String, String>>]) -> Result<String> {
    if items.is_empty() {
        return Ok(format!("{name} is empty\n"));
    }
    let line = |row: &OnNode<BTreeMap<String, String>>| {
        let fields: Vec<String> = row.item.iter().map(|(key, value)| format!("{key}={value}")).collect();
        format!("{}   {}\n", row.node, fields.join("   "))
    };
    Ok(items.iter().map(line).collect())
}
