//! Watches of the API server, one for each kind.

use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt;
use kube::api::{Api, DynamicObject};
use kube::core::{ApiResource, GroupVersionKind, TypeMeta};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt};
use mesh_api::k8s::from_api_server;
use mesh_core::config::ObjectKey;
use mesh_core::config::objects::Kind;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::source::cluster::{KindState, Seen, SharedHeard};

/// Objects of one page of a list.
const PAGE: u32 = 500;
/// First pause after a failure, and after a kind was found missing.
const RETRY_FIRST: Duration = Duration::from_millis(200);
/// Longest pause: a kind that is installed is found within this time.
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Quiet time after which a burst of changes counts as finished.
const QUIET: Duration = Duration::from_millis(20);
/// Longest wait for a burst to end.
const MAX_DEBOUNCE: Duration = Duration::from_millis(100);

/// A kind and where the API server has it.
#[derive(Debug, Clone, Copy)]
pub struct Followed {
    kind: Kind,
    group: &'static str,
    /// Best first.
    versions: &'static [&'static str],
    plural: &'static str,
}

const fn followed(
    kind: Kind,
    group: &'static str,
    versions: &'static [&'static str],
    plural: &'static str,
) -> Followed {
    Followed { kind, group, versions, plural }
}

/// Every kind that is read.
pub const FOLLOWED: [Followed; 9] = [
    followed(Kind::Namespace, "", &["v1"], "namespaces"),
    followed(Kind::Node, "", &["v1"], "nodes"),
    followed(Kind::Pod, "", &["v1"], "pods"),
    followed(Kind::Service, "", &["v1"], "services"),
    followed(Kind::ServiceAccount, "", &["v1"], "serviceaccounts"),
    followed(Kind::EndpointSlice, "discovery.k8s.io", &["v1"], "endpointslices"),
    followed(Kind::WorkloadEntry, "networking.istio.io", &["v1", "v1beta1"], "workloadentries"),
    followed(Kind::PeerAuthentication, "security.istio.io", &["v1", "v1beta1"], "peerauthentications"),
    followed(Kind::AuthorizationPolicy, "security.istio.io", &["v1", "v1beta1"], "authorizationpolicies"),
];

impl Followed {
    /// The kind.
    pub fn kind(self) -> Kind {
        self.kind
    }

    fn resource(self, version: &str) -> ApiResource {
        let kind = GroupVersionKind::gvk(self.group, version, self.kind.as_str());
        ApiResource::from_gvk_with_plural(&kind, self.plural)
    }

    /// Whether it is the kind of this name.
    pub(super) fn is(self, group: &str, kind: &str) -> bool {
        self.group == group && self.kind.as_str() == kind
    }

    /// Whether objects are judged before they are written. Those of kinds that every API server has are its own matter.
    pub(super) fn is_judged(self) -> bool {
        self.definition().is_some()
    }

    /// Whether the status of objects says what became of them.
    fn has_conditions(self) -> bool {
        matches!(self.kind, Kind::AuthorizationPolicy | Kind::PeerAuthentication)
    }

    /// Where an object of a kind is written, in the version in which it was read.
    pub(super) fn resource_of(kind: Kind, api_version: &str) -> Option<ApiResource> {
        let version = api_version.rsplit('/').next()?;
        FOLLOWED.iter().find(|what| what.kind == kind).map(|what| what.resource(version))
    }

    /// Name of its CustomResourceDefinition; none for a kind that every API server has.
    pub(super) fn definition(self) -> Option<String> {
        self.group.ends_with(".istio.io").then(|| format!("{}.{}", self.plural, self.group))
    }

    fn key(self, object: &DynamicObject) -> ObjectKey {
        ObjectKey::new(self.kind, &object.namespace().unwrap_or_default(), &object.name_any())
    }
}

