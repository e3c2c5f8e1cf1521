//! Sandboxes for tests: a name of its own for each, the command line as a user types it, and the logs of all parts when
//! a case fails.
//!
//! What deliberately does not live here: building the topology (that is `mesh_ctl::sandbox`, which is what is tested).

pub mod footprint;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use mesh_ctl::sandbox::{Layout, Part, Sandbox, binaries_beside, state::Process, teardown};
use nix::sys::signal::Signal;

pub use self::footprint::Footprint;

/// How long a test waits for what must happen; only a failing test waits so long.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Pause between looks.
const POLL: Duration = Duration::from_millis(10);
/// A command that has not ended by then hangs.
const COMMAND_WITHIN: Duration = Duration::from_secs(90);
/// Lines of each log in the message of a failing test.
const LOG_LINES: usize = 40;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A sandbox's name, and everything that a test does under it. Ends the sandbox when it is dropped.
#[derive(Debug)]
pub struct SandboxBed {
    name: String,
}

/// How a command ended.
#[derive(Debug)]
pub struct Ran {
    /// What was run.
    pub command: String,
    /// Exit code; none: ended by a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
    /// Logs of the sandbox's parts at its end.
    logs: String,
}

impl SandboxBed {
    /// A name that no other test and no user has. Panics without root: a test that cannot run has failed.
    pub fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "sandboxes need root: run the tests with sudo");
        Self { name: format!("test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)) }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its paths.
    pub fn layout(&self) -> Layout {
        Layout::of(&self.name).expect("layout")
    }

    /// The sandbox as it is recorded now.
    pub fn open(&self) -> Sandbox {
        Sandbox::open(&self.name).expect("open the sandbox")
    }

    /// `mesh-ctl ARGUMENTS` for this sandbox, not started yet.
    pub fn ctl<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(mesh_ctl());
        command.args(arguments).env("MESH_SANDBOX", &self.name).env_remove("NO_COLOR").stdin(Stdio::null());
        command
    }

    /// Runs `mesh-ctl ARGUMENTS` for this sandbox.
    pub fn run(&self, arguments: &[&str]) -> Ran {
        self.finish(self.ctl(arguments))
    }

    /// Runs a command to its end.
    pub fn finish(&self, command: Command) -> Ran {
        let mut ran = finish(command);
        ran.logs = self.logs();
        ran
    }

    /// `mesh-ctl sandbox up`, which must succeed.
    pub fn up(&self) -> Ran {
        let ran = self.run(&["sandbox", "up"]);
        ran.succeeds();
        ran
    }

    /// `mesh-ctl sandbox exec WORKLOAD -- COMMAND`.
    pub fn exec(&self, workload: &str, command: &[&str]) -> Ran {
        self.run(&[&["sandbox", "exec", workload, "--"], command].concat())
    }

    /// One HTTP request from a workload, by curl; the body is on standard output.
    pub fn curl(&self, workload: &str, url: &str) -> Ran {
        self.exec(workload, &["curl", "-sS", "--max-time", "10", url])
    }

    /// The recorded process of a part, alive or not.
    pub fn process(&self, part: &Part) -> Process {
        let sandbox = self.open();
        let process = sandbox.state().processes.get(part);
        process.unwrap_or_else(|| panic!("{part} is not recorded")).clone()
    }

    /// `kill -9` of the recorded process of a part; returns when it is gone.
    pub fn kill(&self, part: &Part) {
        let process = self.process(part);
        let sent = mesh_ctl::sandbox::process::signal(&process, Signal::SIGKILL).expect("kill");
        assert!(sent, "{part} was not alive");
        self.eventually(&format!("{part} ends"), || !mesh_ctl::sandbox::process::is_alive(&process));
    }

    /// Waits until `condition` holds; panics with `what` and the logs if it does not.
    #[track_caller]
    pub fn eventually(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}\n{}", self.logs());
            std::thread::sleep(POLL);
        }
    }

    /// Writes a file of the test's; it goes with the bed.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let dir = self.files();
        fs::create_dir_all(&dir).expect("create a directory");
        let path = dir.join(name);
        fs::write(&path, text).expect("write a file");
        path
    }

    fn files(&self) -> PathBuf {
        std::env::temp_dir().join(format!("mesh-{}", self.name))
    }

    /// The end of each part's log.
    pub fn logs(&self) -> String {
        let layout = self.layout();
        let mut parts = vec![Part::Controller, Part::Agent];
        if let Ok(sandbox) = Sandbox::open(&self.name) {
            parts.extend(sandbox.topology().nodes.iter().map(|n| Part::Node(n.name.clone())));
            parts.extend(sandbox.topology().workloads.iter().map(|w| Part::Workload(w.key())));
        }
        let mut files: Vec<PathBuf> = parts.iter().map(|part| layout.log(part)).collect();
        let nodes = parts.iter().filter_map(|p| match p {
            Part::Node(name) => Some(layout.node(name).join("access.log")),
            Part::Controller | Part::Agent | Part::Workload(_) => None,
        });
        files.extend(nodes);
        let mut text = String::new();
        for file in files {
            let Ok(log) = fs::read_to_string(&file) else { continue };
            let lines: Vec<&str> = log.lines().collect();
            let end = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
            text.push_str(&format!("---- {}\n{end}\n", file.display()));
        }
        text
    }
}

