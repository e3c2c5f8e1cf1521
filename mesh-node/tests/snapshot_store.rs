//! The stored configuration against crashes and damage.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_api::ADDRESS_TYPE_URL;
use mesh_api::proto::workload::{Address, Workload, address};
use mesh_api::wds;
use mesh_core::policy::{Action, Policy, PolicyName, PolicyScope};
use mesh_core::snapshot::{Change, Snapshot};
use mesh_node::snapshot_store::{Storage, StoreError, load, save};
use prost::Message;

/// Where the process that is killed writes.
const DIR: &str = "MESH_TEST_SNAPSHOT_DIR";
/// Workloads of the configuration that is written over and over: its file is more than a page and less than a second.
const MANY: usize = 1500;
/// How often the writer is killed.
const KILLS: u32 = 25;
/// Everything here takes milliseconds; this is when a test gives up.
const PATIENCE: Duration = Duration::from_secs(20);

struct TempDir(PathBuf);

impl TempDir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mesh-snapshot-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("a fresh name");
        Self(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("snapshot")
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn workload(number: usize, node: &str) -> Change {
    let workload = Workload {
        uid: format!("Kubernetes//Pod/default/w-{number}"),
        name: format!("w-{number}"),
        namespace: "default".into(),
        service_account: "default".into(),
        node: node.into(),
        ..Workload::default()
    };
    let address = Address { r#type: Some(address::Type::Workload(workload)) };
    wds::decode(ADDRESS_TYPE_URL, &address.encode_to_vec()).unwrap()
}

fn snapshot(workloads: usize, node: &str) -> Snapshot {
    let mut changes: Vec<_> = (0..workloads).map(|number| workload(number, node)).collect();
    changes.push(Change::UpsertPolicy(Arc::new(Policy {
        name: PolicyName { namespace: "default".into(), name: "deny-all".into() },
        scope: PolicyScope::Namespace,
        action: Action::Deny,
        dry_run: false,
        rules: Vec::new(),
    })));
    Snapshot::default().apply(&changes)
}

/// Names of the nodes of all workloads, and the number of workloads and policies.
fn read(dir: &Path) -> (Vec<String>, usize, usize) {
    let stored = load(dir).unwrap_or_else(|error| panic!("{error}")).expect("stored");
    let read = Snapshot::default().apply(&stored.changes);
    let mut nodes: Vec<_> = read.workloads().map(|workload| workload.node.to_string()).collect();
    nodes.sort();
    nodes.dedup();
    (nodes, read.workloads().count(), read.policies().count())
}

/// What the process does that [`a_writer_killed_at_any_moment_leaves_a_whole_configuration`] starts and kills.
fn write_until_killed(dir: &Path) -> ! {
    let snapshots = ["node-a", "node-b"].map(|node| snapshot(MANY, node));
    loop {
        for snapshot in &snapshots {
            save(dir, 1, snapshot, &Default::default()).unwrap();
        }
    }
}

/// Files that are being written.
fn unfinished(dir: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "new")).collect()
}

#[test]
fn two_writers_at_once_leave_one_of_both_whole() {
    let dir = TempDir::new("two");
    let writer = |node: &'static str| {
        let dir = dir.0.clone();
        std::thread::spawn(move || {
            let snapshot = snapshot(MANY, node);
            for _ in 0..20 {
                save(&dir, 1, &snapshot, &Default::default()).unwrap();
            }
        })
    };
    let writers = [writer("node-a"), writer("node-b")];
    let mut looks = 0;
    while writers.iter().any(|writer| !writer.is_finished()) {
        if dir.file().exists() {
            let (nodes, workloads, policies) = read(&dir.0);
            assert!(nodes == ["node-a"] || nodes == ["node-b"], "a mixture: {nodes:?}");
            assert_eq!((workloads, policies), (MANY, 1));
            looks += 1;
        }
    }
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    assert!(looks > 0, "nothing was read while they wrote");
    assert!(unfinished(&dir.0).is_empty());
}

#[test]
fn what_a_successor_stored_stays() {
    let dir = TempDir::new("turns");
    let (predecessor, nothing) = Storage::open(dir.0.clone());
    assert!(nothing.unwrap().is_none());
    predecessor.save(&snapshot(3, "node-a"), &Default::default()).unwrap();
    // One that found everything as it should be, and stored nothing.
    let (_idle, _) = Storage::open(dir.0.clone());
    let (successor, found) = Storage::open(dir.0.clone());
    assert_eq!(found.unwrap().unwrap().changes.len(), 4);
    // It goes on for as long as nobody else has stored: the next one may fail.
    predecessor.save(&snapshot(2, "node-a"), &Default::default()).unwrap();
    assert_eq!(read(&dir.0), (vec!["node-a".to_owned()], 2, 1));
    successor.save(&snapshot(4, "node-b"), &Default::default()).unwrap();
    predecessor.save(&snapshot(3, "node-a"), &Default::default()).unwrap();
    assert_eq!(read(&dir.0), (vec!["node-b".to_owned()], 4, 1));
    successor.save(&snapshot(5, "node-b"), &Default::default()).unwrap();
    assert_eq!(read(&dir.0), (vec!["node-b".to_owned()], 5, 1));
    assert!(unfinished(&dir.0).is_empty());
}

