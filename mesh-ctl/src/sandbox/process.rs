//! Processes of a sandbox: born into their cgroup, network namespace and private files; ended by pidfd.
//!
//! A process is known by pid and start time, never by name.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;

use super::netns;
use super::state::Process;

/// How long a process may take after SIGKILL.
const KILLED_WITHIN: Duration = Duration::from_secs(5);

/// What a process is put into before it runs. Opened beforehand: between fork and exec only system calls are made.
#[derive(Debug)]
pub struct Place {
    cgroup: File,
    netns: Option<File>,
    /// Source and target of bind mounts in a private mount namespace.
    binds: Vec<(CString, CString)>,
}

impl Place {
    /// Opens a cgroup and, if given, a network namespace.
    ///
    /// # Errors
    /// One of them does not exist.
    pub fn open(cgroup: &Path, netns: Option<&Path>) -> Result<Self> {
        let procs = cgroup.join("cgroup.procs");
        let cgroup = File::options().write(true).open(&procs).with_context(|| format!("open {}", procs.display()))?;
        Ok(Self { cgroup, netns: netns.map(netns::open).transpose()?, binds: Vec::new() })
    }

    /// Shows the process `source` under the name `target`. A target that does not exist on this machine is left out:
    /// nothing that reads it would find it.
    ///
    /// # Errors
    /// A path with a NUL byte.
    pub fn bind(mut self, source: &Path, target: &Path) -> Result<Self> {
        if let Ok(target) = target.canonicalize() {
            let c = |p: &Path| CString::new(p.as_os_str().as_bytes()).context("path with a NUL byte");
            self.binds.push((c(source)?, c(&target)?));
        }
        Ok(self)
    }

    /// Puts the calling process there (its calling thread, as to namespaces). Makes system calls only.
    ///
    /// # Errors
    /// Not permitted, or the namespace or cgroup has been removed.
    pub fn enter(&self) -> io::Result<()> {
        // "0" stands for the writer itself.
        (&self.cgroup).write_all(b"0")?;
        if let Some(netns) = &self.netns {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
        }
        if self.binds.is_empty() {
            return Ok(());
        }
        unshare(CloneFlags::CLONE_NEWNS)?;
        // Slave, not private: an unmount by `down` reaches this copy too.
        bind_mount(None, c"/", libc::MS_SLAVE | libc::MS_REC)?;
        for (source, target) in &self.binds {
            bind_mount(Some(source), target, libc::MS_BIND)?;
        }
        Ok(())
    }

    /// Lets a command start there.
    pub fn place(self, command: &mut Command) {
        // SAFETY: `enter` only makes system calls on descriptors and strings that exist already; it allocates nothing
        // on its way to success, as is required between fork and exec.
        unsafe { command.pre_exec(move || self.enter()) };
    }
}

fn bind_mount(source: Option<&CString>, target: &std::ffi::CStr, flags: libc::c_ulong) -> io::Result<()> {
    let source = source.map_or(std::ptr::null(), |s| s.as_ptr());
    // SAFETY: both strings are NUL-terminated and outlive the call; type and data are unused for these flags.
    let result = unsafe { libc::mount(source, target.as_ptr(), std::ptr::null(), flags, std::ptr::null()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Starts a process of its own session that writes to a log file.
///
/// # Errors
/// The program does not exist, or the place cannot be entered.
pub fn spawn(argv: &[String], env: &[(&str, &str)], place: Place, log: &Path) -> Result<Process> {
    let (program, args) = argv.split_first().context("empty command")?;
    let file = File::options().create(true).append(true).open(log);
    let file = file.with_context(|| format!("open {}", log.display()))?;
    let mut command = Command::new(program);
    command.args(args).envs(env.iter().copied()).stdin(Stdio::null());
    command.stdout(file.try_clone().context("log")?).stderr(file);
    // A session of its own: Ctrl-C at the terminal of `up` does not reach it.
    // SAFETY: setsid is async-signal-safe.
    unsafe { command.pre_exec(|| nix::unistd::setsid().map(|_| ()).map_err(io::Error::from)) };
    place.place(&mut command);
    let child = command.spawn().with_context(|| format!("start {program}"))?;
    let pid = i32::try_from(child.id()).context("pid")?;
    let start_ticks = stat(pid).map_or(0, |s| s.start_ticks);
    Ok(Process { pid, start_ticks, argv: argv.to_vec() })
}

/// Whether this very process still runs. One that is about to end, of which a thread still holds its ports and locks, is
/// waited for.
pub fn is_alive(process: &Process) -> bool {
    let Some(found) = stat(process.pid).filter(|s| s.start_ticks == process.start_ticks) else { return false };
    if found.state == b'Z' && found.threads > 1 {
        let end = open_pidfd(process.pid).and_then(|fd| match fd {
            Some(fd) => wait_end(&fd, Instant::now() + KILLED_WITHIN),
            None => Ok(true),
        });
        return !end.unwrap_or(true);
    }
    found.state != b'Z'
}

/// Sends a signal to this very process; false if it is gone.
///
/// # Errors
/// Not permitted.
pub fn signal(process: &Process, signal: Signal) -> Result<bool> {
    let Some(fd) = pidfd(process)? else { return Ok(false) };
    send(&fd, signal).with_context(|| format!("signal process {}", process.pid))
}

/// Ends processes: SIGTERM to all, then SIGKILL to those that are still there after `patience`. Returns the pids that
/// had to be killed.
///
/// # Errors
/// Not permitted, or one survives SIGKILL.
pub fn end_all(processes: &[Process], patience: Duration) -> Result<Vec<i32>> {
    let mut open = Vec::new();
    for process in processes {
        if let Some(fd) = pidfd(process)? {
            send(&fd, Signal::SIGTERM)?;
            open.push((process, fd));
        }
    }
    let deadline = Instant::now() + patience;
    let mut killed = Vec::new();
    for (process, fd) in open {
        if !wait_end(&fd, deadline)? {
            send(&fd, Signal::SIGKILL)?;
            killed.push(process.pid);
            if !wait_end(&fd, Instant::now() + KILLED_WITHIN)? {
                bail!("process {} ({}) survives SIGKILL", process.pid, process.argv.join(" "));
            }
        }
        reap(process.pid);
    }
    Ok(killed)
}

/// Collects the exit status if the process is a child of this one.
fn reap(pid: i32) {
    // ECHILD when it is not a child: then init collects it.
    let _status = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), Some(nix::sys::wait::WaitPidFlag::WNOHANG));
}

fn pidfd(process: &Process) -> Result<Option<OwnedFd>> {
    // The descriptor pins the process; compared after it was opened, the start time cannot be of another one.
    Ok(open_pidfd(process.pid)?.filter(|_| is_alive(process)))
}

/// `None` if there is no such process.
fn open_pidfd(pid: i32) -> Result<Option<OwnedFd>> {
    // SAFETY: plain system call with integers; the result is checked before it is owned.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ESRCH) { Ok(None) } else { Err(error).context("pidfd_open") };
    }
    let fd = i32::try_from(fd).context("descriptor")?;
    // SAFETY: the kernel just returned this descriptor to us.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn send(pidfd: &OwnedFd, signal: Signal) -> Result<bool> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is open; a null siginfo asks the kernel to fill it in as for kill(2).
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal as i32, no_info, 0) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ESRCH) { Ok(false) } else { Err(error).context("pidfd_send_signal") }
}

