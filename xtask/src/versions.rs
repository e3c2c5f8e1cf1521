//! What may be in `Cargo.lock`: version floors of past advisories, licences, one copy of what must be one, no second TLS stack.
//!
//! The advisory database cannot be read without the internet, so the floors stand here, each with its advisory.

use anyhow::Result;

use crate::metadata::{self, Package, Version};
use crate::process;
use crate::spdx;
use crate::tree::Tree;

/// The first version without the fault.
const FLOORS: [(&str, Version, &str); 6] = [
    ("h2", Version(0, 4, 18), "RUSTSEC-2026-0258: empty DATA frames queued without limit"),
    ("rustls-webpki", Version(0, 103, 13), "RUSTSEC-2026-0098, -0099, -0104: name constraints, CRL panic"),
    ("rustls", Version(0, 23, 18), "RUSTSEC-2024-0399: panic on a fragmented ClientHello"),
    ("tonic", Version(0, 12, 3), "RUSTSEC-2024-0376: server ends on an accept error"),
    ("hyper", Version(1, 0, 0), "RUSTSEC-2021-0078, -0079: request smuggling"),
    ("tokio-rustls", Version(0, 26, 0), "the one made for rustls 0.23"),
];

/// Never in the tree: a second TLS stack or crypto provider, and YAML crates with no upkeep.
const REFUSED: [(&str, &str); 6] = [
    ("ring", "aws-lc-rs is the one crypto provider"),
    ("openssl", "rustls is the one TLS stack"),
    ("openssl-sys", "rustls is the one TLS stack"),
    ("native-tls", "rustls is the one TLS stack"),
    ("serde_yaml", "archived and writes `yes` unquoted; YAML goes through serde-saphyr"),
    ("serde_yml", "RUSTSEC-2025-0068; YAML goes through serde-saphyr"),
];

/// Two copies of these would be two worlds of types, or twice the code on the data path.
const SINGLE: [&str; 17] = [
    "aws-lc-rs",
    "aya",
    "clap",
    "h2",
    "http",
    "hyper",
    "mio",
    "nix",
    "prost",
    "rcgen",
    "rustls",
    "rustls-webpki",
    "serde",
    "tokio",
    "tonic",
    "tracing",
    "x509-parser",
];

/// Permissive, and compatible with Apache-2.0.
const LICENCES: [&str; 12] = [
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Everything wrong with the lock file, one line each.
pub(crate) fn findings(tree: &Tree) -> Result<Vec<String>> {
    let mut built = Vec::new();
    for package in metadata::packages(tree)? {
        let refused = REFUSED.iter().any(|(name, _)| *name == package.name);
        if !refused || is_built(tree, &package.name)? {
            built.push(package);
        }
    }
    Ok(judge(&built))
}

/// Whether a package of the lock file is compiled at all: the lock file also has what only an optional feature that
/// nobody asks for would bring.
fn is_built(tree: &Tree, name: &str) -> Result<bool> {
    let command = tree.cargo(&["tree", "--locked", "--workspace", "--target=all", "--edges=all", "--invert", name]);
    Ok(!process::output(command)?.trim().is_empty())
}

fn judge(packages: &[Package]) -> Vec<String> {
    let mut findings = Vec::new();
    for package in packages {
        let Package { name, version, licence, .. } = package;
        for (_, floor, why) in FLOORS.iter().filter(|(floored, floor, _)| floored == name && version < floor) {
            findings.push(format!("{name} {version} is below {floor}: {why}"));
        }
        for (_, why) in REFUSED.iter().filter(|(refused, _)| refused == name) {
            findings.push(format!("{name} {version} must not be in the tree: {why}"));
        }
        if !spdx::is_allowed(licence, &LICENCES) {
            findings.push(format!("{name} {version} has licence {licence:?}, which is not on the list"));
        }
    }
    for single in SINGLE {
        let versions: Vec<String> = packages
            .iter()
            .filter(|package| package.name == single)
            .map(|package| package.version.to_string())
            .collect();
        if versions.len() > 1 {
            findings.push(format!("{single} is there in {} versions: {}", versions.len(), versions.join(", ")));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: Version, licence: &str) -> Package {
        Package {
            name: name.to_owned(),
            version,
            licence: licence.to_owned(),
            is_ours: false,
            dependencies: Vec::new(),
        }
    }

    #[track_caller]
    fn check(packages: &[Package], expected: &[&str]) {
        let findings = judge(packages);
        assert_eq!(findings.len(), expected.len(), "{findings:?}");
        for (finding, start) in findings.iter().zip(expected) {
            assert!(finding.starts_with(start), "{finding}");
        }
    }

    #[test]
    fn floors_licences_doubles_and_refused_crates_are_found() {
        check(&[package("h2", Version(0, 4, 18), "MIT")], &[]);
        check(&[package("h2", Version(0, 4, 17), "MIT")], &["h2 0.4.17 is below 0.4.18"]);
        check(&[package("left", Version(1, 0, 0), "GPL-3.0-only")], &["left 1.0.0 has licence"]);
        check(&[package("ring", Version(0, 17, 0), "ISC")], &["ring 0.17.0 must not be"]);
        let twice = [package("http", Version(0, 2, 0), "MIT"), package("http", Version(1, 3, 0), "MIT")];
        check(&twice, &["http is there in 2 versions: 0.2.0, 1.3.0"]);
    }
}
