//! Nothing goes in clear: frames on all links of both nodes, under load, looked at for a marker and for ports of TCP.
//!
//! Each case first makes sure that the load shows with the mesh off: a capture that sees nothing proves nothing.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use mesh_ctl::sandbox::{Enrolment, Topology, Workload, binaries_beside};
use mesh_node::capture::{Capture, CaptureConfig};
use mesh_tests::link::set_up_or_down;
use mesh_tests::mesh_bed::{Attempt, ECHO, MeshBed, Stream, eventually, eventually_within, two_nodes};
use mesh_tests::wire::{Seen, Wire};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Connections of each of the load's streams that have to come through in every case.
const CONNECTIONS: usize = 100;

/// Connections from `client` to a server on each node, over both families, one after the other in each of four streams.
struct Load(Vec<Stream>);

impl Load {
    fn start(bed: &MeshBed) -> Self {
        let topology = bed.sandbox.topology();
        let addresses = ["near", "far"].into_iter().flat_map(|name| {
            let workload = bed.sandbox.workload(name).unwrap();
            topology.addresses(workload).unwrap().map(|ip: IpAddr| SocketAddr::new(ip, ECHO))
        });
        Self(addresses.map(|address| bed.stream("client", address)).collect())
    }

    /// Waits until each stream had so many more connections that came through.
    fn wait(&mut self, connections: usize) {
        for stream in &mut self.0 {
            let mut through = 0;
            stream.wait("connections under load", |attempt| {
                through += usize::from(attempt.is_ok());
                through == connections
            });
        }
    }

    /// How many connections came through.
    fn end(self) -> usize {
        self.0.into_iter().flat_map(Stream::end).filter(Attempt::is_ok).count()
    }
}

fn listen(bed: &MeshBed) -> [Wire; 2] {
    ["node-a", "node-b"].map(|node| Wire::listen(&bed.sandbox.layout.netns(node)))
}

/// What the capture sees of the load with the mesh off: markers, and how many connections made them.
fn without_the_mesh(name: &str, topology: Topology) -> usize {
    let bed = MeshBed::without_mesh(name, topology);
    let wires = listen(&bed);
    let mut load = Load::start(&bed);
    load.wait(CONNECTIONS);
    let connections = load.end();
    for seen in wires.map(Wire::end) {
        assert!(seen.markers > 0, "the capture does not see the load at all: {seen:?}");
        assert!(seen.tcp.iter().any(|(_, _, low, high)| [*low, *high].contains(&ECHO)), "{:?}", seen.tcp);
    }
    connections
}

/// Puts the load on a mesh, does something meanwhile, and looks at what was on the wire.
fn only_tunnels(name: &str, meanwhile: impl FnOnce(&mut MeshBed, &mut Load)) {
    let in_clear = without_the_mesh(&format!("{name}-off"), two_nodes());
    let mut bed = MeshBed::up(name, two_nodes());
    let wires = listen(&bed);
    let mut load = Load::start(&bed);
    load.wait(CONNECTIONS);
    meanwhile(&mut bed, &mut load);
    while load.0.iter().map(Stream::seen).sum::<usize>() < in_clear {
        load.wait(1);
    }
    let connections = load.end();
    assert!(connections >= in_clear, "{connections} connections, {in_clear} with the mesh off");
    wires.map(Wire::end).iter().for_each(|seen: &Seen| seen.assert_only_tunnels(name));
}

#[test]
fn under_load_only_tunnels_are_on_the_wire() {
    only_tunnels("load", |_, load| load.wait(CONNECTIONS));
}

#[test]
fn while_node_proxies_are_killed_only_tunnels_are_on_the_wire() {
    only_tunnels("kill", |bed, load| {
        for round in 0..10 {
            let node = ["node-a", "node-b"][round % 2];
            let proxy = bed.proxy(node);
            kill(Pid::from_raw(proxy), Signal::SIGKILL).unwrap();
            eventually("the next proxy", || bed.status(node).filter(|s| s.ready && i32::try_from(s.pid) != Ok(proxy)));
            load.wait(10);
        }
    });
}

#[test]
fn while_programs_are_replaced_a_hundred_times_only_tunnels_are_on_the_wire() {
    only_tunnels("swap", |bed, load| {
        let layout = &bed.sandbox.layout;
        for round in 0..100 {
            let node = ["node-a", "node-b"][round % 2];
            let (bpffs, pods, proxy) = (layout.bpf().join(node), layout.pods_cgroup(node), layout.proxy_cgroup(node));
            Capture::open(&CaptureConfig::new(bpffs, pods, proxy)).unwrap_or_else(|error| panic!("{node}: {error}"));
            load.wait(1);
        }
    });
}

/// Workloads that come up during the test, half of them on each node.
const NEWCOMERS: usize = 200;
/// How long they may take until all have sent: each is enrolled on its own.
const NEWCOMERS_WITHIN: Duration = Duration::from_secs(120);

#[test]
fn workloads_that_send_from_their_first_instruction_before_and_during_enrolment_send_nothing_in_clear() {
    let mut topology = two_nodes();
    for number in 0..NEWCOMERS {
        let node = ["node-a", "node-b"][number % 2];
        topology = topology.workload(Workload::new(&format!("new-{number}"), node).outside_mesh());
    }
    let mut bed = MeshBed::up("start", topology);
    let newcomers: Vec<Workload> =
        bed.sandbox.topology().workloads.iter().filter(|w| w.name.starts_with("new-")).cloned().collect();
    // As a node's agent does it: a pod's link is down until its enrolment has been acknowledged.
    let link = |bed: &MeshBed, workload: &Workload, up: bool| {
        let netns = bed.sandbox.layout.netns(&workload.node);
        set_up_or_down(&netns, &mesh_ctl::sandbox::plan::node_side_link(workload), up).unwrap();
    };
    newcomers.iter().for_each(|workload| link(&bed, workload, false));
    let wires = listen(&bed);
    let mut senders: Vec<Sender> = newcomers
        .iter()
        .zip(0..)
        .map(|(workload, n)| Sender::start(&bed, &workload.key(), ["near", "far"][n / 2 % 2]))
        .collect();
    for workload in &newcomers {
        bed.sandbox.enrol(&workload.key(), Enrolment::Mesh).unwrap();
        link(&bed, workload, true);
    }
    for sender in &mut senders {
        sender.wait_for_success();
    }
    drop(senders);
    wires.map(Wire::end).iter().for_each(|seen| seen.assert_only_tunnels("workloads that start"));
}

/// A workload's process that sends from its first instruction, until it is answered once.
struct Sender {
    child: Child,
    name: String,
}

impl Sender {
    fn start(bed: &MeshBed, from: &str, to: &str) -> Self {
        let program = binaries_beside().unwrap().join("mesh-probe");
        let mut command: Command = bed.sandbox.command(from, &program.display().to_string()).unwrap();
        command.args(["until-ok", &bed.address(to).to_string()]).stdin(Stdio::null()).stdout(Stdio::null());
        Self { child: command.spawn().unwrap(), name: from.to_owned() }
    }

    fn wait_for_success(&mut self) {
        let status = eventually_within(NEWCOMERS_WITHIN, &self.name, || self.child.try_wait().unwrap());
        assert!(status.success(), "{}: {status}", self.name);
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
