//! Answers the CNI plugin: whether a pod may start. One task for each request, each with an end.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1;
use kube::Client;
use kube::api::Api;
use mesh_cni::wire::{ANSWER_WITHIN, Answer, Command, MAX_LINE, Request};
use mesh_core::config::objects::Pod;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::pods::{Plugged, Pods};
use crate::announce::{Netns, Outcome};
use crate::board::Board;

/// Requests at a time: more pods than a node starts at once. Who comes when there are more asks again.
const MAX_REQUESTS: usize = 256;
/// A plugin says what it wants within this time, and reads the answer.
const IO_WITHIN: Duration = Duration::from_secs(2);
/// Pause between two looks at the proxy's answers.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Pause before the API server is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// Pause between two reports of requests that cannot be understood.
const REPORT_EVERY: Duration = Duration::from_secs(60);
/// Pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a pod that a plugin has told of is believed to exist while the watch has not heard of it.
const UNHEARD_FOR: Duration = Duration::from_secs(300);

/// What the requests need.
pub(super) struct Desk {
    client: Client,
    pods: Arc<Mutex<Pods>>,
    board: Arc<Board>,
    /// Number of the host's network namespace: whoever names it is no pod.
    host: u64,
    malformed: Mutex<Malformed>,
}

#[derive(Default)]
struct Malformed {
    count: u64,
    reported: Option<Instant>,
}

/// A pod by its UID.
struct Found {
    uid: String,
    pod: Pod,
}

impl Desk {
    pub(super) fn new(client: Client, pods: Arc<Mutex<Pods>>, board: Arc<Board>, host: u64) -> Self {
        Self { client, pods, board, host, malformed: Mutex::default() }
    }

    async fn answer(&self, request: Request) -> Answer {
        match request.command {
            Command::Add => self.add(&request).await,
            Command::Del => {
                let mut pods = self.pods();
                if pods.unplug(&request.container) {
                    self.board.post(pods.desired(), pods.living());
                }
                Answer::Proceed
            }
        }
    }

