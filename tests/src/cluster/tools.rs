//! The Go programs of a cluster, built once for all test runs into a cache outside the source tree.
//!
//! A directory of the cache is named after the version and the hash of the module files, so that a change of either builds
//! anew beside the old. Whoever builds holds a lock file; the others wait for it and then find everything there.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use super::Progress;
use super::shell;

/// Names the directory of the cache; without it the user's cache directory is taken.
pub const CACHE_VARIABLE: &str = "MESH_CLUSTER_CACHE";
/// The oldest Go that the module files ask for.
const OLDEST_GO: (u32, u32) = (1, 26);
/// Digits of the hash in the name of a directory: enough to tell a few versions apart.
const HASH_DIGITS: usize = 12;

/// One Go module of ours, and the programs that it pins.
#[derive(Debug, Clone, Copy)]
pub struct Tools {
    name: &'static str,
    /// The module whose version names the directory.
    module: &'static str,
    go_mod: &'static str,
    go_sum: &'static str,
    /// Program and package, in the order of building.
    programs: &'static [(&'static str, &'static str)],
    /// Variables of the programs that are set when they are linked, from the version.
    stamps: fn(&str) -> Vec<(&'static str, String)>,
}

/// Kubernetes and its store.
pub const KUBERNETES: Tools = Tools {
    name: "kubernetes",
    module: "k8s.io/kubernetes",
    go_mod: include_str!("../../cluster/kubernetes/go.mod"),
    go_sum: include_str!("../../cluster/kubernetes/go.sum"),
    programs: &[
        ("etcd", "go.etcd.io/etcd/server/v3"),
        ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
        ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
        ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
        ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
        ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
        ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
    ],
    stamps: kubernetes_stamps,
};

/// The cluster's DNS server.
pub const COREDNS: Tools = Tools {
    name: "coredns",
    module: "github.com/coredns/coredns",
    go_mod: include_str!("../../cluster/coredns/go.mod"),
    go_sum: include_str!("../../cluster/coredns/go.sum"),
    programs: &[("coredns", "github.com/coredns/coredns")],
    stamps: no_stamps,
};

/// The package manager.
pub const HELM: Tools = Tools {
    name: "helm",
    module: "helm.sh/helm/v3",
    go_mod: include_str!("../../cluster/helm/go.mod"),
    go_sum: include_str!("../../cluster/helm/go.sum"),
    programs: &[("helm", "helm.sh/helm/v3/cmd/helm")],
    stamps: helm_stamps,
};

impl Tools {
    /// The directory of the programs, which are built if they are not there.
    ///
    /// # Errors
    /// No Go is recent enough, or a program cannot be built.
    pub fn ready(&self, progress: Progress<'_>) -> Result<PathBuf> {
        let cache = cache_directory()?;
        let directory = cache.join(self.directory_name()?);
        if self.missing(&directory).is_empty() {
            return Ok(directory);
        }
        let go = go(&cache)?;
        fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
        let _held = lock(&directory.join(".lock"), progress)?;
        let missing = self.missing(&directory);
        if missing.is_empty() {
            return Ok(directory);
        }
        let source = directory.join(".source");
        fs::create_dir_all(&source).with_context(|| format!("create {}", source.display()))?;
        for (file, text) in [("go.mod", self.go_mod), ("go.sum", self.go_sum)] {
            let path = source.join(file);
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        for (number, (program, package)) in (1..).zip(&missing) {
            progress(&format!("building {program} ({number} of {} programs)", missing.len()));
            let started = Instant::now();
            self.build(&go, &source, package, &directory.join(program))?;
            progress(&format!("built {program} in {:.0} s", started.elapsed().as_secs_f64()));
        }
        Ok(directory)
    }

    /// One of the programs of [`Tools::ready`].
    ///
    /// # Errors
    /// As [`Tools::ready`].
    pub fn program(&self, name: &str, progress: Progress<'_>) -> Result<PathBuf> {
        ensure!(self.programs.iter().any(|(program, _)| *program == name), "{} has no program {name}", self.name);
        Ok(self.ready(progress)?.join(name))
    }

    fn missing(&self, directory: &Path) -> Vec<(&'static str, &'static str)> {
        self.programs.iter().filter(|(program, _)| !directory.join(program).is_file()).copied().collect()
    }

    fn directory_name(&self) -> Result<String> {
        let mut hash = Sha256::new();
        hash.update(self.go_mod);
        hash.update(self.go_sum);
        let hash = hex(&hash.finalize());
        Ok(format!("{}-{}-{}", self.name, self.version()?, &hash[..HASH_DIGITS]))
    }

    /// The version of the module, as its `require` line has it.
    pub fn version(&self) -> Result<&'static str> {
        let version = self.go_mod.lines().find_map(|line| {
            let mut words = line.split_whitespace().skip_while(|word| *word == "require");
            if words.next() == Some(self.module) { words.next() } else { None }.filter(|word| word.starts_with('v'))
        });
        version.with_context(|| format!("go.mod of {} requires no version of {}", self.name, self.module))
    }

