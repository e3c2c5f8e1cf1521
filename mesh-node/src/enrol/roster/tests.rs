use std::collections::BTreeSet;

use super::*;
use crate::enrol::testing::{FakeHost, file, workload};

struct Scene {
    host: Arc<FakeHost>,
    shared: Arc<Shared>,
    roster: Roster,
}

fn scene(adopted: Vec<Enrolled>) -> Scene {
    let (host, shared) = (Arc::new(FakeHost::default()), Arc::new(Shared::default()));
    let dyn_host: Arc<dyn Host> = Arc::clone(&host) as Arc<dyn Host>;
    let roster = Roster::new(dyn_host, Arc::clone(&shared), "t".into(), adopted, EnrolMetrics::default());
    Scene { host, shared, roster }
}

fn info(name: &str, service_account: &str) -> WorkloadInfo {
    WorkloadInfo { name: name.into(), namespace: "default".into(), service_account: service_account.into() }
}

fn add(uid: &str, account: &str, netns: &OwnedFd) -> Request {
    let netns = netns.try_clone().expect("dup");
    Request::Add(Add { uid: WorkloadUid(uid.into()), info: info(uid, account), netns })
}

fn del(uid: &str) -> Request {
    Request::Del(WorkloadUid(uid.into()))
}

impl Scene {
    async fn expect(&mut self, request: Request, outcome: Result<(), &str>, asked: &[&str]) {
        let what = format!("{request:?}");
        match (self.roster.handle(request).await, outcome) {
            (Ok(()), Ok(())) => {}
            (Err(error), Err(part)) if error.contains(part) => {}
            (got, expected) => panic!("{what}: got {got:?}, expected {expected:?}"),
        }
        assert_eq!(self.host.asked(), asked, "{what}");
    }

    fn served(&self) -> Vec<String> {
        self.shared.view.load().enrolled.keys().map(|uid| uid.0.to_string()).collect()
    }

    fn states(&self) -> Vec<String> {
        self.roster.rows().iter().map(|row| format!("{} {}", row.uid, row.state)).collect()
    }

    fn kept_uids(&self) -> BTreeSet<String> {
        let kept = self.host.kept.lock().expect("lock");
        kept.iter().filter_map(|name| name.strip_prefix("info/").map(str::to_owned)).collect()
    }
}

#[tokio::test]
async fn a_workload_is_captured_then_certified_then_served_and_all_is_undone_when_it_goes() {
    let mut scene = scene(Vec::new());
    let netns = file();
    scene.expect(add("a", "web", &netns), Ok(()), &["capture a", "certificate web", "serve a"]).await;
    assert_eq!(scene.states(), ["a ready"]);
    assert_eq!(scene.host.kept.lock().expect("lock").len(), 8, "namespace, six listeners, info");
    scene.expect(add("a", "web", &netns), Ok(()), &["renew a", "certificate web"]).await;
    scene.expect(del("a"), Ok(()), &["stop a", "release", "give up web"]).await;
    assert!(scene.served().is_empty() && scene.host.kept.lock().expect("lock").is_empty());
    scene.expect(del("a"), Ok(()), &[]).await;
}

fn let_go(uid: &str) -> Request {
    Request::LetGo(WorkloadUid(uid.into()))
}

#[tokio::test]
async fn what_a_workload_that_left_needs_stays_until_its_last_connection_has_ended() {
    let mut scene = scene(Vec::new());
    let netns = file();
    scene.expect(add("a", "web", &netns), Ok(()), &["capture a", "certificate web", "serve a"]).await;
    *scene.host.carried.lock().expect("lock") = 3;
    assert_eq!(scene.roster.next_look(), None);
    scene.expect(let_go("a"), Ok(()), &["let go"]).await;
    scene.expect(let_go("a"), Ok(()), &[]).await;
    assert!(scene.kept_uids().is_empty(), "the next proxy must not serve it");
    assert_eq!(scene.states(), ["a left the mesh; 3 connections go on, at most 60 min"]);
    assert_eq!(scene.served(), ["a"], "what was captured is still accepted");
    // Not announced, and not gone either.
    scene.expect(Request::SnapshotSent, Ok(()), &[]).await;
    let mut asked = Vec::new();
    for _ in 0..20 {
        let look = scene.roster.next_look().expect("a look");
        scene.roster.look_at_leaving(look).await;
        asked.extend(scene.host.asked());
    }
    assert_eq!(asked, ["stop listening a"]);
    assert!(scene.served().is_empty());
    *scene.host.carried.lock().expect("lock") = 0;
    scene.roster.look_at_leaving(Instant::now()).await;
    assert_eq!(scene.host.asked(), ["cut a", "release", "give up web"]);
    assert_eq!((scene.states().len(), scene.roster.next_look()), (0, None));
}