    async fn add(&self, request: &Request) -> Answer {
        let deadline = Instant::now() + ANSWER_WITHIN;
        if !self.pods().is_complete() {
            return wait("the agent has not heard of the node's pods yet (is the API server reachable?)", Known::No);
        }
        let found = match self.find(request, deadline).await {
            Ok(found) => found,
            Err(answer) => return answer,
        };
        if let Err(answer) = self.know_namespace(&request.namespace, deadline).await {
            return answer;
        }
        if !self.pods().is_member(&found.pod) {
            return Answer::Proceed;
        }
        let netns = match open_netns(&request.netns, self.host) {
            Ok(file) => Arc::new(file),
            Err(error) => {
                return Answer::Refused { reason: format!("its network namespace {}: {error}", request.netns) };
            }
        };
        let plugged = Plugged {
            container: request.container.clone(),
            netns: Arc::clone(&netns),
            pod: found.pod,
            unheard_until: (Instant::now() + UNHEARD_FOR).into_std(),
        };
        {
            // Posted under the lock: what is posted later knows more.
            let mut pods = self.pods();
            pods.plug(found.uid.clone(), plugged);
            self.board.post(pods.desired(), pods.living());
        }
        let netns = Netns::Held(netns);
        loop {
            let answer = verdict(self.board.outcome_in(&found.uid, &netns));
            if answer == Answer::Proceed || Instant::now() >= deadline {
                return answer;
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// The pod, from the watch or from the API server. A runtime that does not say the UID may mean one that is newer than
    /// what the watch has heard of.
    async fn find(&self, request: &Request, deadline: Instant) -> Result<Found, Answer> {
        if let Some((uid, pod)) = self.pods().find(&request.namespace, &request.pod, &request.uid) {
            return Ok(Found { uid: uid.clone(), pod: pod.clone() });
        }
        let api = Api::<v1::Pod>::namespaced(self.client.clone(), &request.namespace);
        let mut why = "the API server does not know the pod yet".to_owned();
        while let Some(left) = left(deadline) {
            match timeout(left, api.get_opt(&request.pod)).await {
                Ok(Ok(Some(object))) => {
                    let (_, Some((uid, pod))) = super::pod(&object) else {
                        return Err(wait("the pod cannot be read (see the agent's log)", Known::No));
                    };
                    if is_meant(&request.uid, &uid, &pod) {
                        return Ok(Found { uid, pod });
                    }
                    if !is_mirror(&pod) {
                        return Err(Answer::Refused { reason: format!("another pod ({uid}) has its name now") });
                    }
                    // Kubelet makes one anew, a moment after it starts a static pod whose manifest has changed.
                    why = format!("the API server knows the mirror ({uid}) of another manifest still");
                }
                // A static pod's mirror comes a moment later.
                Ok(Ok(None)) => {}
                Ok(Err(error)) => why = format!("the API server does not say what the pod is: {error}"),
                Err(_) => why = "the API server does not answer".to_owned(),
            }
            sleep_until(deadline.min(Instant::now() + ASK_AGAIN)).await;
        }
        Err(wait(why, Known::No))
    }

    /// Sees to it that the pod's namespace is known.
    async fn know_namespace(&self, name: &str, deadline: Instant) -> Result<(), Answer> {
        let api = Api::<v1::Namespace>::all(self.client.clone());
        let mut why = format!("the API server does not know the namespace {name} yet");
        while let Some(left) = left(deadline) {
            if self.pods().knows_namespace(name) {
                return Ok(());
            }
            match timeout(left, api.get_opt(name)).await {
                Ok(Ok(Some(object))) => {
                    let (_, Some(namespace)) = super::namespace(&object) else {
                        return Err(wait("its namespace cannot be read (see the agent's log)", Known::No));
                    };
                    self.pods().add_namespace(namespace);
                    return Ok(());
                }
                Ok(Ok(None)) => {}
                Ok(Err(error)) => why = format!("the API server does not say what namespace {name} is: {error}"),
                Err(_) => why = "the API server does not answer".to_owned(),
            }
            sleep_until(deadline.min(Instant::now() + ASK_AGAIN)).await;
        }
        Err(wait(why, Known::No))
    }

    fn pods(&self) -> MutexGuard<'_, Pods> {
        lock(&self.pods)
    }

    /// Counted, and said once a minute.
    fn malformed(&self, error: &dyn std::fmt::Display) {
        let mut malformed = self.malformed.lock().unwrap_or_else(PoisonError::into_inner);
        malformed.count += 1;
        if malformed.reported.is_none_or(|at| at.elapsed() >= REPORT_EVERY) {
            malformed.reported = Some(Instant::now());
            tracing::warn!(%error, total = malformed.count, "a request at the CNI socket was not understood");
        }
    }
}

/// Nothing panics half way through a change.
pub(super) fn lock(pods: &Mutex<Pods>) -> MutexGuard<'_, Pods> {
    pods.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the runtime means this pod. For a static one, kubelet and runtime use the hash of its manifest as UID, and the API
/// server has a mirror with a UID of its own.
pub(super) fn is_meant(asked: &str, uid: &str, pod: &Pod) -> bool {
    asked.is_empty() || asked == uid || Some(asked) == hash(pod)
}

/// Whether it stands for a static pod.
fn is_mirror(pod: &Pod) -> bool {
    hash(pod).is_some()
}

/// Of the manifest of a static pod.
fn hash(pod: &Pod) -> Option<&str> {
    pod.meta.annotations.get("kubernetes.io/config.hash").map(|hash| &**hash)
}

/// What the plugin is told of a member, by what the newest proxy said of it.
fn verdict(outcome: Option<Option<Outcome>>) -> Answer {
    match outcome {
        Some(Some(Outcome::Enrolled)) => Answer::Proceed,
        Some(Some(Outcome::Refused { why, .. })) => {
            wait(format!("the node proxy cannot serve it: {why}"), Known::Member)
        }
        Some(None) => wait("the node proxy has not answered yet", Known::Member),
        None => wait("no node proxy runs on this node", Known::Member),
    }
}

/// What a pod is known to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Member,
    No,
}

fn wait(reason: impl Into<String>, known: Known) -> Answer {
    Answer::Wait { reason: reason.into(), is_member: known == Known::Member }
}

fn left(deadline: Instant) -> Option<Duration> {
    deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
}

/// Number of the host's network namespace.
pub(super) fn host_netns() -> Result<u64> {
    Ok(fs::metadata("/proc/1/ns/net").context("the host's network namespace (is this the node's /proc?)")?.ino())
}

/// The namespace at a path of the node: as this process sees it, or else as process 1 does.
fn open_netns(path: &str, host: u64) -> io::Result<File> {
    let own = |file: File| -> io::Result<File> {
        let is_namespace = fstatfs(&file)?.filesystem_type() == NSFS_MAGIC;
        if !is_namespace || file.metadata()?.ino() == host {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no network namespace of a pod"));
        }
        Ok(file)
    };
    let on_node = || open_in_root(Path::new("/proc/1/root"), path).and_then(own);
    File::open(path).and_then(own).or_else(|error| on_node().map_err(|_| error))
}

/// Opens a path below a root, where absolute symbolic links (`/var/run`) begin at that root too.
fn open_in_root(root: &Path, path: &str) -> io::Result<File> {
    let how = OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    Ok(openat2(File::open(root)?, path, how)?.into())
}

/// Listens there, for root alone, in place of an agent that was there before.
pub(super) fn listen(path: &Path) -> Result<UnixListener> {
    let open = || -> io::Result<UnixListener> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        // While one agent follows another there are two.
        let fresh = path.with_extension(format!("{}.new", std::process::id()));
        let _stale = fs::remove_file(&fresh);
        let listener = UnixListener::bind(&fresh)?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))?;
        fs::rename(&fresh, path)?;
        Ok(listener)
    };
    open().with_context(|| format!("listen at {}", path.display()))
}

