//! Every verb of `mesh-ctl` against a mesh that runs.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};

use mesh_ctl::sandbox::Part;
use mesh_tests::sandbox_bed::{Ran, SandboxBed, finish, mesh_ctl};
use serde_json::Value;

/// Verbs that list something, and the columns that they begin with.
const LISTS: [(&[&str], &[&str]); 15] = [
    (&["sandbox", "status"], &["PART", "NODE", "STATE", "PID", "ADDRESS", "MESH"]),
    (&["proxy-status"], &["NAME", "KIND", "NODE", "CONTROLLER", "VERSION", "ENROLLED", "SYNC", "LAST-ACK", "ERR"]),
    (&["ps"], &["NAME", "KIND", "NODE", "CONTROLLER", "VERSION", "ENROLLED", "SYNC", "LAST-ACK", "ERR"]),
    (&["version"], &["COMPONENT", "VERSION", "COUNT"]),
    (&["node-config", "workload"], &["NODE", "NAMESPACE", "POD NAME", "ADDRESS", "RUNS ON", "WAYPOINT", "PROTOCOL"]),
    (&["zc", "workload"], &["NODE", "NAMESPACE", "POD NAME", "ADDRESS", "RUNS ON", "WAYPOINT", "PROTOCOL"]),
    (&["node-config", "service"], &["NODE", "NAMESPACE", "SERVICE NAME", "SERVICE VIP", "WAYPOINT", "ENDPOINTS"]),
    (&["node-config", "policy"], &["NODE", "NAMESPACE", "POLICY NAME", "ACTION", "SCOPE"]),
    (&["node-config", "certificate"], &["NODE", "CERTIFICATE NAME", "TYPE", "STATUS", "VALID CERT", "NOT AFTER"]),
    (&["node-config", "log"], &["NODE", "LEVEL"]),
    (&["bpf", "status"], &["NODE", "HOOK", "PROG", "ID", "ATTACHED-TO"]),
    (&["bpf", "map"], &["NODE", "MAP", "KIND", "ENTRIES", "CAPACITY", "FILL"]),
    (&["logs", "client"], &["TIME", "NODE", "DIRECTION", "SOURCE", "DESTINATION", "RESULT"]),
    (
        &["mtls-check", "client", "web-v2"],
        &["SOURCE", "DESTINATION", "STATUS", "SERVER", "CLIENT", "OBSERVED", "IDENTITY"],
    ),
    (
        &["authn", "tls-check", "pod/client", "svc/web"],
        &["SOURCE", "DESTINATION", "STATUS", "SERVER", "CLIENT", "OBSERVED", "IDENTITY"],
    ),
];

/// What a test holds open in a workload; ended when dropped.
struct Held(Child);

impl Drop for Held {
    fn drop(&mut self) {
        // It may have ended by itself, which the test then says.
        let _gone = self.0.kill();
        let _status = self.0.wait();
    }
}

/// A connection from a workload to the database, which has greeted.
fn hold(bed: &SandboxBed, workload: &str) -> Held {
    let script = "exec 3<>/dev/tcp/db/5432; head -n 1 <&3; exec sleep 1000";
    let mut command = bed.ctl(&["sandbox", "exec", workload, "--", "bash", "-c", script]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("220 db ready"), "{line}{}", bed.logs());
    Held(child)
}

fn items(ran: &Ran) -> Vec<Value> {
    ran.json()["items"].as_array().unwrap_or_else(|| panic!("no items: {}", ran.all())).clone()
}

fn with<'a>(verb: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [verb, more].concat()
}

fn up() -> SandboxBed {
    let bed = SandboxBed::new();
    bed.up();
    bed
}

