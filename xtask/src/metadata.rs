//! The packages of the workspace and all that they depend on, as cargo resolved them.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process;
use crate::tree::Tree;

/// One package in the lock file.
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: Version,
    /// SPDX expression; empty if the package does not say.
    pub(crate) licence: String,
    /// A member of this workspace.
    pub(crate) is_ours: bool,
    /// What it asks for, of whichever kind and platform.
    pub(crate) dependencies: Vec<Dependency>,
}

/// One line of a package's `[dependencies]`, `[dev-dependencies]` or `[build-dependencies]`.
pub(crate) struct Dependency {
    pub(crate) name: String,
    pub(crate) kind: Kind,
}

/// Which of the tables a dependency stands in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Normal,
    Development,
    Build,
}

/// The numbers of a version; what follows `-` or `+` does not count for a floor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u64, pub(crate) u64, pub(crate) u64);

impl Version {
    pub(crate) fn parse(text: &str) -> Option<Version> {
        let numbers = text.split(['-', '+']).next()?;
        let mut parts = numbers.split('.').map(str::parse::<u64>);
        let version = Version(parts.next()?.ok()?, parts.next()?.ok()?, parts.next()?.ok()?);
        parts.next().is_none().then_some(version)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// Every package that `Cargo.lock` names.
pub(crate) fn packages(tree: &Tree) -> Result<Vec<Package>> {
    let text = process::output(tree.cargo(&["metadata", "--format-version=1", "--locked"]))?;
    let metadata: Value = serde_json::from_str(&text).context("read the output of cargo metadata")?;
    let listed = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    listed.iter().map(package).collect()
}

fn package(value: &Value) -> Result<Package> {
    let name = value["name"].as_str().context("a package without name")?.to_owned();
    let version = value["version"].as_str().unwrap_or_default();
    let version = Version::parse(version).with_context(|| format!("{name} has version {version:?}"))?;
    let dependencies = value["dependencies"].as_array().with_context(|| format!("{name} lists no dependencies"))?;
    Ok(Package {
        licence: value["license"].as_str().unwrap_or_default().to_owned(),
        is_ours: value["source"].is_null(),
        dependencies: dependencies.iter().map(dependency).collect::<Result<_>>()?,
        name,
        version,
    })
}

fn dependency(value: &Value) -> Result<Dependency> {
    let name = value["name"].as_str().context("a dependency without name")?.to_owned();
    let kind = match value["kind"].as_str() {
        None => Kind::Normal,
        Some("dev") => Kind::Development,
        Some("build") => Kind::Build,
        Some(other) => anyhow::bail!("{name} is a dependency of unknown kind {other:?}"),
    };
    Ok(Dependency { name, kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        let parse = |text| Version::parse(text).unwrap();
        assert!(parse("0.4.9") < parse("0.4.18"));
        assert!(parse("0.103.13") < parse("0.104.0-alpha.1"));
        assert_eq!(parse("1.2.3+build"), Version(1, 2, 3));
        assert_eq!(Version::parse("1.2"), None);
    }
}
