//! Connections that carry a client's own address need a port of that address inside the workload's namespace, which the
//! application's own sockets have there too.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::net::SocketAddr;

use mesh_ctl::sandbox::{Topology, Workload, binaries_beside};
use mesh_tests::policy_bed::{Family, PolicyBed};

/// The port that is served.
const PORT: u16 = 7000;
/// Ports on which the application listens besides; as many as a process may open without asking for more.
const FIRST: u16 = 20_000;
/// The last of them: 1 of 35 of those that the node proxy chooses from.
const LAST: u16 = 20_899;
/// Connections from outside the mesh; the chance that none of them is given a port of these is 1 in 300.
const CONNECTIONS: usize = 200;

#[test]
fn an_application_that_listens_on_many_ports_is_reached_by_every_client() {
    let probe = binaries_beside().unwrap().join("mesh-probe").display().to_string();
    let argv = [probe, "hoard".into(), FIRST.to_string(), LAST.to_string(), PORT.to_string()];
    let topology = Topology::new()
        .node("node-a")
        .node("node-b")
        .workload(Workload::new("hoarder", "node-b").runs(argv).ready_on(PORT))
        .workload(Workload::new("plain", "node-a").outside_mesh())
        .workload(Workload::new("client", "node-a"));
    let bed = PolicyBed::up("ports", topology);
    for from in ["plain", "client"] {
        for family in Family::BOTH {
            let to = [SocketAddr::new(bed.ip("hoarder", family), PORT); CONNECTIONS];
            let went = bed.reaches(from, &to).into_iter().filter(|went| *went).count();
            assert_eq!(went, CONNECTIONS, "{from} by {family:?}");
        }
    }
}
