//! A sandbox for one test: a whole mesh of real processes, taken down when the test ends, whose logs are printed when it
//! fails.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant, SystemTime};

use mesh_api::admin::{BpfState, NodeStatus};
use mesh_ctl::sandbox::{Mesh, Part, Sandbox, Topology, Workload, binaries_beside, teardown};
use mesh_node::capture::in_netns;
use serde::de::DeserializeOwned;

/// Everything here takes milliseconds to a second; this is when a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Port of the servers that return every byte.
pub const ECHO: u16 = 7000;
/// Lines of each log that are printed when a test fails.
const LOG_LINES: usize = 15;

/// A running mesh.
pub struct MeshBed {
    /// The sandbox that it is.
    pub sandbox: Sandbox,
}

/// Looks until there is something.
///
/// # Panics
/// After [`PATIENCE`].
pub fn eventually<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    eventually_within(PATIENCE, what, look)
}

/// As [`eventually`], for what takes longer by its nature.
///
/// # Panics
/// After `patience`.
pub fn eventually_within<T>(patience: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "gave up waiting for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A workload that returns every byte on [`ECHO`].
pub fn echo(name: &str, node: &str) -> Workload {
    let port = ECHO.to_string();
    let argv = ["mesh-ctl", "sandbox", "serve", "echo", "--port", &port, "--workload", name];
    Workload::new(name, node).runs(argv).ready_on(ECHO)
}

/// `client` and `near` on node-a, `far` on node-b; the latter two return every byte.
pub fn two_nodes() -> Topology {
    Topology::new()
        .node("node-a")
        .node("node-b")
        .namespace("default", &[("istio.io/dataplane-mode", "ambient")])
        .workload(Workload::new("client", "node-a"))
        .workload(echo("near", "node-a"))
        .workload(echo("far", "node-b"))
}

/// Answer of one of a node proxy's ports, head and body, asked inside the node; `None` when it does not answer.
///
/// # Panics
/// The node has no namespace.
pub fn page_of(sandbox: &Sandbox, node: &str, port: u16, path: &str) -> Option<String> {
    let netns = File::open(sandbox.layout.netns(node)).expect("namespace");
    let ask = || -> std::io::Result<String> {
        let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        connection.set_read_timeout(Some(PATIENCE))?;
        write!(connection, "GET {path} HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer)?;
        Ok(answer)
    };
    in_netns(netns.as_fd(), ask).expect("enter the node's namespace").ok()
}

impl MeshBed {
    /// Builds a sandbox. The name is a part of its name, a few letters.
    ///
    /// # Panics
    /// It does not come up; what went wrong is in the message.
    pub fn up(name: &str, topology: Topology) -> Self {
        Self::with(name, topology, Mesh::beside().unwrap_or_else(|error| panic!("{error:#}")))
    }

    /// As [`Self::up`], with other arguments for the parts.
    ///
    /// # Panics
    /// As [`Self::up`].
    pub fn with(name: &str, topology: Topology, mesh: Mesh) -> Self {
        let name = format!("t-{name}-{}", std::process::id());
        let sandbox = Sandbox::up(&name, topology, Some(mesh), &mut |_step| {});
        Self { sandbox: sandbox.unwrap_or_else(|error| panic!("sandbox {name}: {error:#}")) }
    }

    /// The same network, processes and load, with nothing of the mesh.
    ///
    /// # Panics
    /// As [`Self::up`].
    pub fn without_mesh(name: &str, topology: Topology) -> Self {
        let name = format!("t-{name}-{}", std::process::id());
        let sandbox = Sandbox::up(&name, topology, None, &mut |_step| {});
        Self { sandbox: sandbox.unwrap_or_else(|error| panic!("sandbox {name}: {error:#}")) }
    }

    /// IPv4 address of a workload's echo port.
    ///
    /// # Panics
    /// There is no such workload.
    pub fn address(&self, workload: &str) -> SocketAddr {
        let workload = self.sandbox.workload(workload).expect("workload");
        let [v4, _v6] = self.sandbox.topology().addresses(workload).expect("address");
        SocketAddr::new(v4, ECHO)
    }

    /// What a node proxy says of itself; `None` when it does not answer.
    pub fn status(&self, node: &str) -> Option<NodeStatus> {
        self.admin(node, "/status")
    }

    /// A page of a node proxy's admin interface; `None` when it does not answer.
    pub fn admin<T: DeserializeOwned>(&self, node: &str, page: &str) -> Option<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(mesh_ctl::admin::get(&self.sandbox.layout.node_admin(node), page)).ok()
    }

    /// Answer of one of a node proxy's ports; `None` when it does not answer.
    pub fn page(&self, node: &str, port: u16, path: &str) -> Option<String> {
        page_of(&self.sandbox, node, port, path)
    }

    /// Whether a word is in the configuration that a node has stored.
    pub fn stored(&self, node: &str, word: &str) -> Option<()> {
        let stored = std::fs::read(self.sandbox.layout.node(node).join("state/snapshot")).ok()?;
        stored.windows(word.len()).any(|window| window == word.as_bytes()).then_some(())
    }

    /// Waits until the access log of a node has a line with all the words; the first such line.
    pub fn logged(&self, node: &str, words: &[&str]) -> String {
        let log = self.sandbox.layout.node(node).join("access.log");
        eventually(&format!("a line with {words:?} in {}", log.display()), || {
            let text = std::fs::read_to_string(&log).ok()?;
            text.lines().find(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned)
        })
    }

    /// Process of a node's proxy.
    pub fn proxy(&self, node: &str) -> i32 {
        let pid = eventually("the node proxy's status", || self.status(node)).pid;
        i32::try_from(pid).expect("pid")
    }

    /// Process of a node's supervisor.
    ///
    /// # Panics
    /// It does not run.
    pub fn supervisor(&self, node: &str) -> i32 {
        self.sandbox.running(&Part::Node(node.to_owned())).expect("supervisor runs").pid
    }

    /// Connections one after the other, from inside a workload.
    pub fn stream(&self, from: &str, to: SocketAddr) -> Stream {
        let mut child = self.probe(from, &["stream", &to.to_string(), "2"]);
        let input = child.stdin.take().expect("piped");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let (sender, attempts) = channel();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(Attempt::parse(&line))));
        Stream { child, input: Some(input), attempts, seen: Vec::new() }
    }

    /// One connection that stays, from inside a workload.
    pub fn hold(&self, from: &str, to: SocketAddr) -> Held {
        let mut child = self.probe(from, &["hold", &to.to_string()]);
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        Held { child, input, output }
    }

    fn probe(&self, from: &str, args: &[&str]) -> Child {
        let program = binaries_beside().expect("binaries").join("mesh-probe");
        let mut command = self.sandbox.command(from, &program.display().to_string()).expect("workload");
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().unwrap_or_else(|error| panic!("{}: {error}", program.display()))
    }

    /// A second command line like the one of a node's proxy, in its place, with more arguments; errors are piped.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn another_node(&self, node: &str, more: &[&str]) -> Another {
        let mut argv = self.sandbox.node_argv(node).expect("command line");
        argv.extend(more.iter().map(ToString::to_string));
        self.run_on(node, &argv)
    }

    /// Runs a command line in the place of a node's proxy; errors are piped.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn run_on(&self, node: &str, argv: &[String]) -> Another {
        let layout = &self.sandbox.layout;
        let place = mesh_ctl::sandbox::process::Place::open(&layout.proxy_cgroup(node), Some(&layout.netns(node)));
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]).stdin(Stdio::null()).stderr(Stdio::piped());
        place.expect("place").place(&mut command);
        Another(command.spawn().expect("start"))
    }

    fn print_logs(&self) {
        let layout = &self.sandbox.layout;
        let nodes = self.sandbox.topology().nodes.iter();
        let mut logs: Vec<PathBuf> = nodes.clone().map(|node| layout.log(&Part::Node(node.name.clone()))).collect();
        logs.extend(nodes.map(|node| layout.node(&node.name).join("access.log")));
        logs.extend([layout.log(&Part::Controller), layout.log(&Part::Agent)]);
        let commands = self.sandbox.topology().workloads.iter().filter(|workload| !workload.command.is_empty());
        logs.extend(commands.map(|workload| layout.log(&Part::Workload(workload.key()))));
        for node in &self.sandbox.topology().nodes {
            if let Some(kernel) = self.admin::<BpfState>(&node.name, "/bpf") {
                let counted = kernel.counters.iter().map(|c| format!("{}/{}={}", c.hook, c.reason, c.count));
                println!("--- kernel programs on {}: {}", node.name, counted.collect::<Vec<_>>().join(" "));
            }
        }
        for log in logs {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            println!("--- {}", log.display());
            lines[lines.len().saturating_sub(LOG_LINES)..].iter().for_each(|line| println!("{line}"));
        }
    }
}

