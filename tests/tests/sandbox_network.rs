//! Sandboxes without a mesh: the network is there, and goes without a trace.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use mesh_ctl::sandbox::netns::run_in;
use mesh_ctl::sandbox::{Sandbox, Topology, Workload, teardown};
use mesh_tests::sandbox_bed::{Footprint, SandboxBed};

const CONNECTS_WITHIN: Duration = Duration::from_secs(5);

fn silent() -> impl FnMut(&str) {
    |_: &str| {}
}

fn network(bed: &SandboxBed) -> Sandbox {
    Sandbox::network(bed.name(), Topology::demo(), None, &mut silent()).unwrap()
}

fn addresses(sandbox: &Sandbox, workload: &str) -> [IpAddr; 2] {
    sandbox.topology().addresses(sandbox.workload(workload).unwrap()).unwrap()
}

/// The client's address as a server in `to` sees it, or why there is no connection.
fn connect(from: &Sandbox, client: &str, to: &Sandbox, server: &str, family: usize) -> Result<IpAddr, String> {
    // Any port: a process that another test starts just now holds copies of all sockets until its exec.
    let any = SocketAddr::new(addresses(to, server)[family], 0);
    let listener = run_in(&to.layout.netns(server), || Ok(TcpListener::bind(any)?)).unwrap();
    let address = listener.local_addr().unwrap();
    let stream = run_in(&from.layout.netns(client), || Ok(TcpStream::connect_timeout(&address, CONNECTS_WITHIN)?));
    let mut stream = stream.map_err(|e| format!("{e:#}"))?;
    let (mut accepted, peer) = listener.accept().unwrap();
    stream.write_all(b"ping").unwrap();
    let mut buffer = [0; 4];
    accepted.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"ping");
    Ok(peer.ip())
}

#[test]
fn every_workload_reaches_every_other_by_both_families_and_shows_its_own_address() {
    let bed = SandboxBed::new();
    let sandbox = network(&bed);
    let names: Vec<String> = sandbox.topology().workloads.iter().map(Workload::key).collect();
    for from in &names {
        for to in names.iter().filter(|to| *to != from) {
            for (family, own) in addresses(&sandbox, from).into_iter().enumerate() {
                assert_eq!(connect(&sandbox, from, &sandbox, to, family), Ok(own), "{from} -> {to}");
            }
        }
    }
}

