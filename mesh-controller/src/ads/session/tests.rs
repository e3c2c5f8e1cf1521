//! Streams without I/O.

use super::super::catalogue::ResourceType::{Address, Authorization};
use super::super::catalogue::Update;
use super::*;

fn put(kind: ResourceType, name: &str, version: &str) -> Update {
    put_as(kind, name, version, &[])
}

fn put_as(kind: ResourceType, name: &str, version: &str, aliases: &[&str]) -> Update {
    let aliases = aliases.iter().map(|a| Arc::from(*a)).collect();
    let (name, version) = (name.into(), version.into());
    Update::Put(kind, Resource { name, version, body: vec![], aliases, member_of: vec![], is_named: false })
}

/// A policy that concerns only workloads which name it.
fn put_named(name: &str, version: &str) -> Update {
    match put(Authorization, name, version) {
        Update::Put(kind, resource) => Update::Put(kind, Resource { is_named: true, ..resource }),
        removal @ Update::Remove(..) => removal,
    }
}

fn request(kind: ResourceType) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { type_url: kind.type_url().into(), ..Default::default() }
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|n| (*n).to_owned()).collect()
}

/// `a=1 b=2 -c` of a response.
fn told(response: &DeltaDiscoveryResponse) -> String {
    let put = response.resources.iter().map(|r| format!("{}={}", r.name, r.version));
    put.chain(response.removed_resources.iter().map(|n| format!("-{n}"))).collect::<Vec<_>>().join(" ")
}

struct Stream {
    session: Session,
    catalogue: Catalogue,
}

impl Stream {
    fn new(updates: Vec<Update>) -> Self {
        let mut catalogue = Catalogue::default();
        catalogue.apply(updates);
        Self { session: Session::default(), catalogue }
    }

    fn next(&mut self) -> Option<DeltaDiscoveryResponse> {
        self.session.next(&self.catalogue).unwrap()
    }

    fn expect(&mut self, kind: ResourceType, expected: &str) -> String {
        let response = self.next().unwrap_or_else(|| panic!("nothing, not {expected:?}"));
        assert_eq!((response.type_url.as_str(), told(&response).as_str()), (kind.type_url(), expected));
        response.nonce
    }

    fn silence(&mut self) {
        assert_eq!(self.next().map(|r| told(&r)), None);
    }

    fn ack(&mut self, kind: ResourceType, nonce: &str) {
        let heard = self.session.hear(DeltaDiscoveryRequest { response_nonce: nonce.into(), ..request(kind) });
        assert_eq!(heard, Ok(Heard::Ack(kind)));
    }

    fn nack(&mut self, kind: ResourceType, nonce: &str, message: &str) -> Heard {
        let error_detail = Some(Status { code: 3, message: message.into(), details: vec![] });
        self.session
            .hear(DeltaDiscoveryRequest { response_nonce: nonce.into(), error_detail, ..request(kind) })
            .unwrap()
    }
}

#[test]
fn all_then_exactly_what_changes() {
    let mut s = Stream::new(vec![put(Address, "a", "1"), put(Address, "b", "1")]);
    s.silence();
    s.session.hear(request(Address)).unwrap();
    assert_eq!(s.session.sync(), Sync::NotSent);
    let nonce = s.expect(Address, "a=1 b=1");
    assert_eq!(s.session.sync(), Sync::Stale);
    s.ack(Address, &nonce);
    assert_eq!(s.session.sync(), Sync::Synced);
    assert_eq!(s.session.sync_by_type(), [Sync::NotSent, Sync::Synced], "policies were not asked for");
    s.silence();
    s.catalogue.apply(vec![put(Address, "b", "2")]);
    let nonce = s.expect(Address, "b=2");
    s.ack(Address, &nonce);
    s.catalogue.apply(vec![Update::Remove(Address, "a".into())]);
    s.expect(Address, "-a");
}

