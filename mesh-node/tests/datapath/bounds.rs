//! What one peer can make the node proxy hold.

use std::task::Poll;

use http::StatusCode;
use mesh_node::hbone::{CONNECTION_WINDOW, STREAM_WINDOW};
use mesh_node::limits::{LEAST_WINDOW, MAX_UNREAD_PER_SOURCE};

use crate::bed::{Bed, Ca, Carried, Peer, identity, open, roots, soon};

/// Tunnels that together would have more room than one address may have.
const TUNNELS: usize = 40;
/// Streams that together fill a tunnel's window.
const STREAMS: usize = (CONNECTION_WINDOW / STREAM_WINDOW) as usize + 1;

/// What a stream may send although nobody reads.
async fn room(carried: &mut Carried) -> usize {
    carried.send.reserve_capacity(STREAM_WINDOW as usize);
    // Nothing is assigned to the last stream where those before it took all.
    std::future::poll_fn(|cx| {
        let _assigned = carried.send.poll_capacity(cx);
        Poll::Ready(())
    })
    .await;
    carried.send.capacity()
}

#[tokio::test]
async fn many_tunnels_of_one_address_share_what_may_be_unread() {
    let (bed, ca) = (Bed::new(2), Ca::new());
    bed.trust(&[&ca]);
    bed.certify(&ca.issue(&identity("far")));
    let far = bed.serve("far").await;
    let peer = Peer { identity: ca.issue(&identity("client")), roots: roots(&[&ca]) };
    let mut held = Vec::new();
    let mut rooms = Vec::new();
    for _ in 0..TUNNELS {
        let tunnel = peer.tunnel(far.hbone, &identity("far")).await;
        let mut of_tunnel = Vec::new();
        for _ in 0..STREAMS {
            let (status, mut carried) = open(&tunnel, far.application).await.unwrap();
            assert_eq!(status, StatusCode::OK);
            of_tunnel.push(room(&mut carried).await);
            held.push(carried);
        }
        rooms.push(of_tunnel);
    }
    assert_eq!(rooms[0][0], STREAM_WINDOW as usize, "a stream of the first tunnel is not made slow");
    let of_tunnels: Vec<usize> = rooms.iter().map(|of_tunnel| of_tunnel.iter().sum()).collect();
    assert_eq!(of_tunnels[0], CONNECTION_WINDOW as usize, "nor are all together");
    assert!(of_tunnels.iter().all(|room| *room >= LEAST_WINDOW as usize), "{of_tunnels:?}");
    let (total, least) = (of_tunnels.iter().sum::<usize>(), TUNNELS * LEAST_WINDOW as usize);
    assert!(total <= MAX_UNREAD_PER_SOURCE as usize + least, "{total} bytes: {of_tunnels:?}");
}

/// The peer has the window that HTTP/2 connections begin with, less than what is read from an application at once.
#[tokio::test]
async fn idle_connections_take_nothing_of_their_tunnels_window() {
    let (bed, ca) = (Bed::new(1), Ca::new());
    bed.trust(&[&ca]);
    bed.certify(&ca.issue(&identity("far")));
    let far = bed.serve("far").await;
    let peer = Peer { identity: ca.issue(&identity("client")), roots: roots(&[&ca]) };
    let tunnel = peer.tunnel(far.hbone, &identity("far")).await;
    let mut idle = Vec::new();
    for number in 0..5 {
        let (status, mut carried) = open(&tunnel, far.application).await.unwrap();
        assert_eq!(status, StatusCode::OK);
        assert_eq!(soon(&format!("the echo of connection {number}"), carried.say("x")).await.unwrap(), "x");
        idle.push(carried);
    }
}