#[test]
fn lists_are_tables_for_people_and_documents_for_programs() {
    let bed = up();
    for (verb, columns) in LISTS {
        let table = bed.run(verb);
        table.succeeds();
        let header = table.stdout.lines().next().unwrap_or_default();
        let found: Vec<&str> = header.split("   ").map(str::trim).filter(|c| !c.is_empty()).collect();
        assert_eq!(found, columns, "{}", table.all());
        assert!(table.stdout.lines().count() > 1, "{}", table.all());
        let wide = bed.run(&with(verb, &["-o", "wide"]));
        let wide_header = wide.succeeds().stdout.lines().next().unwrap_or_default();
        assert!(columns.iter().all(|c| wide_header.contains(c)), "{}", wide.all());
        let bare = bed.run(&with(verb, &["--no-headers"]));
        assert_ne!(bare.succeeds().stdout.lines().next(), Some(header), "{}", bare.all());
        let json = bed.run(&with(verb, &["-o", "json"]));
        json.succeeds();
        assert_eq!(json.json()["apiVersion"], "mesh-ctl/v1", "{}", json.all());
        assert!(json.json()["kind"].is_string(), "{}", json.all());
        assert!(!items(&json).is_empty(), "{}", json.all());
        let yaml = bed.run(&with(verb, &["-o", "yaml"]));
        yaml.succeeds().prints("apiVersion: mesh-ctl/v1\n").prints("items:\n");
    }
}

#[test]
fn every_node_answers_unless_one_is_named() {
    let bed = up();
    let nodes = |ran: &Ran| {
        let of = |item: &Value| item["node"].as_str().unwrap_or_default().to_owned();
        items(ran).iter().map(of).collect::<std::collections::BTreeSet<_>>()
    };
    let all = bed.run(&["node-config", "workload", "-o", "json"]);
    assert_eq!(nodes(&all), ["node-a", "node-b"].map(str::to_owned).into(), "{}", all.all());
    assert_eq!(items(&all).len(), 10, "5 workloads on each of 2 nodes: {}", all.all());
    let one = bed.run(&["node-config", "workload", "-o", "json", "--node", "node-b"]);
    assert_eq!(nodes(&one), ["node-b".to_owned()].into(), "{}", one.all());
    bed.run(&["node-config", "workload", "--node", "node-z"]).exits(64).complains("there are node-a, node-b");
    bed.run(&["node-config", "workload", "-n", "elsewhere"]).succeeds().prints("no Workload found");
}

#[test]
fn node_config_shows_what_is_in_force() {
    let bed = up();
    let workloads = items(&bed.run(&["node-config", "workload", "-o", "json"]));
    let web = workloads.iter().find(|w| w["name"] == "web-v2" && w["node"] == "node-a").unwrap();
    assert_eq!((&web["protocol"], &web["runsOn"]), (&"HBONE".into(), &"node-b".into()), "{web}");
    assert_eq!(web["identity"], "spiffe://cluster.local/ns/default/sa/web");
    assert_eq!(web["addresses"], serde_json::json!(["10.244.2.10", "fd00:10:244:2::a"]));
    let legacy = workloads.iter().find(|w| w["name"] == "legacy").unwrap();
    assert_eq!(legacy["protocol"], "TCP");
    let services = items(&bed.run(&["node-config", "service", "-o", "json"]));
    let web = services.iter().find(|s| s["name"] == "web").unwrap();
    assert_eq!(web["endpoints"].as_array().unwrap().len(), 2, "{web}");
    let certificates = bed.run(&["node-config", "certificate"]);
    for (node, account) in [("node-a", "client"), ("node-a", "web"), ("node-b", "web"), ("node-b", "db")] {
        let leaf = |l: &str| l.starts_with(node) && l.contains(&format!("/sa/{account} ")) && l.contains("Leaf");
        let line = certificates.stdout.lines().find(|l| leaf(l)).unwrap_or_else(|| panic!("{}", certificates.all()));
        assert!(line.contains("Available") && line.contains("true"), "{line}");
    }
    assert!(!certificates.stdout.contains("legacy"), "{}", certificates.all());
    let policy = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-client, namespace: default}
spec:
  selector: {matchLabels: {app: db}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/default/sa/client]}}]
    to: [{operation: {ports: ['5432']}}]