#[test]
fn a_slow_client_gets_the_latest_state_once() {
    let mut s = Stream::new(vec![put(Address, "a", "1")]);
    s.session.hear(request(Address)).unwrap();
    let nonce = s.expect(Address, "a=1");
    for version in 2..50 {
        s.catalogue.apply(vec![put(Address, "a", &version.to_string()), put(Address, "b", &version.to_string())]);
        s.silence();
    }
    s.catalogue.apply(vec![Update::Remove(Address, "b".into())]);
    s.ack(Address, &nonce);
    s.expect(Address, "a=49 -b");
}

#[test]
fn an_empty_type_is_answered_once() {
    let mut s = Stream::new(vec![]);
    s.session.hear(request(Authorization)).unwrap();
    let nonce = s.expect(Authorization, "");
    s.ack(Authorization, &nonce);
    s.silence();
}

#[test]
fn a_reconnect_is_told_the_difference() {
    let mut s = Stream::new(vec![put(Address, "a", "1"), put(Address, "b", "2"), put(Address, "c", "1")]);
    let has = [("a", "1"), ("b", "1"), ("gone", "1")].map(|(n, v)| (n.to_owned(), v.to_owned()));
    let initial_resource_versions = has.into_iter().collect();
    s.session.hear(DeltaDiscoveryRequest { initial_resource_versions, ..request(Address) }).unwrap();
    s.expect(Address, "b=2 c=1 -gone");
}

#[test]
fn a_refused_resource_leaves_the_others_working() {
    let mut s = Stream::new(vec![put(Address, "a", "1"), put(Address, "b", "1")]);
    s.session.hear(request(Address)).unwrap();
    let nonce = s.expect(Address, "a=1 b=1");
    let refused: BTreeMap<_, _> = [("b".to_owned(), "no address".to_owned())].into();
    assert_eq!(s.nack(Address, &nonce, "b: no address"), Heard::Nack(Address, refused.clone()));
    assert_eq!(s.session.rejected(), refused);
    s.silence();
    s.catalogue.apply(vec![put(Address, "a", "2")]);
    let nonce = s.expect(Address, "a=2");
    s.ack(Address, &nonce);
    assert_eq!(s.session.rejected(), refused, "b is as it was");
    s.catalogue.apply(vec![put(Address, "b", "2")]);
    let nonce = s.expect(Address, "b=2");
    s.ack(Address, &nonce);
    assert_eq!(s.session.rejected(), BTreeMap::new());
}

#[test]
fn refusals_are_attributed() {
    let names = ["ns/p", "ns/p-2", "x"].map(Arc::from);
    let check = |message: &str, expected: &[(&str, &str)]| {
        let status = Status { message: message.into(), ..Default::default() };
        let got = attribute(&names, &status);
        let expected = expected.iter().map(|(n, r)| ((*n).to_owned(), (*r).to_owned())).collect();
        assert_eq!(got, expected, "{message}");
    };
    check("ns/p: bad; x: worse: much", &[("ns/p", "bad"), ("x", "worse: much")]);
    check("ns/p-2: bad", &[("ns/p-2", "bad")]);
    check("everything", &[("ns/p", "everything"), ("ns/p-2", "everything"), ("x", "everything")]);
    check("matrix: y", &[("ns/p", "matrix: y"), ("ns/p-2", "matrix: y"), ("x", "matrix: y")]);
}

#[test]
fn an_old_nonce_acknowledges_nothing() {
    let mut s = Stream::new(vec![put(Address, "a", "1")]);
    s.session.hear(request(Address)).unwrap();
    s.expect(Address, "a=1");
    let old = DeltaDiscoveryRequest { response_nonce: "999".into(), ..request(Address) };
    assert_eq!(s.session.hear(old), Ok(Heard::Stale(Address)));
    assert_eq!(s.session.sync(), Sync::Stale);
}

