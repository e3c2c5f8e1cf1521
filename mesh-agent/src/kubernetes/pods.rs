//! The pods of a node, and which of them should be served. Values only.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use mesh_api::proto::workload::zds::WorkloadInfo;
use mesh_core::config::objects::{Namespace, Pod, PodPhase};
use mesh_core::config::{Enrolment, enrolment};

use super::cni::is_meant;
use crate::{Desired, Enrol, Netns};

/// What is known of a node's pods.
#[derive(Debug, Default)]
pub struct Pods {
    pods: BTreeMap<String, Pod>,
    namespaces: BTreeMap<Arc<str>, Namespace>,
    netns: BTreeMap<String, Arc<File>>,
    /// By UID. They may not have been heard of yet.
    plugged: BTreeMap<String, Plugged>,
    is_complete: bool,
    /// The mesh is uninstalled.
    is_closed: bool,
}

/// A pod whose network has just been made, as the CNI plugin tells of it.
#[derive(Debug, Clone)]
pub struct Plugged {
    /// The sandbox.
    pub container: String,
    /// Its network namespace, which counts for more than one that was found: the sandbox before it may still end.
    pub netns: Arc<File>,
    /// As the API server knows it.
    pub pod: Pod,
    /// When a pod that was not heard of by then is taken for gone.
    pub unheard_until: Instant,
}

impl Pods {
    /// All namespaces.
    pub fn set_namespaces(&mut self, namespaces: impl IntoIterator<Item = Namespace>) {
        self.namespaces = namespaces.into_iter().map(|namespace| (namespace.meta.name.clone(), namespace)).collect();
    }

    /// One more.
    pub fn add_namespace(&mut self, namespace: Namespace) {
        self.namespaces.entry(namespace.meta.name.clone()).or_insert(namespace);
    }

    /// Whether its labels are known.
    pub fn knows_namespace(&self, name: &str) -> bool {
        self.namespaces.contains_key(name)
    }

    /// All pods by UID. Namespaces of those that are gone are given up.
    pub fn set_pods(&mut self, pods: BTreeMap<String, Pod>, now: Instant) {
        // Heard of before and not now: it is gone.
        self.plugged.retain(|uid, plugged| {
            pods.contains_key(uid) || (!self.pods.contains_key(uid) && now < plugged.unheard_until)
        });
        self.pods = pods;
        self.netns.retain(|uid, _| self.pods.contains_key(uid));
        self.is_complete = true;
    }

    /// Whether all pods and namespaces have been heard of.
    pub fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// A pod that the watch has heard of, with its UID.
    pub fn find(&self, namespace: &str, name: &str, uid: &str) -> Option<(&String, &Pod)> {
        let is_it = |found: &str, pod: &Pod| {
            &*pod.meta.name == name && &*pod.meta.namespace == namespace && is_meant(uid, found, pod)
        };
        self.pods.iter().find(|(found, pod)| !uid.is_empty() && is_it(found, pod))
    }

    /// Takes in what the plugin says.
    pub fn plug(&mut self, uid: String, plugged: Plugged) {
        self.plugged.insert(uid, plugged);
    }

    /// A sandbox ends; whether anything is different now. What is served goes on until the pod is gone.
    pub fn unplug(&mut self, container: &str) -> bool {
        let before = self.plugged.len();
        let ended = self.plugged.extract_if(.., |_, plugged| plugged.container == container);
        for (uid, plugged) in ended {
            if self.pods.contains_key(&uid) {
                self.netns.insert(uid, plugged.netns);
            }
        }
        self.plugged.len() != before
    }

    /// Namespaces that belong to the mesh, have a pod that does, or had one before; and the others.
    pub fn standings(&self, before: &BTreeSet<String>) -> (BTreeSet<String>, BTreeSet<String>) {
        let with_member: BTreeSet<&str> = self.all_members().map(|(_, pod, _)| &*pod.meta.namespace).collect();
        let all = self.namespaces.iter().map(|(name, namespace)| (name.to_string(), namespace));
        let (members, outside): (Vec<_>, Vec<_>) = all.partition(|(name, namespace)| {
            before.contains(name)
                || with_member.contains(name.as_str())
                || enrolment(Some(namespace), &Pod::default()) == Enrolment::Enrolled
        });
        let names = |list: Vec<(String, &Namespace)>| list.into_iter().map(|(name, _)| name).collect();
        (names(members), names(outside))
    }

    /// Network namespaces that were found.
    pub fn found(&mut self, found: BTreeMap<String, Arc<File>>) {
        self.netns.extend(found);
    }

    /// UIDs of pods that belong to the mesh.
    pub fn members(&self) -> BTreeSet<String> {
        self.all_members().map(|(uid, _, _)| uid.clone()).collect()
    }