";
    let file = bed.file("policy.yaml", policy);
    bed.run(&["sandbox", "apply", file.to_str().unwrap()]).succeeds();
    let policies = bed.run(&["node-config", "policy", "-o", "wide", "-n", "default"]);
    policies.succeeds().prints("only-client").prints("ALLOW").prints("sa/client").prints("5432");
    let held = hold(&bed, "client");
    let live = bed.run(&["node-config", "connections"]);
    let row = |node: &str, workload: &str, direction: &str| {
        live.stdout
            .lines()
            .any(|l| l.starts_with(node) && l.contains(workload) && l.contains(direction) && l.contains("HBONE"))
    };
    assert!(row("node-a", "client.default", "outbound") && row("node-b", "db.default", "inbound"), "{}", live.all());
    bed.run(&["status"]).succeeds().prints("2 of 2 with verified identities");
    drop(held);
    bed.eventually("the connection is gone", || {
        bed.run(&["node-config", "connections"]).stdout.contains("no Connection found")
    });
}

#[test]
fn log_levels_are_shown_and_set() {
    let bed = up();
    bed.run(&["node-config", "log", "--level", "mesh_node=debug,info", "--node", "node-a"]).succeeds();
    let levels = items(&bed.run(&["node-config", "log", "-o", "json"]));
    let level = |node: &str| levels.iter().find(|l| l["node"] == node).unwrap()["level"].clone();
    assert!(level("node-a").as_str().unwrap().contains("mesh_node=debug"), "{levels:?}");
    assert_eq!(level("node-b"), "info");
    let wrong = bed.run(&["node-config", "log", "--level", "no=such=level"]);
    wrong.exits(64).complains("node-a");
}

#[test]
fn a_saved_dump_answers_as_the_mesh_did() {
    let bed = up();
    let dump = bed.run(&["node-config", "all", "-o", "json"]);
    dump.succeeds();
    let file = bed.file("dump.json", &dump.stdout);
    let file = file.to_str().unwrap();
    let yaml = bed.file("dump.yaml", &bed.run(&["node-config", "all", "-o", "yaml"]).stdout);
    let verbs: [&[&str]; 6] = [
        &["node-config", "workload"],
        &["node-config", "service"],
        &["node-config", "policy"],
        &["node-config", "certificate"],
        &["bpf", "map"],
        &["version"],
    ];
    let live: Vec<Ran> = verbs.iter().map(|verb| bed.run(&with(verb, &["-o", "json"]))).collect();
    bed.run(&["sandbox", "down"]).succeeds();
    for (verb, live) in verbs.iter().zip(live) {
        let saved = bed.run(&with(verb, &["-o", "json", "-f", file]));
        saved.succeeds();
        if verb[0] == "bpf" {
            // Connections come and go between the dump and the question.
            assert_eq!(items(&saved).len(), items(&live).len());
        } else {
            assert_eq!(saved.json(), live.json());
        }
    }
    let workloads = |file| bed.run(&["node-config", "workload", "-o", "json", "-f", file]).json();
    assert_eq!(workloads(yaml.to_str().unwrap()), workloads(file), "a dump in YAML");
    let garbage = bed.file("garbage.json", "{}");
    bed.run(&["node-config", "workload", "-f", garbage.to_str().unwrap()]).exits(65).complains("garbage.json");
    bed.run(&["node-config", "workload", "-f", "/nonexistent"]).exits(65).complains("/nonexistent");
}