#[tokio::test]
async fn a_workload_that_left_ends_with_its_time_its_life_and_its_pod() {
    for end in ["time", "life", "pod"] {
        let mut scene = scene(Vec::new());
        scene.expect(add("a", "web", &file()), Ok(()), &["capture a", "certificate web", "serve a"]).await;
        *scene.host.carried.lock().expect("lock") = 1;
        scene.expect(let_go("a"), Ok(()), &["let go"]).await;
        let mut now = Instant::now() + Duration::from_secs(60);
        scene.roster.look_at_leaving(now).await;
        assert_eq!(scene.host.asked(), ["stop listening a"], "{end}");
        match end {
            "time" => now += Duration::from_secs(3600),
            "life" => scene.host.fail("alive"),
            _pod => scene.expect(del("a"), Ok(()), &["cut a", "release", "give up web"]).await,
        }
        scene.roster.look_at_leaving(now).await;
        let expected: &[&str] = if end == "pod" { &[] } else { &["cut a", "release", "give up web"] };
        assert_eq!(scene.host.asked(), expected, "{end}");
    }
}

#[tokio::test]
async fn a_workload_that_enters_again_keeps_its_old_connections_and_what_they_need() {
    let mut scene = scene(Vec::new());
    let netns = file();
    scene.expect(add("a", "web", &netns), Ok(()), &["capture a", "certificate web", "serve a"]).await;
    *scene.host.carried.lock().expect("lock") = 1;
    scene.expect(let_go("a"), Ok(()), &["let go"]).await;
    let again = ["stop listening a", "capture a", "certificate web", "serve a"];
    scene.expect(add("a", "web", &netns), Ok(()), &again).await;
    assert_eq!(scene.states(), ["a ready", "a left the mesh; 1 connections go on, at most 60 min"]);
    *scene.host.carried.lock().expect("lock") = 0;
    scene.roster.look_at_leaving(Instant::now()).await;
    assert_eq!(scene.host.asked(), ["cut a"], "routes and certificate are those of the new enrolment too");
    assert_eq!(scene.served(), ["a"]);
}

#[tokio::test]
async fn what_one_that_left_has_in_common_with_others_stays_for_those() {
    let mut scene = scene(Vec::new());
    for uid in ["a", "b"] {
        let asked = [format!("capture {uid}"), "certificate web".into(), format!("serve {uid}")];
        scene.expect(add(uid, "web", &file()), Ok(()), &asked.each_ref().map(String::as_str)).await;
        scene.expect(let_go(uid), Ok(()), &["let go"]).await;
    }
    *scene.host.carried.lock().expect("lock") = 1;
    let now = Instant::now() + Duration::from_secs(60);
    scene.roster.look_at_leaving(now).await;
    scene.host.asked();
    scene.host.idle.lock().expect("lock").insert("a".into());
    scene.roster.look_at_leaving(now).await;
    assert_eq!(scene.host.asked(), ["cut a", "release"], "the certificate is that of b, too");
    scene.expect(del("b"), Ok(()), &["cut b", "release", "give up web"]).await;
}

#[tokio::test]
async fn who_comes_and_leaves_all_the_time_does_not_fill_the_list() {
    let mut scene = scene(Vec::new());
    let netns = file();
    *scene.host.carried.lock().expect("lock") = 1;
    for _ in 0..10 {
        let _answered = scene.roster.handle(add("a", "web", &netns)).await;
        let _answered = scene.roster.handle(let_go("a")).await;
    }
    assert_eq!(scene.states().len(), 4, "{:?}", scene.states());
}

