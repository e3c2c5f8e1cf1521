//! What one peer can make the node proxy hold.

use http::StatusCode;
use mesh_node::hbone::STREAM_WINDOW;
use mesh_node::limits::{LEAST_WINDOW, MAX_UNREAD_PER_SOURCE};

use crate::bed::{Bed, Ca, Carried, Peer, identity, open, roots, soon};

/// Tunnels that together have more room than one address may have: a stream's window is a quarter of a tunnel's.
const TUNNELS: usize = 100;

/// What a stream may send although nobody reads.
async fn room(carried: &mut Carried) -> usize {
    carried.send.reserve_capacity(STREAM_WINDOW as usize);
    soon("room", std::future::poll_fn(|cx| carried.send.poll_capacity(cx))).await.unwrap().unwrap();
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
    for number in 0..TUNNELS {
        let tunnel = peer.tunnel(far.hbone, &identity("far")).await;
        let (status, mut carried) = open(&tunnel, far.application).await.unwrap();
        assert_eq!(status, StatusCode::OK);
        let room = room(&mut carried).await;
        held.push((tunnel, carried, room));
        assert!(room >= LEAST_WINDOW as usize, "tunnel {number}");
    }
    let total: usize = held.iter().map(|(_, _, room)| room).sum();
    let bound = MAX_UNREAD_PER_SOURCE as usize + TUNNELS * LEAST_WINDOW as usize;
    assert_eq!(held[0].2, STREAM_WINDOW as usize, "the first is not made slow");
    assert!(total <= bound, "{total} bytes for {TUNNELS} tunnels, {bound} at most");
}
