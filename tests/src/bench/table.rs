//! Medians and ratios as a Markdown table.

use std::collections::BTreeMap;
use std::fmt;

use super::load::{Outcome, Work};
use super::place::{Distance, System};

/// One measurement, or the median of several.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cell {
    /// Units a second.
    pub rate: f64,
    /// CPU seconds for a million units; for bulk for a gigabyte.
    pub cpu: f64,
    /// Median latency, microseconds.
    pub p50_us: f64,
    /// 99th percentile, microseconds.
    pub p99_us: f64,
    /// Failures.
    pub errors: u64,
}

impl Cell {
    /// From what a client did and the CPU seconds of all that took part.
    pub fn of(outcome: &Outcome, cpu_secs: f64) -> Self {
        let units = outcome.units as f64;
        Self {
            rate: units / outcome.secs,
            cpu: cpu_secs / units,
            p50_us: outcome.p50_us,
            p99_us: outcome.p99_us,
            errors: outcome.errors,
        }
    }

    /// Median field by field; errors add up.
    pub fn median(cells: &[Self]) -> Self {
        let of = |field: fn(&Self) -> f64| median(cells.iter().map(field).collect());
        Self {
            rate: of(|c| c.rate),
            cpu: of(|c| c.cpu),
            p50_us: of(|c| c.p50_us),
            p99_us: of(|c| c.p99_us),
            errors: cells.iter().map(|c| c.errors).sum(),
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

/// One kind of work at one distance, on each system.
#[derive(Debug, Clone)]
pub struct Row {
    /// Where the server was.
    pub distance: Distance,
    /// What was done.
    pub work: Work,
    /// Connections at once.
    pub connections: usize,
    /// Medians.
    pub cells: BTreeMap<System, Cell>,
}

/// Where and when a run was made.
#[derive(Debug, Clone)]
pub struct Origin {
    /// UTC, `YYYY-MM-DD`.
    pub date: String,
    /// Commit of the tree that was built; `+` where files differed from it.
    pub commit: String,
    /// Model of the CPU and how many the run could use.
    pub cpu: String,
    /// Kernel release.
    pub kernel: String,
}

impl Origin {
    /// Asks the machine; what it does not say is left out as `unknown`.
    pub fn of_this_run() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model =
            cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).map(|m| m.trim_matches([' ', '\t', ':']));
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let commit = said(&["git", "rev-parse", "--short", "HEAD"]);
        let clean = said(&["git", "status", "--porcelain", "--untracked-files=no"]) == UNKNOWN;
        Self {
            date: said(&["date", "-u", "+%F"]),
            commit: if clean { commit } else { format!("{commit}+") },
            cpu: format!("{} ({cpus} CPUs)", model.unwrap_or(UNKNOWN)),
            kernel: said(&["uname", "-r"]),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, commit {}, {}, Linux {}.", self.date, self.commit, self.cpu, self.kernel)
    }
}

const UNKNOWN: &str = "unknown";

/// First line that a command prints, `unknown` if none.
fn said(argv: &[&str]) -> String {
    let output = std::process::Command::new(argv[0]).args(&argv[1..]).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().next().map_or_else(|| UNKNOWN.to_owned(), str::to_owned)
}

/// Resident memory of one node's processes, KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resident {
    /// Of the process that carries connections.
    pub proxy_kib: u64,
    /// Of the one that watches over it; 0 if there is none.
    pub supervisor_kib: u64,
}

/// Everything that a run measured.
#[derive(Debug, Clone)]
pub struct Table {
    /// Where and when.
    pub origin: Origin,
    /// Throughput rows.
    pub rows: Vec<Row>,
    /// KiB an idle connection, both proxies together.
    pub memory: BTreeMap<(Distance, System), f64>,
    /// One node's processes before any load.
    pub idle: BTreeMap<System, Resident>,
    /// Rounds.
    pub rounds: usize,
    /// Seconds of one measurement.
    pub secs: f64,
    /// Connections of the memory rows.
    pub idle_connections: usize,
}

impl Row {
    fn name(&self) -> String {
        let place = if self.distance == Distance::Across { "across nodes" } else { "same node" };
        let work = match self.work {
            Work::Bulk => "bulk",
            Work::RequestResponse => "request-response 64 B",
            Work::ConnectRequestClose => "connect-request-close",
            Work::Idle => "idle",
        };
        format!("{place}: {work}, {}", self.connections)
    }

