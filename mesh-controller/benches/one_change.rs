//! How long one pod's change takes in a mesh of 10,000 services and 100,000 pods: `cargo bench -p mesh-controller`.
//!
//! For files of a hundred objects and for a file an object: the first step (all is read), a step in which nothing has
//! changed, a step with one pod changed, and the way from the write of its file to the resource on a node's stream, which
//! has the wait for the end of a burst of changes in it. Medians and the longest of several.
#![allow(clippy::unwrap_used, reason = "a benchmark ends where it fails")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{ADDRESS, Mesh, TempDir};
use mesh_controller::ads::catalogue::ResourceType;
use mesh_controller::control::Control;
use mesh_controller::metrics::Metrics;
use mesh_controller::source::{Changed, Source};
use mesh_core::config::{Compiler, Settings};

const NAMESPACES: usize = 100;
const SERVICES_EACH: usize = 100;
const PODS_OF_A_SERVICE: usize = 10;
const NODES: usize = 1000;
const ROUNDS: usize = 15;

/// A tree of files that hold the mesh.
struct Tree {
    config: PathBuf,
    per_file: usize,
}

impl Tree {
    fn write(root: &Path, per_file: usize) -> Self {
        let tree = Self { config: root.join("config"), per_file };
        for namespace in 0..NAMESPACES {
            fs::create_dir_all(tree.config.join(format!("ns{namespace}"))).unwrap();
            tree.write_all(namespace, "service", SERVICES_EACH, |i| service(namespace, i));
            tree.write_all(namespace, "pod", SERVICES_EACH * PODS_OF_A_SERVICE, |i| pod(namespace, i, 0));
        }
        fs::write(tree.config.join("policy.yaml"), POLICIES).unwrap();
        tree
    }

    fn write_all(&self, namespace: usize, kind: &str, count: usize, object: impl Fn(usize) -> String) {
        for first in (0..count).step_by(self.per_file) {
            let text: String = (first..(first + self.per_file).min(count)).map(&object).collect();
            fs::write(self.file(namespace, kind, first), text).unwrap();
        }
    }

    fn file(&self, namespace: usize, kind: &str, first: usize) -> PathBuf {
        self.config.join(format!("ns{namespace}/{kind}-{first:04}.yaml"))
    }

    /// Another version of one pod, written as an editor does. Gives the file.
    fn change(&self, round: usize) -> PathBuf {
        let (namespace, changed) = (round * 7 % NAMESPACES, round * 131 % (SERVICES_EACH * PODS_OF_A_SERVICE));
        let first = changed / self.per_file * self.per_file;
        let text: String =
            (first..first + self.per_file).map(|i| pod(namespace, i, if i == changed { round } else { 0 })).collect();
        let new = self.config.join(format!("ns{namespace}/.new"));
        fs::write(&new, text).unwrap();
        let file = self.file(namespace, "pod", first);
        fs::rename(new, &file).unwrap();
        file
    }
}

const POLICIES: &str = "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-ports, namespace: ns1}
spec: {selector: {matchLabels: {app: s1}}, rules: [{to: [{operation: {ports: ['8080'], methods: [GET]}}]}]}
";

fn service(namespace: usize, i: usize) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{i}, namespace: ns{namespace}}}\n\
         spec:\n  clusterIP: 10.200.{namespace}.{i}\n  selector: {{app: s{i}}}\n  ports: [{{name: http, port: 80, targetPort: 8080}}]\n"
    )
}