impl Drop for MeshBed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_logs();
        }
        if let Err(error) = teardown::down(&self.sandbox.layout) {
            println!("sandbox {} is not gone: {error:#}", self.sandbox.layout.name);
        }
    }
}

/// A process that the sandbox does not know; killed at the end of the test, before the sandbox is taken down.
pub struct Another(Child);

impl Another {
    /// Its process.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).expect("pid")
    }

    /// Waits for its end; its exit code.
    pub fn wait_for_exit(&mut self) -> Option<i32> {
        eventually("exit", || self.0.try_wait().expect("wait")).code()
    }

    /// What it wrote to standard error, after its end.
    pub fn stderr(&mut self) -> String {
        let mut text = String::new();
        self.0.stderr.take().expect("piped").read_to_string(&mut text).expect("read");
        text
    }
}

impl Drop for Another {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// One connection of a [`Stream`].
#[derive(Debug, Clone)]
pub struct Attempt {
    /// When it began.
    pub started: SystemTime,
    /// Until the answer, or the error.
    pub took: Duration,
    /// `ok`, or the kind of the error.
    pub outcome: String,
}

impl Attempt {
    fn parse(line: &str) -> Self {
        let mut fields = line.split(' ');
        let mut micros = || Duration::from_micros(fields.next().and_then(|n| n.parse().ok()).unwrap_or_default());
        let (started, took) = (SystemTime::UNIX_EPOCH + micros(), micros());
        Self { started, took, outcome: fields.next().unwrap_or(line).to_owned() }
    }