#[test]
fn names_are_answered_by_alias_and_followed() {
    let mut s = Stream::new(vec![put_as(Address, "w", "1", &["/10.0.0.1"]), put(Address, "other", "1")]);
    let first = DeltaDiscoveryRequest {
        resource_names_subscribe: names(&["*"]),
        resource_names_unsubscribe: names(&["*"]),
        ..request(Address)
    };
    s.session.hear(first).unwrap();
    let nonce = s.expect(Address, "");
    s.ack(Address, &nonce);

    let ask = |list: &[&str]| DeltaDiscoveryRequest { resource_names_subscribe: names(list), ..request(Address) };
    s.session.hear(ask(&["/10.0.0.1", "/10.9.9.9"])).unwrap();
    let response = s.next().unwrap();
    assert_eq!(told(&response), "w=1 -/10.9.9.9");
    assert_eq!(response.resources[0].aliases, ["/10.0.0.1"]);
    s.ack(Address, &response.nonce);

    s.catalogue.apply(vec![put(Address, "other", "2")]);
    s.silence();
    s.catalogue.apply(vec![put_as(Address, "late", "1", &["/10.9.9.9"]), put_as(Address, "w", "2", &["/10.0.0.1"])]);
    let nonce = s.expect(Address, "late=1 w=2");
    s.ack(Address, &nonce);

    // Asked again: sent again.
    s.session.hear(ask(&["/10.0.0.1"])).unwrap();
    let nonce = s.expect(Address, "w=2");
    s.ack(Address, &nonce);

    s.session
        .hear(DeltaDiscoveryRequest { resource_names_unsubscribe: names(&["/10.9.9.9"]), ..request(Address) })
        .unwrap();
    let nonce = s.expect(Address, "-late");
    s.ack(Address, &nonce);
    s.catalogue.apply(vec![Update::Remove(Address, "w".into())]);
    s.expect(Address, "-w");
}

#[test]
fn policies_come_before_workloads_and_go_after_them() {
    let mut s = Stream::new(vec![put(Address, "w", "1"), put(Authorization, "p", "1")]);
    s.session.hear(request(Address)).unwrap();
    s.session.hear(request(Authorization)).unwrap();
    let auth = s.expect(Authorization, "p=1");
    let addr = s.expect(Address, "w=1");
    s.ack(Authorization, &auth);
    s.ack(Address, &addr);

    s.catalogue.apply(vec![
        Update::Remove(Authorization, "p".into()),
        put(Authorization, "q", "1"),
        put(Address, "w", "2"),
    ]);
    let auth = s.expect(Authorization, "q=1");
    let addr = s.expect(Address, "w=2");
    s.silence();
    s.ack(Authorization, &auth);
    s.expect(Authorization, "-p");
    s.ack(Address, &addr);
}

#[test]
fn a_workload_waits_for_a_new_policy_that_waits_for_an_answer() {
    let mut s = Stream::new(vec![put(Address, "w", "1"), put(Authorization, "p", "1")]);
    s.session.hear(request(Address)).unwrap();
    s.session.hear(request(Authorization)).unwrap();
    let (auth, addr) = (s.expect(Authorization, "p=1"), s.expect(Address, "w=1"));
    s.ack(Authorization, &auth);
    s.ack(Address, &addr);

    s.catalogue.apply(vec![put(Authorization, "p", "2")]);
    let auth = s.expect(Authorization, "p=2");
    // The workload names `q`, which cannot be sent before the answer to `p`.
    s.catalogue.apply(vec![put(Authorization, "q", "1"), put(Address, "w", "2")]);
    s.silence();
    s.catalogue.apply(vec![Update::Remove(Authorization, "p".into()), put(Address, "v", "1")]);
    s.silence();
    s.ack(Authorization, &auth);
    let auth = s.expect(Authorization, "q=1");
    let addr = s.expect(Address, "w=2 v=1");
    s.silence();
    s.ack(Authorization, &auth);
    s.expect(Authorization, "-p");

    // What comes without a new policy does not wait.
    s.ack(Address, &addr);
    s.catalogue.apply(vec![put(Address, "v", "2")]);
    s.expect(Address, "v=2");
}

