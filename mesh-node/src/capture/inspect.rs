//! What `mesh-ctl bpf` and the metrics show: counters, maps, programs.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use mesh_ebpf_common::maps;
use mesh_ebpf_common::outcome::{Hook, Reason, Verdict, counter_index};

use super::Capture;
use super::error::{CaptureError, context};
use super::pins::{CLSACT_SUFFIX, entries};
use super::programs::CGROUP_PROGRAMS;
use super::sys;

/// How often a hook had an outcome, since the maps were created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// Where.
    pub hook: Hook,
    /// Why.
    pub reason: Reason,
    /// What followed.
    pub verdict: Verdict,
    /// Connections at the cgroup hooks, segments at the tc hooks.
    pub count: u64,
}

/// A map of the kernel's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapRow {
    /// Its name.
    pub name: &'static str,
    /// The kernel's name of its type.
    pub kind: &'static str,
    /// Entries in use; `None` where the kernel does not tell (socket storage, rings).
    pub entries: Option<usize>,
    /// Entries that it can hold; bytes for a ring; 0 for socket storage, which grows with the sockets.
    pub capacity: u32,
}

/// A program of the kernel's and where it is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramRow {
    /// The program's name, from its pin.
    pub name: String,
    /// Id of the program.
    pub id: u32,
    /// The kernel's hash over its instructions, hexadecimal.
    pub tag: String,
    /// Where it is pinned.
    pub pin: PathBuf,
    /// `cgroup 123`, `ifindex 2`, `netns 4026532000`, or `gone` if what it was attached to is.
    pub attached_to: String,
}

impl Capture {
    /// All outcomes that occurred.
    pub fn counters(&self) -> Result<Vec<Count>, CaptureError> {
        let cpus = context(possible_cpus(), || "read the number of CPUs".to_owned())?;
        let mut words = vec![0_u64; cpus];
        let mut counts = Vec::new();
        for hook in Hook::ALL {
            for reason in Reason::ALL {
                let index = counter_index(hook, reason);
                let read = sys::lookup_per_cpu(self.maps.counters.as_fd(), index, &mut words);
                context(read, || "read the counters".to_owned())?;
                let count = words.iter().sum();
                if count > 0 {
                    counts.push(Count { hook, reason, verdict: reason.verdict(), count });
                }
            }
        }
        Ok(counts)
    }

    /// Events that were counted but not sent, because there were too many or nobody read them.
    pub fn suppressed_events(&self) -> Result<u64, CaptureError> {
        /// Words of `EventBudget`, of which the third counts.
        const BUDGET_WORDS: usize = 3;
        let cpus = context(possible_cpus(), || "read the number of CPUs".to_owned())?;
        let mut words = vec![0_u64; cpus * BUDGET_WORDS];
        let read = sys::lookup_per_cpu(self.maps.event_budget.as_fd(), 0, &mut words);
        context(read, || "read the event budget".to_owned())?;
        Ok(words.chunks(BUDGET_WORDS).map(|budget| budget[BUDGET_WORDS - 1]).sum())
    }

    /// All maps and how full they are.
    pub fn maps(&self) -> Result<Vec<MapRow>, CaptureError> {
        let mut rows = Vec::with_capacity(maps::ALL.len());
        for name in maps::ALL {
            let path = self.pins.map(name);
            let what = || format!("read {}", path.display());
            let map = context(sys::open_pin(&path), what)?;
            let info = context(sys::map_info(map.as_fd()), what)?;
            let (kind, countable) = map_kind(info.kind);
            let entries = if countable {
                let key_size = usize::try_from(info.key_size).unwrap_or_default();
                let limit = usize::try_from(info.max_entries).unwrap_or_default();
                Some(context(sys::count_keys(map.as_fd(), key_size, limit), what)?)
            } else {
                None
            };
            rows.push(MapRow { name, kind, entries, capacity: info.max_entries });
        }
        Ok(rows)
    }

    /// All pinned programs.
    pub fn programs_attached(&self) -> Result<Vec<ProgramRow>, CaptureError> {
        let list = |dir: PathBuf| context(entries(&dir), || format!("read {}", dir.display()));
        let mut paths = list(self.pins.links())?;
        for dir in list(self.pins.workloads())? {
            paths.extend(list(dir)?);
        }
        paths.into_iter().map(program_row).collect()
    }
}

fn program_row(pin: PathBuf) -> Result<ProgramRow, CaptureError> {
    let what = || format!("read {}", pin.display());
    let name = pin.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let fd = context(sys::open_pin(&pin), what)?;
    let (program, attached_to) = if name.ends_with(CLSACT_SUFFIX) {
        (fd, format!("clsact, ifindex {}", name.split('_').next().unwrap_or_default()))
    } else {
        let link = context(sys::link_info(fd.as_fd()), what)?;
        (context(sys::program_by_id(link.prog_id), what)?, target(&link))
    };
    let info = context(sys::program_info(program.as_fd()), what)?;
    let tag = info.tag.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    Ok(ProgramRow { name, id: info.id, tag, pin, attached_to })
}

fn target(link: &sys::LinkInfo) -> String {
    const LINK_CGROUP: u32 = 3;
    const LINK_NETNS: u32 = 5;
    const LINK_TCX: u32 = 11;
    let low = link.target & u64::from(u32::MAX);
    match link.kind {
        LINK_CGROUP if link.target != 0 => format!("cgroup {}", link.target),
        LINK_NETNS if low != 0 => format!("netns {low}"),
        LINK_TCX if low != 0 => format!("ifindex {low}"),
        LINK_CGROUP | LINK_NETNS | LINK_TCX => "gone".to_owned(),
        // We make no other links.
        other => format!("link type {other}"),
    }
}

/// What is attached to a cgroup at the hooks that capture uses, whoever attached it: `connect4 (program 12)`.
pub fn attached_to_cgroup(cgroup: &Path) -> Result<Vec<String>, CaptureError> {
    let what = || format!("read what is attached to {}", cgroup.display());
    let directory = context(std::fs::File::open(cgroup), what)?;
    let mut found = Vec::new();
    for (program, kind) in CGROUP_PROGRAMS {
        let ids = context(sys::attached(directory.as_fd(), kind), what)?;
        found.extend(ids.iter().map(|id| format!("{program} (program {id})")));
    }
    Ok(found)
}

/// Name, and whether its keys can be walked to count entries.
fn map_kind(kind: u32) -> (&'static str, bool) {
    match kind {
        1 => ("hash", true),
        2 => ("array", false),
        6 => ("percpu_array", false),
        9 => ("lru_hash", true),
        18 => ("sockhash", true),
        24 => ("sk_storage", false),
        27 => ("ringbuf", false),
        // A map of a newer version.
        _ => ("other", false),
    }
}

/// `0-3,8` -> 5: the kernel gives one value per possible CPU.
fn possible_cpus() -> std::io::Result<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    parse_possible(&text).ok_or_else(|| std::io::Error::other(format!("unexpected list of CPUs: {text}")))
}

fn parse_possible(text: &str) -> Option<usize> {
    let ranges = text.trim().split(',');
    ranges
        .map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
            (last + 1).checked_sub(first)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::parse_possible;

    #[test]
    fn possible_cpus_are_counted() {
        for (text, expected) in [("0\n", Some(1)), ("0-1\n", Some(2)), ("0-3,8-9", Some(6)), ("", None), ("3-1", None)]
        {
            assert_eq!(parse_possible(text), expected, "{text}");
        }
    }
}
