//! A Go toolchain for the programs of the Kubernetes test cluster: that of `PATH` if it is recent enough, else one from the
//! Go module proxy, in the cache of the cluster's programs. Debian's own is older than what Kubernetes asks for.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process;

/// The oldest series that the module files of `tests/cluster` ask for.
const OLDEST: (u32, u32) = (1, 26);
/// The module that is a toolchain.
const VERSION: &str = "v0.0.1-go1.26.8.linux-amd64";
/// SHA-256 of its archive: what comes from a proxy is run as root.
const DIGEST: &str = "30c2b1bf7dcc88d3eb0a1364e47ddd9128edb3110a30e8a0ef61cd5856b31de7";
/// Asked if the environment names no other.
const PROXY: &str = "https://proxy.golang.org";

/// What `setup` shows as the way to get it.
pub(super) fn description() -> String {
    format!("download golang.org/toolchain {VERSION} from a Go module proxy")
}

/// Whether a Go of `PATH` or of the cache is recent enough.
pub(super) fn is_present() -> bool {
    let cached = cache().ok().map(|cache| cache.join("go/bin/go"));
    [Some(PathBuf::from("go")), cached]
        .into_iter()
        .flatten()
        .any(|go| version(&go).is_some_and(|found| found >= OLDEST))
}

/// Puts the toolchain into the cache.
pub(super) fn install() -> Result<()> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        bail!("no toolchain is known for this kind of machine: install Go {}.{} or later", OLDEST.0, OLDEST.1);
    }
    let cache = cache()?;
    // Whole or not at all: it gets its name when it is complete.
    let unfinished = cache.join("go.unfinished");
    let archive = unfinished.join("go.zip");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).with_context(|| format!("remove {}", unfinished.display()))?;
    }
    fs::create_dir_all(&unfinished).with_context(|| format!("create {}", unfinished.display()))?;
    download(&archive)?;
    let mut sum = Command::new("sha256sum");
    sum.arg(&archive);
    let found = process::output(sum)?;
    if !found.starts_with(DIGEST) {
        bail!("{} is not what it should be: SHA-256 {}", archive.display(), found.trim());
    }
    let mut unzip = Command::new("busybox");
    unzip.args(["unzip", "-q", "-o"]).arg(&archive).arg("-d").arg(&unfinished);
    process::run(unzip)?;
    let root = unfinished.join(format!("golang.org/toolchain@{VERSION}"));
    executable(&root)?;
    let target = cache.join("go");
    if target.exists() {
        fs::remove_dir_all(&target).with_context(|| format!("remove {}", target.display()))?;
    }
    fs::rename(&root, &target).with_context(|| format!("name {}", target.display()))?;
    fs::remove_dir_all(&unfinished).with_context(|| format!("remove {}", unfinished.display()))
}

fn download(archive: &Path) -> Result<()> {
    let list = env::var("GOPROXY").unwrap_or_default();
    let mut failed = None;
    for proxy in proxies(&list) {
        let url = format!("{}/golang.org/toolchain/@v/{VERSION}.zip", proxy.trim_end_matches('/'));
        let mut curl = Command::new("curl");
        curl.args(["--fail", "--silent", "--show-error", "--location", "--output"]).arg(archive).arg(&url);
        match process::run(curl) {
            Ok(()) => return Ok(()),
            Err(error) => failed = Some(error),
        }
    }
    Err(failed.unwrap_or_else(|| anyhow::anyhow!("GOPROXY={list} names no proxy: install Go by hand")))
}

/// The proxies of a GOPROXY list. `direct` means version control, which has no toolchains, and `off` nothing at all.
fn proxies(list: &str) -> Vec<&str> {
    let named: Vec<&str> = list.split([',', '|']).map(str::trim).filter(|word| !word.is_empty()).collect();
    if named.is_empty() {
        return vec![PROXY];
    }
    named.into_iter().filter(|word| !["direct", "off"].contains(word)).collect()
}

/// Archives of modules have no modes that can be relied on.
fn executable(root: &Path) -> Result<()> {
    for directory in ["bin", "pkg/tool/linux_amd64"] {
        let path = root.join(directory);
        let entries = fs::read_dir(&path).with_context(|| format!("list {}", path.display()))?;
        let mut chmod = Command::new("chmod");
        chmod.arg("755").args(entries.flatten().map(|entry| entry.path()));
        process::run(chmod)?;
    }
    Ok(())
}

/// As `mesh_tests::cluster::tools` has it: what is put here is looked for there.
fn cache() -> Result<PathBuf> {
    let given = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    given("MESH_CLUSTER_CACHE")
        .or_else(|| Some(given("XDG_CACHE_HOME")?.join("mesh-cluster")))
        .or_else(|| Some(given("HOME")?.join(".cache/mesh-cluster")))
        .context("no cache directory: set MESH_CLUSTER_CACHE or HOME")
}

fn version(go: &Path) -> Option<(u32, u32)> {
    let mut command = Command::new(go);
    command.args(["env", "GOVERSION"]).env("GOTOOLCHAIN", "local").stdin(Stdio::null()).stderr(Stdio::null());
    parse_version(&String::from_utf8(command.output().ok()?.stdout).ok()?)
}

/// `go1.26.8` and `go1.27rc1` are both of a series.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim().strip_prefix("go")?.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxies_are_taken_from_the_environment_first() {
        assert_eq!(proxies(""), [PROXY]);
        assert_eq!(proxies("https://a.example,https://b.example|direct"), ["https://a.example", "https://b.example"]);
        assert!(proxies("off").is_empty());
    }

    #[test]
    fn versions_compare_by_number() {
        assert!(parse_version("go1.19.8\n") < Some(OLDEST));
        assert_eq!(parse_version("go1.27rc1"), Some((1, 27)));
    }
}