#[tokio::test]
async fn a_workload_that_cannot_be_let_go_is_released() {
    let mut scene = scene(Vec::new());
    scene.expect(add("a", "web", &file()), Ok(()), &["capture a", "certificate web", "serve a"]).await;
    scene.host.fail("let go");
    scene.expect(let_go("a"), Ok(()), &["let go", "stop a", "release", "give up web"]).await;
    assert!(scene.served().is_empty());
}

#[tokio::test]
async fn a_certificate_is_given_up_with_its_last_workload() {
    let mut scene = scene(Vec::new());
    let (one, two) = (file(), file());
    scene.expect(add("a", "web", &one), Ok(()), &["capture a", "certificate web", "serve a"]).await;
    scene.expect(add("b", "web", &two), Ok(()), &["capture b", "certificate web", "serve b"]).await;
    scene.expect(del("a"), Ok(()), &["stop a", "release"]).await;
    scene.expect(del("b"), Ok(()), &["stop b", "release", "give up web"]).await;
}

#[tokio::test]
async fn another_namespace_or_identity_under_a_known_uid_is_a_new_workload() {
    let mut scene = scene(Vec::new());
    let (one, two) = (file(), file());
    scene.expect(add("a", "web", &one), Ok(()), &["capture a", "certificate web", "serve a"]).await;
    let refused = Err("a has another network namespace, and its last one still has a link");
    scene.expect(add("a", "web", &two), refused, &[]).await;
    scene.host.fail("alive");
    // The key that there is will do, also while there is no CA.
    let again = ["stop a", "release", "capture a", "certificate web", "serve a"];
    scene.expect(add("a", "web", &two), Ok(()), &again).await;
    let other = ["stop a", "release", "capture a", "certificate db", "serve a", "give up web"];
    scene.expect(add("a", "db", &two), Ok(()), &other).await;
    scene.host.fail("capture");
    let failed = ["stop a", "release", "capture a", "give up db"];
    scene.expect(add("a", "db", &one), Err("capture fails"), &failed).await;
    scene.host.mend();
    scene.expect(add("a", "db", &one), Ok(()), &["capture a", "certificate db", "serve a"]).await;
    scene.expect(Request::SnapshotSent, Ok(()), &[]).await;
    assert_eq!(scene.served(), ["a"]);
}

#[tokio::test]
async fn a_workload_that_cannot_be_captured_stays_closed_until_it_is_gone() {
    let mut scene = scene(Vec::new());
    let netns = file();
    scene.host.fail("capture");
    scene.expect(add("a", "web", &netns), Err("capture fails"), &["capture a"]).await;
    assert_eq!(scene.states(), ["a capture fails"]);
    assert!(scene.served().is_empty());
    scene.expect(Request::SnapshotSent, Ok(()), &[]).await;
    assert_eq!(scene.host.captured.lock().expect("lock").len(), 1, "the snapshot must not open it");
    scene.host.mend();
    scene.expect(add("a", "web", &netns), Ok(()), &["capture a", "certificate web", "serve a"]).await;
    assert_eq!(scene.states(), ["a ready"]);
    scene.host.fail("capture");
    let other = file();
    scene.expect(add("b", "web", &other), Err("capture fails"), &["capture b"]).await;
    scene.expect(del("b"), Ok(()), &["release"]).await;
}

#[tokio::test]
async fn without_a_certificate_it_is_served_and_the_agent_hears_of_it() {
    let mut scene = scene(Vec::new());
    let netns = file();
    scene.host.fail("certificate");
    let asked = ["capture a", "certificate web", "serve a"];
    scene.expect(add("a", "web", &netns), Err("no certificate for spiffe://t/ns/default/sa/web"), &asked).await;
    assert_eq!(scene.served(), ["a"]);
    assert!(scene.states()[0].starts_with("a no certificate"), "{:?}", scene.states());
    scene.host.mend();
    scene.expect(add("a", "web", &netns), Ok(()), &["renew a", "certificate web"]).await;
    assert_eq!(scene.states(), ["a ready"]);
}

#[tokio::test]
async fn the_answer_comes_in_time_whatever_the_controller_does() {
    let mut scene = scene(Vec::new());
    scene.host.fail("hang");
    scene.roster.answer_within = Duration::from_millis(20);
    let started = Instant::now();
    let asked = ["capture a", "certificate web", "serve a"];
    scene.expect(add("a", "web", &file()), Err("no answer in time"), &asked).await;
    assert!(started.elapsed() < ANSWER_WITHIN, "{:?}", started.elapsed());
}

