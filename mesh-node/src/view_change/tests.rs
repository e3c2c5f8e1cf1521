//! Nothing that decides about a connection changes without it being judged again, and little else makes it so.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use mesh_api::proto::workload::{Address, Workload as WireWorkload, address};
use mesh_api::{ADDRESS_TYPE_URL, wds};
use mesh_core::flow::InboundFlow;
use mesh_core::policy::{Action, Clause, Match, PolicyScope, Rule, StringMatch};
use mesh_core::snapshot::Change;
use prost::Message;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};

use super::*;
use crate::connections::{Carrier, CloseReason, Connections, Direction};
use crate::metrics::Metrics;
use crate::runtime::{CertifiedIdentity, Enrolled, Listeners, RootStore, Shared};
use crate::tls::{PeerProof, PeerRole};

/// Changes of a random life.
const STEPS: usize = 3000;
/// Workloads, as `namespace/name`.
const WORKLOADS: [&str; 3] = ["a/web", "a/db", "b/web"];

fn identity(path: &str) -> SpiffeId {
    let (namespace, name) = path.split_once('/').expect("namespace/name");
    SpiffeId::new("cluster.local", namespace, name)
}

fn uid(path: &str) -> WorkloadUid {
    let (namespace, name) = path.split_once('/').expect("namespace/name");
    WorkloadUid(format!("Kubernetes//Pod/{namespace}/{name}").into())
}

/// `policies`: those that it names.
fn workload(path: &str, policies: &[&str]) -> Change {
    let (namespace, name) = path.split_once('/').expect("namespace/name");
    let workload = WireWorkload {
        uid: uid(path).to_string(),
        name: name.into(),
        namespace: namespace.into(),
        service_account: name.into(),
        authorization_policies: policies.iter().map(ToString::to_string).collect(),
        ..WireWorkload::default()
    };
    let address = Address { r#type: Some(address::Type::Workload(workload)) };
    wds::decode(ADDRESS_TYPE_URL, &address.encode_to_vec()).expect("a workload")
}

fn name(path: &str) -> PolicyName {
    let (namespace, name) = path.split_once('/').expect("namespace/name");
    PolicyName { namespace: namespace.into(), name: name.into() }
}

/// Concerns those whose client is of namespace `of`.
fn policy(path: &str, scope: PolicyScope, action: Action, of: &str) -> Change {
    let client = Match { namespaces: vec![StringMatch::Exact(of.into())], ..Match::default() };
    let rule = Rule { clauses: vec![Clause { matches: vec![client] }] };
    Change::UpsertPolicy(Arc::new(Policy { name: name(path), scope, action, dry_run: false, rules: vec![rule] }))
}

/// A CA, and a certificate of it.
struct Proofs {
    certificate: Arc<CertifiedIdentity>,
    peer: Arc<PeerProof>,
    /// That vouch for the peer, and that do not.
    roots: [Arc<RootStore>; 2],
}

impl Proofs {
    fn new() -> Self {
        let ca = || {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().expect("key");
            (params.self_signed(&key).expect("sign").der().clone(), Issuer::new(params, key))
        };
        let ((root, issuer), (other, _)) = (ca(), ca());
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::default();
        let id = identity("a/client");
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into().expect("URI"))];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = params.signed_by(&key, &issuer).expect("sign");
        let pem = format!("{}{}", leaf.pem(), key.serialize_pem());
        let roots = [root, other].map(|root| Arc::new(RootStore::new(vec![root]).expect("root")));
        let peer = PeerProof::new(Some(&[leaf.der().clone()]), PeerRole::Client, Arc::clone(&roots[0]));
        Self {
            certificate: Arc::new(crate::ca_client::read_identity(&id, &pem).expect("certificate")),
            peer: Arc::new(peer.expect("proof")),
            roots,
        }
    }

    /// Certificates of these workloads. Nobody looks at what they say.
    fn certs(&self, of: &[&str]) -> BTreeMap<SpiffeId, Arc<CertifiedIdentity>> {
        of.iter().map(|path| (identity(path), Arc::clone(&self.certificate))).collect()
    }
}

fn enrolled(path: &str) -> Arc<Enrolled> {
    let (namespace, name) = path.split_once('/').expect("namespace/name");
    let null = || OwnedFd::from(File::open("/dev/null").expect("open"));
    Arc::new(Enrolled {
        uid: WorkloadUid(path.into()),
        name: name.into(),
        namespace: namespace.into(),
        service_account: name.into(),
        netns: null(),
        cookie: 1,
        listeners: Listeners {
            outbound4: null(),
            outbound6: None,
            inbound4: null(),
            inbound6: None,
            hbone4: null(),
            hbone6: None,
        },
    })
}

