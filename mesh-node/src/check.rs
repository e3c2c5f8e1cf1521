//! `mesh-node check`: what the node proxy needs of the kernel and of its privileges, and what is there.

use std::io::{self, Write};
use std::net::{Ipv6Addr, TcpListener};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use aya::programs::ProgramType;

use crate::{capture, supervisor};

/// Oldest kernel that the programs are made for, as (major, minor).
const OLDEST_KERNEL: (u32, u32) = (6, 1);
/// Kernels that the tests run on.
const TESTED_KERNELS: [(u32, u32); 3] = [(6, 1), (6, 12), (6, 18)];

/// One requirement and what was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What is needed.
    pub need: &'static str,
    /// What for.
    pub why: &'static str,
    /// What was found.
    pub found: Found,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// It is there.
    Yes(String),
    /// It is not, and something else serves.
    Less(String),
    /// It is not, and the node proxy does not work.
    No(String),
}

/// Looks, prints a line for each requirement, fails if one is not met.
pub fn run() -> ExitCode {
    let findings = look();
    print!("{}", render(&findings));
    let missing = findings.iter().any(|finding| matches!(finding.found, Found::No(_)));
    if missing { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// All requirements.
pub fn look() -> Vec<Finding> {
    let yes_or_no = |outcome: io::Result<String>| match outcome {
        Ok(found) => Found::Yes(found),
        Err(error) => Found::No(error.to_string()),
    };
    let finding = |need, why, found| Finding { need, why, found };
    let mut findings = vec![
        finding(
            "Linux 6.1 or newer",
            "what the programs are made for",
            release().map_or_else(|e| Found::No(e.to_string()), |r| kernel(&r)),
        ),
        finding(
            "BTF of the kernel",
            "the programs find the kernel's structures by it",
            yes_or_no(exists("/sys/kernel/btf/vmlinux")),
        ),
        finding(
            "cgroup v2",
            "the programs at connect attach there",
            yes_or_no(capture::own_cgroup().map(|own| own.display().to_string())),
        ),
        finding("cookies of network namespaces", "a workload is known by its own", yes_or_no(netns_cookie())),
        finding(
            "net.ipv4.tcp_fwmark_accept",
            "applications see the client's address",
            yes_or_no(exists("/proc/sys/net/ipv4/tcp_fwmark_accept")),
        ),
        finding("transparent sockets (CAP_NET_ADMIN)", "as above, and incoming connections", yes_or_no(transparent())),
        finding("sealed memory", "keys outlive the proxy and touch no disk", yes_or_no(sealed())),
        finding(
            "built-in kernel programs",
            "without them nothing is captured",
            yes_or_no(
                capture::object_size()
                    .map(|size| format!("{size} bytes"))
                    .ok_or_else(|| io::Error::other("built without: run cargo xtask build")),
            ),
        ),
        finding("IPv6", "workloads with IPv6 addresses", ipv6()),
        finding("tcx (Linux 6.6)", "else programs attach to interfaces by clsact", tcx()),
    ];
    for (program, need) in [
        (ProgramType::CgroupSockAddr, "programs at connect (CAP_BPF)"),
        (ProgramType::SockOps, "sock_ops programs"),
        (ProgramType::SchedClassifier, "tc programs (CAP_NET_ADMIN)"),
        (ProgramType::SkLookup, "sk_lookup programs"),
    ] {
        let supported = match aya::sys::is_program_supported(program) {
            Ok(true) => Found::Yes("supported".to_owned()),
            Ok(false) => Found::No("the kernel has none".to_owned()),
            Err(error) => Found::No(error.to_string()),
        };
        findings.push(finding(need, "capture", supported));
    }
    findings
}

/// One line each, what is missing last.
fn render(findings: &[Finding]) -> String {
    let mut text = String::new();
    let rank = |finding: &&Finding| match finding.found {
        Found::Yes(_) => 0,
        Found::Less(_) => 1,
        Found::No(_) => 2,
    };
    let mut sorted: Vec<_> = findings.iter().collect();
    sorted.sort_by_key(rank);
    for Finding { need, why, found } in sorted {
        let (word, found) = match found {
            Found::Yes(found) => ("ok", found),
            Found::Less(found) => ("less", found),
            Found::No(found) => ("missing", found),
        };
        text.push_str(&format!("{word:<8}{need:<40}{found}"));
        text.push_str(&if word == "ok" { "\n".to_owned() } else { format!(" ({why})\n") });
    }
    text
}

fn release() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned())
}

/// `6.18.5+debian` is (6, 18).
fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(['.', '-', '+']).map(str::parse);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        (Some(_) | None, _) => None,
    }
}

fn kernel(release: &str) -> Found {
    match parse_release(release) {
        None => Found::Less(format!("{release}: not a version that is known, untested")),
        Some(version) if version < OLDEST_KERNEL => Found::No(release.to_owned()),
        Some(version) if TESTED_KERNELS.contains(&version) => Found::Yes(release.to_owned()),
        Some(_) => Found::Less(format!("{release}: untested, should work")),
    }
}

fn exists(path: &str) -> io::Result<String> {
    std::fs::metadata(Path::new(path))
        .map(|_| path.to_owned())
        .map_err(|error| io::Error::other(format!("{path}: {error}")))
}

fn netns_cookie() -> io::Result<String> {
    let own = std::fs::File::open("/proc/self/ns/net")?;
    capture::netns_cookie(own.as_fd()).map(|cookie| format!("ours is {cookie}"))
}

fn transparent() -> io::Result<String> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.set_ip_transparent_v4(true)?;
    socket.set_mark(mesh_ebpf_common::INNER_MARK)?;
    Ok("allowed".to_owned())
}

fn sealed() -> io::Result<String> {
    let content = b"check";
    let read = supervisor::memfd::unseal(&supervisor::memfd::seal("check", content)?)?;
    io::sink().write_all(&read)?;
    if read == content { Ok("works".to_owned()) } else { Err(io::Error::other("does not read back")) }
}

fn ipv6() -> Found {
    match TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) {
        Ok(_) => Found::Yes("there".to_owned()),
        Err(error) => Found::Less(format!("not in this namespace: {error}")),
    }
}

fn tcx() -> Found {
    let version = release().ok().as_deref().and_then(parse_release);
    match version {
        Some(version) if version >= (6, 6) => Found::Yes("by the kernel's version".to_owned()),
        Some(_) | None => Found::Less("clsact is used".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_apart() {
        for (release, expected) in [
            ("6.18.5+debian", Found::Yes("6.18.5+debian".into())),
            ("6.1.0-25-amd64", Found::Yes("6.1.0-25-amd64".into())),
            ("5.15.0", Found::No("5.15.0".into())),
            ("6.0.9", Found::No("6.0.9".into())),
            ("6.8.0-generic", Found::Less("6.8.0-generic: untested, should work".into())),
            ("7.0", Found::Less("7.0: untested, should work".into())),
            ("weird", Found::Less("weird: not a version that is known, untested".into())),
        ] {
            assert_eq!(kernel(release), expected, "{release}");
        }
    }

    #[test]
    fn what_is_missing_comes_last_and_says_what_for() {
        let finding = |need, found| Finding { need, why: "reasons", found };
        let text = render(&[
            finding("a", Found::No("gone".into())),
            finding("b", Found::Yes("here".into())),
            finding("c", Found::Less("half".into())),
        ]);
        let lines: Vec<_> = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(lines, ["ok b here", "less c half (reasons)", "missing a gone (reasons)"]);
    }
}
