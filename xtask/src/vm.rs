//! Tier 4: the capture tests on other kernels. A machine in software boots the kernel with a file system in memory that holds
//! busybox, the modules, and the test programs with their libraries; its first process runs the tests and powers off.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cargo_test;
use crate::kernel::Kernel;
use crate::process::{self, End};
use crate::stages::Tally;
use crate::tree::Tree;

/// The kernel of Debian 12: the oldest that is supported.
pub(crate) const OLDEST: &str = "6.1";
/// The next long-term kernel.
pub(crate) const NEXT: &str = "6.12";

/// Boot and tests of one kernel. It is emulated, some ten times slower than the machine itself, also where there is `/dev/kvm`:
/// inside another virtual machine that may be there and fail.
const LIMIT: Duration = Duration::from_secs(10 * 60);
/// Test programs of this name are about the kernel and need nothing else.
const SUITE: &str = "capture";
/// What the tests use and Debian builds as modules.
const MODULES: [&str; 9] =
    ["veth", "bridge", "dummy", "sch_ingress", "cls_bpf", "act_bpf", "inet_diag", "tcp_diag", "af_packet_diag"];
/// What tests call beside busybox.
const PROGRAMS: [&str; 2] = ["ip", "tc"];
/// The last line of the machine, before the exit code.
const EXIT_MARK: &str = "machine: tests ended with ";
const MEMORY_MIB: &str = "2048";
const CPUS: &str = "2";

/// Boots the newest kernel of the series and runs the suite in it.
pub(crate) fn run(tree: &Tree, series: &str, filter: Option<&str>) -> Result<Tally> {
    let kernel = Kernel::of_series(tree, series)?;
    let tests = test_programs(tree)?;
    if tests.is_empty() {
        bail!("mesh-tests has no test program whose name begins with {SUITE}");
    }
    let directory = tree.target.join("machine").join(series);
    let root = directory.join("root");
    make_root(&root, &kernel, &tests, filter)?;
    let archive = directory.join("initramfs.cpio");
    pack(&root, &archive)?;
    println!("booting {}", kernel.package);
    boot(&kernel, &archive, &directory.join("console.log"))
}

/// Builds the suite and returns its programs.
fn test_programs(tree: &Tree) -> Result<Vec<PathBuf>> {
    let mut command = tree.cargo(&[
        "test",
        "--locked",
        "--no-run",
        "--package=mesh-tests",
        "--message-format=json-render-diagnostics",
    ]);
    command.stderr(Stdio::inherit());
    let messages = process::output(command)?;
    let mut programs = Vec::new();
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line).context("read a message of cargo")?;
        let name = message["target"]["name"].as_str().unwrap_or_default();
        if let Some(program) = message["executable"].as_str().filter(|_| name.starts_with(SUITE)) {
            programs.push(PathBuf::from(program));
        }
    }
    Ok(programs)
}

/// Lays out the machine's file system.
fn make_root(root: &Path, kernel: &Kernel, tests: &[PathBuf], filter: Option<&str>) -> Result<()> {
    if root.exists() {
        fs::remove_dir_all(root).with_context(|| format!("remove {}", root.display()))?;
    }
    for directory in ["bin", "dev", "lib", "lib64", "mesh/deps", "modules", "proc", "run", "sbin", "sys", "tmp"] {
        fs::create_dir_all(root.join(directory)).with_context(|| format!("create {directory} of the machine"))?;
    }
    let mut libraries = BTreeSet::new();
    let busybox = process::find("busybox").context("busybox is missing: cargo xtask setup")?;
    install(&busybox, &root.join("bin/busybox"), &mut libraries)?;
    for name in PROGRAMS {
        let program = process::find(name).with_context(|| format!("{name} is missing: cargo xtask setup"))?;
        install(&program, &root.join("sbin").join(name), &mut libraries)?;
    }
    for test in tests {
        let name = test.file_name().context("a test program has a name")?;
        let inside = root.join("mesh/deps").join(name);
        install(test, &inside, &mut libraries)?;
        let mut strip = Command::new("strip");
        strip.arg("--strip-debug").arg(&inside);
        process::run(strip)?;
    }
    for library in libraries {
        let inside = root.join(library.strip_prefix("/").unwrap_or(&library));
        fs::create_dir_all(inside.parent().context("a library lies in a directory")?)?;
        fs::copy(&library, &inside).with_context(|| format!("copy {}", library.display()))?;
    }
    let modules = install_modules(root, kernel)?;
    let init = root.join("init");
    fs::write(&init, first_process(&modules, filter)).context("write the machine's first process")?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).context("make it executable")?;
    symlink("busybox", root.join("bin/sh")).context("link the machine's shell")
}