    fn rate(&self, system: System) -> String {
        self.cells.get(&system).map_or_else(
            || "-".into(),
            |c| match self.work {
                Work::Bulk => format!("{:.2} Gbit/s", c.rate * 8.0 / 1e9),
                _ => format!("{:.0}/s", c.rate),
            },
        )
    }

    fn cpu(&self, system: System) -> String {
        self.cells.get(&system).map_or_else(
            || "-".into(),
            |c| match self.work {
                Work::Bulk => format!("{:.2} s/GB", c.cpu * 1e9),
                _ => format!("{:.1} us", c.cpu * 1e6),
            },
        )
    }

    fn ratio(&self, a: System, b: System, field: fn(&Cell) -> f64) -> String {
        match (self.cells.get(&a), self.cells.get(&b)) {
            (Some(a), Some(b)) if field(b) > 0.0 => format!("{:.2}", field(a) / field(b)),
            _ => "-".into(),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.origin)?;
        writeln!(f, "Medians of {} rounds of {} s, the systems in turn within each round.", self.rounds, self.secs)?;
        writeln!(
            f,
            "Pinned: client and everything of its node on CPU 0, the other node on CPU 1; for one node, CPU 0.\n"
        )?;
        writeln!(
            f,
            "| workload | direct | ours | ztunnel | ours / direct | ztunnel / direct | **ours / ztunnel** | CPU a unit: direct, ours, ztunnel | p99 us: direct, ours, ztunnel | errors: ours, ztunnel |"
        )?;
        writeln!(f, "|---|---|---|---|---|---|---|---|---|---|")?;
        for row in &self.rows {
            use System::{Direct, Mesh, Peer};
            let p99 = |s| row.cells.get(&s).map_or_else(|| "-".into(), |c: &Cell| format!("{:.0}", c.p99_us));
            let errors = |s| row.cells.get(&s).map_or_else(|| "-".into(), |c: &Cell| c.errors.to_string());
            writeln!(
                f,
                "| {} | {} | {} | {} | {} | {} | **{}** | {}, {}, {} | {}, {}, {} | {}, {} |",
                row.name(),
                row.rate(Direct),
                row.rate(Mesh),
                row.rate(Peer),
                row.ratio(Mesh, Direct, |c| c.rate),
                row.ratio(Peer, Direct, |c| c.rate),
                row.ratio(Mesh, Peer, |c| c.rate),
                row.cpu(Direct),
                row.cpu(Mesh),
                row.cpu(Peer),
                p99(Direct),
                p99(Mesh),
                p99(Peer),
                errors(Mesh),
                errors(Peer),
            )?;
        }
        writeln!(f, "\n| memory | ours | ztunnel |\n|---|---|---|")?;
        for (distance, name) in [(Distance::Across, "across nodes"), (Distance::Same, "same node")] {
            let cell = |s| self.memory.get(&(distance, s)).map_or_else(|| "-".into(), |kib| format!("{kib:.1} KiB"));
            writeln!(
                f,
                "| an idle connection, {name} (RSS of both proxies over {} connections) | {} | {} |",
                self.idle_connections,
                cell(System::Mesh),
                cell(System::Peer)
            )?;
        }
        let idle = |s, kib: fn(&Resident) -> u64| match self.idle.get(&s).map(kib) {
            None | Some(0) => "-".into(),
            Some(kib) => format!("{:.1} MiB", kib as f64 / 1024.0),
        };
        let [proxy, supervisor]: [fn(&Resident) -> u64; 2] = [|r| r.proxy_kib, |r| r.supervisor_kib];
        writeln!(f, "| RSS of an idle node proxy | {} | {} |", idle(System::Mesh, proxy), idle(System::Peer, proxy))?;
        writeln!(
            f,
            "| RSS of its supervisor (the same program: most pages are shared) | {} | {} |",
            idle(System::Mesh, supervisor),
            idle(System::Peer, supervisor)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(vec![]), 0.0);
    }
}