/// From a client in `client`'s namespace to a workload of the first view.
fn connection(view: &View, client: &str, to: &str, carrier: Carrier, peer: Option<&Arc<PeerProof>>) -> Description {
    let (client, address) = (identity(client), SocketAddr::from(([10, 0, 0, 2], 80)));
    let destination = view.snapshot.workload(&uid(to)).cloned().expect("a workload");
    Description {
        direction: Direction::Inbound,
        carrier,
        enrolled: enrolled(to),
        local_destination: None,
        source_addr: SocketAddr::from(([10, 0, 0, 1], 40000)),
        destination_addr: address,
        target: None,
        hbone_addr: None,
        source: None,
        destination: Some(destination),
        service: None,
        identities: peer.map(|_| (client.clone(), identity(to))),
        peer: peer.cloned(),
        judged: Some(InboundFlow { client: peer.map(|_| client), source: [10, 0, 0, 1].into(), destination: address }),
    }
}

fn apply(shared: &Shared, changes: &[Change]) {
    shared.update(|view| view.with_snapshot(Arc::new(view.snapshot.apply(changes)), true));
}

fn all_workloads() -> Vec<Change> {
    WORKLOADS.map(|path| workload(path, &[])).to_vec()
}

/// Something that happens to the view.
fn happens(shared: &Shared, proofs: &Proofs, rng: &mut StdRng) {
    let any = |rng: &mut StdRng| WORKLOADS[rng.random_range(0..WORKLOADS.len())];
    let namespace = ["a", "b", "root"][rng.random_range(0..3)];
    let path = format!("{namespace}/p{}", rng.random_range(0..2));
    match rng.random_range(0..10) {
        0..3 => {
            let scopes = [PolicyScope::Global, PolicyScope::Namespace, PolicyScope::Workload];
            let action = if rng.random_bool(0.7) { Action::Deny } else { Action::Allow };
            let of = ["a", "b"][rng.random_range(0..2)];
            apply(shared, &[policy(&path, scopes[rng.random_range(0..3)], action, of)]);
        }
        3..6 => apply(shared, &[Change::RemovePolicy(name(&path))]),
        6 => apply(shared, &[workload(any(rng), if rng.random_bool(0.5) { &["a/p0"] } else { &[] })]),
        7 => apply(shared, &[Change::RemoveWorkload(uid(any(rng)))]),
        8 => {
            let with = WORKLOADS.into_iter().filter(|_| rng.random_bool(0.7)).collect::<Vec<_>>();
            shared.update(|view| view.with_certs(proofs.certs(&with), Arc::clone(&view.roots)));
        }
        _ => {
            let roots = &proofs.roots[rng.random_range(0..2)];
            shared.update(|view| view.with_certs(view.certs.clone(), Arc::clone(roots)));
        }
    }
}

#[test]
fn no_verdict_changes_without_its_connection_being_concerned() {
    let (shared, proofs, mut rng) = (Shared::default(), Proofs::new(), StdRng::seed_from_u64(7));
    apply(&shared, &all_workloads());
    shared.update(|view| view.with_certs(proofs.certs(&WORKLOADS), Arc::clone(&proofs.roots[0])));
    let first = shared.view.load_full();
    let connections: Vec<Description> = WORKLOADS
        .into_iter()
        .flat_map(|to| {
            let tunnelled = ["a/client", "b/client"].map(|client| (client, Carrier::Hbone, Some(&proofs.peer)));
            tunnelled
                .into_iter()
                .chain([("a/client", Carrier::Tcp, None)])
                .map(move |(client, carrier, peer)| (client, to, carrier, peer))
        })
        .map(|(client, to, carrier, peer)| connection(&first, client, to, carrier, peer))
        .collect();
    let (mut changed, mut spared) = (0, 0);
    for step in 0..STEPS {
        let old = shared.view.load_full();
        for _ in 0..rng.random_range(1..3) {
            happens(&shared, &proofs, &mut rng);
        }
        let new = shared.view.load_full();
        let mut change = ViewChange::between(&old, &new);
        for one in &connections {
            let (before, after) = (one.verdict(&old), one.verdict(&new));
            // What was refused before does not live.
            if before.is_some() {
                continue;
            }
            let concerned = change.concerns(one);
            assert!(concerned || after.is_none(), "step {step}: {after:?} is not noticed");
            changed += usize::from(after.is_some());
            spared += usize::from(!concerned);
        }
    }
    assert!(changed > 300 && spared > 1000, "{changed} verdicts changed, {spared} were not reached again");
}

