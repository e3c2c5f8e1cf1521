//! The matrix: every row on every system in turn, several times; medians.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};

use super::load::Work;
use super::place::{Distance, Place, System};
use super::table::{Cell, Origin, Row, Table};

/// Length of the load that shows that a mesh is one, seconds.
const PROOF_SECS: f64 = 0.1;
/// Processes give back what starting up took.
const SETTLED_AFTER: Duration = Duration::from_secs(5);
/// And what opening many connections at once took.
const IDLE_AFTER: Duration = Duration::from_secs(3);
/// How long idle connections are held, seconds.
const IDLE_SECS: f64 = 5.0;

/// One row of the matrix.
#[derive(Debug, Clone, Copy)]
struct Item {
    distance: Distance,
    work: Work,
    connections: usize,
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Rounds; the median is quoted.
    pub rounds: usize,
    /// Seconds of one measurement.
    pub secs: f64,
    /// Connections of the memory row.
    pub idle_connections: usize,
    /// What is measured.
    pub systems: Vec<System>,
    /// Binary of the peer.
    pub peer: Option<PathBuf>,
}

fn items() -> Vec<Item> {
    let item = |distance, work, connections| Item { distance, work, connections };
    [Distance::Across, Distance::Same]
        .into_iter()
        .flat_map(|d| {
            [
                item(d, Work::Bulk, 1),
                item(d, Work::RequestResponse, 1),
                item(d, Work::RequestResponse, 64),
                item(d, Work::ConnectRequestClose, 1),
                item(d, Work::ConnectRequestClose, 32),
            ]
        })
        .collect()
}

/// Builds the places, runs the matrix, ends the places.
///
/// # Errors
/// A place does not come up, or a load fails altogether.
pub fn run(plan: &Plan) -> Result<Table> {
    let mut places: Vec<(System, Place)> = Vec::new();
    let mut result = Ok(());
    for &system in &plan.systems {
        match Place::build(system, plan.peer.as_ref()) {
            Ok(place) => places.push((system, place)),
            Err(error) => {
                result = Err(error.context(format!("{system:?}")));
                break;
            }
        }
    }
    let table = match result {
        Ok(()) => measure(plan, &places),
        Err(error) => Err(error),
    };
    for (_, place) in places {
        place.down()?;
    }
    table
}

fn measure(plan: &Plan, places: &[(System, Place)]) -> Result<Table> {
    prove_mutual(places)?;
    let table = measured(plan, places)?;
    prove_mutual(places)?;
    Ok(table)
}

/// Sends a little at both distances, so that there is something to prove.
fn prove_mutual(places: &[(System, Place)]) -> Result<()> {
    for distance in [Distance::Across, Distance::Same] {
        for (_, place) in places {
            place.run(distance, Work::RequestResponse, 1, PROOF_SECS)?;
            place.prove_mutual()?;
        }
    }
    Ok(())
}

fn measured(plan: &Plan, places: &[(System, Place)]) -> Result<Table> {
    std::thread::sleep(SETTLED_AFTER);
    let idle = places
        .iter()
        .filter(|(system, _)| *system != System::Direct)
        .map(|(system, place)| Ok((*system, place.resident()?)))
        .collect::<Result<BTreeMap<_, _>>>()?;
    // Before the loads, whose waiting sockets would count too.
    let memory = [Distance::Across, Distance::Same]
        .into_iter()
        .flat_map(|d| places.iter().filter(|(s, _)| *s != System::Direct).map(move |(s, p)| (d, *s, p)))
        .map(|(distance, system, place)| ((distance, system), idle_kib(plan, place, distance)))
        .filter_map(|(key, kib)| match kib {
            Ok(kib) => Some((key, kib)),
            // A system that cannot hold them open has no figure; the rest of the table stands.
            Err(error) => {
                eprintln!("  {key:?}: {error:#}");
                None
            }
        })
        .collect::<BTreeMap<_, _>>();
    let mut rows = Vec::new();
    for item in items() {
        let mut samples: BTreeMap<System, Vec<Cell>> = BTreeMap::new();
        for round in 0..plan.rounds {
            eprintln!(
                "  {:?} {:?} x{} round {}/{}",
                item.distance,
                item.work,
                item.connections,
                round + 1,
                plan.rounds
            );
            for (system, place) in places {
                place.pin(item.distance)?;
                let (outcome, cpu) = place.run(item.distance, item.work, item.connections, plan.secs)?;
                samples.entry(*system).or_default().push(Cell::of(&outcome, cpu));
            }
        }
        let cells = samples.into_iter().map(|(system, cells)| (system, Cell::median(&cells))).collect();
        rows.push(Row { distance: item.distance, work: item.work, connections: item.connections, cells });
    }
    Ok(Table {
        origin: Origin::of_this_run(),
        rows,
        memory,
        idle,
        rounds: plan.rounds,
        secs: plan.secs,
        idle_connections: plan.idle_connections,
    })
}

/// Growth of the proxies' memory by idle connections, KiB each.
fn idle_kib(plan: &Plan, place: &Place, distance: Distance) -> Result<f64> {
    let before = place.proxies_rss_kib()?;
    let mut command = place.client(distance, Work::Idle, plan.idle_connections, IDLE_SECS)?;
    let mut client = command.stdout(Stdio::piped()).spawn().context("load client")?;
    let mut lines = BufReader::new(client.stdout.take().context("output of the load client")?);
    let mut line = String::new();
    lines.read_line(&mut line).context("first line of the load client")?;
    anyhow::ensure!(line.trim() == "opened", "the idle connections did not open: {line}");
    std::thread::sleep(IDLE_AFTER);
    let after = place.proxies_rss_kib()?;
    client.wait().context("load client")?;
    Ok((after as f64 - before as f64) / plan.idle_connections as f64)
}
