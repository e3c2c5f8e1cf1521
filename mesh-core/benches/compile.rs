//! How long the compiler takes for one change in a large mesh: `cargo bench -p mesh-core --bench compile`.
//!
//! Medians over many changes, in a mesh of 10,000 services and 100,000 pods.

#[path = "../tests/compiler/fleet.rs"]
mod fleet;

use std::time::{Duration, Instant};

use mesh_core::config::{Compiler, Delta, Object, Settings};
use mesh_core::snapshot::Snapshot;

const SERVICES: usize = 10_000;
/// Changes of each kind.
const ROUNDS: usize = 101;

fn main() {
    let everything = fleet::everything(SERVICES);
    let mut compiler = Compiler::new(Settings::default());
    let start = Instant::now();
    let compiled = compiler.compile(&everything);
    println!("{} services, {} pods", SERVICES, SERVICES * fleet::PODS_PER_SERVICE);
    println!("{:<28} {:>12.3?}   {} resources", "everything from nothing", start.elapsed(), compiled.changes.len());
    let start = Instant::now();
    let mut snapshot = Snapshot::default().apply(&compiled.changes);
    println!("{:<28} {:>12.3?}", "a snapshot of it", start.elapsed());

    // Far from each other, so that no step finds the caches warm from the last one.
    let pods: Vec<_> = (0..ROUNDS).map(|round| fleet::pod(round * 977)).collect();
    let mut measure = |what: &str, delta: &dyn Fn(usize) -> Delta| {
        let mut compiled_in = Vec::new();
        let mut applied_in = Vec::new();
        let mut changes = 0;
        for round in 0..ROUNDS {
            let delta = [delta(round)];
            let start = Instant::now();
            let compiled = compiler.compile(&delta);
            compiled_in.push(start.elapsed());
            let start = Instant::now();
            snapshot = snapshot.apply(&compiled.changes);
            applied_in.push(start.elapsed());
            changes += compiled.changes.len();
        }
        let (median, worst) = median_and_worst(&mut compiled_in);
        let (applied, _) = median_and_worst(&mut applied_in);
        println!(
            "{what:<28} {median:>12.3?}   at most {worst:.3?}, applied in {applied:.3?}, {:.2} resources",
            changes as f64 / ROUNDS as f64
        );
    };
    measure("a pod gets unready", &|round| {
        let mut pod = pods[round].clone();
        pod.ready = Some(false);
        Delta::Upsert(Object::Pod(pod))
    });
    measure("a pod has another address", &|round| {
        let mut pod = pods[round].clone();
        pod.ips = vec![fleet::address(11, round)];
        Delta::Upsert(Object::Pod(pod))
    });
    measure("a pod is gone", &|round| Delta::Remove(Object::Pod(pods[round].clone()).key()));
    measure("a pod is new", &|round| Delta::Upsert(Object::Pod(pods[round].clone())));
    measure("a policy selects ten pods", &|round| {
        let mut policy = mesh_core::config::objects::AuthorizationPolicy::default();
        policy.meta.namespace = pods[round].meta.namespace.clone();
        policy.meta.name = format!("bench-{round}").into();
        policy.selector.insert("app".into(), pods[round].meta.labels["app"].clone());
        Delta::Upsert(Object::AuthorizationPolicy(policy))
    });
}

fn median_and_worst(times: &mut [Duration]) -> (Duration, Duration) {
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() - 1])
}