/// Serves the plugin for the life of the process.
pub(super) async fn serve(listener: UnixListener, desk: Arc<Desk>) {
    let places = Arc::new(Semaphore::new(MAX_REQUESTS));
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Without a place the connection closes, and the plugin asks again.
                let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
                let desk = Arc::clone(&desk);
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, &desk).await {
                        desk.malformed(&error);
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept at the CNI socket");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn converse(mut stream: UnixStream, desk: &Desk) -> io::Result<()> {
    let mut line = String::new();
    timeout(IO_WITHIN, BufReader::new((&mut stream).take(MAX_LINE)).read_line(&mut line)).await??;
    let (answer, error) = match serde_json::from_str::<Request>(&line) {
        Ok(request) => {
            let (pod, started) = (format!("{}/{}", request.namespace, request.pod), Instant::now());
            let command = request.command;
            let answer = desk.answer(request).await;
            tracing::info!(pod, ?command, ?answer, elapsed = ?started.elapsed(), "CNI plugin answered");
            (answer, None)
        }
        Err(error) => (Answer::Refused { reason: format!("the agent does not understand: {error}") }, Some(error)),
    };
    let line = format!("{}\n", serde_json::to_string(&answer)?);
    timeout(IO_WITHIN, stream.write_all(line.as_bytes())).await??;
    error.map_or(Ok(()), |error| Err(error.into()))
}

#[cfg(test)]
mod tests {
    use mesh_core::config::objects::{Meta, Namespace};

    use super::*;
    use crate::announce::Told;

    #[test]
    fn a_member_starts_when_the_newest_proxy_serves_it() {
        let now = std::time::Instant::now();
        let refused = Outcome::Refused { why: "port 15001 is taken".into(), pause: Duration::ZERO, retry_at: now };
        let check = |outcome: Option<Option<Outcome>>, expected: &str| {
            let found = match verdict(outcome) {
                Answer::Proceed => "proceed".to_owned(),
                Answer::Refused { reason } => format!("refused: {reason}"),
                Answer::Wait { reason, is_member } => format!("wait ({is_member}): {reason}"),
            };
            assert_eq!(found, expected);
        };
        check(Some(Some(Outcome::Enrolled)), "proceed");
        check(Some(Some(refused)), "wait (true): the node proxy cannot serve it: port 15001 is taken");
        check(Some(None), "wait (true): the node proxy has not answered yet");
        check(None, "wait (true): no node proxy runs on this node");
    }

