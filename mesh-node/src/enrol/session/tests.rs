use std::os::fd::BorrowedFd;
use std::sync::Arc;

use mesh_api::proto::workload::zds;
use mesh_api::proto::workload::zds::workload_request::Payload;
use prost::Message;

use super::*;
use crate::enrol::Host;
use crate::enrol::kept;
use crate::enrol::testing::{FakeHost, file, workload};
use crate::runtime::Shared;

/// The agent's side of the socket.
struct Agent {
    listener: AsyncFd<OwnedFd>,
    path: PathBuf,
}

impl Agent {
    fn listen(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mesh-enrol-{name}-{}.sock", std::process::id()));
        let listener = seqpacket::asynchronous(seqpacket::listen(&path).expect("listen")).expect("register");
        Self { listener, path }
    }

    async fn accept(&self) -> AsyncFd<OwnedFd> {
        let socket = self.listener.async_io(Interest::READABLE, |fd| seqpacket::accept(fd.as_fd())).await;
        let proxy = seqpacket::asynchronous(socket.expect("accept")).expect("register");
        let hello = receive(&proxy).await;
        assert_eq!(zds::ZdsHello::decode(&hello[..]).expect("hello").version(), zds::Version::V1);
        proxy
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        std::fs::remove_file(&self.path).expect("the socket's file");
    }
}

async fn receive(proxy: &AsyncFd<OwnedFd>) -> Vec<u8> {
    let received = proxy.async_io(Interest::READABLE, |fd| seqpacket::receive(fd.as_fd())).await.expect("receive");
    match received {
        Received::Message(message) => message.bytes,
        other => panic!("expected a message, got {other:?}"),
    }
}

async fn ask(proxy: &AsyncFd<OwnedFd>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> String {
    seqpacket::send(proxy.as_fd(), bytes, fds).expect("send");
    let answer = zds::WorkloadResponse::decode(&receive(proxy).await[..]).expect("answer");
    let Some(zds::workload_response::Payload::Ack(ack)) = answer.payload else { panic!("no acknowledgement") };
    ack.error
}

fn request(payload: Payload) -> Vec<u8> {
    zds::WorkloadRequest { payload: Some(payload) }.encode_to_vec()
}

fn add(uid: &str) -> Vec<u8> {
    let info = zds::WorkloadInfo { name: uid.into(), namespace: "default".into(), service_account: "web".into() };
    request(Payload::Add(zds::AddWorkload { uid: uid.into(), workload_info: Some(info) }))
}

/// A session, and the supervisor's end of the socket by which it hears of a predecessor.
fn session(agent: &Agent) -> (Session, watch::Receiver<EnrolmentStatus>, OwnedFd) {
    let host: Arc<dyn Host> = Arc::new(FakeHost::default());
    let metrics = EnrolMetrics::default();
    let roster = Roster::new(host, Arc::new(Shared::default()), "t".into(), Vec::new(), metrics.clone());
    let (supervisor, ours) = seqpacket::pair().expect("pair");
    let predecessor = Changes::over(ours).expect("register");
    let (session, status) = Session::new(agent.path.clone(), roster, predecessor, metrics);
    (session, status, supervisor)
}

fn at_once() -> impl Future<Output = ()> {
    std::future::ready(())
}

#[tokio::test]
async fn requests_are_answered_bad_ones_refused_and_counted_and_nobody_else_is_disturbed() {
    let agent = Agent::listen("requests");
    let (session, mut status, _supervisor) = session(&agent);
    let cancel = CancellationToken::new();
    let running = tokio::spawn(session.run(at_once(), cancel.clone()));
    let proxy = agent.accept().await;
    let netns = file();
    assert_eq!(ask(&proxy, &add("a"), &[netns.as_fd()]).await, "");
    let too_long = vec![0; seqpacket::MAX_MESSAGE_BYTES + 1];
    for (bytes, fds, reason) in [
        (b"\xff\xff".to_vec(), 0, "not a WorkloadRequest"),
        (add("b"), 0, "add with 0 descriptors"),
        (add(""), 1, "uid is empty"),
        (too_long, 0, "a message of more than"),
    ] {
        let fds = vec![netns.as_fd(); fds];
        let error = ask(&proxy, &bytes, &fds).await;
        assert!(error.contains(reason), "{error}");
    }
    assert_eq!(ask(&proxy, &request(Payload::SnapshotSent(zds::SnapshotSent {})), &[]).await, "");
    let now = status.wait_for(|status| status.announced).await.expect("runs").clone();
    assert_eq!(now.bad_messages, 4);
    assert_eq!(now.workloads.iter().map(|w| (&*w.uid, &*w.state)).collect::<Vec<_>>(), [("a", "ready")]);
    assert!(now.agent_connected);
    cancel.cancel();
    running.await.expect("ends");
}

#[tokio::test]
async fn an_agent_that_goes_away_is_tried_again_and_workloads_stay() {
    let agent = Agent::listen("again");
    let (session, mut status, _supervisor) = session(&agent);
    let cancel = CancellationToken::new();
    let running = tokio::spawn(session.run(at_once(), cancel.clone()));
    let proxy = agent.accept().await;
    let netns = file();
    assert_eq!(ask(&proxy, &add("a"), &[netns.as_fd()]).await, "");
    drop(proxy);
    status.wait_for(|status| !status.agent_connected).await.expect("runs");
    let proxy = agent.accept().await;
    assert_eq!(ask(&proxy, &request(Payload::Keep(zds::KeepWorkload { uid: "a".into() })), &[]).await, "");
    assert_eq!(status.borrow().workloads.len(), 1);
    cancel.cancel();
    running.await.expect("ends");
}

#[tokio::test]
async fn what_a_predecessor_does_is_done_before_the_agent_is_spoken_to_and_after() {
    let agent = Agent::listen("predecessor");
    let (session, mut status, supervisor) = session(&agent);
    let cancel = CancellationToken::new();
    let (speak, may_speak) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(session.run(async move { drop(may_speak.await) }, cancel.clone()));
    let put = |name: &str| {
        for (name, fd) in kept::descriptors(&workload(name, name, true)).expect("descriptors") {
            seqpacket::send(supervisor.as_fd(), format!("put {name}").as_bytes(), &[fd.as_fd()]).expect("send");
        }
    };
    put("early");
    status.wait_for(|status| status.workloads.iter().any(|w| w.uid == "early")).await.expect("served");
    drop(speak);
    let proxy = agent.accept().await;
    put("late");
    status.wait_for(|status| status.workloads.len() == 2).await.expect("served");
    seqpacket::send(supervisor.as_fd(), b"del info/early", &[]).expect("send");
    status.wait_for(|status| status.workloads.len() == 1).await.expect("left");
    assert_eq!(ask(&proxy, &request(Payload::Keep(zds::KeepWorkload { uid: "late".into() })), &[]).await, "");
    cancel.cancel();
    running.await.expect("ends");
}
