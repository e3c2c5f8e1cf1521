//! Debian's kernels as files: downloaded and unpacked below the build directory, never installed.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;
use crate::tree::Tree;

/// A kernel that can be booted.
pub(crate) struct Kernel {
    /// The package that it came from.
    pub(crate) package: String,
    /// The compressed image.
    pub(crate) image: PathBuf,
    /// Every module, by name with `_` for `-`.
    modules: Vec<(String, PathBuf)>,
}

impl Kernel {
    /// The newest kernel of a series such as `6.1` that this machine's package sources have.
    pub(crate) fn of_series(tree: &Tree, series: &str) -> Result<Kernel> {
        let package = match newest(series)? {
            Some(package) => package,
            None => {
                process::run(apt("apt-get", &["--quiet=2", "update"]))?;
                newest(series)?.with_context(|| {
                    format!("no package linux-image-{series}*-cloud-amd64: this needs the package sources of Debian 12")
                })?
            }
        };
        let directory = tree.target.join("kernels").join(&package);
        if !directory.join("boot").is_dir() {
            unpack(&package, &directory)?;
        }
        let image = only_file(&directory.join("boot"), "vmlinuz-")?;
        let mut modules = Vec::new();
        find_modules(&directory.join("lib/modules"), &mut modules)?;
        Ok(Kernel { package, image, modules })
    }

    /// The module and all that it needs, in the order of loading; empty if it is built in.
    pub(crate) fn module_and_needs(&self, name: &str, loaded: &mut Vec<String>) -> Result<Vec<(String, Vec<u8>)>> {
        if loaded.iter().any(|other| other == name) {
            return Ok(Vec::new());
        }
        loaded.push(name.to_owned());
        let Some((_, file)) = self.modules.iter().find(|(module, _)| module == name) else { return Ok(Vec::new()) };
        let bytes = read_module(file)?;
        let mut ordered = Vec::new();
        for needed in needs(&bytes) {
            ordered.extend(self.module_and_needs(&needed, loaded)?);
        }
        ordered.push((name.to_owned(), bytes));
        Ok(ordered)
    }
}

/// apt's tools in a language whose words do not change.
fn apt(tool: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(tool);
    command.env("LC_ALL", "C").args(arguments);
    command
}

/// The newest signed kernel for virtual machines of the series.
fn newest(series: &str) -> Result<Option<String>> {
    let prefix = format!("linux-image-{series}.");
    let names = process::output(apt("apt-cache", &["pkgnames", &prefix]))?;
    let names = names.lines().filter(|name| name.ends_with("-cloud-amd64"));
    Ok(names.max_by_key(|name| numbers(name)).map(str::to_owned))
}

/// The numbers in a name: `6.1.0-9` comes before `6.1.0-56`.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

fn unpack(package: &str, directory: &Path) -> Result<()> {
    let download = directory.with_extension("download");
    if download.exists() {
        fs::remove_dir_all(&download).with_context(|| format!("remove {}", download.display()))?;
    }
    fs::create_dir_all(&download).with_context(|| format!("create {}", download.display()))?;
    let mut command = apt("apt-get", &["--quiet=2", "-o", "APT::Sandbox::User=root", "download", package]);
    command.current_dir(&download);
    if process::run(command).is_err() {
        // The list of packages may be older than what the source still has.
        process::run(apt("apt-get", &["--quiet=2", "update"]))?;
        let mut again = apt("apt-get", &["--quiet=2", "-o", "APT::Sandbox::User=root", "download", package]);
        again.current_dir(&download);
        process::run(again)?;
    }
    let archive = only_file(&download, "linux-image-")?;
    let unpacked = download.join("unpacked");
    let mut command = Command::new("dpkg-deb");
    command.arg("--extract").arg(&archive).arg(&unpacked);
    process::run(command)?;
    fs::rename(&unpacked, directory).with_context(|| format!("rename to {}", directory.display()))?;
    fs::remove_dir_all(&download).with_context(|| format!("remove {}", download.display()))
}

fn only_file(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))?;
    let named = |name: &OsStr| name.to_str().is_some_and(|name| name.starts_with(prefix));
    let mut files = entries.flatten().filter(|entry| named(&entry.file_name())).map(|entry| entry.path());
    match (files.next(), files.next()) {
        (Some(file), None) => Ok(file),
        (None, _) => bail!("no {prefix}* in {}", directory.display()),
        (Some(_), Some(_)) => bail!("more than one {prefix}* in {}", directory.display()),
    }
}

fn find_modules(directory: &Path, modules: &mut Vec<(String, PathBuf)>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find_modules(&entry.path(), modules)?;
        } else if let Some((name, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
            modules.push((name.replace('-', "_"), entry.path()));
        }
    }
    Ok(())
}

fn read_module(file: &Path) -> Result<Vec<u8>> {
    if file.extension() != Some(OsStr::new("xz")) {
        return fs::read(file).with_context(|| format!("read {}", file.display()));
    }
    let output = Command::new("xz").arg("--decompress").arg("--stdout").arg(file).output().context("start xz")?;
    if !output.status.success() {
        bail!("xz {}: {}", file.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

/// The modules that the module's own record names: `depends=a,b`, between zero bytes.
fn needs(module: &[u8]) -> Vec<String> {
    let entry = module.split(|&byte| byte == 0).find_map(|text| text.strip_prefix(b"depends="));
    let names = String::from_utf8_lossy(entry.unwrap_or_default()).replace('-', "_");
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_their_numbers() {
        let [old, new] = ["linux-image-6.1.0-9-cloud-amd64", "linux-image-6.1.0-56-cloud-amd64"].map(numbers);
        assert!(old < new);
    }

    #[test]
    fn a_modules_needs_are_read_from_its_record() {
        assert_eq!(needs(b"\x7fELF\0license=GPL\0depends=stp,llc-x\0name=bridge\0"), ["stp", "llc_x"]);
        assert!(needs(b"\0depends=\0").is_empty());
    }
}
