//! Access logs of a mesh's node proxies, line by line.

use serde_json::Value;

use crate::mesh_bed::{MeshBed, eventually};

/// One line.
#[derive(Debug, Clone)]
pub struct AccessRecord(pub Value);

impl AccessRecord {
    /// A field's text; empty when it is not there.
    pub fn text(&self, key: &str) -> &str {
        self.0[key].as_str().unwrap_or_default()
    }

    /// A field's number; 0 when it is not there.
    pub fn number(&self, key: &str) -> u64 {
        self.0[key].as_u64().unwrap_or_default()
    }

    /// Whether all of these fields have these texts.
    pub fn has(&self, fields: &[(&str, &str)]) -> bool {
        fields.iter().all(|(key, text)| self.text(key) == *text)
    }
}

impl MeshBed {
    /// What a node has logged so far.
    ///
    /// # Panics
    /// A line is no JSON.
    pub fn records(&self, node: &str) -> Vec<AccessRecord> {
        let path = self.sandbox.layout.node(node).join("access.log");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        // The last line may be in the middle of being written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        whole.lines().map(|line| AccessRecord(parse(line))).collect()
    }

    /// The first record of a node with these fields, when it is there.
    pub fn record(&self, node: &str, fields: &[(&str, &str)]) -> AccessRecord {
        eventually(&format!("a record with {fields:?} on {node}"), || {
            self.records(node).into_iter().find(|record| record.has(fields))
        })
    }

    /// Both node proxies have logged connections from one workload to another, with both identities; both records.
    pub fn carried(&self, from: &str, to: &str) -> [AccessRecord; 2] {
        let node_of = |workload: &str| self.sandbox.workload(workload).expect("workload").node.clone();
        let identity = |workload: &str| format!("spiffe://cluster.local/ns/default/sa/{workload}");
        let (source, destination) = (identity(from), identity(to));
        let ends = [("src.workload", from), ("dst.workload", to)];
        let identities = [("src.identity", &*source), ("dst.identity", &*destination)];
        [(node_of(from), "outbound"), (node_of(to), "inbound")].map(|(node, direction)| {
            self.record(&node, &[&ends[..], &identities[..], &[("direction", direction)][..]].concat())
        })
    }

    /// Writes a file of the controller's configuration directory, whole.
    ///
    /// # Panics
    /// It cannot be written.
    pub fn write_config(&self, file: &str, text: &str) {
        let fresh = self.sandbox.layout.run.join("fresh.yaml");
        std::fs::write(&fresh, text).expect("write");
        std::fs::rename(&fresh, self.sandbox.layout.config().join(file)).expect("rename");
    }
}