    #[test]
    fn a_static_pod_is_meant_by_the_hash_of_its_manifest() {
        let mut mirror = Pod::default();
        mirror.meta.annotations = [("kubernetes.io/config.hash".into(), "h1".into())].into();
        for (asked, expected) in [("u1", true), ("h1", true), ("", true), ("u2", false)] {
            assert_eq!(is_meant(asked, "u1", &mirror), expected, "{asked}");
        }
        assert!(!is_meant("h1", "u1", &Pod::default()));
        // The runtime may mean a newer manifest than that of the mirror, so it is not refused.
        assert!(is_mirror(&mirror) && !is_mirror(&Pod::default()));
    }

    #[test]
    fn only_a_network_namespace_that_is_not_the_hosts_is_taken() {
        let host = fs::metadata("/proc/self/ns/net").unwrap().ino();
        for path in ["/etc/passwd", "/proc/self/ns/net", "/does/not/exist", ""] {
            assert!(open_netns(path, host).is_err(), "{path}");
        }
        assert!(open_netns("/proc/self/ns/net", 0).is_ok());
    }

    #[test]
    fn links_of_the_node_lead_to_what_is_on_the_node() {
        let root = std::env::temp_dir().join(format!("mesh-agent-root-{}", std::process::id()));
        fs::create_dir_all(root.join("run/netns")).unwrap();
        fs::create_dir_all(root.join("var")).unwrap();
        std::os::unix::fs::symlink("/run", root.join("var/run")).unwrap();
        fs::write(root.join("run/netns/cni-1"), "its").unwrap();
        let opened = open_in_root(&root, "/var/run/netns/cni-1").unwrap();
        assert_eq!(io::read_to_string(opened).unwrap(), "its");
        assert!(open_in_root(&root, "/var/run/netns/cni-2").is_err());
        fs::remove_dir_all(root).unwrap();
    }