#[test]
fn nothing_of_it_is_in_the_namespace_of_the_machine() {
    let bed = SandboxBed::new();
    let sandbox = network(&bed);
    let links = || {
        let all = std::fs::read_dir("/sys/class/net").unwrap().flatten();
        all.map(|e| e.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    // /proc/net/route has addresses as little-endian hexadecimal: 10.244.x.y, 10.96.x.y and 172.30.x.y.
    let routes = |text: String| {
        let destinations = text.lines().skip(1).filter_map(|l| l.split('\t').nth(1).map(str::to_string));
        destinations.filter(|d| ["F40A", "600A", "1EAC"].iter().any(|ours| d.ends_with(ours))).collect::<Vec<_>>()
    };
    let routes_here = || routes(std::fs::read_to_string("/proc/thread-self/net/route").unwrap());
    let on_node = run_in(&sandbox.layout.netns("node-a"), || Ok(routes_here())).unwrap();
    assert!(!on_node.is_empty(), "a look that finds no route on a node proves nothing");
    assert_eq!(routes_here(), Vec::<String>::new());
    let ours = links().into_iter().filter(|l| l == "pods" || l.starts_with("to-node") || l == "pod10");
    assert_eq!(ours.collect::<Vec<_>>(), Vec::<String>::new());
}

#[test]
fn down_leaves_nothing_and_the_name_can_be_used_again() {
    let bed = SandboxBed::new();
    for round in 0..2 {
        let sandbox = network(&bed);
        let print = Footprint::of(&sandbox.layout);
        assert_eq!(print.namespaces.len(), 8, "5 workloads, 2 nodes, the controller");
        assert!(!print.left().is_empty(), "a footprint that sees nothing of a sandbox that is up proves nothing");
        sandbox.down().unwrap();
        assert_eq!(print.left(), Vec::<String>::new(), "round {round}");
    }
}

#[test]
fn down_ends_processes_that_a_user_left_in_a_workload() {
    let bed = SandboxBed::new();
    let sandbox = network(&bed);
    let mut command = sandbox.command("client", "sh").unwrap();
    // Ignores what can be ignored, has a child, and is not on record.
    command.args(["-c", "trap '' TERM HUP INT; sleep 1000 & wait"]);
    let mut shell = command.spawn().unwrap();
    let print = loop {
        let print = Footprint::of(&sandbox.layout);
        if print.processes.len() == 2 {
            break print;
        }
        std::thread::yield_now();
    };
    sandbox.down().unwrap();
    shell.wait().unwrap();
    bed.eventually("the shell's child is gone", || print.left().is_empty());
}

#[test]
fn two_sandboxes_have_the_same_addresses_and_do_not_meet() {
    let beds = [SandboxBed::new(), SandboxBed::new()];
    let [a, b] = [network(&beds[0]), network(&beds[1])];
    assert_eq!(addresses(&a, "web-v1"), addresses(&b, "web-v1"));
    // A listens, B's client finds nobody: at the same address there is only B's own web.
    let web = SocketAddr::new(addresses(&a, "web-v1")[0], 8080);
    let _listener = run_in(&a.layout.netns("web-v1"), || Ok(TcpListener::bind(web)?)).unwrap();
    let dial =
        |s: &Sandbox| run_in(&s.layout.netns("client"), || Ok(TcpStream::connect_timeout(&web, CONNECTS_WITHIN)?));
    assert!(dial(&b).is_err(), "B's client reached A's web");
    assert!(dial(&a).is_ok(), "A's client does not reach A's web");
    a.down().unwrap();
    assert!(connect(&b, "client", &b, "web-v1", 0).is_ok(), "the end of A disturbs B");
}

#[test]
fn a_name_that_is_in_use_is_refused_and_the_sandbox_lives_on() {
    let bed = SandboxBed::new();
    let sandbox = network(&bed);
    let second = Sandbox::network(bed.name(), Topology::demo(), None, &mut silent()).unwrap_err();
    assert!(format!("{second:#}").contains("exists already"), "{second:#}");
    assert!(connect(&sandbox, "client", &sandbox, "web-v2", 1).is_ok());
}

#[test]
fn of_two_that_build_the_same_name_at_once_one_wins_and_the_other_is_told() {
    const BUILDERS: usize = 4;
    let bed = SandboxBed::new();
    let (gate, opened) = (Mutex::new(0), Condvar::new());
    let build = || {
        let mut waiting = gate.lock().unwrap();
        *waiting += 1;
        opened.notify_all();
        drop(opened.wait_while(waiting, |n| *n < BUILDERS).unwrap());
        Sandbox::network(bed.name(), Topology::demo(), None, &mut silent()).map(|_| ()).map_err(|e| format!("{e:#}"))
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..BUILDERS).map(|_| scope.spawn(build)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let failures: Vec<&String> = results.iter().filter_map(|r| r.as_ref().err()).collect();
    assert_eq!(failures.len(), BUILDERS - 1, "{results:?}");
    for failure in failures {
        assert!(failure.contains("exists already") || failure.contains("is changing the sandbox"), "{failure}");
    }
    assert_eq!(Footprint::of(&bed.layout()).namespaces.len(), 8, "the losers damaged the winner's");
}

#[test]
fn workloads_come_and_go_in_a_sandbox_that_is_up() {
    let bed = SandboxBed::new();
    let mut sandbox = network(&bed);
    let late = sandbox.add_workload(Workload::new("late", "node-b").namespace("shop")).unwrap();
    assert_eq!(late.key(), "late.shop");
    assert!(connect(&sandbox, "client", &sandbox, "late.shop", 0).is_ok());
    let again = sandbox.add_workload(Workload::new("late", "node-a").namespace("shop")).unwrap_err();
    assert!(format!("{again:#}").contains("used twice"), "{again:#}");
    sandbox.remove_workload("late.shop").unwrap();
    assert!(!sandbox.layout.netns("late.shop").exists());
    let reborn = sandbox.add_workload(Workload::new("late", "node-b").namespace("shop")).unwrap();
    assert_ne!(reborn.uid, late.uid, "a workload of the same name is another one");
    assert!(connect(&sandbox, "client", &sandbox, "late.shop", 1).is_ok());
}

/// Whatever was made when the builder died is on record.
#[test]
fn what_a_killed_builder_left_is_given_back() {
    let bed = SandboxBed::new();
    let sandbox = network(&bed);
    let print = Footprint::of(&sandbox.layout);
    // As after a reboot of half of it: namespaces unbound, cgroups and files still there.
    for name in ["client", "node-b"] {
        mesh_ctl::sandbox::netns::remove(&sandbox.layout.netns(name)).unwrap();
    }
    drop(sandbox);
    let start = Instant::now();
    let removed = teardown::down(&bed.layout()).unwrap().unwrap();
    assert_eq!(removed.netns, 6, "of 8 two were gone");
    assert_eq!(print.left(), Vec::<String>::new());
    assert_eq!(teardown::down(&bed.layout()).unwrap(), None, "a second `down` finds nothing");
    assert!(start.elapsed() < Duration::from_secs(5), "nothing had to be waited for");
}
