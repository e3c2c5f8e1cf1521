//! The verbs of `mesh-node` besides serving: a configuration that cannot work, `cleanup`, `check`.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::process::{Command, Output};

use mesh_ctl::sandbox::{Part, binaries_beside};
use mesh_tests::mesh_bed::{Attempt, MeshBed, two_nodes};

fn mesh_node(args: &[&str]) -> Output {
    Command::new(binaries_beside().unwrap().join("mesh-node")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_configuration_that_cannot_work_ends_the_node_proxy_once_with_the_reason() {
    let mut bed = MeshBed::up("config", two_nodes());
    bed.sandbox.end_part(&Part::Node("node-b".into())).unwrap();
    let layout = &bed.sandbox.layout;
    let no_bpffs = layout.run.display().to_string();
    let whole = layout.cgroup.display().to_string();
    for (flag, value, reason) in [
        ("--bpffs", &no_bpffs, "is not on a BPF file system"),
        ("--cgroup", &whole, "run mesh-node cleanup, then start again"),
    ] {
        let mut argv = bed.sandbox.node_argv("node-b").unwrap();
        let at = argv.iter().position(|argument| argument == flag).expect("flag");
        argv[at + 1].clone_from(value);
        let mut node = bed.run_on("node-b", &argv);
        assert_eq!(node.wait_for_exit(), Some(78), "{flag} {value}");
        let said = node.stderr();
        assert!(said.contains(reason), "{said}");
        assert_eq!(said.matches("proxy started").count(), 1, "tried once: {said}");
    }
    let output = mesh_node(&["run", "--node", "n", "--controller", "nowhere"]);
    assert_eq!(output.status.code(), Some(2), "a wrong command line");
    assert!(text(&output.stderr).contains("is not HOST:PORT"), "{}", text(&output.stderr));
}

#[test]
fn cleanup_removes_all_that_was_pinned_or_attached_and_says_so() {
    let mut bed = MeshBed::up("clean", two_nodes());
    let far = bed.address("far");
    let in_use = mesh_node(&["cleanup", "--bpffs", &bed.sandbox.layout.bpf().join("node-b").display().to_string()]);
    assert!(!in_use.status.success() && text(&in_use.stderr).contains("end it first"), "{}", text(&in_use.stderr));
    bed.stream("client", far).wait("traffic as before", Attempt::is_ok);
    for node in ["node-a", "node-b"] {
        bed.sandbox.end_part(&Part::Node(node.into())).unwrap();
    }
    let refused = bed.stream("client", far).wait("an attempt", |_| true);
    assert!(!refused.is_ok(), "the programs stay when the node proxies go: {refused:?}");
    for node in ["node-a", "node-b"] {
        let (bpffs, pods) = (bed.sandbox.layout.bpf().join(node), bed.sandbox.layout.pods_cgroup(node));
        let (bpffs, pods) = (bpffs.display().to_string(), pods.display().to_string());
        let output = mesh_node(&["cleanup", "--bpffs", &bpffs, "--cgroup", &pods]);
        let said = text(&output.stdout);
        assert!(output.status.success(), "{said}{}", text(&output.stderr));
        for part in ["maps/WORKLOADS", "connect4", "sock_ops", "tc_ingress", "routing rules"] {
            assert!(said.lines().any(|line| line.starts_with("removed") && line.contains(part)), "{part}: {said}");
        }
        assert!(!said.contains("still attached"), "{said}");
        assert_eq!(std::fs::read_dir(&bpffs).unwrap().count(), 0, "{bpffs} is empty");
        let again = text(&mesh_node(&["cleanup", "--bpffs", &bpffs]).stdout);
        assert_eq!(again, format!("nothing was pinned in {bpffs}\n"));
    }
    bed.stream("client", far).wait("plain traffic: nothing is captured any more", Attempt::is_ok);
}

#[test]
fn check_says_what_the_kernel_has() {
    let output = mesh_node(&["check"]);
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said}");
    for need in ["cgroup v2", "cookies of network namespaces", "sk_lookup", "kernel programs"] {
        assert!(said.lines().any(|line| line.starts_with("ok") && line.contains(need)), "{need}: {said}");
    }
}
