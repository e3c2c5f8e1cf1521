//! Connections that carry a client's own address need a port of that address inside the workload's namespace, which the
//! application's own sockets have there too.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use mesh_ctl::sandbox::{Topology, Workload, binaries_beside};
use mesh_node::capture::in_netns;
use mesh_tests::mesh_bed::{MeshBed, PATIENCE, echo};
use mesh_tests::policy_bed::{Family, PolicyBed};
use socket2::{Domain, Socket, Type};

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

/// Connections that one client tries to hold. Of as many ports of those that the node proxy draws from, the last ones have
/// a chance of 1 in 53 to be given the addresses of another; that none of all is, 1 in 300.
const TRIED: u16 = 600;
/// First port of a client whose kernel hands out nearly all; what the node proxy draws from begins there, too.
const FIRST_OF_CLIENT: u16 = 1024;
/// A port that the node proxy has drawn for a live connection cannot be the client's own: that one waits in vain, or is
/// reset before it has carried a byte.
const OWN_PORT_IS_TAKEN: Duration = Duration::from_millis(300);

#[test]
fn a_client_that_uses_low_ports_keeps_all_its_connections() {
    let topology = Topology::new()
        .node("node-a")
        .node("node-b")
        .workload(echo("far", "node-b"))
        .workload(Workload::new("plain", "node-a").outside_mesh());
    let bed = MeshBed::up("low", topology);
    let to = bed.address("far");
    let plain = File::open(bed.sandbox.layout.netns(&bed.sandbox.workload("plain").unwrap().key())).unwrap();
    let echoes = |connection: &mut TcpStream| {
        let mut answer = [0];
        connection.write_all(b"x")?;
        connection.read_exact(&mut answer)
    };
    let connect = |port: u16| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
        socket.connect_timeout(&to.into(), OWN_PORT_IS_TAKEN)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut connection = TcpStream::from(socket);
        echoes(&mut connection)?;
        Ok::<_, std::io::Error>(connection)
    };
    let connect_all = || (FIRST_OF_CLIENT..).take(TRIED.into()).filter_map(|port| connect(port).ok()).collect();
    let mut held: Vec<TcpStream> = in_netns(plain.as_fd(), connect_all).unwrap();
    assert!(held.len() > usize::from(TRIED) / 2, "only {} of {TRIED} connections", held.len());
    for (number, connection) in held.iter_mut().enumerate() {
        let said = echoes(connection);
        assert!(said.is_ok(), "connection {number} of {}: {said:?}", connection.local_addr().unwrap());
    }
}