    /// Those of them whose network namespace is not known: they have just been made, or have none yet.
    pub fn homeless(&self) -> BTreeSet<String> {
        self.all_members().filter(|(_, _, netns)| netns.is_none()).map(|(uid, _, _)| uid.clone()).collect()
    }

    /// From now on nothing should be served, whatever is heard or told.
    pub fn close(&mut self) {
        self.is_closed = true;
    }

    /// What should be served.
    pub fn desired(&self) -> Desired {
        if self.is_closed {
            return Desired::default();
        }
        self.all_members().map(|(uid, pod, netns)| (uid.clone(), enrol(pod, netns))).collect()
    }

    /// UIDs of pods that have not ended, members or not.
    pub fn living(&self) -> BTreeSet<String> {
        self.all().filter(|(_, pod)| !has_ended(pod)).map(|(uid, _)| uid.clone()).collect()
    }

    /// Whether it belongs to the mesh.
    pub fn is_member(&self, pod: &Pod) -> bool {
        !has_ended(pod) && enrolment(self.namespaces.get(&pod.meta.namespace), pod) == Enrolment::Enrolled
    }

    /// Pods that were heard of, then those that were only told of.
    fn all(&self) -> impl Iterator<Item = (&String, &Pod)> {
        let unheard = self.plugged.iter().filter(|(uid, _)| !self.pods.contains_key(*uid));
        self.pods.iter().chain(unheard.map(|(uid, plugged)| (uid, &plugged.pod)))
    }

    /// Members with their network namespaces.
    fn all_members(&self) -> impl Iterator<Item = (&String, &Pod, Option<&Arc<File>>)> {
        let netns = |uid: &String| self.plugged.get(uid).map(|plugged| &plugged.netns).or_else(|| self.netns.get(uid));
        self.all().filter(|(_, pod)| self.is_member(pod)).map(move |(uid, pod)| (uid, pod, netns(uid)))
    }
}

fn has_ended(pod: &Pod) -> bool {
    matches!(pod.phase, PodPhase::Succeeded | PodPhase::Failed)
}

