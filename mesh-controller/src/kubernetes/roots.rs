//! ConfigMap `istio-ca-root-cert` in every namespace: the roots that a pod needs to talk to the controller.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::{StreamExt, stream};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{Api, Patch, PatchParams};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt};
use serde_json::json;

use crate::ca::authority::Authority;

/// Name of the ConfigMap in each namespace (Istio's).
pub const CONFIG_MAP: &str = "istio-ca-root-cert";
/// Its only entry.
const ENTRY: &str = "root-cert.pem";
/// Istio leaves these alone, too.
const LEFT_ALONE: [&str; 3] = ["kube-system", "kube-public", "kube-node-lease"];
/// Who we are to the API server.
const MANAGER: &str = "mesh-controller";
/// How often the roots and what failed are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Namespaces and what their ConfigMaps hold.
#[derive(Debug, Default)]
struct Have {
    namespaces: BTreeSet<String>,
    /// Roots by namespace.
    maps: BTreeMap<String, String>,
    /// Lists that were read: nothing is written before both are known.
    listed: [bool; 2],
}

impl Have {
    /// Where the roots are missing or others.
    fn to_write(&self, roots: &str) -> Vec<String> {
        if self.listed != [true; 2] {
            return Vec::new();
        }
        let differs = |namespace: &&String| {
            !LEFT_ALONE.contains(&namespace.as_str()) && self.maps.get(*namespace).map(String::as_str) != Some(roots)
        };
        self.namespaces.iter().filter(differs).cloned().collect()
    }
}

enum Seen {
    Namespace(Event<PartialObjectMeta<Namespace>>),
    Map(Event<ConfigMap>),
    Nothing,
}

/// Keeps the ConfigMaps as they should be, for ever.
pub async fn hand_out(client: Client, authority: Arc<ArcSwap<Authority>>) {
    let namespaces = watcher(Api::<PartialObjectMeta<Namespace>>::all(client.clone()), watcher::Config::default());
    let selected = watcher::Config::default().fields(&format!("metadata.name={CONFIG_MAP}"));
    let maps = watcher(Api::<ConfigMap>::all(client.clone()), selected);
    let seen = stream::select(
        namespaces.map(|event| event.map_or(Seen::Nothing, Seen::Namespace)),
        maps.map(|event| event.map_or(Seen::Nothing, Seen::Map)),
    );
    let mut seen = pin!(seen);
    let mut have = Have::default();
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            event = seen.next() => match event {
                Some(Seen::Nothing) => {
                    // A watch failed and begins anew; it must not do so without a pause.
                    tokio::time::sleep(Duration::from_millis(500)).await;
                    continue;
                }
                Some(Seen::Namespace(event)) => note_namespace(&mut have, event),
                Some(Seen::Map(event)) => note_map(&mut have, event),
                // Watches have no end.
                None => return,
            },
            _ = look.tick() => {}
        }
        let roots = authority.load().bundle_pem();
        for namespace in have.to_write(&roots) {
            match write(&client, &namespace, &roots).await {
                Ok(()) => drop(have.maps.insert(namespace, roots.clone())),
                Err(kube::Error::Api(status)) if status.code == 404 => {
                    have.namespaces.remove(&namespace);
                }
                Err(error) => {
                    tracing::warn!(namespace, %error, "roots are not handed out; trying again");
                    break;
                }
            }
        }
    }
}

fn note_namespace(have: &mut Have, event: Event<PartialObjectMeta<Namespace>>) {
    match event {
        Event::Init => (have.listed[0], have.namespaces) = (false, BTreeSet::new()),
        Event::InitDone => have.listed[0] = true,
        Event::Delete(namespace) => {
            have.namespaces.remove(&namespace.name_any());
            have.maps.remove(&namespace.name_any());
        }
        Event::Apply(namespace) | Event::InitApply(namespace) if namespace.metadata.deletion_timestamp.is_none() => {
            have.namespaces.insert(namespace.name_any());
        }
        // Nothing can be created in a namespace that goes.
        Event::Apply(namespace) | Event::InitApply(namespace) => {
            have.namespaces.remove(&namespace.name_any());
        }
    }
}

fn note_map(have: &mut Have, event: Event<ConfigMap>) {
    match event {
        Event::Init => (have.listed[1], have.maps) = (false, BTreeMap::new()),
        Event::InitDone => have.listed[1] = true,
        Event::Delete(map) => drop(have.maps.remove(&map.namespace().unwrap_or_default())),
        Event::Apply(map) | Event::InitApply(map) => {
            let namespace = map.namespace().unwrap_or_default();
            let roots = map.data.and_then(|mut data| data.remove(ENTRY)).unwrap_or_default();
            have.maps.insert(namespace, roots);
        }
    }
}

async fn write(client: &Client, namespace: &str, roots: &str) -> kube::Result<()> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let map = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": CONFIG_MAP, "labels": {"istio.io/config": "true"}},
        "data": {ENTRY: roots},
    });
    // By force: a root that somebody else has put there is not ours.
    let params = PatchParams::apply(MANAGER).force();
    maps.patch(CONFIG_MAP, &params, &Patch::Apply(map)).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_or_differs_is_written_and_nothing_before_all_is_known() {
        let mut have = Have {
            namespaces: ["default", "kube-system", "shop", "web"].map(str::to_owned).into(),
            maps: [("shop", "new"), ("web", "old"), ("gone", "old")].map(|(n, r)| (n.into(), r.into())).into(),
            listed: [false; 2],
        };
        assert!(have.to_write("new").is_empty());
        have.listed[0] = true;
        assert!(have.to_write("new").is_empty());
        have.listed[1] = true;
        assert_eq!(have.to_write("new"), ["default", "web"]);
    }
}