#[test]
fn mtls_check_says_what_is_configured_and_what_was_seen() {
    let bed = up();
    let check = |arguments: &[&str]| bed.run(&with(&["mtls-check", "-o", "json"], arguments));
    // The first request of `up` went to the other node.
    let across = check(&["client", "web-v2"]);
    let pair = items(across.succeeds()).remove(0);
    assert_eq!((&pair["status"], &pair["server"]), (&"OK".into(), &"PERMISSIVE".into()), "{pair}");
    assert!(pair["observed"]["mtls"].as_u64().unwrap() >= 1 && pair["observed"]["plain"] == 0, "{pair}");
    // A live connection counts as well; so does one of a workload outside, as the server's node sees it.
    let (ours, theirs) = (hold(&bed, "client"), hold(&bed, "legacy"));
    let pair = items(&check(&["client", "db"])).remove(0);
    assert_eq!(pair["observed"]["mtls"], 1, "{pair}");
    let outside = check(&["legacy", "db"]);
    let pair = items(outside.exits(79)).remove(0);
    assert_eq!((&pair["status"], &pair["observed"]["plain"]), (&"PLAINTEXT".into(), &1.into()), "{pair}");
    drop((ours, theirs));
    let strict = "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: {mode: STRICT}}
";
    let file = bed.file("strict.yaml", strict);
    bed.run(&["sandbox", "apply", file.to_str().unwrap()]).succeeds();
    let pair = items(check(&["client", "svc/db"]).succeeds()).remove(0);
    assert_eq!((&pair["status"], &pair["server"]), (&"OK".into(), &"STRICT".into()), "{pair}");
    let pair = items(check(&["legacy.default", "db.default"]).exits(79)).remove(0);
    assert_eq!((&pair["status"], &pair["server"]), (&"REFUSED".into(), &"STRICT".into()), "{pair}");
    // It is so.
    assert_ne!(bed.exec("legacy", &["curl", "-sS", "--max-time", "5", "http://web:8080/"]).code, Some(0));
    bed.curl("client", "http://web/").succeeds();
    // One port is an exception.
    let exception = "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: db, namespace: default}
spec: {selector: {matchLabels: {app: db}}, portLevelMtls: {5432: {mode: PERMISSIVE}}}
";
    let file = bed.file("exception.yaml", exception);
    bed.run(&["sandbox", "apply", file.to_str().unwrap()]).succeeds();
    let pair = items(check(&["legacy", "db"]).exits(79)).remove(0);
    assert_eq!((&pair["status"], &pair["server"]), (&"PLAINTEXT".into(), &"MIXED".into()), "{pair}");
    // Every workload of the mesh, when none is named: `legacy` keeps it from being all well.
    let all = check(&["client"]);
    assert_eq!(items(all.exits(79)).len(), 4, "{}", all.all());
    check(&["nobody", "db"]).exits(64).complains("there are client.default");
}

#[test]
fn authz_why_decides_as_the_traffic_is_decided() {
    let bed = up();
    let policies = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web-for-client, namespace: default}
spec:
  selector: {matchLabels: {app: web}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/default/sa/client]}}]
    to: [{operation: {ports: ['8080']}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-web-v1, namespace: default}
spec:
  selector: {matchLabels: {version: v1}}
  action: DENY
  rules:
  - from: [{source: {namespaces: [default]}}]
";
    let file = bed.file("authz.yaml", policies);
    bed.run(&["sandbox", "apply", file.to_str().unwrap()]).succeeds();
    let sandbox = bed.open();
    for (client, server, decision, policy) in [
        ("client", "web-v1", "deny", "default/no-web-v1"),
        ("client", "web-v2", "allow", "default/web-for-client"),
        ("legacy", "web-v1", "deny", ""),
        ("legacy", "web-v2", "deny", ""),
    ] {
        let why = bed.run(&["authz", "why", client, server, "8080", "-o", "json"]);
        let answer = items(why.succeeds()).remove(0);
        assert_eq!(answer["decision"], decision, "{client} -> {server}: {answer}");
        assert_eq!(answer["policy"], policy, "{client} -> {server}: {answer}");
        let address = sandbox.topology().addresses(sandbox.workload(server).unwrap()).unwrap()[0];
        let url = format!("http://{address}:8080/");
        let real = bed.exec(client, &["curl", "-sS", "--max-time", "5", &url]);
        assert_eq!(real.code == Some(0), decision == "allow", "{client} -> {server}: {}", real.all());
    }
    // The table names every policy that was looked at, and what is missing.
    let table = bed.run(&["authz", "why", "legacy", "svc/web", "80"]);
    table.succeeds().prints("deny").prints("no identity").prints("default/web-for-client").prints("ACTION");
    bed.run(&["authz", "why", "client", "web-v2", "9090"]).succeeds().prints("deny:").prints("web-for-client");
    bed.run(&["authz", "why", "client", "legacy", "80"]).succeeds().prints("not in the mesh");
    bed.run(&["authz", "why", "10.9.9.9", "web-v2", "8080"]).succeeds().prints("deny:");
    for port in ["15001", "15006", "15008"] {
        bed.run(&["authz", "why", "client", "web-v2", port])
            .succeeds()
            .prints("deny:")
            .prints("cannot be a destination");
    }
    bed.run(&["authz", "why", "client", "web-v2", "0"]).exits(64);
    bed.run(&["authz", "why", "client", "svc/web", "81"]).exits(64).complains("80->8080");
    bed.run(&["authz", "why", "client", "svc/nothing", "80"]).exits(64).complains("svc/web.default");
}

