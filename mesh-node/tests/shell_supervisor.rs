//! The supervisor with real processes: restart, kept descriptors, shedding, take-over, end. The proxy is a stand-in that
//! answers every connection with its pid; this binary plays all three parts, by its first argument.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mesh_node::supervisor::client::StoreClient;
use mesh_node::supervisor::process::Signals;
use mesh_node::supervisor::{self, memfd};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const DIR: &str = "MESH_TEST_SUPERVISOR_DIR";
const TAKEOVER: &str = "MESH_TEST_SUPERVISOR_TAKEOVER";
const LISTENER: &str = "listen/test/outbound4";
const KEY: &str = "cert/test";
/// Everything here takes milliseconds; this is when a test gives up.
const PATIENCE: Duration = Duration::from_secs(20);

type Test = (&'static str, fn());

macro_rules! tests {
    ($($name:ident),* $(,)?) => { &[$((stringify!($name), $name as fn())),*] };
}

const TESTS: &[Test] = tests![
    a_killed_proxy_is_replaced_within_a_second_and_finds_listener_and_key,
    connections_are_reset_when_no_proxy_is_ready_for_a_second_and_served_again_afterwards,
    with_the_supervisor_gone_its_proxy_is_gone_and_connections_are_refused,
    sigterm_drains_the_proxy_and_exits_0,
    a_second_supervisor_on_the_same_directory_says_who_has_it_and_exits_1,
    a_proxy_that_cannot_work_with_its_configuration_ends_the_supervisor,
    a_proxy_that_holds_listeners_is_tried_again_whatever_it_says,
    a_take_over_loses_no_new_connection_and_ends_the_old_supervisor,
    a_successor_that_never_gets_ready_changes_nothing,
    taking_over_from_nobody_or_from_a_dead_one_is_an_ordinary_start,
    one_that_is_to_stay_ends_when_it_is_told_and_not_when_another_took_over,
];

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("play-supervisor") => play_supervisor(),
        Some("play-proxy") => play_proxy(),
        // What cargo passes on is a filter, or an option of the usual harness.
        filter => run(filter.filter(|text| !text.starts_with('-')).unwrap_or_default()),
    }
}

/// Runs the tests whose name contains `filter`, all at once: most of their time is waiting.
fn run(filter: &str) {
    let chosen = TESTS.iter().filter(|(name, _)| name.contains(filter));
    let running: Vec<_> = chosen.map(|&(name, test)| (name, std::thread::spawn(test))).collect();
    let mut failed = 0;
    for (name, test) in running {
        let passed = test.join().is_ok();
        failed += u32::from(!passed);
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
    }
    if failed > 0 {
        println!("{failed} failed");
        std::process::exit(101);
    }
}

fn dir_has_flag(name: &str) -> bool {
    std::env::var_os(DIR).map(PathBuf::from).is_some_and(|dir| dir.join(name).exists())
}

/// The supervisor process of the tests below.
fn play_supervisor() -> ! {
    let dir = std::env::var_os(DIR).map(PathBuf::from).expect("directory");
    let status = supervisor::run(supervisor::Options {
        state_dir: dir,
        takeover: std::env::var_os(TAKEOVER).is_some(),
        stay: dir_has_flag("stay"),
        program: std::env::current_exe().expect("own path"),
        args: vec!["play-proxy".into()],
        drain: Duration::from_secs(5),
    });
    match status {
        Ok(status) => std::process::exit(status.into()),
        Err(error) => {
            eprintln!("{error:#}");
            std::process::exit(1);
        }
    }
}

/// The proxy process of the tests below.
fn play_proxy() -> ! {
    let dir = std::env::var_os(DIR).map(PathBuf::from).expect("directory");
    let mut signals = Signals::block().expect("signals");
    let (store, mut kept) = StoreClient::from_stdin().expect("store");
    if dir.join("refuse-configuration").exists() {
        write(&dir, "pid", &std::process::id().to_string());
        std::process::exit(78);
    }
    let listener = match kept.remove(LISTENER) {
        Some(fd) => TcpListener::from(fd),
        None => {
            let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
            listener.set_nonblocking(true).expect("nonblocking");
            store.put(LISTENER, &listener).expect("put");
            store.put(KEY, &memfd::seal("key", b"the key").expect("seal")).expect("put");
            write(&dir, "addr", &listener.local_addr().expect("addr").to_string());
            listener
        }
    };
    let key = kept.get(KEY).map(|fd| memfd::unseal(fd).expect("unseal"));
    write(&dir, "key", &format!("{key:?}"));
    write(&dir, "pid", &std::process::id().to_string());
    if dir.join("crash").exists() {
        std::process::exit(3);
    }
    if dir.join("never-ready").exists() {
        nix::poll::poll(&mut [], nix::poll::PollTimeout::NONE).expect("wait for the end");
    }
    store.ready().expect("ready");
    serve(&listener, &mut signals);
    std::process::exit(0);
}

