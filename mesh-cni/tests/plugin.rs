//! The plugin's program as a container runtime starts it, with an agent that the test plays.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use mesh_cni::store::{BELIEVED_FOR, Store};
use mesh_cni::unasked;
use mesh_cni::wire::Request;
use serde_json::{Value, json};

/// Longest time until something that must happen has happened.
const SOON: Duration = Duration::from_secs(20);

/// A node's directories.
struct Node {
    dir: PathBuf,
}

impl Node {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("mesh-cni-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Self { dir }
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("cni.sock")
    }

    fn config(&self, wait_secs: u64) -> Value {
        json!({
            "cniVersion": "1.0.0", "name": "cbr0", "type": "mesh-cni", "agentSocket": self.socket(), "waitSecs": wait_secs,
            "stateDir": self.dir.join("state"), "logFile": self.dir.join("cni.log"), "prevResult": prev_result(),
        })
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("cni.log")).unwrap_or_default()
    }

    /// Writes what an agent knew of the namespace `batch`, that long ago.
    fn knew_batch_outside(&self, ago: Duration) {
        let outside = ["batch".to_owned()].into();
        Store::new([].into(), outside, SystemTime::now() - ago).write(&self.dir.join("state")).unwrap();
    }

    /// An agent that gives these answers, one for each connection; it ends with the requests it got.
    fn agent(&self, answers: &[&str]) -> thread::JoinHandle<Vec<Request>> {
        let listener = UnixListener::bind(self.socket()).unwrap();
        let answers: Vec<String> = answers.iter().map(|answer| format!("{answer}\n")).collect();
        thread::spawn(move || {
            let answer = |answer: &String| {
                let (mut stream, _) = listener.accept().unwrap();
                let request = request_of(&stream);
                stream.write_all(answer.as_bytes()).unwrap();
                request
            };
            answers.iter().map(answer).collect()
        })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.dir);
    }
}

