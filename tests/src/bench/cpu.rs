//! CPU time and memory of processes, as the scheduler accounts them.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};

/// A process and all its descendants.
pub fn family(pid: i32) -> BTreeSet<i32> {
    let mut all = BTreeSet::from([pid]);
    let mut new = vec![pid];
    while let Some(parent) = new.pop() {
        for child in children(parent) {
            if all.insert(child) {
                new.push(child);
            }
        }
    }
    all
}

fn children(pid: i32) -> Vec<i32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|line| line.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>())
        .collect()
}

/// Seconds that a process's threads have run, to the nanosecond (`/proc/PID/task/*/schedstat`). Threads that ended do
/// not count, so what is measured keeps its threads.
pub fn cpu_secs(pid: i32) -> f64 {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0.0 };
    let nanos: u64 = tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|line| line.split_whitespace().next().and_then(|ns| ns.parse::<u64>().ok()))
        .sum();
    nanos as f64 / 1e9
}

/// Resident memory, KiB.
///
/// # Errors
/// The process is gone.
pub fn rss_kib(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).with_context(|| format!("VmRSS of {pid}"))?;
    line.trim().trim_end_matches("kB").trim().parse().context("VmRSS")
}

#[cfg(test)]
mod tests {
    use super::{cpu_secs, family, rss_kib};

    #[test]
    fn a_busy_process_is_seen() {
        let pid = i32::try_from(std::process::id()).expect("pid");
        let before = cpu_secs(pid);
        let mut sum = 0_u64;
        while cpu_secs(pid) - before < 0.01 {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(rss_kib(pid).expect("own memory") > 100);
        assert!(family(pid).contains(&pid));
    }
}
