//! The pods of a node, and which of them should be served. Values only.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::Arc;

use mesh_api::proto::workload::zds::WorkloadInfo;
use mesh_core::config::objects::{Namespace, Pod, PodPhase};
use mesh_core::config::{Enrolment, enrolment};

use crate::{Desired, Enrol, Netns};

/// What is known of a node's pods.
#[derive(Debug, Default)]
pub struct Pods {
    pods: BTreeMap<String, Pod>,
    namespaces: BTreeMap<Arc<str>, Namespace>,
    netns: BTreeMap<String, Arc<File>>,
}

impl Pods {
    /// All namespaces.
    pub fn set_namespaces(&mut self, namespaces: impl IntoIterator<Item = Namespace>) {
        self.namespaces = namespaces.into_iter().map(|namespace| (namespace.meta.name.clone(), namespace)).collect();
    }

    /// All pods by UID. Namespaces of those that are gone are given up.
    pub fn set_pods(&mut self, pods: BTreeMap<String, Pod>) {
        self.pods = pods;
        self.netns.retain(|uid, _| self.pods.contains_key(uid));
    }

    /// Network namespaces that were found.
    pub fn found(&mut self, found: BTreeMap<String, Arc<File>>) {
        self.netns.extend(found);
    }

    /// UIDs of pods that belong to the mesh.
    pub fn members(&self) -> BTreeSet<String> {
        self.pods.iter().filter(|(_, pod)| self.is_member(pod)).map(|(uid, _)| uid.clone()).collect()
    }

    /// Those of them whose network namespace is not known: they have just been made, or have none yet.
    pub fn homeless(&self) -> BTreeSet<String> {
        self.members().into_iter().filter(|uid| !self.netns.contains_key(uid)).collect()
    }

    /// What should be served.
    pub fn desired(&self) -> Desired {
        let members = self.pods.iter().filter(|(_, pod)| self.is_member(pod));
        members.map(|(uid, pod)| (uid.clone(), enrol(pod, self.netns.get(uid)))).collect()
    }

    fn is_member(&self, pod: &Pod) -> bool {
        let ended = matches!(pod.phase, PodPhase::Succeeded | PodPhase::Failed);
        !ended && enrolment(self.namespaces.get(&pod.meta.namespace), pod) == Enrolment::Enrolled
    }
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
        pods.set_pods(all.into_iter().map(|(uid, pod)| (uid.to_owned(), pod)).collect());
        pods
    }

    fn netns() -> Arc<File> {
        Arc::new(File::open("/proc/self/ns/net").unwrap())
    }

    #[test]
    fn labels_of_pod_and_namespace_say_who_belongs_to_the_mesh() {
        assert_eq!(world().members(), ["1", "3"].map(String::from).into());
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
        pods.set_pods(BTreeMap::new());
        assert!(pods.netns.is_empty());
    }
}