    fn build(&self, go: &Path, source: &Path, package: &str, program: &Path) -> Result<()> {
        let mut linker = "-s -w".to_owned();
        for (variable, value) in (self.stamps)(self.version()?) {
            linker.push_str(&format!(" -X {variable}={value}"));
        }
        // A name of its own until it is whole: whoever finds the program may run it.
        let unfinished = program.with_extension("unfinished");
        let mut command = Command::new(go);
        command.current_dir(source).env("CGO_ENABLED", "0").env("GOFLAGS", "-mod=readonly -buildvcs=false");
        command.env("GOTOOLCHAIN", "local").env("GOWORK", "off");
        command.args(["build", "-trimpath", "-ldflags", &linker, "-o"]).arg(&unfinished).arg(package);
        shell::output(&mut command)?;
        fs::rename(&unfinished, program).with_context(|| format!("name {}", program.display()))
    }
}

/// Where programs are kept: `$MESH_CLUSTER_CACHE`, else `mesh-cluster` in the user's cache directory.
///
/// # Errors
/// The environment names no directory at all.
pub fn cache_directory() -> Result<PathBuf> {
    let given = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    given(CACHE_VARIABLE)
        .or_else(|| Some(given("XDG_CACHE_HOME")?.join("mesh-cluster")))
        .or_else(|| Some(given("HOME")?.join(".cache/mesh-cluster")))
        .with_context(|| format!("no cache directory: set {CACHE_VARIABLE} or HOME"))
}

/// A Go that is recent enough: that of `PATH`, else the one that `cargo xtask setup` put into the cache.
fn go(cache: &Path) -> Result<PathBuf> {
    let candidates = [PathBuf::from("go"), cache.join("go/bin/go")];
    let found = candidates.into_iter().find(|go| go_version(go).is_some_and(|version| version >= OLDEST_GO));
    let (major, minor) = OLDEST_GO;
    found.with_context(|| {
        format!("no Go of version {major}.{minor} or later on PATH: install it, or run `cargo xtask setup`")
    })
}

fn go_version(go: &Path) -> Option<(u32, u32)> {
    let output = Command::new(go).args(["env", "GOVERSION"]).env("GOTOOLCHAIN", "local").stderr(Stdio::null()).output();
    parse_go_version(&String::from_utf8(output.ok()?.stdout).ok()?)
}

/// `go1.26.8` and `go1.27rc1` are both of a series.
fn parse_go_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim().strip_prefix("go")?.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn lock(path: &Path, progress: Progress<'_>) -> Result<Flock<File>> {
    let open = || {
        let file = File::options().create(true).truncate(false).write(true).open(path);
        file.with_context(|| format!("open {}", path.display()))
    };
    match Flock::lock(open()?, FlockArg::LockExclusiveNonblock) {
        Ok(held) => Ok(held),
        Err((file, nix::Error::EWOULDBLOCK)) => {
            progress(&format!("waiting for another build (it holds {})", path.display()));
            match Flock::lock(file, FlockArg::LockExclusive) {
                Ok(held) => Ok(held),
                Err((_, error)) => bail!("lock {}: {error}", path.display()),
            }
        }
        Err((_, error)) => bail!("lock {}: {error}", path.display()),
    }
}

/// As lower-case digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn kubernetes_stamps(version: &str) -> Vec<(&'static str, String)> {
    vec![
        ("k8s.io/component-base/version.gitVersion", version.to_owned()),
        ("k8s.io/component-base/version.gitMajor", "1".to_owned()),
        ("k8s.io/component-base/version.gitMinor", version.split('.').nth(1).unwrap_or_default().to_owned()),
    ]
}

fn helm_stamps(version: &str) -> Vec<(&'static str, String)> {
    vec![("helm.sh/helm/v3/internal/version.version", version.to_owned())]
}

fn no_stamps(_version: &str) -> Vec<(&'static str, String)> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_those_of_the_module_files() {
        for tools in [KUBERNETES, COREDNS, HELM] {
            let version = tools.version().unwrap();
            assert!(version.starts_with("v1.") || version.starts_with("v3."), "{version}");
            assert!(tools.directory_name().unwrap().starts_with(&format!("{}-{version}-", tools.name)));
        }
    }

    #[test]
    fn go_versions_compare_by_number() {
        assert_eq!(parse_go_version("go1.26.8\n"), Some((1, 26)));
        assert_eq!(parse_go_version("go1.27rc1"), Some((1, 27)));
        assert_eq!(parse_go_version("devel"), None);
        assert!(parse_go_version("go1.9") < parse_go_version("go1.19"));
    }
}