#[test]
fn bpf_shows_hooks_maps_verdicts_and_drops() {
    let bed = up();
    let status = bed.run(&["bpf", "status"]);
    for hook in ["cgroup/connect4", "cgroup/connect6", "cgroup/sock_ops", "tc/ingress", "tc/egress"] {
        status.prints(hook);
    }
    status.prints("client.default").prints("captured").prints("redirect");
    let map = bed.run(&["bpf", "map", "WORKLOADS"]);
    map.succeeds().prints("client.default").prints("10.244.1.10").prints("web-v2.default");
    assert!(!map.stdout.contains("legacy"), "{}", map.all());
    bed.run(&["bpf", "map", "NOTHING"]).exits(64).complains("WORKLOADS");
    // The proxy's own listener, dialled by an application, is refused and seen.
    bed.exec("client", &["curl", "-sS", "--max-time", "5", "http://127.0.0.1:15001/"]).exits(7);
    let refused = |ran: &Ran| {
        items(ran).iter().any(|i| {
            i["counters"]
                .as_array()
                .is_some_and(|c| c.iter().any(|c| c["verdict"] == "refuse" && c["hook"] == "connect4"))
        })
    };
    let status = bed.run(&["bpf", "status", "-o", "json"]);
    assert!(refused(&status), "{}", status.all());
    bed.eventually("the refusal is among the events", || {
        let events = items(&bed.run(&["bpf", "events", "-o", "json"]));
        events.iter().any(|e| e["workload"] == "client.default" && e["destination"] == "127.0.0.1:15001")
    });
}

#[test]
fn logs_tell_who_talked_to_whom() {
    let bed = up();
    bed.curl("legacy", "http://web:8080/").succeeds();
    let logs = bed.run(&["logs", "client", "-o", "wide"]);
    logs.succeeds()
        .prints("outbound")
        .prints("client.default")
        .prints("spiffe://cluster.local/ns/default/sa/web")
        .prints(":15008");
    assert!(!logs.stdout.contains("legacy"), "{}", logs.all());
    bed.eventually("the server's node has the plain connection", || {
        bed.run(&["logs", "legacy"]).stdout.lines().any(|l| l.contains("inbound") && l.contains("legacy.default"))
    });
    let one = bed.run(&["logs", "client", "--tail", "1", "--node", "node-a", "-o", "json"]);
    assert_eq!(items(&one).len(), 1, "{}", one.all());
}

#[test]
fn what_does_not_answer_is_named_and_the_rest_is_shown() {
    let bed = up();
    bed.kill(&Part::Node("node-b".into()));
    for verb in [&["node-config", "workload"][..], &["status"], &["proxy-status"], &["bpf", "status"]] {
        bed.run(verb).exits(69).prints("node-a").complains("node-b");
    }
    bed.run(&["node-config", "workload", "--node", "node-a"]).succeeds();
    bed.up();
    bed.kill(&Part::Controller);
    bed.run(&["proxy-status"]).exits(69).prints("mesh-node.node-a").complains("controller");
    bed.run(&["status"]).exits(69).prints("node-a").prints("disconnected").complains("controller");
    bed.run(&["node-config", "workload"]).succeeds();
    // Traffic goes on without a controller.
    bed.curl("client", "http://web/").succeeds();
}

#[test]
fn sockets_can_be_named_instead_of_a_sandbox() {
    let bed = up();
    let layout = bed.layout();
    let (node, controller) = (layout.node_admin("node-b"), layout.controller_admin());
    let mut command = std::process::Command::new(mesh_ctl());
    command.args(["status", "-o", "json", "--admin-socket"]).arg(&node).arg("--controller-socket").arg(&controller);
    let ran = finish(command);
    assert_eq!(items(ran.succeeds())[0]["node"], "node-b", "{}", ran.all());
    let missing = bed.run(&["node-config", "workload", "--admin-socket", "/nonexistent.sock"]);
    missing.exits(69).complains("/nonexistent.sock");
}