/// Answers with the pid until told to end.
fn serve(listener: &TcpListener, signals: &mut Signals) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    loop {
        let mut fds =
            [PollFd::new(listener.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::NONE).expect("poll");
        if signals.pending().is_some() {
            return;
        }
        if let Ok((mut connection, _)) = listener.accept() {
            use std::io::Write;
            connection.write_all(std::process::id().to_string().as_bytes()).expect("answer");
        }
    }
}

fn write(dir: &Path, name: &str, content: &str) {
    let fresh = dir.join(format!("{name}.{}", std::process::id()));
    std::fs::write(&fresh, content).expect("write");
    std::fs::rename(&fresh, dir.join(name)).expect("rename");
}

/// A supervisor under test with its directory; ends and cleans up when dropped.
struct Scene {
    dir: PathBuf,
    children: Vec<Child>,
}

impl Scene {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("mesh-supervisor-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("directory");
        Self { dir, children: Vec::new() }
    }

    /// Starts a supervisor; its index.
    fn start(&mut self, takeover: bool) -> usize {
        let mut command = Command::new(std::env::current_exe().expect("own path"));
        command.arg("play-supervisor").env(DIR, &self.dir);
        if takeover {
            command.env(TAKEOVER, "1");
        }
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("spawn");
        self.children.push(child);
        self.children.len() - 1
    }

    fn read(&self, name: &str) -> String {
        eventually(name, || std::fs::read_to_string(self.dir.join(name)).ok().filter(|text| !text.is_empty()))
    }

    fn addr(&self) -> SocketAddr {
        self.read("addr").parse().expect("address")
    }

    fn flag(&self, name: &str) {
        std::fs::write(self.dir.join(name), "").expect("flag");
    }

    fn exit_code(&mut self, index: usize) -> Option<i32> {
        let child = &mut self.children[index];
        eventually("exit of the supervisor", || child.try_wait().expect("wait")).code()
    }

    fn stderr(&mut self, index: usize) -> String {
        let mut text = String::new();
        let pipe = self.children[index].stderr.as_mut().expect("piped");
        pipe.read_to_string(&mut text).expect("read");
        text
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for child in &mut self.children {
            // The proxy dies with its supervisor. Either may be gone already.
            drop(child.kill());
            drop(child.wait());
        }
        drop(std::fs::remove_dir_all(&self.dir));
    }
}

fn eventually<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < deadline, "gave up waiting for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The pid that answers a connection.
fn ask(addr: SocketAddr) -> std::io::Result<i32> {
    let mut connection = TcpStream::connect(addr)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    answer.parse().map_err(|_| ErrorKind::UnexpectedEof.into())
}

fn sigkill(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill");
}

fn pid_of(scene: &Scene, index: usize) -> Pid {
    Pid::from_raw(i32::try_from(scene.children[index].id()).expect("pid"))
}

fn a_killed_proxy_is_replaced_within_a_second_and_finds_listener_and_key() {
    let mut scene = Scene::new("restart");
    scene.start(false);
    let addr = scene.addr();
    let first = ask(addr).expect("first proxy answers");
    assert_eq!(scene.read("key"), "None", "the first proxy starts with nothing");
    let killed = Instant::now();
    sigkill(first);
    let second = ask(addr).expect("the connection waits in the backlog");
    assert!(killed.elapsed() < Duration::from_secs(1), "took {:?}", killed.elapsed());
    assert_ne!(first, second);
    assert_eq!(scene.read("key"), format!("{:?}", Some(b"the key".to_vec())));
}

fn connections_are_reset_when_no_proxy_is_ready_for_a_second_and_served_again_afterwards() {
    let mut scene = Scene::new("shed");
    scene.start(false);
    let addr = scene.addr();
    let first = ask(addr).expect("answer");
    scene.flag("crash");
    sigkill(first);
    let asked = Instant::now();
    let error = ask(addr).expect_err("nobody serves");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(asked.elapsed() < Duration::from_secs(3), "reset after {:?}", asked.elapsed());
    std::fs::remove_file(scene.dir.join("crash")).expect("stop crashing");
    eventually("a proxy that serves", || ask(addr).ok());
}

fn with_the_supervisor_gone_its_proxy_is_gone_and_connections_are_refused() {
    let mut scene = Scene::new("both");
    let supervisor = scene.start(false);
    let addr = scene.addr();
    ask(addr).expect("answer");
    scene.children[supervisor].kill().expect("kill");
    let error = eventually("refusal", || ask(addr).err().filter(|e| e.kind() == ErrorKind::ConnectionRefused));
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}

