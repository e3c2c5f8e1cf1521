//! From the compiler's changes to resources of the catalogue.

use std::sync::Arc;

use mesh_api::wds;
use mesh_core::policy::PolicyScope;
use mesh_core::snapshot::Change;

use crate::ads::catalogue::{Resource, ResourceType, Update};

/// Encodes changes, with the other names that clients may ask for.
pub fn updates(changes: &[Change]) -> Vec<Update> {
    changes.iter().map(update).collect()
}

fn update(change: &Change) -> Update {
    let encoded = wds::encode(change);
    let name: Arc<str> = encoded.name.into();
    let kind = match change {
        Change::UpsertPolicy(_) | Change::RemovePolicy(_) => ResourceType::Authorization,
        Change::UpsertWorkload(_) | Change::RemoveWorkload(_) | Change::UpsertService(_) | Change::RemoveService(_) => {
            ResourceType::Address
        }
    };
    let Some(content) = encoded.content else { return Update::Remove(kind, name) };
    let (aliases, member_of) = match change {
        Change::UpsertWorkload(w) => {
            let aliases = w.addresses.iter().map(|ip| format!("{}/{ip}", w.network).into()).collect();
            (aliases, w.services.keys().map(|service| service.to_string().into()).collect())
        }
        Change::UpsertService(s) => {
            (s.vips.iter().map(|(network, ip)| format!("{network}/{ip}").into()).collect(), Vec::new())
        }
        Change::UpsertPolicy(_) | Change::RemoveWorkload(_) | Change::RemoveService(_) | Change::RemovePolicy(_) => {
            (Vec::new(), Vec::new())
        }
    };
    let is_named = matches!(change, Change::UpsertPolicy(policy) if policy.scope == PolicyScope::Workload);
    let (version, body) = (content.version.into(), content.bytes.to_vec());
    Update::Put(kind, Resource { name, version, body, aliases, member_of, is_named })
}
