use std::thread;

use super::super::memfd;
use super::*;

/// A state directory of the test's.
struct StateDir(PathBuf);

impl StateDir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mesh-handover-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("create");
        Self(path)
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).expect("clean up");
    }
}

/// Serves successors until `done`.
fn serve(server: &mut HandoverServer, store: &FdStore, lock: &StateLock, mut done: impl FnMut() -> bool) -> Progress {
    let deadline = Instant::now() + TAKE_OVER_TIMEOUT;
    while !done() {
        assert!(Instant::now() < deadline, "gave up");
        server.accept();
        for at in (0..server.successors.len()).rev() {
            if server.hear(at, store, lock) == Progress::TakenOver {
                return Progress::TakenOver;
            }
        }
        thread::yield_now();
    }
    Progress::Waiting
}

fn sealed(content: &str) -> std::os::fd::OwnedFd {
    memfd::seal("test", content.as_bytes()).expect("seal")
}

/// The next message, or `closed`.
fn heard(peer: &Peer) -> String {
    let deadline = Instant::now() + TAKE_OVER_TIMEOUT;
    loop {
        match peer.hear() {
            Heard::Message(message, fd) => {
                let content = fd.map(|fd| memfd::unseal(&fd).expect("unseal"));
                return format!(
                    "{message}{}",
                    content.map_or_else(String::new, |c| format!(" {}", String::from_utf8_lossy(&c)))
                );
            }
            Heard::Nothing => wait_readable(peer, deadline).expect("a message"),
            Heard::Closed => return "closed".into(),
            Heard::Malformed(reason) => panic!("{reason}"),
        }
    }
}

#[test]
fn changes_after_the_store_was_sent_follow_it_until_the_next_one_has_taken_over() {
    let dir = StateDir::new("changes");
    let lock = StateLock::acquire(&dir.0).expect("lock");
    let mut server = HandoverServer::listen(&dir.0).expect("listen");
    let mut store = FdStore::default();
    store.put("info/a".into(), sealed("a")).expect("put");
    let bystander = Peer::new(seqpacket::connect(&socket_path(&dir.0)).expect("connect")).expect("peer");
    let path = dir.0.clone();
    let successor = thread::spawn(move || take_over(&path).expect("take over").expect("one answers"));
    serve(&mut server, &store, &lock, || successor.is_finished());
    let mut taken = successor.join().expect("join");
    assert_eq!(taken.store.names().collect::<Vec<_>>(), ["info/a"]);
    store.put("info/b".into(), sealed("b")).expect("put");
    server.forward(&Change::Put("info/b".into()), &store);
    store.del("info/a");
    server.forward(&Change::Del("info/a".into()), &store);
    taken.predecessor.queue(StoreMessage::TakenOver);
    taken.predecessor.flush(&taken.store).expect("send");
    assert_eq!(serve(&mut server, &store, &lock, || false), Progress::TakenOver);
    drop(server);
    let all: Vec<String> = (0..3).map(|_| heard(&taken.predecessor)).collect();
    assert_eq!(all, ["put info/b b", "del info/a", "closed"]);
    assert_eq!(heard(&bystander), "closed", "who did not ask for the store is told nothing");
}

#[test]
fn a_successor_that_takes_nothing_is_given_up() {
    let dir = StateDir::new("stuck");
    let lock = StateLock::acquire(&dir.0).expect("lock");
    let mut server = HandoverServer::listen(&dir.0).expect("listen");
    let mut store = FdStore::default();
    let mut stuck = Peer::new(seqpacket::connect(&socket_path(&dir.0)).expect("connect")).expect("peer");
    stuck.queue(StoreMessage::TakeOver);
    stuck.flush(&store).expect("send");
    let deadline = Instant::now() + TAKE_OVER_TIMEOUT;
    while !server.successors.iter().any(|next| next.follows) {
        assert!(Instant::now() < deadline, "gave up");
        server.accept();
        for at in (0..server.successors.len()).rev() {
            assert_eq!(server.hear(at, &store, &lock), Progress::Waiting);
        }
    }
    store.put("info/a".into(), sealed("a")).expect("put");
    for _ in 0..=MAX_BACKLOG + 1024 {
        server.forward(&Change::Put("info/a".into()), &store);
    }
    assert!(server.successors.is_empty());
}
