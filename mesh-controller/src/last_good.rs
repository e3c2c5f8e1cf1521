//! The last good version of every object, on disk.
//!
//! What a file said before it broke is known to nobody but the controller. Without this a restart would take it for deleted,
//! and policies would go out of force. The file is a log: a line with its format, then one line a change, each with a
//! checksum over itself and all lines before it. When most lines are out of date the log is written anew, as a whole.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use mesh_core::config::{Compiler, Delta, Object, ObjectKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::state_dir::{PRIVATE_MODE, StateError, io_error, write_atomically_by};

/// First line; another form of the lines gets another one.
const FORMAT: &str = "mesh-configuration-1";
/// Lines below which a log is not written anew, whatever is out of date.
const MIN_LINES: usize = 4096;
/// Largest log that is read, bytes: ten times a mesh of 100,000 pods.
const MAX_BYTES: u64 = 1 << 30;
/// Bytes of a line's checksum, in hexadecimal twice as many. It is against accidents, not against attackers.
const CHECKSUM_BYTES: usize = 8;

/// The log, open for what comes next.
#[derive(Debug)]
pub struct LastGood {
    path: PathBuf,
    /// None: what is on disk cannot be added to.
    log: Option<Log>,
    /// The last attempt to write failed, and was complained about.
    failing: bool,
}

#[derive(Debug)]
struct Log {
    file: File,
    chain: Chain,
    lines: usize,
}

/// Checksum of all lines so far.
#[derive(Debug, Clone, Default)]
struct Chain([u8; 32]);

/// One change, as it is written.
#[derive(Serialize, Deserialize)]
enum Line<'a> {
    Put(Cow<'a, Object>),
    Remove(Cow<'a, ObjectKey>),
}

/// Why a log is not used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// Written by another version of this program, or not by it.
    #[error("{path} is not of the format {FORMAT}")]
    Format {
        /// The file.
        path: String,
    },
    /// Damaged.
    #[error("{path}: line {line} {reason}")]
    Damaged {
        /// The file.
        path: String,
        /// From 1.
        line: usize,
        /// How.
        reason: String,
    },
}

/// What a log held.
type Stored = Result<Option<Vec<Object>>, LogError>;

impl LastGood {
    /// Opens the log and reads it; no objects when there is none.
    pub fn open(path: PathBuf) -> (Self, Stored) {
        let (log, stored) = match read(&path) {
            Ok(None) => (None, Ok(None)),
            Ok(Some((log, objects))) => (log, Ok(Some(objects))),
            Err(error) => (None, Err(error)),
        };
        (Self { path, log, failing: false }, stored)
    }

    /// Stores what a step has brought into force. What could not be stored is stored with the next step.
    pub fn note(&mut self, deltas: &[Delta], compiler: &Compiler) {
        match self.try_note(deltas, compiler) {
            Ok(()) => self.failing = false,
            Err(error) => {
                self.log = None;
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::error!(%error, "the configuration is not stored; a restart would not know it");
                }
            }
        }
    }

    fn try_note(&mut self, deltas: &[Delta], compiler: &Compiler) -> Result<(), StateError> {
        let bound = MIN_LINES.max(2 * compiler.objects().len());
        match &mut self.log {
            Some(_) if deltas.is_empty() => Ok(()),
            Some(log) if log.lines + deltas.len() <= bound => {
                log.append(deltas, compiler).map_err(|e| io_error("write", &self.path, e))
            }
            Some(_) | None => {
                self.log = Some(write(&self.path, compiler)?);
                Ok(())
            }
        }
    }
}

impl Log {
    fn append(&mut self, deltas: &[Delta], compiler: &Compiler) -> io::Result<()> {
        let mut text = Vec::new();
        for delta in deltas {
            let line = match delta {
                // Its last good version stays.
                Delta::Upsert(object) if compiler.is_refused(&object.key()) => continue,
                Delta::Upsert(object) => Line::Put(Cow::Borrowed(object)),
                Delta::Remove(key) => Line::Remove(Cow::Borrowed(key)),
            };
            self.chain.write(&line, &mut text)?;
            self.lines += 1;
        }
        self.file.write_all(&text)?;
        self.file.sync_data()
    }
}