/// Copies a program and notes the libraries that it needs.
fn install(program: &Path, inside: &Path, libraries: &mut BTreeSet<PathBuf>) -> Result<()> {
    fs::copy(program, inside).with_context(|| format!("copy {}", program.display()))?;
    let listed = Command::new("ldd").arg(program).output().context("start ldd")?;
    // A static program has none; ldd says so by its exit code.
    if listed.status.success() {
        let text = String::from_utf8_lossy(&listed.stdout).into_owned();
        libraries.extend(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from));
    }
    Ok(())
}

/// Copies the modules and returns their names in the order of loading.
fn install_modules(root: &Path, kernel: &Kernel) -> Result<Vec<String>> {
    let mut seen = Vec::new();
    let mut names = Vec::new();
    for module in MODULES {
        for (name, bytes) in kernel.module_and_needs(module, &mut seen)? {
            fs::write(root.join("modules").join(&name), bytes).with_context(|| format!("write module {name}"))?;
            names.push(name);
        }
    }
    Ok(names)
}

/// The script that is the machine's process 1. The kernel's messages stay on the first serial line, the tests' output
/// has the second to itself.
fn first_process(modules: &[String], filter: Option<&str>) -> String {
    let modules = modules.join(" ");
    let filter = filter.map_or_else(String::new, |filter| format!("'{}'", filter.replace('\'', "'\\''")));
    format!(
        r#"#!/bin/sh
/bin/busybox --install -s /bin
export PATH=/sbin:/bin HOME=/ RUST_BACKTRACE=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
for module in {modules}; do insmod /modules/$module || echo "machine: no module $module"; done
ip link set lo up
exec >/dev/ttyS1 2>&1
echo "machine: Linux $(uname -r), up $(cut -d' ' -f1 /proc/uptime) s"
code=0
for tests in /mesh/deps/*; do
  $tests --test-threads={CPUS} {filter} || code=1
done
echo "{EXIT_MARK}$code"
# Closing the line waits until it is sent.
exec >/dev/console 2>&1
poweroff -f
"#
    )
}

/// Packs the directory as the kernel wants it.
fn pack(root: &Path, archive: &Path) -> Result<()> {
    let file = fs::File::create(archive).with_context(|| format!("create {}", archive.display()))?;
    let mut names = String::new();
    list(root, Path::new("."), &mut names)?;
    let mut cpio = Command::new("cpio");
    cpio.current_dir(root).args(["--create", "--quiet", "--format=newc"]).stdin(Stdio::piped()).stdout(file);
    let mut child = cpio.spawn().context("start cpio: cargo xtask setup installs it")?;
    child.stdin.take().context("its input was asked for")?.write_all(names.as_bytes()).context("write to cpio")?;
    let status = child.wait().context("wait for cpio")?;
    if !status.success() {
        bail!("cpio failed: {status}");
    }
    Ok(())
}

/// Every path below the root, one a line, directories before what is in them.
fn list(root: &Path, below: &Path, names: &mut String) -> Result<()> {
    for entry in fs::read_dir(root.join(below)).with_context(|| format!("read {}", below.display()))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        names.push_str(&path.to_string_lossy());
        names.push('\n');
        if entry.file_type()?.is_dir() {
            list(root, &path, names)?;
        }
    }
    Ok(())
}

/// Runs the machine to its end and counts the tests.
fn boot(kernel: &Kernel, archive: &Path, console: &Path) -> Result<Tally> {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", CPUS, "-m", MEMORY_MIB]);
    qemu.args(["-display", "none", "-nodefaults", "-no-reboot"]);
    qemu.arg("-serial").arg(format!("file:{}", console.display())).args(["-serial", "stdio"]);
    qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(archive);
    qemu.args(["-append", "console=ttyS0 panic=-1 loglevel=4 random.trust_cpu=on"]);
    let mut tally = Tally::default();
    let mut exit_code = None;
    let end = process::watch(qemu, LIMIT, |line| {
        let line = line.trim_end_matches('\r');
        println!("{line}");
        if let Some(result) = cargo_test::parse_result(line) {
            tally += result;
        }
        exit_code = line.strip_prefix(EXIT_MARK).map(str::to_owned).or(exit_code.take());
    })?;
    let problem = match (end, exit_code.as_deref()) {
        (End::Exited(_), Some("0")) if tally.failed == 0 && tally.passed > 0 => return Ok(tally),
        (End::Exited(_), Some(_)) if tally.failed > 0 => return Ok(tally),
        (End::Exited(_), Some("0")) => "no test ran".to_owned(),
        (End::Exited(_), Some(code)) => format!("the suite ended with {code}, but no test says that it failed"),
        (End::Exited(status), None) => format!("the machine ended before the tests did ({status})"),
        (End::OutOfTime, _) => format!("the machine was ended after {} minutes", LIMIT.as_secs() / 60),
    };
    let log = fs::read_to_string(console).unwrap_or_default();
    let tail: Vec<&str> = log.lines().rev().take(40).collect();
    for line in tail.iter().rev() {
        println!("  {line}");
    }
    bail!("{problem}; the console's last lines are above, all of it is in {}", console.display())
}