#[tokio::test]
async fn all_that_is_announced_waits_for_a_silent_controller_only_once() {
    const WORKLOADS: usize = 20;
    let mut scene = scene(Vec::new());
    scene.host.fail("hang");
    scene.roster.answer_within = Duration::from_millis(500);
    scene.roster.agent_connected();
    let started = Instant::now();
    for number in 0..WORKLOADS {
        let outcome = scene.roster.handle(add(&number.to_string(), "web", &file())).await;
        assert!(outcome.is_err_and(|error| error.contains("no answer in time")));
    }
    assert!(started.elapsed() < 5 * scene.roster.answer_within, "{:?}", started.elapsed());
    assert_eq!(scene.served().len(), WORKLOADS);
    scene.roster.handle(Request::SnapshotSent).await.expect("all are announced");
}

#[tokio::test]
async fn a_namespace_that_is_taken_or_our_own_is_refused() {
    let mut scene = scene(Vec::new());
    let netns = file();
    scene.expect(add("a", "web", &netns), Ok(()), &["capture a", "certificate web", "serve a"]).await;
    scene.expect(add("b", "db", &netns), Err("is that of a (a)"), &[]).await;
    scene.expect(del("b"), Ok(()), &[]).await;
    let own = std::fs::File::open("/proc/self/ns/net").expect("own").into();
    scene.expect(add("host", "web", &own), Err("node's own"), &[]).await;
    assert_eq!(scene.served(), ["a"]);
}

#[tokio::test]
async fn what_was_adopted_is_served_at_once_and_what_is_not_announced_again_goes() {
    let mut scene = scene(vec![workload("a", "a", true), workload("b", "b", false), workload("c", "c", true)]);
    assert_eq!(scene.host.asked(), ["serve a", "serve b", "serve c"]);
    scene.roster.agent_connected();
    scene.expect(Request::Keep(WorkloadUid("a".into())), Ok(()), &[]).await;
    scene.expect(Request::Keep(WorkloadUid("x".into())), Err("x is not enrolled here"), &[]).await;
    let netns = scene.shared.view.load().enrolled[&WorkloadUid("b".into())].netns.try_clone().expect("dup");
    scene.expect(add("b", "web", &netns), Ok(()), &["renew b", "certificate web"]).await;
    assert_eq!(scene.served(), ["a", "b", "c"], "before the snapshot nothing goes");
    scene.expect(Request::SnapshotSent, Ok(()), &["stop c", "release"]).await;
    assert_eq!(scene.served(), ["a", "b"]);
}

#[tokio::test]
async fn after_a_new_connection_everything_has_to_be_announced_again() {
    let mut scene = scene(Vec::new());
    let (one, two) = (file(), file());
    for (uid, netns) in [("a", &one), ("b", &two)] {
        let asked = [format!("capture {uid}"), "certificate web".into(), format!("serve {uid}")];
        scene.expect(add(uid, "web", netns), Ok(()), &asked.each_ref().map(String::as_str)).await;
    }
    scene.expect(Request::SnapshotSent, Ok(()), &[]).await;
    scene.roster.agent_connected();
    scene.expect(Request::Keep(WorkloadUid("b".into())), Ok(()), &[]).await;
    scene.expect(Request::SnapshotSent, Ok(()), &["stop a", "release"]).await;
    assert_eq!(scene.kept_uids(), BTreeSet::from(["b".to_owned()]));
}

#[tokio::test]
async fn namespaces_that_a_dead_proxy_captured_are_released_after_the_snapshot_only() {
    let mut scene = scene(Vec::new());
    scene.host.captured.lock().expect("lock").insert(4711);
    scene.expect(add("a", "web", &file()), Ok(()), &["capture a", "certificate web", "serve a"]).await;
    scene.expect(Request::SnapshotSent, Ok(()), &["release unknown"]).await;
    assert_eq!(scene.host.captured.lock().expect("lock").len(), 1);
}