impl Chain {
    /// Checksum of the next line.
    fn next(&mut self, json: &[u8]) -> String {
        self.0 = Sha256::new().chain_update(self.0).chain_update(json).finalize().into();
        self.0[..CHECKSUM_BYTES].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn write(&mut self, line: &Line<'_>, to: &mut impl Write) -> io::Result<()> {
        let json = serde_json::to_vec(line)?;
        write!(to, "{} ", self.next(&json))?;
        to.write_all(&json)?;
        to.write_all(b"\n")
    }
}

/// Replaces the log by one that holds what is in force.
fn write(path: &Path, compiler: &Compiler) -> Result<Log, StateError> {
    let (mut chain, mut lines) = (Chain::default(), 0);
    write_atomically_by(path, PRIVATE_MODE, |file| {
        let mut to = BufWriter::new(file);
        writeln!(to, "{FORMAT}")?;
        for object in compiler.in_force() {
            chain.write(&Line::Put(Cow::Owned(object)), &mut to)?;
            lines += 1;
        }
        to.flush()
    })?;
    Ok(Log { file: open_to_append(path)?, chain, lines })
}

fn open_to_append(path: &Path) -> Result<File, StateError> {
    OpenOptions::new().append(true).open(path).map_err(|e| io_error("open", path, e))
}

/// The objects of a log, and the log itself where it can be added to; none when there is no file.
fn read(path: &Path) -> Result<Option<(Option<Log>, Vec<Object>)>, LogError> {
    let failed = |e: io::Error| LogError::State(io_error("read", path, e));
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    let name = || path.display().to_string();
    let mut from = BufReader::new(file.take(MAX_BYTES));
    let mut text = Vec::new();
    from.read_until(b'\n', &mut text).map_err(failed)?;
    if text != format!("{FORMAT}\n").as_bytes() {
        return Err(LogError::Format { path: name() });
    }
    let (mut chain, mut lines, mut objects) = (Chain::default(), 0, BTreeMap::new());
    loop {
        text.clear();
        if from.read_until(b'\n', &mut text).map_err(failed)? == 0 {
            let log = Log { file: open_to_append(path)?, chain, lines };
            return Ok(Some((Some(log), objects.into_values().collect())));
        }
        if text.pop() != Some(b'\n') {
            if from.get_ref().limit() == 0 {
                return Err(damaged(name(), lines, format!("lies beyond {MAX_BYTES} bytes")));
            }
            // The process ended while it wrote the line: the change was not yet stored, and no other came after it.
            return Ok(Some((None, objects.into_values().collect())));
        }
        match parse(&text, &mut chain).map_err(|reason| damaged(name(), lines, reason))? {
            Line::Put(object) => drop(objects.insert(object.key(), object.into_owned())),
            Line::Remove(key) => drop(objects.remove(&*key)),
        }
        lines += 1;
    }
}

fn parse(text: &[u8], chain: &mut Chain) -> Result<Line<'static>, String> {
    let (checksum, json) = text.split_at_checked(2 * CHECKSUM_BYTES + 1).ok_or("is too short")?;
    if chain.next(json).as_bytes() != &checksum[..2 * CHECKSUM_BYTES] {
        return Err("does not match its checksum".into());
    }
    serde_json::from_slice(json).map_err(|e| format!("cannot be understood: {e}"))
}

fn damaged(path: String, lines_before: usize, reason: String) -> LogError {
    // The first line is the format's.
    LogError::Damaged { path, line: lines_before + 2, reason }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use mesh_api::k8s::{Item, items};
    use mesh_api::yaml::documents;
    use mesh_core::config::Settings;

    use super::*;
    use crate::testing::TempDir;

    /// One of each kind, with every field that is read.
    const ALL: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {a: "b c"}, annotations: {note: "x\ny"}, creationTimestamp: 2026-01-31T12:00:00Z}
---
apiVersion: v1
kind: Node
metadata: {name: node-a, labels: {topology.kubernetes.io/zone: z}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata:
  name: web
  namespace: shop
  labels: {app: web}
  deletionTimestamp: 2026-01-31T13:00:00Z
  ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-5d, controller: true}]
spec:
  serviceAccountName: web
  nodeName: node-a
  hostNetwork: true
  containers: [{name: c, ports: [{name: http, containerPort: 80}, {containerPort: 53, protocol: UDP}]}]
