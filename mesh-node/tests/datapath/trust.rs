//! Roots and certificates that change while tunnels are up.

use std::io::ErrorKind;
use std::sync::Arc;

use http::StatusCode;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::bed::{Bed, Ca, Peer, identity, open, roots, say, soon};

#[tokio::test]
async fn a_root_that_is_removed_ends_what_was_let_in_by_it_and_nothing_else() {
    let bed = Bed::new(1);
    let (old, new) = (Ca::new(), Ca::new());
    bed.trust(&[&old, &new]);
    bed.certify(&new.issue(&identity("far")));
    let far = bed.serve("far").await;
    let peer = |ca: &Ca, name: &str| Peer { identity: ca.issue(&identity(name)), roots: roots(&[&new]) };
    let forged = peer(&old, "client").tunnel(far.hbone, &identity("far")).await;
    let good = peer(&new, "client").tunnel(far.hbone, &identity("far")).await;
    let (status, mut of_old) = open(&forged, far.application).await.unwrap();
    assert_eq!(status, StatusCode::OK);
    let (status, mut of_new) = open(&good, far.application).await.unwrap();
    assert_eq!(status, StatusCode::OK);
    for carried in [&mut of_old, &mut of_new] {
        assert_eq!(carried.say("before").await.unwrap(), "before");
    }

    bed.trust(&[&new]);
    let end = soon("the end of the live connection", of_old.recv.data()).await;
    assert!(matches!(end, Some(Err(_))), "reset, not {end:?}");
    let (status, _) = open(&forged, far.application).await.unwrap();
    assert_eq!(status, StatusCode::UNAUTHORIZED, "a further connection in the tunnel");
    let gone = soon("the end of the tunnel", async {
        loop {
            if let Err(error) = open(&forged, far.application).await {
                break error;
            }
        }
    });
    assert!(gone.await.is_go_away(), "the tunnel is told to go");
    assert_eq!(of_new.say("after").await.unwrap(), "after");
    assert_eq!(open(&good, far.application).await.unwrap().0, StatusCode::OK);
}

#[tokio::test]
async fn a_root_that_is_removed_ends_connections_to_servers_that_it_vouched_for() {
    let (old, new) = (Ca::new(), Ca::new());
    let far_bed = Bed::new(1);
    far_bed.trust(&[&new]);
    far_bed.certify(&old.issue(&identity("far")));
    let far = far_bed.serve("far").await;
    let target = far.application;
    let bed = Bed::capturing(1, Arc::new(move |_, _| Some(target)));
    bed.trust(&[&old, &new]);
    bed.certify(&new.issue(&identity("client")));
    let client = bed.serve("client").await;
    bed.know("far", &far);

    let connect = || TcpStream::connect(client.outbound);
    let mut held = connect().await.unwrap();
    assert_eq!(soon("an answer", say(&mut held, "before")).await.unwrap(), "before");
    bed.trust(&[&new]);
    let end = soon("the end of the live connection", held.read(&mut [0])).await;
    assert_eq!(end.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
    let refused = soon("a refusal", say(&mut connect().await.unwrap(), "refused")).await;
    assert!(refused.is_err(), "{refused:?}");
    far_bed.certify(&new.issue(&identity("far")));
    let good = soon("an answer", say(&mut connect().await.unwrap(), "good")).await;
    assert_eq!(good.unwrap(), "good");
}
