//! Two workloads of one node: both are authorized by their identities, but what they say to each other is not encrypted
//! and leaves no namespace; unless the mesh is told to use tunnels everywhere.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::net::SocketAddr;

use mesh_api::admin::ConnectionRow;
use mesh_ctl::sandbox::Mesh;
use mesh_tests::ends::{Family, ROUTES, Route};
use mesh_tests::mesh_bed::{Attempt, ECHO, MeshBed, eventually, two_nodes};
use mesh_tests::wire::{Seen, Wire};

/// Connections, each of which carries the marker both ways.
const CONNECTIONS: usize = 50;
/// Port of a tunnel.
const HBONE: u16 = 15008;

/// What is on the links, loopback included, of the node and of the two workloads while `client` talks to `near`.
fn seen(bed: &MeshBed) -> [Seen; 3] {
    let wires = ["node-a", "client", "near"].map(|name| Wire::listen(&bed.sandbox.layout.netns(name)));
    for family in [Family::V4, Family::V6] {
        let mut stream = bed.stream("client", SocketAddr::new(bed.address_of("near", family), ECHO));
        let mut through = 0;
        stream.wait("connections on one node", |attempt: &Attempt| {
            through += usize::from(attempt.is_ok());
            through == CONNECTIONS
        });
    }
    let seen = wires.map(Wire::end);
    seen.iter().for_each(|seen| assert_eq!(seen.lost, 0, "frames were missed"));
    seen
}

/// How a connection from `client` to `near` is carried, as the node shows it.
fn carriers(bed: &MeshBed) -> Vec<String> {
    let route: Route = *ROUTES.iter().find(|route| route.to == "near").unwrap();
    let ends = bed.ends(route);
    let rows: Vec<ConnectionRow> = eventually("the connection", || {
        bed.admin("node-a", "/connections").filter(|rows: &Vec<ConnectionRow>| !rows.is_empty())
    });
    drop(ends);
    rows.into_iter().map(|row| row.protocol).collect()
}

#[test]
fn they_talk_without_a_tunnel_and_nothing_is_on_a_link() {
    let bed = MeshBed::up("same", two_nodes());
    let [node, client, near] = seen(&bed);
    assert!(node.tcp.is_empty() && node.markers == 0, "on the node's links: {node:?}");
    for (name, inside) in [("client", client), ("near", near)] {
        // Between application and proxy, over loopback: this is what the capture can see.
        assert!(inside.markers > 0, "{name}: the capture does not see the load at all: {inside:?}");
        assert_eq!(inside.tls, 0, "{name}: TLS over loopback");
        assert!(inside.tcp.iter().all(|(_, _, low, high)| ![*low, *high].contains(&HBONE)), "{name}: {:?}", inside.tcp);
    }
    let [outbound, inbound] = bed.carried("client", "near");
    for record in [outbound, inbound] {
        assert_eq!(record.text("dst.hbone_addr"), "", "{record:?}");
        assert_eq!(record.text("dst.addr"), bed.address("near").to_string(), "{record:?}");
    }
    let carriers = carriers(&bed);
    assert!(carriers.iter().all(|carrier| carrier == "LOCAL"), "{carriers:?}");
}

#[test]
fn with_tunnels_everywhere_they_talk_through_one() {
    let mut mesh = Mesh::beside().unwrap();
    mesh.node_args = ["--force-tunnel".to_owned()].to_vec();
    let bed = MeshBed::with("force", two_nodes(), mesh);
    let [node, client, near] = seen(&bed);
    node.assert_only_tunnels("on the node's links");
    for (name, inside) in [("client", client), ("near", near)] {
        assert!(inside.tls > 0, "{name}: no TLS: {inside:?}");
        assert!(inside.tcp.iter().any(|(_, _, low, high)| [*low, *high].contains(&HBONE)), "{name}: {:?}", inside.tcp);
    }
    for record in bed.carried("client", "near") {
        let tunnel = SocketAddr::new(bed.address("near").ip(), HBONE);
        assert_eq!(record.text("dst.hbone_addr"), tunnel.to_string(), "{record:?}");
    }
    let carriers = carriers(&bed);
    assert!(carriers.iter().all(|carrier| carrier == "HBONE"), "{carriers:?}");
}
