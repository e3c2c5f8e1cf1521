//! The client's end of tunnels: what is dialled, and what is done when it is not what it should be.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use mesh_core::snapshot::Change;
use tokio::net::TcpStream;

use crate::bed::{Bed, Ca, Gate, PATIENCE, Served, identity, say, soon, workload};

/// `client` here and `far` on another node, whose tunnels are dialled through a gate.
struct Scene {
    ca: Ca,
    bed: Bed,
    client: Served,
    far: Served,
    gate: Gate,
    _far_bed: Bed,
}

impl Scene {
    async fn new() -> Self {
        let ca = Ca::new();
        let far_bed = Bed::new(1);
        far_bed.trust(&[&ca]);
        far_bed.certify(&ca.issue(&identity("far")));
        let far = far_bed.serve_at("far", 0).await;
        let gate = Gate::before(far.hbone).await;
        let target = far.application;
        let bed = Bed::capturing(1, Arc::new(move |_, _| Some(target)));
        bed.trust(&[&ca]);
        bed.certify(&ca.issue(&identity("client")));
        let client = bed.serve("client").await;
        bed.know("far", &far);
        Self { ca, bed, client, far, gate, _far_bed: far_bed }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.client.outbound).await.unwrap()
    }
}

#[tokio::test]
async fn a_tunnel_whose_certificate_is_replaced_while_it_is_dialled_is_dialled_again() {
    let scene = Scene::new().await;
    let mut first = scene.connect().await;
    scene.gate.came(1).await;
    scene.bed.certify(&scene.ca.issue(&identity("client")));
    scene.gate.let_through(2);
    assert_eq!(soon("an answer", say(&mut first, "first")).await.unwrap(), "first");
    assert_eq!(scene.gate.came.load(Ordering::Relaxed), 2, "dials");
    let mut second = scene.connect().await;
    assert_eq!(soon("an answer", say(&mut second, "second")).await.unwrap(), "second");
    assert_eq!(scene.gate.came.load(Ordering::Relaxed), 2, "the second tunnel stays");
}

#[tokio::test]
async fn a_workload_that_is_removed_while_its_tunnel_is_dialled_gets_no_connection() {
    let scene = Scene::new().await;
    let mut tcp = scene.connect().await;
    scene.gate.came(1).await;
    let uid = workload("far", scene.far.hbone.ip()).uid;
    scene.bed.configure(&[Change::RemoveWorkload(uid)]);
    scene.gate.let_through(2);
    let refused = soon("a refusal", say(&mut tcp, "to nobody")).await;
    assert!(refused.is_err(), "{refused:?}");
}

#[tokio::test]
async fn a_connection_that_is_being_set_up_survives_a_drain() {
    let scene = Scene::new().await;
    let mut tcp = scene.connect().await;
    scene.gate.came(1).await;
    let drain = scene.bed.path.drain(PATIENCE);
    let carried = async {
        scene.gate.let_through(1);
        let answer = soon("an answer", say(&mut tcp, "late")).await;
        drop(tcp);
        answer
    };
    let ((), answer) = tokio::join!(drain, carried);
    assert_eq!(answer.unwrap(), "late");
    assert_eq!(scene.bed.path.connection_count(), 0);
}
