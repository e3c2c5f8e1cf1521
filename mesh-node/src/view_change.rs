//! Which live connections a new view may judge otherwise than the last one.
//!
//! Somewhere in a mesh something changes all the time, and mostly it concerns nobody here. What a verdict depends on is
//! compared instead of reaching it again: certificates of this node's identities, the roots, the destination, and the
//! policies that concern it. All of these are immutable and shared between views, so that comparing them is comparing
//! pointers.

use std::collections::HashMap;
use std::sync::Arc;

use mesh_core::identity::SpiffeId;
use mesh_core::policy::{Policy, PolicyName};
use mesh_core::workload::{Workload, WorkloadUid};

use crate::connections::Description;
use crate::runtime::View;

/// The difference of two views, as far as it was asked for.
pub struct ViewChange<'a> {
    /// What connections were judged by.
    pub old: &'a View,
    /// What they are to be judged by.
    pub new: &'a View,
    /// Identities of this node that have no certificate any more.
    withdrawn: Vec<&'a SpiffeId>,
    are_other_roots: bool,
    is_other_snapshot: bool,
    /// Destinations that were compared, by their place in memory: many connections have one.
    destinations: HashMap<*const Workload, bool>,
}

impl<'a> ViewChange<'a> {
    /// From `old` to `new`.
    pub fn between(old: &'a View, new: &'a View) -> Self {
        Self {
            old,
            new,
            withdrawn: old.certs.keys().filter(|id| !new.certs.contains_key(*id)).collect(),
            are_other_roots: !Arc::ptr_eq(&old.roots, &new.roots),
            is_other_snapshot: !Arc::ptr_eq(&old.snapshot, &new.snapshot),
            destinations: HashMap::new(),
        }
    }

    /// Whether a connection that `old` allowed must be judged by `new`.
    pub fn concerns(&mut self, connection: &Description) -> bool {
        if !self.withdrawn.is_empty() && connection.own_identities().any(|id| self.withdrawn.contains(&id)) {
            return true;
        }
        if self.are_other_roots && connection.peer.is_some() {
            return true;
        }
        if !self.is_other_snapshot || connection.judged.is_none() {
            return false;
        }
        let Some(destination) = &connection.destination else { return true };
        let (old, new) = (self.old, self.new);
        *self
            .destinations
            .entry(Arc::as_ptr(destination))
            .or_insert_with(|| !is_guarded_the_same(old, new, &destination.uid))
    }
}

/// Whether a workload is the same in both views, and so are all policies that concern it.
fn is_guarded_the_same(old: &View, new: &View, uid: &WorkloadUid) -> bool {
    let (Some(before), Some(after)) = (old.snapshot.workload(uid), new.snapshot.workload(uid)) else { return false };
    if !Arc::ptr_eq(before, after) {
        return false;
    }
    let mut before = old.snapshot.policies_for(before);
    let mut after = new.snapshot.policies_for(after);
    loop {
        match (before.next(), after.next()) {
            (None, None) => return true,
            (Some(before), Some(after)) if is_same(before, after) => {}
            (Some(_), Some(_)) | (Some(_), None) | (None, Some(_)) => return false,
        }
    }
}

fn is_same(before: Result<&Arc<Policy>, &PolicyName>, after: Result<&Arc<Policy>, &PolicyName>) -> bool {
    match (before, after) {
        (Ok(before), Ok(after)) => Arc::ptr_eq(before, after),
        (Err(before), Err(after)) => before == after,
        (Ok(_), Err(_)) | (Err(_), Ok(_)) => false,
    }
}

#[cfg(test)]
mod tests;