    /// Whether a pod that the runtime calls `h2` is found where the API server first says this of it, and then that it is `h2`.
    async fn found_after(first: &'static str) -> Result<String, Answer> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serving = tokio::spawn(async move {
            for metadata in [first, r#""uid":"u2","annotations":{"kubernetes.io/config.hash":"h2"}"#] {
                let (mut stream, _) = listener.accept().await.unwrap();
                BufReader::new(&mut stream).read_line(&mut String::new()).await.unwrap();
                let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n";
                let pod = format!(r#"{{"metadata":{{"name":"web","namespace":"shop",{metadata}}}}}"#);
                stream.write_all(format!("{head}{pod}").as_bytes()).await.unwrap();
            }
        });
        let client = Client::try_from(kube::Config::new(url.parse().unwrap())).unwrap();
        let desk = Desk::new(client, Arc::default(), Arc::default(), 0);
        let line = r#"{"command":"add","namespace":"shop","pod":"web","uid":"h2","container":"c"}"#;
        let found = desk.find(&serde_json::from_str(line).unwrap(), Instant::now() + Duration::from_secs(20)).await;
        serving.abort();
        found.map(|found| found.uid)
    }

    #[tokio::test]
    async fn a_static_pod_waits_for_its_own_mirror_and_any_other_is_refused() {
        let mirror = found_after(r#""uid":"u1","annotations":{"kubernetes.io/config.hash":"h1"}"#).await;
        assert_eq!(mirror, Ok("u2".to_owned()));
        let reason = "another pod (u1) has its name now".to_owned();
        assert_eq!(found_after(r#""uid":"u1""#).await, Err(Answer::Refused { reason }));
    }

    /// One line to an agent with a namespace in the mesh, one outside, and no API server; and its answer.
    async fn said(path: &Path, line: &str) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).await.unwrap();
        answer.trim_end().to_owned()
    }

    #[tokio::test]
    async fn a_plugin_is_answered_at_the_socket() {
        let dir = std::env::temp_dir().join(format!("mesh-agent-cni-{}", std::process::id()));
        let path = dir.join("cni.sock");
        let pods = Arc::new(Mutex::new(Pods::default()));
        let client = Client::try_from(kube::Config::new("http://127.0.0.1:1".parse().unwrap())).unwrap();
        let board = Arc::new(Board::default());
        // No namespace is the host's, so this process's own stands for a pod's.
        let desk = Arc::new(Desk::new(client, Arc::clone(&pods), Arc::clone(&board), 0));
        let serving = tokio::spawn(serve(listen(&path).unwrap(), Arc::clone(&desk)));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let add = |namespace: &str| {
            format!(
                r#"{{"command":"add","namespace":"{namespace}","pod":"web","uid":"{namespace}-1","container":"c","netns":"/no"}}"#
            )
        };
        let early = said(&path, &add("shop")).await;
        assert!(early.starts_with(r#"{"answer":"wait","reason":"the agent has not heard"#), "{early}");
        let pod = |namespace: &str| {
            let meta = Meta { namespace: namespace.into(), name: "web".into(), ..Meta::default() };
            (format!("{namespace}-1"), Pod { meta, ..Pod::default() })
        };
        let namespace = |name: &str, mode: &str| {
            let labels = [("istio.io/dataplane-mode".into(), mode.into())].into();
            Namespace { meta: Meta { name: name.into(), labels, ..Meta::default() } }
        };
        {
            let mut pods = lock(&pods);
            pods.set_namespaces([namespace("shop", "ambient"), namespace("batch", "none")]);
            pods.set_pods([pod("shop"), pod("batch")].into(), std::time::Instant::now());
        }
        assert_eq!(said(&path, &add("batch")).await, r#"{"answer":"proceed"}"#);
        let member = said(&path, &add("shop")).await;
        assert!(member.starts_with(r#"{"answer":"refused","reason":"its network namespace /no: "#), "{member}");
        let (waker, _proxy) = std::os::unix::net::UnixStream::pair().unwrap();
        let proxy = board.connected(waker);
        let (posted, in_netns) = (Arc::clone(&board), add("shop").replace("/no", "/proc/self/ns/net"));
        let answering = async {
            while posted.desired().get("shop-1").is_none_or(|enrol| matches!(enrol.netns, Netns::Unknown)) {
                tokio::task::yield_now().await;
            }
            let stamp = fs::metadata("/proc/self/ns/net").unwrap().ino();
            let enrolled = |stamp| [("shop-1".to_owned(), Told { outcome: Outcome::Enrolled, stamp })].into();
            posted.report(proxy, None, &enrolled(stamp + 1));
            sleep(LOOK_EVERY * 3).await;
            assert_eq!(posted.outcome("shop-1"), Some(Some(Outcome::Enrolled)), "of the sandbox before this one");
            posted.report(proxy, None, &enrolled(stamp));
            Instant::now()
        };
        let served = async { (said(&path, &in_netns).await, Instant::now()) };
        let (answered, (answer, at)) = tokio::join!(answering, served);
        assert_eq!(answer, r#"{"answer":"proceed"}"#);
        assert!(at > answered, "it waited for the answer for its own namespace");
        assert_eq!(said(&path, &add("shop").replace("add", "del")).await, r#"{"answer":"proceed"}"#);
        for garbage in ["", "{}", "[1]", &"x".repeat(20_000)] {
            let answer = said(&path, garbage).await;
            assert!(answer.starts_with(r#"{"answer":"refused","reason":"the agent does not understand"#), "{answer}");
        }
        assert_eq!(desk.malformed.lock().unwrap().count, 4);
        serving.abort();
        fs::remove_dir_all(dir).unwrap();
    }
}