#[test]
fn policies_by_name_come_before_workloads_too() {
    let mut s = Stream::new(vec![put(Authorization, "p", "1"), put(Address, "w", "1")]);
    let by_name = DeltaDiscoveryRequest { resource_names_subscribe: names(&["p", "q"]), ..request(Authorization) };
    s.session.hear(by_name).unwrap();
    s.session.hear(request(Address)).unwrap();
    let auth = s.expect(Authorization, "p=1");
    let addr = s.expect(Address, "w=1");
    s.ack(Address, &addr);
    s.ack(Authorization, &auth);
    let auth = s.expect(Authorization, "-q");
    s.catalogue.apply(vec![put(Authorization, "other", "1"), put(Address, "w", "2")]);
    let addr = s.expect(Address, "w=2");
    s.ack(Address, &addr);
    s.catalogue.apply(vec![put(Authorization, "q", "1"), put(Address, "w", "3")]);
    s.silence();
    // A refusal is an answer, too.
    assert!(matches!(s.nack(Authorization, &auth, "no"), Heard::Nack(Authorization, _)));
    s.expect(Authorization, "q=1");
    s.expect(Address, "w=3");
}

#[test]
fn a_removal_that_waits_for_a_busy_type_is_not_lost() {
    let mut s = Stream::new(vec![put(Address, "w", "1"), put(Authorization, "p", "1")]);
    s.session.hear(request(Address)).unwrap();
    s.session.hear(request(Authorization)).unwrap();
    let auth = s.expect(Authorization, "p=1");
    let addr = s.expect(Address, "w=1");
    s.ack(Authorization, &auth);
    s.catalogue.apply(vec![Update::Remove(Authorization, "p".into()), put(Address, "w", "2")]);
    s.silence();
    s.catalogue.apply(vec![put(Authorization, "p", "3")]);
    let auth = s.expect(Authorization, "p=3");
    s.ack(Authorization, &auth);
    s.catalogue.apply(vec![Update::Remove(Authorization, "p".into())]);
    s.silence();
    s.ack(Address, &addr);
    s.expect(Address, "w=2");
    s.expect(Authorization, "-p");
}

/// A stream that holds a workload and a policy, both acknowledged.
fn settled(policy: Update) -> Stream {
    let mut s = Stream::new(vec![put(Address, "w", "1"), policy]);
    s.session.hear(request(Authorization)).unwrap();
    s.session.hear(request(Address)).unwrap();
    let auth = s.next().unwrap();
    let addr = s.expect(Address, "w=1");
    s.ack(Authorization, &auth.nonce);
    s.ack(Address, &addr);
    s.silence();
    s
}

#[test]
fn a_policy_that_comes_to_be_named_is_told_after_the_workloads_that_name_it() {
    for policy in [put(Authorization, "p", "1"), put_named("p", "1")] {
        let mut s = settled(policy);
        s.catalogue.apply(vec![put_named("p", "2"), put_named("new", "1"), put(Address, "w", "2")]);
        let auth = s.expect(Authorization, "new=1");
        let addr = s.expect(Address, "w=2");
        s.ack(Authorization, &auth);
        let auth = s.expect(Authorization, "p=2");
        s.ack(Authorization, &auth);
        s.ack(Address, &addr);
        s.silence();
    }
}

#[test]
fn a_named_policy_that_changes_alone_is_told_at_once() {
    let mut s = settled(put_named("p", "1"));
    s.catalogue.apply(vec![put_named("p", "2")]);
    s.expect(Authorization, "p=2");
}

#[test]
fn a_policy_that_comes_to_concern_all_is_told_at_once() {
    let mut s = settled(put_named("p", "1"));
    s.catalogue.apply(vec![put(Authorization, "p", "2"), put(Address, "w", "2")]);
    s.expect(Authorization, "p=2");
    s.expect(Address, "w=2");
}

