//! Installs what the build, the tests and the sandbox need: Debian or Ubuntu packages, rustup components, bpf-linker, Go.
//!
//! Each part is looked for by what it brings (a program, a source tree), not by its package, so that another
//! distribution or a hand-made installation is fine too. Services that packages bring are neither started nor enabled.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{ebpf, process};

mod go;

/// The version that the kernel programs are linked and tested with.
const BPF_LINKER: &str = "0.10.3";
/// Its LLVM; the compiler of the kernel programs must not be newer.
const BPF_LINKER_FEATURES: &str = "llvm-22,rust-llvm-22";

/// Something that must be on the machine.
struct Part {
    name: &'static str,
    why: &'static str,
    probe: Probe,
    source: Source,
}

/// How to see that a part is there.
enum Probe {
    Program,
    Custom(fn() -> bool),
}

/// Where a missing part comes from.
enum Source {
    /// Debian packages, and the system services among them that must stay off.
    Packages {
        names: &'static [&'static str],
        services: &'static [&'static str],
    },
    RustupComponents(&'static [&'static str]),
    BpfLinker,
    GoToolchain,
}

const fn program(name: &'static str, why: &'static str, packages: &'static [&'static str]) -> Part {
    Part { name, why, probe: Probe::Program, source: Source::Packages { names: packages, services: &[] } }
}

/// In the order of installation: bpf-linker is compiled, so the compiler comes first.
const PARTS: [Part; 28] = [
    program("cc", "links every crate and compiles the cryptography", &["gcc", "libc6-dev"]),
    program("make", "compiles the node proxy's allocator", &["make"]),
    program("git", "tells tidy which files are ours", &["git"]),
    program("ip", "a look into the sandbox's network namespaces", &["iproute2"]),
    program("curl", "a real HTTP client for tests and sandbox", &["curl"]),
    Part {
        name: "nginx",
        why: "a real web server for the tests",
        probe: Probe::Program,
        source: Source::Packages { names: &["nginx-light"], services: &["nginx.service"] },
    },
    Part {
        name: "redis-server",
        why: "a real store for the tests",
        probe: Probe::Program,
        source: Source::Packages { names: &["redis-server"], services: &["redis-server.service"] },
    },
    program("redis-cli", "its client", &["redis-tools"]),
    Part {
        name: "postgres",
        why: "a real database for the tests, with TLS inside TCP",
        probe: Probe::Custom(has_postgres),
        source: Source::Packages { names: &["postgresql"], services: &["postgresql.service"] },
    },
    program("psql", "its client", &["postgresql-client"]),
    Part {
        name: "iperf3",
        why: "bulk transfer for the tests",
        probe: Probe::Program,
        source: Source::Packages { names: &["iperf3"], services: &["iperf3.service"] },
    },
    Part {
        name: "sshd",
        why: "a real server that speaks first, for the tests",
        probe: Probe::Program,
        source: Source::Packages { names: &["openssh-server"], services: &["ssh.service"] },
    },
    program("ssh", "its client", &["openssh-client"]),
    Part {
        name: "vsftpd",
        why: "a real server with data connections both ways, for the tests",
        probe: Probe::Program,
        source: Source::Packages { names: &["vsftpd"], services: &["vsftpd.service"] },
    },
    program("tcpdump", "reads the wire in the tests", &["tcpdump"]),
    program("openssl", "makes certificates for the tests", &["openssl"]),
    program("qemu-system-x86_64", "boots other kernels for the capture tests", &["qemu-system-x86"]),
    program("busybox", "is all that runs on those kernels beside the tests", &["busybox-static"]),
    program("cpio", "packs what they boot from", &["cpio"]),
    Part {
        name: "containerd",
        why: "runs the pods of the Kubernetes test cluster",
        probe: Probe::Program,
        source: Source::Packages { names: &["containerd"], services: &["containerd.service"] },
    },
    program("runc", "makes their containers", &["runc"]),
    Part {
        name: "CNI plugins",
        why: "connect them",
        probe: Probe::Custom(has_cni_plugins),
        source: Source::Packages { names: &["containernetworking-plugins"], services: &[] },
    },
    program("iptables", "opens ports of nodes to them", &["iptables"]),
    program("nft", "is how kube-proxy spreads connections", &["nftables"]),
    Part {
        name: "go",
        why: "compiles the programs of that cluster",
        probe: Probe::Custom(go::is_present),
        source: Source::GoToolchain,
    },
    Part {
        name: "clippy and rustfmt",
        why: "the first checks of `cargo xtask test`",
        probe: Probe::Custom(has_lints),
        source: Source::RustupComponents(&["clippy", "rustfmt"]),
    },
    Part {
        name: "rust-src",
        why: "core is compiled anew for the kernel's machine",
        probe: Probe::Custom(ebpf::has_compiler),
        source: Source::Packages { names: &["rustc-web", "rust-web-src"], services: &[] },
    },
    Part {
        name: "bpf-linker",
        why: "links the kernel programs",
        probe: Probe::Custom(has_bpf_linker),
        source: Source::BpfLinker,
    },
];

impl Part {
    fn is_present(&self) -> bool {
        match self.probe {
            Probe::Program => process::find(self.name).is_some(),
            Probe::Custom(probe) => probe(),
        }
    }

    /// The command that installs it.
    fn command(&self) -> String {
        match &self.source {
            Source::Packages { names, .. } => format!("apt-get install {}", names.join(" ")),
            Source::RustupComponents(components) => format!("rustup component add {}", components.join(" ")),
            Source::BpfLinker => format!("cargo install {}", bpf_linker_arguments().join(" ")),
            Source::GoToolchain => go::description(),
        }
    }
}