    /// Whether the byte came back.
    pub fn is_ok(&self) -> bool {
        self.outcome == "ok"
    }

    /// When the answer or error came.
    pub fn ended(&self) -> SystemTime {
        self.started + self.took
    }
}

/// Connections one after the other.
pub struct Stream {
    child: Child,
    input: Option<ChildStdin>,
    attempts: Receiver<Attempt>,
    seen: Vec<Attempt>,
}

impl Stream {
    /// Waits for an attempt that `wanted` likes; attempts are asked about in order, each once.
    ///
    /// # Panics
    /// None comes within [`PATIENCE`].
    pub fn wait(&mut self, what: &str, mut wanted: impl FnMut(&Attempt) -> bool) -> Attempt {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(attempt) = self.attempts.recv_timeout(left) else {
                panic!(
                    "gave up waiting for {what}; the last were {:?}",
                    self.seen.iter().rev().take(3).collect::<Vec<_>>()
                )
            };
            self.seen.push(attempt.clone());
            if wanted(&attempt) {
                return attempt;
            }
        }
    }

    /// How many attempts were waited for so far.
    pub fn seen(&self) -> usize {
        self.seen.len()
    }

    /// All attempts that have ended so far.
    pub fn so_far(&mut self) -> &[Attempt] {
        self.seen.extend(self.attempts.try_iter());
        &self.seen
    }

    /// Ends it; all attempts.
    pub fn end(mut self) -> Vec<Attempt> {
        drop(self.input.take());
        self.seen.extend(self.attempts.iter());
        std::mem::take(&mut self.seen)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A connection that stays.
pub struct Held {
    child: Child,
    input: ChildStdin,
    output: BufReader<std::process::ChildStdout>,
}

impl Held {
    /// Sends a line and returns what comes back: the line, or `closed KIND`.
    ///
    /// # Panics
    /// The probe is gone.
    pub fn say(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").expect("probe runs");
        let mut answer = String::new();
        self.output.read_line(&mut answer).expect("probe runs");
        answer.trim_end().to_owned()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
