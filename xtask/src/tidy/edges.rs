//! Which crate may know which, what the deciding crate may not do, and where `unsafe` may stand.

use crate::metadata::{Kind, Package};

use super::rust::{Source, find_word};

/// The crates of this workspace that each one may depend on, tests and build scripts included.
const EDGES: [(&str, &[&str]); 12] = [
    ("mesh-agent", &["mesh-api", "mesh-cni", "mesh-core"]),
    ("mesh-api", &["mesh-core"]),
    ("mesh-cni", &[]),
    ("mesh-controller", &["mesh-api", "mesh-core"]),
    ("mesh-core", &[]),
    ("mesh-ctl", &["mesh-agent", "mesh-api", "mesh-core"]),
    ("mesh-ebpf", &["mesh-ebpf-common"]),
    ("mesh-ebpf-common", &[]),
    ("mesh-fuzz", &["mesh-api", "mesh-controller", "mesh-core", "mesh-node"]),
    ("mesh-node", &["mesh-agent", "mesh-api", "mesh-core", "mesh-ebpf-common"]),
    ("mesh-tests", &["mesh-api", "mesh-controller", "mesh-core", "mesh-ctl", "mesh-ebpf-common", "mesh-node"]),
    ("xtask", &[]),
];

/// All that the deciding crate may use: values, hashes, a random number generator handed in.
const CORE_MAY_USE: [&str; 5] = ["ipnet", "rand", "serde", "sha2", "thiserror"];

/// What would make a decision depend on more than its arguments.
const CORE_NEVER_SAYS: [&str; 12] = [
    "SystemTime::now",
    "Instant::now",
    "std::env",
    "std::fs",
    "std::io",
    "std::process",
    "std::thread",
    "TcpStream",
    "println!",
    "eprintln!",
    "thread_rng",
    "rand::rng",
];

/// Files and directories that talk to the kernel.
const MAY_BE_UNSAFE: [&str; 7] = [
    "mesh-agent/src/proxy.rs",
    "mesh-ctl/src/sandbox/process.rs",
    "mesh-ebpf/",
    "mesh-ebpf-common/",
    "mesh-node/src/capture/",
    "mesh-node/src/seqpacket.rs",
    "tests/",
];

pub(super) fn findings(packages: &[Package]) -> Vec<String> {
    let ours: Vec<&Package> = packages.iter().filter(|package| package.is_ours).collect();
    let mut findings = Vec::new();
    for package in &ours {
        let name = package.name.as_str();
        let Some((_, allowed)) = EDGES.iter().find(|(member, _)| *member == name) else {
            findings.push(format!("{name} is not in the table of crate edges: add it to xtask and ARCHITECTURE.md"));
            continue;
        };
        for dependency in &package.dependencies {
            let to = dependency.name.as_str();
            if ours.iter().any(|other| other.name == to) && !allowed.contains(&to) {
                findings.push(format!("{name} depends on {to}: this direction is closed"));
            }
            if name == "mesh-core" && dependency.kind != Kind::Development && !CORE_MAY_USE.contains(&to) {
                findings.push(format!("mesh-core depends on {to}: decisions need values only"));
            }
        }
    }
    findings
}

/// Findings in one file's code.
pub(super) fn source_findings(file: &str, source: &Source) -> Vec<String> {
    let mut findings = Vec::new();
    let in_core = file.starts_with("mesh-core/src/");
    let may_be_unsafe = MAY_BE_UNSAFE.iter().any(|place| file.starts_with(place));
    for (number, line) in source.code_lines() {
        if in_core && let Some(word) = CORE_NEVER_SAYS.iter().find(|word| line.contains(*word)) {
            findings.push(format!("{file}:{number}: mesh-core says `{word}`: hand it in as an argument"));
        }
        if !may_be_unsafe && find_word(line, "unsafe").is_some() {
            findings.push(format!("{file}:{number}: `unsafe` outside the kernel-facing modules"));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::{Dependency, Version};

    fn ours(name: &str, dependencies: &[(&str, Kind)]) -> Package {
        let dependency = |&(name, kind): &(&str, Kind)| Dependency { name: name.to_owned(), kind };
        Package {
            name: name.to_owned(),
            version: Version(0, 1, 0),
            licence: "Apache-2.0".to_owned(),
            is_ours: true,
            dependencies: dependencies.iter().map(dependency).collect(),
        }
    }

    #[test]
    fn a_closed_direction_is_found() {
        let core = ours("mesh-core", &[("serde", Kind::Normal), ("proptest", Kind::Development)]);
        let api = ours("mesh-api", &[("mesh-core", Kind::Normal)]);
        assert!(findings(&[core, api]).is_empty());
        let core = ours("mesh-core", &[("mesh-api", Kind::Development), ("tokio", Kind::Normal)]);
        let found = findings(&[core, ours("mesh-api", &[]), ours("mesh-new", &[])]);
        assert_eq!(found.len(), 3, "{found:?}");
    }

    #[test]
    fn a_clock_in_the_core_and_stray_unsafe_are_found() {
        let clock = Source::read("fn f() { let now = Instant::now(); } // Instant::now\n");
        assert_eq!(source_findings("mesh-core/src/a.rs", &clock).len(), 1);
        assert!(source_findings("mesh-node/src/a.rs", &clock).is_empty());
        let kernel = Source::read("fn f() { unsafe { g() } }\n");
        assert_eq!(source_findings("mesh-core/src/a.rs", &kernel).len(), 1);
        assert!(source_findings("mesh-node/src/capture/a.rs", &kernel).is_empty());
    }
}