fn request_of(stream: &UnixStream) -> Request {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

fn prev_result() -> Value {
    json!({
        "cniVersion": "1.0.0", "interfaces": [{ "name": "eth0", "sandbox": "/var/run/netns/cni-1" }],
        "ips": [{ "address": "10.244.1.7/24", "gateway": "10.244.1.1", "interface": 0 }], "dns": {}, "unknown": [1],
    })
}

const VARIABLES: [(&str, &str); 4] = [
    ("CNI_CONTAINERID", "c1"),
    ("CNI_NETNS", "/var/run/netns/cni-1"),
    ("CNI_IFNAME", "eth0"),
    ("CNI_ARGS", "K8S_POD_UID=u1;IgnoreUnknown=1;K8S_POD_NAME=web-0;K8S_POD_NAMESPACE=shop"),
];

fn start(command: &str, changed: &[(&str, &str)], stdin: &[u8]) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_mesh-cni"))
        .env_clear()
        .env("CNI_COMMAND", command)
        .envs(VARIABLES)
        .envs(changed.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(stdin).unwrap();
    child
}

fn run(command: &str, changed: &[(&str, &str)], config: &Value) -> (String, i32) {
    ended(start(command, changed, config.to_string().as_bytes()).wait_with_output().unwrap())
}

fn ended(output: Output) -> (String, i32) {
    (String::from_utf8(output.stdout).unwrap(), output.status.code().unwrap())
}

fn passed_on() -> (String, i32) {
    (format!("{}\n", prev_result()), 0)
}

fn error(code: u32, message: &str, what_to_do: &str) -> (String, i32) {
    let msg = format!("mesh-cni: {message}: {what_to_do}");
    let line = format!(r#"{{"cniVersion":"1.0.0","code":{code},"msg":{},"details":"{what_to_do}"}}"#, json!(msg));
    (format!("{line}\n"), 1)
}

const NOT_READY: &str = r#"{"answer":"wait","reason":"no node proxy","isMember":true}"#;
const LOOK: &str = "look at the mesh agent and the node proxy of this node; the pod is tried again";

#[test]
fn a_pod_starts_when_the_agent_says_so_with_the_result_as_it_was() {
    let node = Node::new("proceed");
    let agent = node.agent(&[NOT_READY, r#"{"answer":"proceed"}"#]);
    assert_eq!(run("ADD", &[], &node.config(30)), passed_on());
    let requests = agent.join().unwrap();
    let said = json!({
        "command": "add", "namespace": "shop", "pod": "web-0", "uid": "u1", "container": "c1",
        "netns": "/var/run/netns/cni-1", "ips": ["10.244.1.7"],
    });
    assert_eq!(serde_json::to_value(&requests[0]).unwrap(), said);
    assert_eq!(requests[0], requests[1]);
    assert!(node.log().contains("the agent: it starts"), "{}", node.log());
}

#[test]
fn the_result_is_in_the_version_of_the_configuration() {
    let node = Node::new("version");
    let _agent = node.agent(&[r#"{"answer":"proceed"}"#]);
    let mut config = node.config(30);
    config["cniVersion"] = "0.3.1".into();
    let (stdout, code) = run("ADD", &[], &config);
    let mut expected = prev_result();
    expected["cniVersion"] = "0.3.1".into();
    assert_eq!((serde_json::from_str::<Value>(&stdout).unwrap(), code), (expected, 0));
}

#[test]
fn a_pod_starts_within_two_seconds_of_the_agents_return() {
    let node = Node::new("late");
    // One that died and left its socket.
    drop(UnixListener::bind(node.socket()).unwrap());
    let child = start("ADD", &[], node.config(60).to_string().as_bytes());
    thread::sleep(Duration::from_secs(1));
    fs::remove_file(node.socket()).unwrap();
    let (agent, back) = (node.agent(&[r#"{"answer":"proceed"}"#]), Instant::now());
    assert_eq!(ended(child.wait_with_output().unwrap()), passed_on());
    assert!(back.elapsed() < Duration::from_secs(2), "{:?}", back.elapsed());
    agent.join().unwrap();
}

#[test]
fn without_an_agent_or_with_one_that_hangs_the_wait_has_an_end() {
    let node = Node::new("absent");
    let started = Instant::now();
    let socket = node.socket();
    let absent = format!("the agent is not there ({}: No such file or directory (os error 2))", socket.display());
    let message = |last: &str| format!("pod shop/web-0 has waited 1 s for the mesh: {last}");
    assert_eq!(run("ADD", &[], &node.config(1)), error(11, &message(&absent), LOOK));
    let hanging = UnixListener::bind(&socket).unwrap();
    let silent = format!("the agent is not there ({}: no answer)", socket.display());
    assert_eq!(run("ADD", &[], &node.config(1)), error(11, &message(&silent), LOOK));
    // Its queue is full: even to connect takes for ever.
    let mut queued = Vec::new();
    let full = Instant::now() + SOON;
    while Instant::now() < full {
        let Some(stream) = connect_within(&socket, Duration::from_millis(300)) else { break };
        queued.push(stream);
    }
    assert_eq!(run("ADD", &[], &node.config(1)), error(11, &message(&silent), LOOK));
    assert!(started.elapsed() < SOON + Duration::from_secs(10), "{:?}", started.elapsed());
    drop((hanging, queued));
}

fn connect_within(socket: &Path, within: Duration) -> Option<UnixStream> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let socket = socket.to_owned();
    thread::spawn(move || sender.send(UnixStream::connect(socket).unwrap()));
    receiver.recv_timeout(within).ok()
}

#[test]
fn not_ready_until_the_end_is_said_with_the_agents_reason() {
    let node = Node::new("not-ready");
    let _agent = node.agent(&[NOT_READY; 20]);
    let expected = error(11, "pod shop/web-0 has waited 1 s for the mesh: no node proxy", LOOK);
    assert_eq!(run("ADD", &[], &node.config(1)), expected);
}

#[test]
fn a_refusal_ends_the_wait_at_once() {
    let node = Node::new("refused");
    let _agent = node.agent(&[r#"{"answer":"refused","reason":"another pod has this name now"}"#]);
    let message = "pod shop/web-0 may not start: another pod has this name now";
    assert_eq!(run("ADD", &[], &node.config(60)), error(100, message, "see the log of the mesh agent on this node"));
}

#[test]
fn an_excluded_namespace_and_what_is_no_pod_never_wait() {
    let node = Node::new("excluded");
    for args in
        ["K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=coredns", "K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=a", ""]
    {
        assert_eq!(run("ADD", &[("CNI_ARGS", args)], &node.config(60)), passed_on(), "{args}");
    }
    let mut config = node.config(1);
    config["excludeNamespaces"] = json!(["shop"]);
    assert_eq!(run("ADD", &[], &config), passed_on());
    assert!(!node.dir.join("state").exists());
}

#[test]
fn a_pod_of_a_namespace_known_to_be_outside_starts_without_the_agent_and_is_noted() {
    let node = Node::new("outside");
    let batch = [("CNI_ARGS", "K8S_POD_NAMESPACE=batch;K8S_POD_NAME=job;K8S_POD_UID=u2")];
    node.knew_batch_outside(Duration::from_secs(60));
    assert_eq!(run("ADD", &batch, &node.config(60)), passed_on());
    let noted = unasked::read(&node.dir.join("state")).unwrap();
    assert_eq!(noted.iter().map(|note| note.request.pod.as_str()).collect::<Vec<_>>(), ["job"]);
    unasked::strike(&node.dir.join("state"), &noted).unwrap();
    // An agent that knows better, and knowledge that is too old.
    let agent = node.agent(&[NOT_READY; 40]);
    assert_eq!(run("ADD", &batch, &node.config(7)).1, 1);
    drop(agent);
    fs::remove_file(node.socket()).unwrap();
    node.knew_batch_outside(BELIEVED_FOR);
    assert_eq!(run("ADD", &batch, &node.config(7)).1, 1);
    assert!(unasked::read(&node.dir.join("state")).unwrap().is_empty());
}

#[test]
fn the_end_of_a_pod_never_fails_and_comes_three_times() {
    let node = Node::new("del");
    let agent = node.agent(&[r#"{"answer":"proceed"}"#]);
    assert_eq!(run("DEL", &[], &node.config(60)), (String::new(), 0));
    assert_eq!(serde_json::to_value(agent.join().unwrap()[0].command).unwrap(), "del");
    let mut bare = node.config(60);
    bare.as_object_mut().unwrap().remove("prevResult");
    assert_eq!(run("DEL", &[("CNI_NETNS", "")], &bare), (String::new(), 0));
    fs::remove_file(node.socket()).unwrap();
    let _hanging = UnixListener::bind(node.socket()).unwrap();
    let started = Instant::now();
    assert_eq!(run("DEL", &[("CNI_CONTAINERID", ""), ("CNI_ARGS", "x")], &bare), (String::new(), 0));
    assert_eq!(run("DEL", &[], &bare), (String::new(), 0));
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    let garbage = start("DEL", &[], b"{").wait_with_output().unwrap();
    assert_eq!(ended(garbage), (String::new(), 0));
}

#[test]
fn what_cannot_be_understood_is_said_in_the_forms_of_the_specification() {
    let node = Node::new("garbage");
    let by_hand = "this program is started by a container runtime, not by hand";
    let newest =
        |(stdout, code): (String, i32)| (stdout.replace(r#""cniVersion":"1.0.0""#, r#""cniVersion":"1.1.0""#), code);
    for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        let expected = error(4, &format!("{name} is not set"), by_hand);
        assert_eq!(run("ADD", &[(name, "")], &node.config(60)), expected);
    }
    assert_eq!(run("", &[], &node.config(60)), newest(error(4, "CNI_COMMAND is not set", by_hand)));
    assert_eq!(run("PUT", &[], &node.config(60)), newest(error(4, "CNI_COMMAND is `PUT`", by_hand)));
    let one = error(4, "CNI_ARGS has only one of K8S_POD_NAMESPACE and K8S_POD_NAME", by_hand);
    assert_eq!(run("ADD", &[("CNI_ARGS", "K8S_POD_NAME=web")], &node.config(60)), one);
    let garbage = ended(start("ADD", &[], b"{\"cniVersion\": ").wait_with_output().unwrap());
    let message = "the network configuration cannot be read: EOF while parsing a value at line 1 column 15";
    assert_eq!(garbage, newest(error(6, message, "correct the file in the CNI configuration directory")));
    let mut config = node.config(60);
    config["prevResult"] = Value::Null;
    let chained = "put this plugin behind the one that makes the pod's interface, in the `plugins` of a .conflist";
    assert_eq!(run("ADD", &[], &config), error(7, "there is no prevResult", chained));
    config["cniVersion"] = "0.2.0".into();
    let versions = "set one of 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0 in the network configuration";
    assert_eq!(run("ADD", &[], &config), newest(error(1, "cniVersion `0.2.0` is not supported", versions)));
}

#[test]
fn the_other_commands_need_no_agent() {
    let node = Node::new("others");
    for command in ["CHECK", "GC", "STATUS"] {
        assert_eq!(run(command, &[], &node.config(60)), (String::new(), 0), "{command}");
    }
    let supported = r#""supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]"#;
    let version = |version: &str| (format!("{{\"cniVersion\":\"{version}\",{supported}}}\n"), 0);
    assert_eq!(run("VERSION", &[], &json!({ "cniVersion": "0.4.0" })), version("0.4.0"));
    assert_eq!(ended(start("VERSION", &[], b"").wait_with_output().unwrap()), version("1.1.0"));
}