impl Default for SandboxBed {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for SandboxBed {
    fn drop(&mut self) {
        let result = Layout::of(&self.name).and_then(|layout| teardown::down(&layout));
        if let Err(error) = result {
            eprintln!("end the sandbox {}: {error:#}", self.name);
        }
        // There are none unless the test wrote some.
        let _none = fs::remove_dir_all(self.files());
    }
}

impl Ran {
    /// Panics unless it exited with 0.
    #[track_caller]
    pub fn succeeds(&self) -> &Self {
        self.exits(0)
    }

    /// Panics unless it exited with this code.
    #[track_caller]
    pub fn exits(&self, code: i32) -> &Self {
        assert_eq!(self.code, Some(code), "exit code of {}", self.all());
        self
    }

    /// Panics unless standard output has this text.
    #[track_caller]
    pub fn prints(&self, text: &str) -> &Self {
        assert!(self.stdout.contains(text), "standard output lacks `{text}`: {}", self.all());
        self
    }

    /// Panics unless standard error has this text.
    #[track_caller]
    pub fn complains(&self, text: &str) -> &Self {
        assert!(self.stderr.contains(text), "standard error lacks `{text}`: {}", self.all());
        self
    }

    /// Standard output as JSON; panics if it is anything else, or has anything else around it.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|e| panic!("standard output is no JSON ({e}): {}", self.all()))
    }

    /// Everything about it, for a message.
    pub fn all(&self) -> String {
        format!(
            "`{}`, which ended with {:?} after {:?}\nstandard output:\n{}\nstandard error:\n{}\n{}",
            self.command, self.code, self.took, self.stdout, self.stderr, self.logs
        )
    }
}

/// The binary under test.
pub fn mesh_ctl() -> PathBuf {
    let path = binaries_beside().expect("directory of the binaries").join("mesh-ctl");
    assert!(path.is_file(), "{} is not built: cargo build --workspace", path.display());
    path
}

/// Runs a command to its end; panics if it hangs.
pub fn finish(mut command: Command) -> Ran {
    let shown = shown(&command);
    let start = Instant::now();
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = loop {
        match command.spawn() {
            Ok(child) => break child,
            // A program that was just written is open in the children that other tests are about to start.
            Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy && start.elapsed() < PATIENCE => {
                std::thread::sleep(POLL);
            }
            Err(e) => panic!("start {shown}: {e}"),
        }
    };
    let Output { status, stdout, stderr } = wait(child, &shown);
    Ran {
        command: shown,
        code: status.code(),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
        took: start.elapsed(),
        logs: String::new(),
    }
}

/// Output is read while it runs: a full pipe would keep it from ending.
fn wait(child: Child, shown: &str) -> Output {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("pid"));
    let (done, ended) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let output = child.wait_with_output();
        // Nobody waits any more only when the test has panicked.
        let _nobody = done.send(());
        output
    });
    let in_time = ended.recv_timeout(COMMAND_WITHIN).is_ok();
    if !in_time {
        nix::sys::signal::kill(pid, Signal::SIGKILL).expect("kill a command that hangs");
    }
    let output = reader.join().expect("reader").expect("output");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(in_time, "{shown} hangs. So far:\n{}\n{}", text(&output.stdout), text(&output.stderr));
    output
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