fn has_postgres() -> bool {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    process::find("postgres").is_some()
        || versions.into_iter().any(|version| version.path().join("bin/postgres").is_file())
}

fn has_cni_plugins() -> bool {
    ["bridge", "host-local", "loopback", "portmap"]
        .iter()
        .all(|plugin| Path::new("/usr/lib/cni").join(plugin).is_file())
}

fn has_lints() -> bool {
    process::succeeds("cargo", &["clippy", "--version"]) && process::succeeds("cargo", &["fmt", "--version"])
}

fn has_bpf_linker() -> bool {
    process::succeeds("bpf-linker", &["--version"])
}

fn bpf_linker_arguments() -> [String; 5] {
    [
        "bpf-linker".to_owned(),
        format!("--version={BPF_LINKER}"),
        "--locked".to_owned(),
        "--no-default-features".to_owned(),
        format!("--features={BPF_LINKER_FEATURES}"),
    ]
}

/// Names what is missing; the exit code is 1 if anything is.
pub(crate) fn check() -> ExitCode {
    let missing = missing();
    print_missing(&missing);
    if missing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Installs what is missing, or says what to type where we may not.
pub(crate) fn install() -> Result<()> {
    let missing = missing();
    if missing.is_empty() {
        return Ok(());
    }
    print_missing(&missing);
    let started = Instant::now();
    install_packages(&missing)?;
    for part in &missing {
        let mut command = match &part.source {
            Source::Packages { .. } => continue,
            Source::RustupComponents(components) => {
                let mut command = Command::new("rustup");
                command.args(["component", "add"]).args(*components);
                command
            }
            Source::BpfLinker => {
                let mut command = Command::new("cargo");
                command.arg("install").args(bpf_linker_arguments());
                command
            }
            Source::GoToolchain => {
                println!("setup: {}", part.command());
                go::install()?;
                continue;
            }
        };
        println!("setup: {} (this takes about a minute)", part.command());
        command.env_remove("CARGO_TARGET_DIR");
        process::run(command)?;
    }
    let still: Vec<&str> = missing.iter().filter(|part| !part.is_present()).map(|part| part.name).collect();
    if !still.is_empty() {
        bail!("still missing after installation: {}; is PATH complete?", still.join(", "));
    }
    println!("setup: done in {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

fn missing() -> Vec<&'static Part> {
    PARTS.iter().filter(|part| !part.is_present()).collect()
}

fn print_missing(missing: &[&Part]) {
    if missing.is_empty() {
        println!("setup: nothing is missing");
        return;
    }
    println!("setup: {} of {} parts are missing", missing.len(), PARTS.len());
    for part in missing {
        println!("  {:<20} {:<55} {}", part.name, part.why, part.command());
    }
}

fn install_packages(missing: &[&Part]) -> Result<()> {
    let mut packages = BTreeSet::new();
    let mut services = BTreeSet::new();
    for part in missing {
        if let Source::Packages { names, services: off } = &part.source {
            packages.extend(names.iter().copied());
            services.extend(off.iter().copied());
        }
    }
    if packages.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = packages.into_iter().collect();
    let by_hand = format!("apt-get update && apt-get install --no-install-recommends {}", packages.join(" "));
    if process::find("apt-get").is_none() {
        bail!("this is not Debian or Ubuntu: install what is listed above by your own package manager");
    }
    if !is_root()? {
        bail!("root is needed to install packages; type: sudo sh -c '{by_hand}'");
    }
    println!("setup: {by_hand}");
    process::run(apt_get(&["update"]))?;
    let guard = ServicesStayOff::engage()?;
    let mut command = apt_get(&["install", "--yes", "--no-install-recommends"]);
    command.args(&packages);
    process::run(command)?;
    drop(guard);
    disable(&services)
}

fn apt_get(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").arg("--quiet=2").args(arguments);
    command
}

fn is_root() -> Result<bool> {
    let mut command = Command::new("id");
    command.arg("-u");
    Ok(process::output(command)?.trim() == "0")
}

/// While it lives, packages do not start their services: Debian asks this file before each start.
struct ServicesStayOff {
    ours: bool,
}

impl ServicesStayOff {
    const POLICY: &str = "/usr/sbin/policy-rc.d";

    fn engage() -> Result<ServicesStayOff> {
        if Path::new(Self::POLICY).exists() {
            return Ok(ServicesStayOff { ours: false });
        }
        fs::write(Self::POLICY, "#!/bin/sh\nexit 101\n").with_context(|| format!("write {}", Self::POLICY))?;
        let guard = ServicesStayOff { ours: true };
        let mut chmod = Command::new("chmod");
        chmod.args(["755", Self::POLICY]);
        process::run(chmod)?;
        Ok(guard)
    }
}

impl Drop for ServicesStayOff {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(Self::POLICY)
        {
            eprintln!("remove {}: {error}; while it is there no package starts its service", Self::POLICY);
        }
    }
}

/// Keeps the services that came with the packages from starting at the next boot.
fn disable(services: &BTreeSet<&str>) -> Result<()> {
    // Without systemd nothing starts them.
    if process::find("systemctl").is_none() {
        return Ok(());
    }
    for service in services {
        let mut command = Command::new("systemctl");
        command.args(["--quiet", "disable", service]);
        process::run(command)?;
    }
    Ok(())
}