fn sigterm_drains_the_proxy_and_exits_0() {
    let mut scene = Scene::new("term");
    let supervisor = scene.start(false);
    let addr = scene.addr();
    ask(addr).expect("answer");
    kill(pid_of(&scene, supervisor), Signal::SIGTERM).expect("signal");
    assert_eq!(scene.exit_code(supervisor), Some(0));
    assert_eq!(ask(addr).expect_err("closed").kind(), ErrorKind::ConnectionRefused);
}

fn a_second_supervisor_on_the_same_directory_says_who_has_it_and_exits_1() {
    let mut scene = Scene::new("second");
    let first = scene.start(false);
    ask(scene.addr()).expect("answer");
    let second = scene.start(false);
    assert_eq!(scene.exit_code(second), Some(1));
    let stderr = scene.stderr(second);
    assert!(stderr.contains(&format!("in use by pid {}", scene.children[first].id())), "{stderr}");
    ask(scene.addr()).expect("the first is not disturbed");
}

fn a_proxy_that_cannot_work_with_its_configuration_ends_the_supervisor() {
    let mut scene = Scene::new("config");
    scene.flag("refuse-configuration");
    let supervisor = scene.start(false);
    assert_eq!(scene.exit_code(supervisor), Some(78));
}

fn a_proxy_that_holds_listeners_is_tried_again_whatever_it_says() {
    let mut scene = Scene::new("config-kept");
    scene.flag("crash");
    let supervisor = scene.start(false);
    scene.addr();
    scene.flag("refuse-configuration");
    let first = scene.read("pid");
    eventually("another try", || Some(scene.read("pid")).filter(|pid| *pid != first));
    kill(pid_of(&scene, supervisor), Signal::SIGTERM).expect("signal");
    assert_eq!(scene.exit_code(supervisor), Some(0));
}

fn a_take_over_loses_no_new_connection_and_ends_the_old_supervisor() {
    let mut scene = Scene::new("takeover");
    let old = scene.start(false);
    let addr = scene.addr();
    let first = ask(addr).expect("answer");
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let load = std::thread::spawn({
        let stop = std::sync::Arc::clone(&stop);
        move || {
            let mut answers = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                ask(addr).expect("every connection is answered");
                answers += 1;
            }
            answers
        }
    });
    let new = scene.start(true);
    assert_eq!(scene.exit_code(old), Some(0));
    let second = ask(addr).expect("answer");
    assert_ne!(first, second);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(load.join().expect("no connection was lost") > 0);
    // The new one is a full owner: it restarts its proxy, keeps others out and can be taken over itself.
    sigkill(second);
    ask(addr).expect("restarted");
    let third = scene.start(false);
    assert_eq!(scene.exit_code(third), Some(1));
    let stderr = scene.stderr(third);
    assert!(stderr.contains(&format!("in use by pid {}", scene.children[new].id())), "{stderr}");
    scene.start(true);
    assert_eq!(scene.exit_code(new), Some(0));
    ask(addr).expect("answer");
}

fn a_successor_that_never_gets_ready_changes_nothing() {
    let mut scene = Scene::new("stuck");
    scene.start(false);
    let addr = scene.addr();
    let first = ask(addr).expect("answer");
    scene.flag("never-ready");
    let successor = scene.start(true);
    eventually("the successor's proxy", || Some(scene.read("pid")).filter(|pid| *pid != first.to_string()));
    assert_eq!(ask(addr).expect("answer"), first);
    kill(pid_of(&scene, successor), Signal::SIGTERM).expect("signal");
    assert_eq!(scene.exit_code(successor), Some(0));
    assert_eq!(ask(addr).expect("answer"), first);
}

fn taking_over_from_nobody_or_from_a_dead_one_is_an_ordinary_start() {
    let mut scene = Scene::new("nobody");
    let supervisor = scene.start(true);
    ask(scene.addr()).expect("answer");
    scene.children[supervisor].kill().expect("kill");
    std::fs::remove_file(scene.dir.join("addr")).expect("there was one");
    // The socket of the dead one is still there, and for a moment its lock.
    scene.start(true);
    ask(scene.addr()).expect("answer");
}

fn one_that_is_to_stay_ends_when_it_is_told_and_not_when_another_took_over() {
    let mut scene = Scene::new("stay");
    scene.flag("stay");
    let old = scene.start(true);
    let addr = scene.addr();
    let first = ask(addr).expect("answer");
    scene.start(true);
    eventually("the other", || ask(addr).ok().filter(|pid| *pid != first));
    let pid = pid_of(&scene, old);
    eventually("the end of its proxy", || kill(Pid::from_raw(first), None).is_err().then_some(()));
    assert_eq!(scene.children[old].try_wait().expect("wait"), None, "who started it would start it again");
    kill(pid, Signal::SIGTERM).expect("signal");
    assert_eq!(scene.exit_code(old), Some(0));
    ask(addr).expect("the other is not disturbed");
}
