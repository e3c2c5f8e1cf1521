//! The sandbox as its user sees it: `mesh-ctl sandbox` with the whole mesh in it.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use mesh_ctl::sandbox::{Layout, Mesh, Part, Sandbox, Topology};
use mesh_tests::sandbox_bed::footprint::KernelObject;
use mesh_tests::sandbox_bed::{Footprint, Ran, SandboxBed, mesh_ctl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// `up` on a built tree, its first request included.
const UP_WITHIN: Duration = Duration::from_secs(20);

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";

/// The versions of `web` that answered in `requests` requests.
fn versions(bed: &SandboxBed, requests: usize) -> BTreeSet<String> {
    let ask = |_| bed.curl("client", "http://web/").succeeds().stdout.split(' ').next().unwrap_or_default().to_owned();
    (0..requests).map(ask).collect()
}

fn answers(bed: &SandboxBed) -> Ran {
    let ran = bed.curl("client", "http://web/");
    ran.succeeds().prints("says hello to");
    ran
}

fn goes(bed: &SandboxBed, print: &Footprint) {
    bed.run(&["sandbox", "down"]).succeeds().prints("ended");
    // The kernel frees programs and maps some time after their last user is gone.
    bed.eventually("everything is gone", || print.left().is_empty());
}

#[test]
fn up_makes_a_first_request_over_mutual_tls_and_down_leaves_nothing() {
    let bed = SandboxBed::new();
    let up = bed.up();
    up.prints(CLIENT).prints(WEB).prints("node-a").prints("node-b").prints("HBONE").prints(":15008");
    up.prints("sandbox down").prints("sandbox exec client").prints("authz why").prints("mtls-check");
    assert!(up.took < UP_WITHIN, "{}", up.all());
    let print = Footprint::of(&bed.layout());
    let count = |kind: fn(&KernelObject) -> bool| print.objects.iter().filter(|o| kind(o)).count();
    assert!(count(|o| matches!(o, KernelObject::Program(_))) > 0, "no pinned program: {print:?}");
    assert!(count(|o| matches!(o, KernelObject::Map(_))) > 0, "no pinned map: {print:?}");
    assert!(count(|o| matches!(o, KernelObject::Link(_))) > 0, "no pinned link: {print:?}");
    assert!(print.processes.len() >= 9, "controller, agent, 2 supervisors, 2 proxies, 3 servers: {print:?}");
    goes(&bed, &print);
    bed.run(&["sandbox", "down"]).succeeds().prints("there is no sandbox");
}

#[test]
fn the_demonstration_does_what_it_shows() {
    let bed = SandboxBed::new();
    bed.up();
    let both = BTreeSet::from(["web-v1".to_owned(), "web-v2".to_owned()]);
    assert_eq!(versions(&bed, 40), both, "both nodes serve\n{}", bed.logs());
    let sandbox = bed.open();
    let own = |workload: &str| sandbox.topology().addresses(sandbox.workload(workload).unwrap()).unwrap();
    let [client, client6] = own("client");
    let by_v4 = ["curl", "-4", "-sS", "--max-time", "10", "http://web/"];
    bed.exec("client", &by_v4).succeeds().prints(&format!("hello to {client}:"));
    let by_v6 = format!("http://[{}]:8080/", own("web-v2")[1]);
    bed.exec("client", &["curl", "-sSg", "--max-time", "10", &by_v6]).succeeds().prints(&format!("[{client6}]"));
    // The server speaks first.
    let greeting = "exec 3<>/dev/tcp/db/5432; head -n 1 <&3";
    bed.exec("client", &["timeout", "10", "bash", "-c", greeting]).succeeds().prints("220 db ready");
    // Out of the mesh into it, and the other way, in plain TCP: nothing forbids it yet.
    bed.exec("legacy", &["timeout", "10", "bash", "-c", greeting]).succeeds().prints("220 db ready");
    bed.exec("legacy", &["curl", "-sS", "--max-time", "10", "http://web:8080/"]).succeeds().prints("says hello to");
}

#[test]
fn up_again_says_that_it_is_up_and_changes_nothing() {
    let bed = SandboxBed::new();
    bed.up();
    let processes = bed.open().state().processes.clone();
    bed.up().complains("is up already").prints("controller").prints("node/node-a").prints("workload/web-v1");
    assert_eq!(bed.open().state().processes, processes);
}

fn all_parts() -> Vec<Part> {
    let node = |name: &str| Part::Node(name.into());
    let workload = |name: &str| Part::Workload(name.into());
    vec![Part::Controller, Part::Agent, node("node-a"), node("node-b"), workload("web-v2"), workload("db")]
}

#[test]
fn up_repairs_whatever_was_killed() {
    let bed = SandboxBed::new();
    bed.up();
    for part in all_parts() {
        bed.kill(&part);
        let status = bed.run(&["sandbox", "status"]);
        status.exits(79);
        let row = status
            .stdout
            .lines()
            .find(|l| l.starts_with(&format!("{part} ")))
            .unwrap_or_else(|| panic!("{}", status.all()));
        assert!(row.contains("dead"), "{row}");
        bed.up().complains(&part.to_string());
        bed.run(&["sandbox", "status"]).succeeds();
        assert_eq!(versions(&bed, 40).len(), 2, "after kill -9 of {part}\n{}", bed.logs());
    }
    let print = Footprint::of(&bed.layout());
    goes(&bed, &print);
}

#[test]
fn up_repairs_when_everything_was_killed_at_once() {
    let bed = SandboxBed::new();
    bed.up();
    for pid in Footprint::of(&bed.layout()).processes {
        // A child may have ended with its parent.
        let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    bed.eventually("all processes are gone", || Footprint::of(&bed.layout()).processes.is_empty());
    bed.exec("client", &["curl", "-sS", "--max-time", "3", "http://web/"]).exits(7);
    bed.up();
    assert_eq!(versions(&bed, 40).len(), 2, "{}", bed.logs());
    let print = Footprint::of(&bed.layout());
    goes(&bed, &print);
}

#[test]
fn up_rebuilds_what_has_lost_its_network() {
    let bed = SandboxBed::new();
    bed.up();
    let before = Footprint::of(&bed.layout());
    for pid in &before.processes {
        let _gone = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    // As after a restart of the machine: the files are there, the namespaces are not.
    for name in before.namespaces.keys() {
        mesh_ctl::sandbox::netns::remove(&bed.layout().netns(name)).unwrap();
    }
    bed.up().complains("only a part is there");
    answers(&bed);
    let print = Footprint::of(&bed.layout());
    goes(&bed, &print);
    bed.eventually("nothing of the first one is left", || before.left().is_empty());
}

/// Starts `up`, kills it as soon as `moment` exists, and lets another `up` find what is left.
fn killed_at(moment: impl Fn(&Layout) -> PathBuf) {
    let bed = SandboxBed::new();
    let moment = moment(&bed.layout());
    let mut up = bed.ctl(&["sandbox", "up"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    bed.eventually(&format!("{} exists", moment.display()), || moment.exists());
    up.kill().unwrap();
    assert!(!up.wait().unwrap().success(), "it was at its end before {} existed", moment.display());
    let print = Footprint::of(&bed.layout());
    bed.up();
    answers(&bed);
    let second = Footprint::of(&bed.layout());
    goes(&bed, &second);
    bed.eventually("nothing of the first one is left", || print.left().is_empty());
}

#[test]
fn up_killed_when_it_has_written_its_record() {
    killed_at(Layout::state);
}

#[test]
fn up_killed_among_the_namespaces() {
    killed_at(|layout| layout.netns("node-b"));
}

#[test]
fn up_killed_when_the_controller_runs() {
    killed_at(Layout::controller_admin);
}

#[test]
fn up_killed_when_the_node_proxies_start() {
    killed_at(|layout| layout.node_admin("node-a"));
}

/// A mesh whose node proxy cannot run says why, and nothing of it stays.
#[test]
fn up_that_fails_says_why_and_gives_everything_back() {
    let bed = SandboxBed::new();
    let real = mesh_ctl().parent().unwrap().to_path_buf();
    let broken = bed.file("mesh-node", "#!/bin/sh\necho 'no such kernel' >&2\nexit 78\n");
    std::fs::set_permissions(&broken, std::fs::Permissions::from_mode(0o755)).unwrap();
    let binaries = broken.parent().unwrap().to_path_buf();
    for name in ["mesh-ctl", "mesh-controller"] {
        std::os::unix::fs::symlink(real.join(name), binaries.join(name)).unwrap();
    }
    let mesh = Mesh { binaries, node_args: Vec::new(), controller_args: Vec::new() };
    let mut print = None;
    let mut watch = |_: &str| print = Some(Footprint::of(&bed.layout()));
    let error = Sandbox::up(bed.name(), Topology::demo(), Some(mesh), &mut watch).unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("node/node-") && error.contains("has ended") && error.contains("no such kernel"), "{error}");
    let print = print.unwrap();
    assert!(!print.processes.is_empty(), "the controller and the agent ran: {print:?}");
    bed.eventually("everything is given back", || print.left().is_empty());
}

#[test]
fn two_sandboxes_at_the_same_addresses_do_not_meet() {
    let (a, b) = (SandboxBed::new(), SandboxBed::new());
    std::thread::scope(|scope| {
        let first = scope.spawn(|| a.up());
        b.up();
        first.join().unwrap();
    });
    // In A nobody serves web any more; B's is at the very same addresses.
    for web in ["web-v1", "web-v2"] {
        a.kill(&Part::Workload(web.into()));
    }
    assert_ne!(a.curl("client", "http://web/").code, Some(0), "A's client was answered\n{}", a.logs());
    answers(&b);
    let print = Footprint::of(&a.layout());
    goes(&a, &print);
    answers(&b);
    b.run(&["sandbox", "status"]).succeeds();
}

const DENY_CLIENT: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: not-the-client
  namespace: default
spec:
  selector:
    matchLabels:
      app: web
  action: DENY
  rules:
  - from:
    - source:
        principals: [cluster.local/ns/default/sa/client]
";

#[test]
fn a_policy_holds_from_apply_to_delete() {
    let bed = SandboxBed::new();
    bed.up();
    let file = bed.file("deny.yaml", DENY_CLIENT);
    let path = file.to_str().unwrap();
    answers(&bed);
    bed.run(&["sandbox", "apply", path]).succeeds().prints("applied");
    // In force when `apply` has ended, not some time later.
    for _ in 0..10 {
        assert_ne!(bed.curl("client", "http://web/").code, Some(0), "{}", bed.logs());
    }
    bed.exec("legacy", &["curl", "-sS", "--max-time", "10", "http://web:8080/"]).succeeds();
    bed.run(&["sandbox", "delete", path]).succeeds().prints("deleted");
    for _ in 0..10 {
        answers(&bed);
    }
    bed.run(&["sandbox", "delete", path]).exits(64).complains("was not applied");
}

#[test]
fn a_change_that_a_node_does_not_have_is_not_said_to_be_in_force() {
    let bed = SandboxBed::new();
    bed.up();
    let service = "apiVersion: v1
kind: Service
metadata: {name: more, namespace: default}
spec: {clusterIP: 10.96.7.7, ports: [{port: 80}]}
";
    let file = bed.file("more.yaml", service);
    bed.kill(&Part::Node("node-b".into()));
    bed.run(&["sandbox", "apply", file.to_str().unwrap()]).exits(69).complains("node-b (not connected)");
    // Nodes that were without a controller for a while wait before they dial again; `up` waits for them.
    bed.kill(&Part::Controller);
    std::thread::sleep(Duration::from_secs(4));
    bed.up();
    bed.run(&["status"]).succeeds();
    bed.run(&["sandbox", "delete", file.to_str().unwrap()]).succeeds();
}

#[test]
fn a_bad_file_is_named_with_line_and_field_and_the_rest_of_it_applies() {
    let bed = SandboxBed::new();
    bed.up();
    let wrong = "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: impossible
  namespace: default
spec:
  rules:
  - to:
    - operation:
        ports:
        - \"99999\"
";
    let text = format!("{DENY_CLIENT}{wrong}");
    let line = text.lines().position(|l| l.contains("99999")).unwrap() + 1;
    let file = bed.file("half.yaml", &text);
    let ran = bed.run(&["sandbox", "apply", file.to_str().unwrap(), "-o", "json"]);
    ran.exits(79);
    let problems = ran.json();
    let problem = problems["items"].as_array().unwrap().iter().find(|p| p["severity"] == "error");
    let problem = problem.unwrap_or_else(|| panic!("no error: {}", ran.all()));
    assert_eq!(problem["file"], file.to_str().unwrap(), "{}", ran.all());
    assert_eq!(problem["field"], "spec.rules[0].to[0].operation.ports[0]", "{}", ran.all());
    assert_eq!(problem["line"], line, "{}", ran.all());
    assert_eq!(problem["object"], "AuthorizationPolicy default/impossible");
    assert!(!problem["hint"].as_str().unwrap().is_empty(), "what to do: {problem}");
    assert_ne!(bed.curl("client", "http://web/").code, Some(0), "the good half applies\n{}", bed.logs());
    let table = bed.run(&["sandbox", "apply", file.to_str().unwrap()]);
    table.exits(79).prints(&format!("half.yaml:{line}")).prints("ports[0]");
    // `status` keeps saying it.
    bed.run(&["status"]).exits(79).prints("MESH");
    bed.run(&["sandbox", "delete", file.to_str().unwrap()]).succeeds();
    bed.run(&["status"]).succeeds();
    answers(&bed);
}

#[test]
fn a_file_that_is_no_yaml_breaks_nothing() {
    let bed = SandboxBed::new();
    bed.up();
    let file = bed.file("broken.yaml", "kind: [AuthorizationPolicy\nmetadata: {\n");
    let ran = bed.run(&["sandbox", "apply", file.to_str().unwrap()]);
    ran.exits(79).prints("applied in part").prints("broken.yaml:").prints("MESH002");
    answers(&bed);
    bed.run(&["sandbox", "apply", "/nonexistent/file.yaml"]).exits(65).complains("/nonexistent/file.yaml");
}

#[test]
fn exec_hands_on_input_output_and_exit_code() {
    let bed = SandboxBed::new();
    bed.up();
    bed.exec("client", &["sh", "-c", "echo out; echo err >&2; exit 42"]).exits(42).prints("out").complains("err");
    let hostname = bed.exec("client", &["cat", "/etc/hosts"]);
    hostname.succeeds().prints("10.96.0.10 web");
    bed.exec("nobody", &["true"]).exits(64).complains("there are client");
    bed.exec("client", &["/nonexistent"]).exits(127);
    bed.run(&["sandbox", "logs", "web-v1"]).succeeds();
    bed.run(&["sandbox", "logs", "node-a"]).succeeds();
    bed.run(&["sandbox", "logs"]).succeeds().prints("==> controller").prints("==> node-b");
    bed.run(&["sandbox", "logs", "nobody"]).exits(64).complains("there are controller");
}

#[test]
fn without_a_sandbox_every_verb_says_how_to_make_one() {
    let bed = SandboxBed::new();
    for arguments in [
        &["sandbox", "status"][..],
        &["sandbox", "exec", "client", "--", "true"],
        &["sandbox", "logs"],
        &["sandbox", "apply", "/dev/null"],
        &["status"],
        &["proxy-status"],
        &["node-config", "workload"],
        &["bpf", "status"],
        &["logs", "client"],
        &["mtls-check", "client", "web-v1"],
        &["authz", "why", "client", "web-v1", "8080"],
    ] {
        bed.run(arguments).exits(69).complains("sandbox up");
    }
    bed.run(&["sandbox", "down"]).succeeds();
    assert!(!bed.layout().run.exists());
}