#[test]
fn no_two_processes_have_one_turn() {
    let dir = TempDir::new("turn");
    save(&dir.0, 1, &snapshot(1, "node-a"), &Default::default()).unwrap();
    let (predecessor, _) = Storage::open(dir.0.clone());
    let (successor, _) = Storage::open(dir.0.clone());
    successor.save(&snapshot(4, "node-b"), &Default::default()).unwrap();
    predecessor.save(&snapshot(3, "node-a"), &Default::default()).unwrap();
    assert_eq!(read(&dir.0), (vec!["node-b".to_owned()], 4, 1));
}

#[test]
fn what_killed_writers_left_is_removed_when_it_is_old() {
    let dir = TempDir::new("left");
    let (old, fresh) = (dir.0.join("snapshot.0123456789abcdef.new"), dir.0.join("snapshot.fedcba9876543210.new"));
    for path in [&old, &fresh] {
        fs::write(path, "half").unwrap();
    }
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
    fs::File::open(&old).unwrap().set_modified(long_ago).unwrap();
    assert!(load(&dir.0).unwrap().is_none());
    assert_eq!(unfinished(&dir.0), [fresh]);
}

#[test]
fn a_writer_killed_at_any_moment_leaves_a_whole_configuration() {
    if let Some(dir) = std::env::var_os(DIR) {
        write_until_killed(Path::new(&dir));
    }
    let dir = TempDir::new("killed");
    save(&dir.0, 1, &snapshot(MANY, "node-a"), &Default::default()).unwrap();
    let mut cut_short = 0;
    for kill in 0..KILLS {
        unfinished(&dir.0).iter().for_each(|half| fs::remove_file(half).unwrap());
        let mut writer = Command::new(std::env::current_exe().unwrap());
        writer
            .args(["--exact", "a_writer_killed_at_any_moment_leaves_a_whole_configuration"])
            .env(DIR, &dir.0)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut writer = writer.spawn().unwrap();
        // Another moment each time: when the new file has grown to another size.
        let whole = fs::metadata(dir.file()).unwrap().len();
        let start = Instant::now();
        let wanted = whole / u64::from(KILLS) * u64::from(kill);
        let grown = |half: &PathBuf| fs::metadata(half).is_ok_and(|found| found.len() >= wanted);
        while !unfinished(&dir.0).iter().any(grown) {
            assert!(start.elapsed() < PATIENCE, "the writer does not write {wanted} of {whole} bytes");
        }
        writer.kill().unwrap();
        writer.wait().unwrap();
        cut_short += u32::from(!unfinished(&dir.0).is_empty());
        let (nodes, workloads, policies) = read(&dir.0);
        assert!(nodes == ["node-a"] || nodes == ["node-b"], "a mixture after kill {kill}: {nodes:?}");
        assert_eq!((workloads, policies), (MANY, 1), "after kill {kill}");
    }
    assert!(cut_short > 0, "no kill came between the beginning and the end of a write");
    println!("{cut_short} of {KILLS} kills left an unfinished file beside the whole one");
    save(&dir.0, 1, &snapshot(3, "node-c"), &Default::default()).unwrap();
    assert_eq!(read(&dir.0), (vec!["node-c".to_owned()], 3, 1), "what a kill left does not disturb the next writer");
}

#[test]
fn every_flipped_bit_and_every_cut_is_noticed() {
    let dir = TempDir::new("damaged");
    save(&dir.0, 1, &snapshot(3, "node-a"), &Default::default()).unwrap();
    let good = fs::read(dir.file()).unwrap();
    let refused = |bytes: &[u8], what: &str| {
        fs::write(dir.file(), bytes).unwrap();
        match load(&dir.0) {
            Err(error @ (StoreError::Format { .. } | StoreError::Damaged { .. })) => error.to_string(),
            other => panic!("{what}: {other:?}"),
        }
    };
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << bit;
            refused(&bytes, &format!("bit {bit} of byte {at}"));
        }
        refused(&good[..at], &format!("cut to {at} bytes"));
    }
    refused(&[&good[..], b"x"].concat(), "one byte more");
    refused(&[&good[..], &good[..]].concat(), "twice");
    let newer = [b"mesh-snapshot-9", good.strip_prefix(b"mesh-snapshot-2").unwrap()].concat();
    let said = refused(&newer, "another version");
    assert!(said.contains("not of the format mesh-snapshot-2") && said.contains("/snapshot"), "{said}");
    // Whatever its turn was: who finds it damaged replaces it.
    fs::write(dir.file(), "mesh-snapshot-2 7 cut sho").unwrap();
    let (storage, damaged) = Storage::open(dir.0.clone());
    damaged.unwrap_err();
    storage.save(&snapshot(3, "node-a"), &Default::default()).unwrap();
    assert_eq!(read(&dir.0), (vec!["node-a".to_owned()], 3, 1));
}

#[test]
fn no_file_is_no_error_and_an_unreadable_one_is() {
    let dir = TempDir::new("none");
    assert!(load(&dir.0).unwrap().is_none());
    fs::create_dir(dir.file()).unwrap();
    assert!(matches!(load(&dir.0), Err(StoreError::Read { .. })));
}
