//! What a process uses, as the kernel accounts it, and bounds on it that a test sets.

use std::fs;
use std::process::Command;

/// Largest resident memory since [`forget_peak`], bytes.
///
/// # Panics
/// The process is gone.
pub fn peak_bytes(pid: i32) -> u64 {
    status(pid, "VmHWM:")
}

/// Resident memory, bytes.
///
/// # Panics
/// The process is gone.
pub fn resident_bytes(pid: i32) -> u64 {
    status(pid, "VmRSS:")
}

/// Makes the memory of now the largest so far (proc(5), `clear_refs`).
///
/// # Panics
/// The process is gone.
pub fn forget_peak(pid: i32) {
    fs::write(format!("/proc/{pid}/clear_refs"), "5").expect("forget the peak of a process's memory");
}

/// Open descriptors.
///
/// # Panics
/// The process is gone.
pub fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors of a process").count()
}

/// The limit of open descriptors of a running process: soft and hard.
///
/// # Panics
/// The process is gone.
pub fn descriptor_limit(pid: i32) -> (u64, u64) {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits of a process");
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).expect("limit of descriptors");
    let mut numbers = line.split_whitespace().map(|number| number.parse().expect("number"));
    (numbers.next().expect("soft"), numbers.next().expect("hard"))
}

/// Sets the soft limit of open descriptors of a running process.
///
/// # Panics
/// The process is gone.
pub fn limit_descriptors(pid: i32, soft: u64) {
    let (_, hard) = descriptor_limit(pid);
    let mut command = Command::new("prlimit");
    command.args([format!("--pid={pid}"), format!("--nofile={soft}:{hard}")]);
    let status = command.status().expect("prlimit (package util-linux)");
    assert!(status.success(), "{command:?}: {status}");
}

fn status(pid: i32, key: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("status of a process");
    let kib = text.lines().find_map(|line| line.strip_prefix(key)?.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.map_or_else(|| panic!("no {key} in {text}"), |kib: u64| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME_BYTES: usize = 32 << 20;

    #[test]
    fn memory_that_came_and_went_shows_in_the_peak_until_it_is_forgotten() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let before = peak_bytes(pid);
        drop(std::hint::black_box(vec![1_u8; SOME_BYTES]));
        assert!(peak_bytes(pid) >= before.max(SOME_BYTES as u64));
        forget_peak(pid);
        assert!(peak_bytes(pid) < resident_bytes(pid) + SOME_BYTES as u64);
    }
}