#[test]
fn a_policy_that_was_gone_and_came_back_named_waits_as_well() {
    let mut s = settled(put(Authorization, "p", "1"));
    s.catalogue.apply(vec![Update::Remove(Authorization, "p".into()), put(Address, "w", "2")]);
    s.catalogue.apply(vec![put_named("p", "2"), put(Address, "w", "3")]);
    s.expect(Address, "w=3");
    s.expect(Authorization, "p=2");
}

#[test]
fn a_waiting_change_gives_way_to_a_later_one() {
    let mut s = settled(put(Authorization, "p", "1"));
    s.catalogue.apply(vec![put(Address, "w", "2")]);
    let addr = s.expect(Address, "w=2");
    s.catalogue.apply(vec![put_named("p", "2"), put(Address, "w", "3")]);
    s.silence();
    s.catalogue.apply(vec![Update::Remove(Authorization, "p".into())]);
    s.silence();
    s.ack(Address, &addr);
    s.expect(Address, "w=3");
    s.expect(Authorization, "-p");
}

#[test]
fn what_waits_waits_for_what_was_before_it_and_not_for_all_that_comes() {
    let mut s = settled(put(Authorization, "p", "1"));
    s.catalogue.apply(vec![put_named("p", "2"), put(Address, "w", "2")]);
    let mut addr = s.expect(Address, "w=2");
    // Workloads change faster than the client answers.
    s.catalogue.apply(vec![put(Address, "w", "3")]);
    let auth = s.expect(Authorization, "p=2");
    s.ack(Authorization, &auth);
    s.catalogue.apply(vec![Update::Remove(Authorization, "p".into())]);
    s.silence();
    s.ack(Address, &addr);
    addr = s.expect(Address, "w=3");
    s.catalogue.apply(vec![put(Address, "w", "4")]);
    s.expect(Authorization, "-p");
    s.ack(Address, &addr);
    s.expect(Address, "w=4");
}

#[test]
fn on_a_reconnect_too_what_guards_workloads_goes_after_them() {
    let having = |kind, list: &[(&str, &str)]| DeltaDiscoveryRequest {
        initial_resource_versions: list.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
        ..request(kind)
    };
    let mut s = Stream::new(vec![put(Address, "w", "2"), put_named("narrower", "2"), put_named("new", "1")]);
    s.session.hear(having(Authorization, &[("narrower", "1"), ("gone", "1")])).unwrap();
    // The other type is not subscribed yet.
    let auth = s.expect(Authorization, "new=1");
    s.session.hear(having(Address, &[("w", "1")])).unwrap();
    let addr = s.expect(Address, "w=2");
    s.ack(Authorization, &auth);
    s.expect(Authorization, "narrower=2 -gone");
    s.ack(Address, &addr);
}

#[test]
fn a_client_of_policies_alone_is_told_everything() {
    let mut s = Stream::new(vec![put_named("p", "2")]);
    let initial_resource_versions = [("p", "1"), ("gone", "1")].map(|(n, v)| (n.to_owned(), v.to_owned())).into();
    s.session.hear(DeltaDiscoveryRequest { initial_resource_versions, ..request(Authorization) }).unwrap();
    let auth = s.expect(Authorization, "");
    s.ack(Authorization, &auth);
    s.expect(Authorization, "p=2 -gone");
}

#[test]
fn what_is_not_served_or_too_much_ends_the_stream() {
    let mut s = Stream::new(vec![]);
    let other = DeltaDiscoveryRequest {
        type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster".into(),
        ..Default::default()
    };
    assert!(matches!(s.session.hear(other), Err(SessionError::Type(_))));
    let many = (0..=MAX_SUBSCRIPTIONS).map(|i| i.to_string()).collect();
    let many = DeltaDiscoveryRequest { resource_names_subscribe: many, ..request(Address) };
    assert_eq!(s.session.hear(many), Err(SessionError::TooManyNames));
}