fn pod(namespace: usize, i: usize, version: usize) -> String {
    let (app, node) = (i / PODS_OF_A_SERVICE, (namespace * 1009 + i) % NODES);
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: s{app}-{i:05}\n  namespace: ns{namespace}\n  \
         labels: {{app: s{app}, version: v{version}, istio.io/dataplane-mode: ambient}}\n\
         spec:\n  nodeName: node-{node}\n  serviceAccountName: s{app}\n  \
         containers: [{{name: c, image: registry/s{app}:1, ports: [{{name: http, containerPort: 8080}}]}}]\n\
         status: {{phase: Running, podIP: 10.{namespace}.{}.{}, conditions: [{{type: Ready, status: \"True\"}}]}}\n",
        i / 250,
        i % 250 + 1
    )
}

/// Time that passed, and time on a CPU, which other load of the machine changes less.
#[derive(Clone, Copy)]
struct Spent {
    wall: Duration,
    cpu: Duration,
}

struct Sample(Vec<Spent>);

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

impl std::fmt::Display for Sample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sorted = |part: fn(&Spent) -> Duration| {
            let mut all: Vec<Duration> = self.0.iter().map(part).collect();
            all.sort();
            all
        };
        let (wall, cpu) = (sorted(|spent| spent.wall), sorted(|spent| spent.cpu));
        let middle = self.0.len() / 2;
        write!(
            f,
            "median {:7.1} ms, longest {:7.1} ms, on CPU {:7.1} ms",
            ms(wall[middle]),
            ms(wall[wall.len() - 1]),
            ms(cpu[middle])
        )
    }
}

fn sample(measured: impl FnMut(usize) -> Spent) -> Sample {
    Sample((1..=ROUNDS).map(measured).collect())
}

fn timed(act: impl FnOnce()) -> Spent {
    let (start, cpu) = (Instant::now(), cpu_of_thread());
    act();
    Spent { wall: start.elapsed(), cpu: cpu_of_thread() - cpu }
}

fn cpu_of_thread() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// Steps alone, without a process around them.
fn steps(tree: &Tree, state: &Path) {
    let source = Source::directories(vec![tree.config.clone()]);
    let mut control = Control::new(source, Compiler::new(Settings::default()), Arc::new(Metrics::default()));
    fs::create_dir_all(state).unwrap();
    control.resume(state.join("configuration"));
    println!("  first step                  {}", Sample(vec![timed(|| control.step(&Changed::Anything))]));
    let catalogue = control.catalogue();
    let count = catalogue.read().unwrap().len(ResourceType::Address);
    assert_eq!(count, NAMESPACES * SERVICES_EACH * (1 + PODS_OF_A_SERVICE), "{:?}", control.problems().load().first());
    // Files that have just been written are read once more.
    std::thread::sleep(Duration::from_secs(4));
    control.step(&Changed::Anything);
    println!("  look at all, nothing new    {}", sample(|_| timed(|| control.step(&Changed::Anything))));
    let mut changed = |round: usize, at: fn(PathBuf) -> Changed| {
        let file = tree.change(round);
        let before = catalogue.read().unwrap().generation();
        let spent = timed(|| control.step(&at(file)));
        let catalogue = catalogue.read().unwrap();
        assert_eq!(catalogue.since(ResourceType::Address, before).unwrap().count(), 1, "one resource");
        spent
    };
    println!("  look at all, one change     {}", sample(|round| changed(round, |_| Changed::Anything)));
    let told = |round| changed(ROUNDS + round, |file| Changed::Paths([file].into()));
    println!("  one change, told where      {}", sample(told));
}

/// From the write of the file to the resource on a stream.
async fn pushes(tree: &Tree, temp: TempDir) {
    let mesh = Mesh::resume(temp).await;
    let mut stream = mesh.stream("node-1").await;
    stream.subscribe(ADDRESS).await;
    stream.next().await;
    let mut times = Vec::new();
    for round in 2 * ROUNDS + 1..=3 * ROUNDS {
        let start = Instant::now();
        tree.change(round);
        let response = stream.next().await;
        times.push(Spent { wall: start.elapsed(), cpu: Duration::ZERO });
        assert_eq!(response.resources.len(), 1);
    }
    println!("  from write to push          {}", Sample(times));
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    for per_file in [100, 1] {
        println!("{per_file} objects a file");
        let temp = TempDir::new();
        let tree = Tree::write(temp.path(), per_file);
        steps(&tree, &temp.path().join("steps"));
        runtime.block_on(pushes(&tree, temp));
    }
}