/// Follows one kind for ever. `wake` is told when there is something to read.
pub async fn follow(client: Client, what: Followed, heard: SharedHeard, wake: mpsc::Sender<()>) {
    let mut pause = RETRY_FIRST;
    let mut said = None;
    for version in what.versions.iter().cycle() {
        let resource = what.resource(version);
        let types = TypeMeta { api_version: resource.api_version.clone(), kind: resource.kind.clone() };
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        let mut events = pin!(watcher(api, watcher::Config::default().page_size(PAGE)));
        while let Some(event) = events.next().await {
            let error = match event {
                Ok(event) => {
                    if said.take().is_some() {
                        tracing::info!(kind = what.kind.as_str(), "followed again");
                    }
                    pause = RETRY_FIRST;
                    take(what, event, &types, &heard);
                    // One that waits says all there is to say.
                    let _ = wake.try_send(());
                    continue;
                }
                Err(error) => error,
            };
            let absent = is_absent(&error);
            if absent && is_not_installed(&client, what, &heard).await {
                if heard.lock().state(what.kind) != KindState::Missing {
                    tracing::info!(kind = what.kind.as_str(), "no such kind is installed");
                    heard.lock().missing(what.kind);
                    let _ = wake.try_send(());
                }
            } else {
                let message = error.to_string();
                if said.as_ref() != Some(&message) {
                    tracing::warn!(kind = what.kind.as_str(), error = message, "not followed; trying again");
                    said = Some(message);
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
            if absent {
                // Perhaps by its other version.
                break;
            }
        }
    }
}

fn take(what: Followed, event: Event<DynamicObject>, types: &TypeMeta, heard: &SharedHeard) {
    match event {
        Event::Init => heard.lock().begin_list(what.kind),
        Event::InitDone => heard.lock().end_list(what.kind),
        Event::Delete(object) => heard.lock().gone(what.key(&object)),
        Event::Apply(mut object) | Event::InitApply(mut object) => {
            let key = what.key(&object);
            // Items of a list do not say what they are.
            object.types.get_or_insert_with(|| types.clone());
            object.metadata.managed_fields = None;
            let seen = what.has_conditions().then(|| seen(&object));
            match serde_json::to_value(&object) {
                Ok(value) => {
                    let item = from_api_server(value);
                    let mut heard = heard.lock();
                    if let Some(seen) = seen {
                        heard.saw(key.clone(), seen);
                    }
                    heard.found(key, item);
                }
                // It has just been read from JSON.
                Err(error) => tracing::error!(object = %key, %error, "not read"),
            }
        }
    }
}

fn seen(object: &DynamicObject) -> Seen {
    let spec = &object.data["spec"];
    let conditions = object.data["status"]["conditions"].as_array();
    Seen {
        api_version: object.types.as_ref().map(|types| types.api_version.clone()).unwrap_or_default(),
        generation: object.metadata.generation.unwrap_or_default(),
        resource_version: object.metadata.resource_version.clone().unwrap_or_default(),
        has_targets: spec["targetRefs"].as_array().is_some_and(|targets| !targets.is_empty())
            || spec["targetRef"].is_object(),
        conditions: conditions.cloned().unwrap_or_default(),
    }
}

/// The API server has no such path.
fn is_absent(error: &watcher::Error) -> bool {
    let status = match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status,
        watcher::Error::WatchError(status) => status,
        // Everything else is no answer of the API server to what was asked.
        _ => return false,
    };
    status.code == 404
}

/// Whether a kind whose path does not exist is not installed. Objects that were there are gone only when the definition
/// says so: an API server that is starting may not have all its paths.
async fn is_not_installed(client: &Client, what: Followed, heard: &SharedHeard) -> bool {
    let Some(name) = what.definition() else { return false };
    let definition = GroupVersionKind::gvk("apiextensions.k8s.io", "v1", "CustomResourceDefinition");
    let definitions: Api<DynamicObject> = Api::all_with(client.clone(), &ApiResource::from_gvk(&definition));
    match definitions.get_opt(&name).await {
        Ok(found) => found.is_none(),
        Err(error) => {
            tracing::debug!(name, %error, "whether the kind is installed is not known");
            // Nothing can be lost by it then.
            heard.lock().state(what.kind) == KindState::Unheard
        }
    }
}

/// Says when watches have heard something, after the burst.
#[derive(Debug)]
pub struct Notices {
    woken: mpsc::Receiver<()>,
}

impl Notices {
    /// What watches are given, and what tells of it.
    pub fn new() -> (mpsc::Sender<()>, Self) {
        let (wake, woken) = mpsc::channel(1);
        (wake, Self { woken })
    }

    /// Waits for the next burst, and for its end.
    pub async fn changed(&mut self) {
        if self.woken.recv().await.is_none() {
            // Watches end with the process only.
            std::future::pending::<()>().await;
        }
        let deadline = Instant::now() + MAX_DEBOUNCE;
        loop {
            tokio::select! {
                () = sleep_until(deadline) => return,
                more = timeout(QUIET, self.woken.recv()) => if more.is_err() { return },
            }
        }
    }
}
