//! Label selectors, and finding those that match without trying all.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::objects::Labels;

/// Whether every label of the selector is there with the same value. An empty selector matches everything; callers
/// for which it means nothing at all (Services) check first.
pub(crate) fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

/// Names of objects with a selector, by namespace and the selector's first label: a workload looks up its own labels
/// and tries only what it finds.
#[derive(Debug, Clone, Default)]
pub(crate) struct SelectorIndex {
    by_first_label: BTreeMap<(Arc<str>, Arc<str>, Arc<str>), BTreeSet<Arc<str>>>,
}

impl SelectorIndex {
    pub(crate) fn insert(&mut self, namespace: &Arc<str>, name: &Arc<str>, selector: &Labels) {
        if let Some(key) = first_label(namespace, selector) {
            self.by_first_label.entry(key).or_default().insert(name.clone());
        }
    }

    pub(crate) fn remove(&mut self, namespace: &Arc<str>, name: &Arc<str>, selector: &Labels) {
        let Some(key) = first_label(namespace, selector) else { return };
        if let Some(names) = self.by_first_label.get_mut(&key) {
            names.remove(name);
            if names.is_empty() {
                self.by_first_label.remove(&key);
            }
        }
    }

    /// Objects of the namespace that may select these labels.
    pub(crate) fn candidates<'a>(
        &'a self,
        namespace: &'a Arc<str>,
        labels: &'a Labels,
    ) -> impl Iterator<Item = &'a Arc<str>> {
        labels.iter().filter_map(|(k, v)| self.by_first_label.get(&(namespace.clone(), k.clone(), v.clone()))).flatten()
    }
}

fn first_label(namespace: &Arc<str>, selector: &Labels) -> Option<(Arc<str>, Arc<str>, Arc<str>)> {
    selector.iter().next().map(|(k, v)| (namespace.clone(), k.clone(), v.clone()))
}
