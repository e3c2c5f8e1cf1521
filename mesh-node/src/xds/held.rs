//! The configuration that a node holds, as a function of the controller's responses.

use std::sync::Arc;

use mesh_api::proto::xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource, Status as RpcStatus};
use mesh_api::wds;
use mesh_core::snapshot::{Change, Snapshot};

use crate::snapshot_store::{Stored, Versions, type_index};

/// Resources held, of both types together.
const MAX_RESOURCES: usize = 1_000_000;
/// Characters of what is said about refused resources.
const MAX_REASON_CHARS: usize = 4096;

/// What is held, and by which versions.
pub(super) struct Held {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) versions: [Versions; 2],
    /// Types that this or an earlier stream has sent in full.
    seen: [bool; 2],
}

/// What became of a response.
pub(super) struct Accepted {
    /// To be sent.
    pub(super) answer: DeltaDiscoveryRequest,
    /// The snapshot is another one.
    pub(super) is_changed: bool,
    /// Resources that were refused.
    pub(super) refused: usize,
}

impl Held {
    /// Begins with what was stored.
    pub(super) fn new(network: &str, stored: Option<Stored>) -> Self {
        let has_stored = stored.is_some();
        let Stored { changes, versions } = stored.unwrap_or_default();
        let snapshot = Arc::new(Snapshot::in_network(network).apply(&changes));
        Self { snapshot, versions, seen: [has_stored; 2] }
    }

    /// Whether all types are there: workloads without their policies would let too much in.
    pub(super) fn is_complete(&self) -> bool {
        self.seen == [true; 2]
    }

    /// Takes a response: applies what is good, and says what is not.
    pub(super) fn accept(&mut self, response: DeltaDiscoveryResponse) -> Accepted {
        let DeltaDiscoveryResponse { type_url, nonce, resources, removed_resources, .. } = response;
        let mut refused = Vec::new();
        let mut changes = Vec::with_capacity(resources.len());
        if let Some(index) = type_index(&type_url) {
            for resource in resources {
                match decode(&type_url, &resource) {
                    Ok(change) if self.has_room_for(index, &resource.name) => {
                        self.versions[index].insert(resource.name, resource.version);
                        changes.push(change);
                    }
                    Ok(_) => refused.push(format!("{}: more than {MAX_RESOURCES} resources", resource.name)),
                    Err(reason) => refused.push(format!("{}: {reason}", resource.name)),
                }
            }
            for name in &removed_resources {
                self.versions[index].remove(name);
                changes.extend(wds::removal(&type_url, name));
            }
            self.seen[index] = true;
        } else {
            refused.push(format!("type {type_url} was not asked for"));
        }
        self.apply(&changes);
        let answer = DeltaDiscoveryRequest {
            error_detail: refusal(&type_url, &refused),
            type_url,
            response_nonce: nonce,
            ..Default::default()
        };
        Accepted { answer, is_changed: !changes.is_empty(), refused: refused.len() }
    }

    fn apply(&mut self, changes: &[Change]) {
        if !changes.is_empty() {
            self.snapshot = Arc::new(self.snapshot.apply(changes));
        }
    }

    fn has_room_for(&self, index: usize, name: &str) -> bool {
        self.versions.iter().map(Versions::len).sum::<usize>() < MAX_RESOURCES
            || self.versions[index].contains_key(name)
    }
}

fn refusal(type_url: &str, refused: &[String]) -> Option<RpcStatus> {
    if refused.is_empty() {
        return None;
    }
    let message: String = refused.join("; ").chars().take(MAX_REASON_CHARS).collect();
    tracing::warn!(type_url, refused = refused.len(), reasons = message, "resources refused, last good ones stay");
    // INVALID_ARGUMENT of google.rpc.Code.
    Some(RpcStatus { code: 3, message, details: Vec::new() })
}

/// Decodes a resource that says it is of `type_url`, and is what its name says.
fn decode(type_url: &str, resource: &Resource) -> Result<Change, String> {
    let any = resource.resource.as_ref().ok_or("it has no content")?;
    if any.type_url != type_url {
        return Err(format!("it is of type {}", any.type_url));
    }
    let change = wds::decode(type_url, &any.value).map_err(|error| error.to_string())?;
    let name = match &change {
        Change::UpsertWorkload(workload) => workload.uid.to_string(),
        Change::UpsertService(service) => service.key.to_string(),
        Change::UpsertPolicy(policy) => policy.name.to_string(),
        // Decoding never says that something is gone.
        Change::RemoveWorkload(_) | Change::RemoveService(_) | Change::RemovePolicy(_) => String::new(),
    };
    if name == resource.name { Ok(change) } else { Err(format!("its content is {name}")) }
}