fn enrol(pod: &Pod, netns: Option<&Arc<File>>) -> Enrol {
    let (namespace, name) = (&pod.meta.namespace, &pod.meta.name);
    let service_account = if pod.service_account.is_empty() { "default" } else { &pod.service_account };
    Enrol {
        key: format!("{namespace}/{name}"),
        info: WorkloadInfo {
            name: name.to_string(),
            namespace: namespace.to_string(),
            service_account: service_account.to_owned(),
        },
        netns: netns.map_or(Netns::Unknown, |netns| Netns::Held(Arc::clone(netns))),
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::config::objects::Meta;

    use super::*;

    fn meta(namespace: &str, name: &str, labels: &[(&str, &str)]) -> Meta {
        let labels = labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        Meta { namespace: namespace.into(), name: name.into(), labels, ..Meta::default() }
    }

    fn pod(namespace: &str, name: &str, labels: &[(&str, &str)]) -> Pod {
        Pod { meta: meta(namespace, name, labels), phase: PodPhase::Running, ..Pod::default() }
    }

    const AMBIENT: (&str, &str) = ("istio.io/dataplane-mode", "ambient");
    const NONE: (&str, &str) = ("istio.io/dataplane-mode", "none");

    fn world() -> Pods {
        let mut pods = Pods::default();
        pods.set_namespaces([
            Namespace { meta: meta("", "shop", &[AMBIENT]) },
            Namespace { meta: meta("", "default", &[]) },
        ]);
        let ended = Pod { phase: PodPhase::Succeeded, ..pod("shop", "job", &[]) };
        let on_host = Pod { host_network: true, ..pod("shop", "agent", &[]) };
        let all = [
            ("1", pod("shop", "web", &[])),
            ("2", pod("shop", "left-alone", &[NONE])),
            ("3", pod("default", "asks", &[AMBIENT])),
            ("4", pod("default", "plain", &[])),
            ("5", ended),
            ("6", on_host),
        ];
        pods.set_pods(all.into_iter().map(|(uid, pod)| (uid.to_owned(), pod)).collect(), Instant::now());
        pods
    }

    fn netns() -> Arc<File> {
        Arc::new(File::open("/proc/self/ns/net").unwrap())
    }

    #[test]
    fn labels_of_pod_and_namespace_say_who_belongs_to_the_mesh() {
        assert_eq!(world().members(), ["1", "3"].map(String::from).into());
        assert_eq!(world().living(), ["1", "2", "3", "4", "6"].map(String::from).into());
    }

    #[test]
    fn a_pod_is_announced_when_its_namespace_is_known_and_until_it_is_gone() {
        let mut pods = world();
        assert!(pods.desired().values().all(|enrol| matches!(enrol.netns, Netns::Unknown)));
        assert_eq!(pods.homeless(), ["1", "3"].map(String::from).into());
        pods.found([("1".to_owned(), netns())].into());
        let desired = pods.desired();
        let keys: Vec<_> = desired.iter().map(|(uid, enrol)| (uid.as_str(), enrol.key.as_str())).collect();
        assert_eq!(keys, [("1", "shop/web"), ("3", "default/asks")]);
        assert_eq!(desired["1"].info.service_account, "default");
        assert!(matches!(desired["1"].netns, Netns::Held(_)));
        assert_eq!(pods.homeless(), ["3".to_owned()].into());
        pods.set_namespaces([Namespace { meta: meta("", "shop", &[]) }]);
        let left: Vec<_> = pods.desired().into_keys().collect();
        assert_eq!(left, ["3"], "the label was taken from the namespace, and the other pod has its own");
        pods.set_pods(BTreeMap::new(), Instant::now());
        assert!(pods.netns.is_empty());
    }

    fn plugged(container: &str, pod: Pod, unheard_until: Instant) -> Plugged {
        Plugged { container: container.to_owned(), netns: netns(), pod, unheard_until }
    }

    #[test]
    fn a_pod_that_only_its_plugin_has_told_of_is_served_until_it_ends_or_nobody_hears_of_it() {
        let (mut pods, now) = (world(), Instant::now());
        let known = pods.pods.clone();
        let later = now + std::time::Duration::from_secs(60);
        pods.plug("7".to_owned(), plugged("c7", pod("shop", "new", &[]), later));
        pods.plug("8".to_owned(), plugged("c8", pod("default", "plain-too", &[]), later));
        assert_eq!(pods.members(), ["1", "3", "7"].map(String::from).into());
        assert!(matches!(pods.desired()["7"].netns, Netns::Held(_)));
        pods.set_pods(known.clone(), now);
        assert!(pods.members().contains("7"), "the watch is late");
        assert!(pods.unplug("c7"));
        assert!(!pods.unplug("c7"), "the end comes more than once");
        assert!(!pods.members().contains("7"));
        pods.plug("7".to_owned(), plugged("c7b", pod("shop", "new", &[]), later));
        pods.set_pods(known, later);
        assert!(!pods.members().contains("7"), "nobody has heard of it");
    }

    #[test]
    fn a_pod_that_was_heard_of_keeps_its_network_past_the_plugins_word_and_goes_with_the_watch() {
        let (mut pods, now) = (world(), Instant::now());
        let later = now + std::time::Duration::from_secs(60);
        pods.plug("1".to_owned(), plugged("c1", pod("shop", "web", &[]), later));
        assert_eq!(pods.homeless(), ["3".to_owned()].into());
        assert!(pods.unplug("c1"));
        assert_eq!(pods.homeless(), ["3".to_owned()].into(), "what is served goes on until the pod is gone");
        pods.plug("1".to_owned(), plugged("c1b", pod("shop", "web", &[]), later));
        pods.set_pods(BTreeMap::new(), now);
        assert!(pods.members().is_empty() && pods.plugged.is_empty());
    }

    #[test]
    fn nothing_is_served_after_the_close_whoever_tells_of_a_pod() {
        let mut pods = world();
        pods.close();
        pods.plug("7".to_owned(), plugged("c7", pod("shop", "new", &[]), Instant::now()));
        assert!(pods.desired().is_empty());
        assert!(pods.living().contains("1"), "it is let go, and lives on");
    }

    #[test]
    fn a_pod_is_found_by_all_of_its_names() {
        let pods = world();
        let found =
            |namespace: &str, name: &str, uid: &str| pods.find(namespace, name, uid).map(|(uid, _)| uid.clone());
        assert_eq!(found("shop", "web", "1").as_deref(), Some("1"));
        assert_eq!(found("shop", "web", "9"), None, "a pod of that name before this one");
        assert_eq!(found("shop", "web", ""), None, "it may be one before this one");
        assert_eq!(found("default", "web", "1"), None);
    }

    #[test]
    fn a_namespace_that_had_a_member_once_is_never_outside_again() {
        let mut pods = world();
        pods.add_namespace(Namespace { meta: meta("", "batch", &[]) });
        pods.add_namespace(Namespace { meta: meta("", "past", &[]) });
        let set = |names: &[&str]| names.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
        let before = set(&["past", "deleted"]);
        let (members, outside) = pods.standings(&before);
        // `default` has a pod that asks for itself.
        assert_eq!((members, outside), (set(&["default", "past", "shop"]), set(&["batch"])));
    }
}