fn wait_end(pidfd: &OwnedFd, deadline: Instant) -> Result<bool> {
    use std::os::fd::AsFd;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e).context("poll a process"),
        }
    }
}

struct Stat {
    state: u8,
    /// Those that have not ended; the first stays, as a zombie, until all others have.
    threads: u32,
    start_ticks: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// proc(5): the command name is in parentheses and may hold anything; state is the first field behind it, the
/// number of threads the 18th, start time the 20th.
fn parse_stat(text: &str) -> Option<Stat> {
    let rest = &text[text.rfind(')')? + 1..];
    let mut fields = rest.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    let threads = fields.nth(16)?.parse().ok()?;
    let start_ticks = fields.nth(1)?.parse().ok()?;
    Some(Stat { state, threads, start_ticks })
}

/// Whether a process of this network namespace listens on a TCP port, read from `/proc/PID/net`.
pub fn listens(pid: i32, port: u16) -> bool {
    let listening = |file: &str| {
        let text = std::fs::read_to_string(PathBuf::from(format!("/proc/{pid}/net/{file}"))).unwrap_or_default();
        has_listener(&text, port)
    };
    listening("tcp") || listening("tcp6")
}

fn has_listener(table: &str, port: u16) -> bool {
    let suffix = format!(":{port:04X}");
    table.lines().skip(1).any(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let local = fields.next().unwrap_or_default();
        // 0A is TCP_LISTEN.
        local.ends_with(&suffix) && fields.nth(1) == Some("0A")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let text = "42 (a) b (c) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 3 0 987654 1 1";
        let stat = parse_stat(text).unwrap();
        assert_eq!((stat.state, stat.threads, stat.start_ticks), (b'S', 3, 987_654));
        assert!(parse_stat("42 (x").is_none());
    }

    #[test]
    fn own_process_is_alive_and_one_with_another_start_time_is_not() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let start_ticks = stat(pid).unwrap().start_ticks;
        let process = Process { pid, start_ticks, argv: Vec::new() };
        assert!(is_alive(&process));
        let other = Process { start_ticks: start_ticks + 1, ..process };
        assert!(!is_alive(&other));
        assert!(!signal(&other, Signal::SIGKILL).unwrap(), "this test would be dead otherwise");
    }

    #[test]
    fn what_ignores_sigterm_is_killed_and_what_obeys_is_not() {
        let start = |script: &str| {
            #[allow(
                clippy::zombie_processes,
                reason = "the process that is asked about is its child, which outlives it"
            )]
            let mut child = Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
            let mut line = [0u8; 1];
            io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
            let pid = i32::try_from(child.id()).unwrap();
            Process { pid, start_ticks: stat(pid).unwrap().start_ticks, argv: vec![script.into()] }
        };
        let obeys = start("echo; exec sleep 100");
        let ignores = start("trap '' TERM; echo; exec sleep 100");
        let killed = end_all(&[obeys.clone(), ignores.clone()], Duration::from_millis(300)).unwrap();
        assert_eq!(killed, [ignores.pid]);
        assert!(!is_alive(&obeys) && !is_alive(&ignores));
    }

    #[test]
    fn only_listening_sockets_count() {
        let table = "  sl  local_address rem_address   st\n   0: 00000000:1F90 00000000:0000 0A 0:0\n   1: 0100007F:1538 0100007F:9999 01 0:0\n";
        assert!(has_listener(table, 8080));
        assert!(!has_listener(table, 5432), "established");
        assert!(!has_listener(table, 80));
    }
}