#[test]
fn what_happens_elsewhere_concerns_nobody_here() {
    let (shared, proofs) = (Shared::default(), Proofs::new());
    apply(&shared, &all_workloads());
    shared.update(|view| view.with_certs(proofs.certs(&WORKLOADS), Arc::clone(&proofs.roots[0])));
    let old = shared.view.load_full();
    let to_web = connection(&old, "a/client", "a/web", Carrier::Hbone, Some(&proofs.peer));
    let concerned = |change: &dyn Fn(&Shared)| {
        let here = Shared::new(View::new(
            Arc::clone(&old.snapshot),
            old.enrolled.clone(),
            old.certs.clone(),
            Arc::clone(&old.roots),
            true,
        ));
        change(&here);
        ViewChange::between(&old, &here.view.load_full()).concerns(&to_web)
    };
    let namespace = PolicyScope::Namespace;
    assert!(!concerned(&|here| apply(here, &[workload("a/db", &["a/p0"])])), "another workload");
    assert!(!concerned(&|here| apply(here, &[Change::RemoveWorkload(uid("b/web"))])), "another workload goes");
    assert!(!concerned(&|here| apply(here, &[policy("b/p0", namespace, Action::Deny, "a")])), "another namespace");
    assert!(!concerned(&|here| apply(here, &[policy("a/p0", PolicyScope::Workload, Action::Deny, "a")])), "not named");
    let renewed = proofs.certs(&["a/web"]);
    assert!(
        !concerned(&|here| here.update(|view| view.with_certs(renewed.clone(), Arc::clone(&view.roots)))),
        "a certificate of another identity"
    );
    assert!(concerned(&|here| apply(here, &[policy("a/p0", namespace, Action::Allow, "b")])), "its own namespace");
    assert!(concerned(&|here| apply(here, &[policy("root/p0", PolicyScope::Global, Action::Deny, "b")])), "the mesh");
    assert!(concerned(&|here| apply(here, &[workload("a/web", &["a/p0"])])), "the workload itself");
}

#[tokio::test]
async fn only_those_concerned_are_judged_and_those_judged_in_between_all_the_same() {
    let (shared, proofs) = (Shared::default(), Proofs::new());
    apply(&shared, &all_workloads());
    let connections = Connections::new(Arc::new(Metrics::default()), None, "Kubernetes".into());
    let register = |to: &str| {
        let view = shared.view.load_full();
        let registered = connections.register(connection(&view, "a/client", to, Carrier::Hbone, Some(&proofs.peer)));
        assert_eq!(registered.live.verdict(&view), None, "{to}");
        registered
    };
    // No certificate yet.
    let without = shared.view.load_full();
    shared.update(|view| view.with_certs(proofs.certs(&WORKLOADS), Arc::clone(&proofs.roots[0])));
    let web = register("a/web");
    let with = shared.view.load_full();
    shared.update(|view| view.with_certs(BTreeMap::new(), Arc::clone(&proofs.roots[0])));
    // Both views have no certificate for it; the one that it was let in by had.
    let withdrawn = shared.view.load_full();
    assert_eq!(connections.judge_again(&without, &withdrawn).await, 1);
    assert_eq!(web.live.must_close(), Some(&CloseReason::IdentityWithdrawn(identity("a/web"))));
    drop(web);

    shared.update(|view| view.with_certs(with.certs.clone(), Arc::clone(&proofs.roots[0])));
    let held: Vec<_> = ["a/web", "a/web", "a/db", "b/web"].map(register).into();
    let old = shared.view.load_full();
    apply(&shared, &[workload("b/other", &[])]);
    let new = shared.view.load_full();
    assert_eq!(connections.judge_again(&old, &new).await, 0, "another workload");
    apply(&shared, &[policy("a/p0", PolicyScope::Workload, Action::Deny, "a"), workload("a/web", &["a/p0"])]);
    let denied = shared.view.load_full();
    assert_eq!(connections.judge_again(&new, &denied).await, 2, "those to one workload");
    assert_eq!(connections.judge_again(&new, &denied).await, 0, "they were judged by it");
    let closed: Vec<bool> = held.iter().map(|registered| registered.live.must_close().is_some()).collect();
    assert_eq!(closed, [true, true, false, false]);
}