#[tokio::test]
async fn every_adopted_workload_is_captured_again_unless_it_left() {
    let mut scene = scene(vec![workload("a", "a", true), workload("b", "b", true), workload("c", "c", true)]);
    scene.roster.certify_adopted();
    assert_eq!(
        scene.host.asked(),
        ["serve a", "serve b", "serve c", "certificate web", "certificate web", "certificate web"]
    );
    scene.host.fail("renew");
    assert!(scene.roster.settle_one().await && !scene.roster.is_settled());
    scene.expect(del("b"), Ok(()), &["renew a", "stop b", "release"]).await;
    while scene.roster.settle_one().await {}
    assert!(scene.roster.is_settled());
    assert_eq!(scene.host.asked(), ["renew c"]);
}

/// Listeners of adopted workloads may be a past proxy's, and what the agent has not announced is not looked into.
#[tokio::test]
async fn proxies_of_the_past_are_retired_when_everything_is_known() {
    let mut scene = scene(vec![workload("a", "a", true)]);
    assert_eq!(scene.host.asked(), ["serve a"]);
    scene.expect(Request::Keep(WorkloadUid("a".into())), Ok(()), &[]).await;
    scene.expect(Request::SnapshotSent, Ok(()), &[]).await;
    while scene.roster.settle_one().await {}
    assert_eq!(scene.host.asked(), ["renew a", "retire"]);
    assert!(scene.roster.is_settled());
    scene.expect(Request::SnapshotSent, Ok(()), &[]).await;
    while scene.roster.settle_one().await {}
    assert_eq!(scene.host.asked(), ["retire"], "every time");
}

#[tokio::test]
async fn a_store_that_does_not_take_the_listeners_is_reported_until_it_does_and_the_workload_served() {
    let mut scene = scene(Vec::new());
    let netns = file();
    scene.host.fail("keep");
    scene
        .expect(
            add("a", "web", &netns),
            Err("cannot be kept for a restart"),
            &["capture a", "certificate web", "serve a"],
        )
        .await;
    scene.host.kept.lock().expect("lock").clear();
    scene.expect(add("a", "web", &netns), Err("cannot be kept for a restart"), &["renew a"]).await;
    assert_eq!(scene.served(), ["a"]);
    scene.host.kept.lock().expect("lock").clear();
    scene.host.mend();
    scene.expect(add("a", "web", &netns), Ok(()), &["renew a", "certificate web"]).await;
    assert_eq!(scene.kept_uids(), BTreeSet::from(["a".to_owned()]));
}

fn hand_over(scene: &mut Scene, workload: &Enrolled) {
    for (name, fd) in kept::descriptors(workload).expect("descriptors") {
        scene.roster.follow(StoreChange::Put(name, fd));
    }
}

#[tokio::test]
async fn what_a_predecessor_enrolled_late_is_served_and_what_it_ended_is_not() {
    let mut scene = scene(vec![workload("a", "a", true)]);
    assert_eq!(scene.host.asked(), ["serve a"]);
    let late = workload("b", "b", true);
    hand_over(&mut scene, &late);
    assert_eq!(scene.host.asked(), ["serve b", "certificate web"]);
    hand_over(&mut scene, &late);
    assert!(scene.host.asked().is_empty(), "put again, as a renewal does");
    assert_eq!(scene.served(), ["a", "b"]);
    for name in kept::names(&late.uid) {
        scene.roster.follow(StoreChange::Del(name));
    }
    assert_eq!(scene.host.asked(), ["stop b"], "the predecessor releases it in the kernel");
    assert_eq!(scene.served(), ["a"]);
    assert!(scene.host.kept.lock().expect("lock").is_empty(), "the supervisor has it already");
    scene.roster.follow(StoreChange::Put("cert/spiffe://t/ns/default/sa/web".into(), file()));
    scene.roster.follow(StoreChange::Del("info/x".into()));
    assert!(scene.host.asked().is_empty());
}

#[tokio::test]
async fn half_a_hand_over_is_nothing_until_the_rest_comes() {
    let mut scene = scene(Vec::new());
    let mut parts = kept::descriptors(&workload("a", "a", false)).expect("descriptors");
    let (info, info_fd) = parts.pop().expect("info is last");
    parts.into_iter().for_each(|(name, fd)| scene.roster.follow(StoreChange::Put(name, fd)));
    assert!(scene.served().is_empty());
    scene.roster.follow(StoreChange::Put(info, info_fd));
    assert_eq!(scene.served(), ["a"]);
}
