//! A mesh of two nodes with a hostile peer on one of them, and good clients that must not notice.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use http::{Method, StatusCode};
use mesh_ctl::sandbox::{Mesh, Topology};
use tokio::runtime::Runtime;

use super::raw::RawTunnel;
use super::{Approach, Ca, Claim, ask, tunnel};
use crate::bench::cpu::cpu_secs;
use crate::mesh_bed::{Attempt, ECHO, MeshBed, two_nodes};
use crate::usage::{forget_peak, peak_bytes, resident_bytes};

/// Identity of the workload `client`, which the hostile peers have, too: a node that went bad has the keys of its own.
pub const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
/// Port of tunnels.
pub const HBONE: u16 = 15008;
/// A good client that waits longer than this is deprived of service; far above what a loaded machine needs. How fair turns
/// are is tested where they are made.
const SERVED_WITHIN: Duration = Duration::from_secs(10);
/// Between two questions of the good client.
const ASK_EVERY: Duration = Duration::from_millis(10);

/// Both nodes, and where the hostile peer stands.
pub struct Scene {
    /// The mesh.
    pub bed: MeshBed,
    /// What the hostile peer runs on.
    pub runtime: Runtime,
    /// Where it is: in the namespace of node-a.
    pub place: PathBuf,
    /// Whom it attacks: the tunnel port of the workload `far`, on node-b.
    pub far: SocketAddr,
}

/// What a deed cost a node proxy.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// By how much its resident memory grew at the peak.
    pub memory_bytes: u64,
    /// What its threads ran.
    pub cpu: Duration,
    /// How long it went on.
    pub took: Duration,
}

impl Scene {
    /// The mesh of two nodes.
    pub fn new(name: &str) -> Self {
        Self::with(name, two_nodes())
    }

    /// Another mesh that has `far` on node-b.
    pub fn with(name: &str, topology: Topology) -> Self {
        Self::with_node_args(name, topology, &[])
    }

    /// The mesh of two nodes whose proxies have one worker: everybody shares a thread with the hostile peer.
    pub fn with_one_worker(name: &str) -> Self {
        Self::with_node_args(name, two_nodes(), &["--workers", "1"])
    }

    /// As [`Self::with`], with arguments for the node proxies.
    ///
    /// # Panics
    /// The mesh does not come up.
    pub fn with_node_args(name: &str, topology: Topology, node_args: &[&str]) -> Self {
        let mut mesh = Mesh::beside().unwrap_or_else(|error| panic!("{error:#}"));
        mesh.node_args = node_args.iter().map(ToString::to_string).collect();
        let bed = MeshBed::with(name, topology, mesh);
        let place = bed.sandbox.layout.netns("node-a");
        let far = SocketAddr::new(bed.address("far").ip(), HBONE);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        Self { bed, runtime: runtime.expect("runtime"), place, far }
    }

    /// The mesh's own CA.
    pub fn ca(&self) -> Ca {
        Ca::of_the_mesh(&self.bed.sandbox.layout.controller().join("state"))
    }

    /// A peer with a good certificate.
    pub fn good(&self) -> Approach {
        Approach::with(self.ca().issue(&Claim::of(CLIENT)))
    }

    /// The authority of a request that is carried.
    pub fn good_request(&self) -> String {
        SocketAddr::new(self.far.ip(), ECHO).to_string()
    }

    /// What comes of a tunnel and a good request in it.
    ///
    /// # Errors
    /// There is no answer.
    pub fn attempt(&self, approach: Approach) -> Result<StatusCode, String> {
        self.runtime.block_on(async {
            let send = tunnel(&self.place, self.far, approach).await?;
            ask(&send, Method::CONNECT, &self.good_request()).await
        })
    }

    /// A tunnel of a peer with a good certificate, to write frames on; its preface is said.
    ///
    /// # Panics
    /// The handshake fails.
    pub fn raw(&self, settings: &[(u16, u32)]) -> RawTunnel {
        let opened = self.runtime.block_on(RawTunnel::open(&self.place, self.far, self.good(), settings));
        opened.expect("a tunnel of a peer with a good certificate")
    }

    /// A number of node-b's metrics.
    pub fn count(&self, name: &str) -> u64 {
        self.count_on("node-b", name)
    }

    /// A number of a node's metrics.
    ///
    /// # Panics
    /// There is none of this name.
    pub fn count_on(&self, node: &str, name: &str) -> u64 {
        let metrics = self.bed.page(node, 15020, "/metrics").expect("metrics");
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {metrics}")).parse().expect("number")
    }

    /// Does something hostile to a node's proxy. All the while a connection that `client` has to `far` is answered;
    /// afterwards there is the same proxy, and new connections work. What came of the deed, and what it cost.
    ///
    /// # Panics
    /// Somebody was deprived of service.
    pub fn endured<T: Send + 'static>(
        &self,
        node: &str,
        what: &str,
        deed: impl Future<Output = T> + Send + 'static,
    ) -> (T, Cost) {
        let ((), outcome, cost) = self.endured_with(node, what, || (), deed);
        (outcome, cost)
    }

    /// As [`Self::endured`]; what `begin` does is part of what is measured, and comes before the deed.
    ///
    /// # Panics
    /// As [`Self::endured`].
    pub fn endured_with<B, T: Send + 'static>(
        &self,
        node: &str,
        what: &str,
        begin: impl FnOnce() -> B,
        deed: impl Future<Output = T> + Send + 'static,
    ) -> (B, T, Cost) {
        let mut held = self.bed.hold("client", self.bed.address("far"));
        assert_eq!(held.say("before"), "before", "{what}");
        let pid = self.bed.proxy(node);
        forget_peak(pid);
        let (memory, cpu, started) = (resident_bytes(pid), cpu_secs(pid), Instant::now());
        let begun = begin();
        let task = self.runtime.spawn(deed);
        while !task.is_finished() {
            let asked = Instant::now();
            assert_eq!(held.say("meanwhile"), "meanwhile", "{what}");
            assert!(asked.elapsed() < SERVED_WITHIN, "{what}: a good client waited {:?}", asked.elapsed());
            std::thread::sleep(ASK_EVERY);
        }
        let cost = Cost {
            memory_bytes: peak_bytes(pid).saturating_sub(memory),
            cpu: Duration::from_secs_f64((cpu_secs(pid) - cpu).max(0.0)),
            took: started.elapsed(),
        };
        println!("{what}: {cost:?}");
        let outcome = self.runtime.block_on(task).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(held.say("after"), "after", "{what}");
        self.bed.stream("client", self.bed.address("far")).wait("a new connection", Attempt::is_ok);
        assert_eq!(self.bed.proxy(node), pid, "{what}: the proxy is another process");
        (begun, outcome, cost)
    }
}