status: {phase: Pending, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}], conditions: [{type: Ready, status: "False"}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  clusterIPs: [10.96.0.1, "fd00:96::1"]
  ports: [{name: http, port: 80, targetPort: http, appProtocol: http}, {port: 81, targetPort: 8081, protocol: SCTP}]
  publishNotReadyAddresses: true
  internalTrafficPolicy: Local
  trafficDistribution: PreferClose
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 80}]
endpoints:
- {addresses: [10.0.0.1], conditions: {ready: false}, targetRef: {kind: Pod, name: web}, nodeName: node-a, zone: z}
- {addresses: [10.0.0.7, 10.0.0.8]}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm, namespace: shop}
spec: {address: 10.1.0.1, labels: {app: vm}, ports: {http: 8080}, network: net, locality: r/z, weight: 3, serviceAccount: vm}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: shop}
spec: {selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: DISABLE}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: policy, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  action: DENY
  rules:
  - {}
  - from: [{source: {principals: [a], notNamespaces: [b], ipBlocks: [10.0.0.0/8], remoteIpBlocks: [10.0.0.0/8]}}]
    to: [{operation: {ports: ["80"], notPaths: [/x]}}]
    when: [{key: source.ip, notValues: [10.0.0.1]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: waypoint, namespace: shop}
spec: {targetRefs: [{group: "", kind: Service, name: web}], action: CUSTOM, provider: {name: x}}
"#;

    fn puts(text: &str) -> Vec<Delta> {
        let file = Arc::from("/config/all.yaml");
        let all = documents(text).into_iter().flat_map(|document| items(&document.unwrap(), &file));
        all.map(|item| match item {
            Item::Object(object) => Delta::Upsert(*object),
            other => panic!("{other:?}"),
        })
        .collect()
    }

    fn policy(port: &str) -> Vec<Delta> {
        let head = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\n";
        puts(&format!("{head}spec: {{rules: [{{to: [{{operation: {{ports: ['{port}']}}}}]}}]}}\n"))
    }

    struct Disk {
        temp: TempDir,
        compiler: Compiler,
        last_good: LastGood,
    }

    impl Disk {
        fn new() -> Self {
            let temp = TempDir::new();
            let (last_good, stored) = LastGood::open(temp.path().join("log"));
            assert!(stored.unwrap().is_none());
            Self { temp, compiler: Compiler::new(Settings::default()), last_good }
        }

        fn path(&self) -> PathBuf {
            self.temp.path().join("log")
        }

        fn step(&mut self, deltas: &[Delta]) {
            self.compiler.compile(deltas);
            self.last_good.note(deltas, &self.compiler);
        }

        fn lines(&self) -> usize {
            fs::read_to_string(self.path()).unwrap().lines().count()
        }

        /// What the next process would find, sorted; it goes on with the log as that process would.
        fn reopen(&mut self) -> Vec<Object> {
            let (last_good, stored) = LastGood::open(self.path());
            self.last_good = last_good;
            stored.unwrap().expect("there is a log")
        }

        fn in_force(&self) -> Vec<Object> {
            let mut all: Vec<Object> = self.compiler.in_force().collect();
            all.sort_by_key(Object::key);
            all
        }
    }

    #[test]
    fn every_kind_comes_back_as_it_was() {
        let mut disk = Disk::new();
        let all = puts(ALL);
        disk.step(&all[..3]);
        disk.step(&all[3..]);
        assert_eq!(disk.lines(), 1 + all.len());
        let found = disk.reopen();
        assert_eq!(found.len(), all.len());
        assert_eq!(found, disk.in_force());

        let Delta::Upsert(first) = &all[0] else { panic!() };
        disk.step(&[Delta::Remove(first.key())]);
        let found = disk.reopen();
        assert_eq!(found.len(), all.len() - 1);
        assert_eq!(found, disk.in_force());
    }

    #[test]
    fn a_refused_version_leaves_the_one_before_it() {
        let mut disk = Disk::new();
        disk.step(&policy("80"));
        disk.step(&policy("99999"));
        assert_eq!(disk.reopen(), disk.in_force());
        assert_eq!(disk.in_force().len(), 1);
        // Also when the log is written as a whole.
        disk.last_good.log = None;
        disk.step(&[]);
        assert_eq!(disk.reopen(), disk.in_force());
    }

    #[test]
    fn a_line_that_was_being_written_is_as_if_it_had_not_been() {
        let mut disk = Disk::new();
        disk.step(&policy("80"));
        let before = disk.in_force();
        disk.step(&policy("81"));
        let text = fs::read(disk.path()).unwrap();
        fs::write(disk.path(), &text[..text.len() - 5]).unwrap();
        assert_eq!(disk.reopen(), before);
        // What follows is not appended to half a line.
        disk.step(&policy("82"));
        assert_eq!(disk.reopen(), disk.in_force());
    }

    #[test]
    fn damage_is_named_and_nothing_is_used() {
        let mut disk = Disk::new();
        disk.step(&policy("80"));
        disk.step(&puts(ALL));
        let text = fs::read_to_string(disk.path()).unwrap();
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        let error = |text: &str| {
            fs::write(disk.path(), text).unwrap();
            LastGood::open(disk.path()).1.unwrap_err().to_string()
        };
        assert!(error(&text.replace("shop", "shap")).contains("line 3 does not match its checksum"));
        let without_third: String = lines.iter().enumerate().filter(|(i, _)| *i != 2).map(|(_, line)| *line).collect();
        assert!(error(&without_third).contains("line 3 does not match its checksum"), "a line is missing");
        assert!(error(&text.replace(FORMAT, "mesh-configuration-0")).contains("is not of the format"));
        assert!(error("").contains("is not of the format"));
    }

    #[test]
    fn a_log_of_old_versions_is_written_anew() {
        let mut disk = Disk::new();
        for i in 0..MIN_LINES + 10 {
            // One write a step would take long; the size is what counts.
            let deltas: Vec<Delta> = (0..50).flat_map(|port| policy(&(1 + (i + port) % 1000).to_string())).collect();
            disk.step(&deltas);
            assert!(disk.lines() <= 1 + MIN_LINES);
            if i * 50 > 2 * MIN_LINES {
                break;
            }
        }
        assert_eq!(disk.reopen(), disk.in_force());
    }

    #[test]
    fn what_could_not_be_stored_is_stored_later() {
        let mut disk = Disk::new();
        let dir = disk.temp.path().to_owned();
        fs::remove_dir(&dir).unwrap();
        disk.step(&policy("80"));
        fs::create_dir(&dir).unwrap();
        disk.step(&[]);
        assert_eq!(disk.reopen(), disk.in_force());
        assert_eq!(disk.in_force().len(), 1);
    }
}
