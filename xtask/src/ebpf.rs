//! `cargo xtask ebpf`: builds the kernel programs to `<target>/bpf/mesh-ebpf.o`.
//!
//! Needs a compiler that may build `core` itself: a rustup nightly with `rust-src`, else Debian's `rustc-web` with
//! `rust-web-src`; and `bpf-linker`.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::tree::Tree;

/// Version of `bpf-linker` that goes with the toolchains' LLVM.
const LINKER_INSTALL: &str =
    "cargo install bpf-linker --version 0.10.3 --no-default-features --features llvm-22,rust-llvm-22";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// Oldest Debian compiler that was tried; the stable `rustc` package of Debian 12 (1.63) is too old.
const DEBIAN_RUSTC_MINOR: u32 = 95;
const TARGET: &str = "bpfel-unknown-none";
/// Options of the compiler, separated as `CARGO_ENCODED_RUSTFLAGS` wants it.
const RUSTFLAGS: &str = "-Clinker=bpf-linker\u{1f}-Clink-arg=--btf";

/// A compiler that can build `core` for the kernel.
enum Toolchain {
    /// `cargo +nightly` with `rust-src`.
    Nightly,
    /// Debian's `rustc-web`, told that it is a nightly.
    Debian,
}

/// Builds the object and returns its path. A missing part is named with the command that installs it.
pub(crate) fn build(tree: &Tree) -> Result<PathBuf> {
    require_linker()?;
    let toolchain = toolchain()?;
    let build_dir = tree.target.join("bpf-build");
    let mut cargo = match toolchain {
        Toolchain::Nightly => rustup_cargo("nightly"),
        Toolchain::Debian => debian_cargo(),
    };
    cargo
        .current_dir(&tree.root)
        .args(["build", "--package", "mesh-ebpf", "--profile", "bpf", "--target", TARGET, "-Z", "build-std=core"])
        .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS)
        .env("CARGO_TARGET_DIR", &build_dir)
        // What cargo set for this very process belongs to another toolchain.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET");
    let status = cargo.status().context("start cargo for the kernel programs")?;
    if !status.success() {
        bail!("the kernel programs do not build ({status})");
    }
    let built = build_dir.join(TARGET).join("bpf").join("mesh-ebpf");
    let object = tree.target.join("bpf").join("mesh-ebpf.o");
    install(&built, &object)?;
    Ok(object)
}

/// Replaces the object only if it changed, so that `mesh-node` is not built again for nothing.
fn install(built: &Path, object: &Path) -> Result<()> {
    let bytes = fs::read(built).with_context(|| format!("read {}", built.display()))?;
    if fs::read(object).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let dir = object.parent().context("the object's path has no directory")?;
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let temporary = object.with_extension("o.new");
    fs::write(&temporary, bytes).with_context(|| format!("write {}", temporary.display()))?;
    fs::rename(&temporary, object).with_context(|| format!("replace {}", object.display()))
}

fn require_linker() -> Result<()> {
    match Command::new("bpf-linker").arg("--version").output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(_) | Err(_) => bail!("bpf-linker is missing; install it with: {LINKER_INSTALL}"),
    }
}

/// Whether there is a compiler for the kernel programs.
pub(crate) fn has_compiler() -> bool {
    toolchain().is_ok()
}

fn toolchain() -> Result<Toolchain> {
    if let Some(sysroot) = stdout(rustup_rustc("nightly").args(["--print", "sysroot"]))
        && has_core_source(Path::new(&sysroot))
    {
        return Ok(Toolchain::Nightly);
    }
    if let Some(version) = stdout(Command::new(DEBIAN_RUSTC).arg("--version"))
        && minor_version(&version).is_some_and(|minor| minor >= DEBIAN_RUSTC_MINOR)
        && let Some(sysroot) = stdout(Command::new(DEBIAN_RUSTC).args(["--print", "sysroot"]))
        && has_core_source(Path::new(&sysroot))
    {
        return Ok(Toolchain::Debian);
    }
    bail!(
        "no compiler can build the kernel programs; install one with: \
         rustup toolchain install nightly --component rust-src   or, on Debian (with its security updates): apt-get install rustc-web rust-web-src"
    )
}

fn has_core_source(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists()
}

/// `rustc 1.96.0 (...)` -> 96
fn minor_version(version: &str) -> Option<u32> {
    version.strip_prefix("rustc 1.")?.split('.').next()?.parse().ok()
}

fn stdout(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn rustup_rustc(toolchain: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", toolchain, "rustc"]);
    command
}

fn rustup_cargo(toolchain: &str) -> Command {
    let mut command = Command::new("rustup");
    // The variables of the cargo that started this program would win over the toolchain named here.
    command.args(["run", toolchain, "cargo"]).env_remove("RUSTC").env_remove("RUSTDOC").env_remove("CARGO");
    command
}

fn debian_cargo() -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
    command
}

#[cfg(test)]
mod tests {
    use super::minor_version;

    #[test]
    fn the_compilers_version_is_understood() {
        assert_eq!(minor_version("rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)"), Some(96));
        assert_eq!(minor_version("rustc 1.63.0"), Some(63));
        assert_eq!(minor_version("clang 14"), None);
    }
}