#[test]
fn a_wrong_command_line_exits_with_64_and_a_user_without_rights_with_77() {
    let bed = up();
    for wrong in [&["nonsense"][..], &["node-config"], &["authz", "why", "client"], &["status", "-o", "xml"]] {
        bed.run(wrong).exits(64);
    }
    bed.run(&["sandbox", "status", "--sandbox", "No Such Name"]).exits(64).complains("lower case");
    bed.exec("client", &["no-such-command"]).exits(127).complains("no-such-command");
    bed.exec("client", &["/etc/hosts"]).exits(126).complains("/etc/hosts");
    bed.run(&["--help"]).succeeds().prints("Usage: mesh-ctl");
    // A copy that anybody may run, whatever the rights of the build directory are.
    let copy = bed.file("mesh-ctl", "");
    std::fs::copy(mesh_ctl(), &copy).unwrap();
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
    for verb in [&["status"][..], &["sandbox", "status"], &["sandbox", "up"], &["sandbox", "down"]] {
        let mut command = std::process::Command::new(&copy);
        command.args(verb).env("MESH_SANDBOX", bed.name()).stdin(Stdio::null()).uid(65534).gid(65534);
        finish(command).exits(77).complains("sudo");
    }
    bed.run(&["sandbox", "status"]).succeeds();
}

#[test]
fn completion_scripts_know_the_verbs() {
    let bed = SandboxBed::new();
    for shell in ["bash", "zsh", "fish"] {
        bed.run(&["completion", shell]).succeeds().prints("node-config").prints("mtls-check");
    }
    let script = bed.run(&["completion", "bash"]).stdout;
    let file = bed.file("completion.bash", &script);
    let mut check = std::process::Command::new("bash");
    check.arg("-n").arg(file);
    finish(check).succeeds();
    bed.run(&["completion", "tcsh"]).exits(64);
    // Without a mesh the client still knows its own version, and says that it is alone.
    bed.run(&["version"]).succeeds().prints("mesh-ctl").complains("no mesh to ask");
}

#[test]
fn files_are_validated_without_a_mesh() {
    let bed = SandboxBed::new();
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec: ";
    let (good, bad) = (format!("{policy}{{}}\n"), format!("{policy}{{action: MAYBE}}\n"));
    let (good, bad) = (bed.file("good.yaml", &good), bed.file("bad.yaml", &bad));
    let (good, bad) = (good.to_str().unwrap(), bad.to_str().unwrap());
    bed.run(&["validate", "-f", good]).succeeds().prints("1 objects read, 0 errors, 0 warnings");
    bed.run(&["validate", "-f", bad]).exits(79).prints("bad.yaml:4").prints("spec.action").prints("1 errors");
    let directory = std::path::Path::new(good).parent().unwrap().to_str().unwrap();
    let both = bed.run(&["validate", directory, "-o", "json"]);
    let found = items(both.exits(79));
    assert_eq!((found.len(), &found[0]["field"]), (1, &"spec.action".into()), "{}", both.all());
    bed.run(&["validate", "/nowhere.yaml"]).exits(65).complains("/nowhere.yaml");
    bed.run(&["validate"]).exits(64);
}

#[test]
fn the_configuration_of_a_sandbox_is_analyzed_with_files_on_top() {
    let bed = up();
    let policy =
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: default}\nspec: ";
    let of = |label: &str| format!("{policy}{{selector: {{matchLabels: {{app: {label}}}}}}}\n");
    let (web, nobody) = (bed.file("web.yaml", &of("web")), bed.file("nobody.yaml", &of("nobody")));
    bed.run(&["analyze", "-A", web.to_str().unwrap()]).succeeds().prints("no issues found");
    bed.run(&["analyze", nobody.to_str().unwrap()])
        .succeeds()
        .prints("Warning [IST0127] (AuthorizationPolicy default/p ");
    // The file's version of an object that is there counts, and is no second one.
    bed.run(&["sandbox", "apply", nobody.to_str().unwrap()]).succeeds();
    bed.run(&["analyze"]).succeeds().prints("IST0127");
    bed.run(&["analyze", web.to_str().unwrap()]).succeeds().prints("no issues found");
}
