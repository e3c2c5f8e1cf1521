//! Kinds of `networking.istio.io`.

use super::common::ANY_TEXT;
use super::schema::{Bounds, Need, Schema, map, number, object, optional, text};
use super::{Column, Definition};

const GROUP: &str = "networking.istio.io";
const VERSIONS: &[&str] = &["v1", "v1beta1", "v1alpha3"];
const PORT: Bounds = Bounds::of(1, 65_535);
/// What a name of the network, or a place with its parts, may be long.
const LONG_NAME: Bounds = Bounds::most(2048);

pub(super) fn workload_entry() -> Definition {
    Definition {
        group: GROUP,
        kind: "WorkloadEntry",
        plural: "workloadentries",
        short_name: "we",
        versions: VERSIONS,
        columns: vec![Column { name: "Address", path: ".spec.address", description: "Where the workload is reached." }],
        spec: workload().about("A workload that is no pod: a virtual machine, or a process outside the cluster."),
        spec_need: Need::Required,
    }
}

fn workload() -> Schema {
    let address = text(Bounds::most(256))
        .about("An IP address, a host name, or unix:// and the path of a socket.")
        .rule(
            "!self.startsWith('unix://') || self.startsWith('unix:///') || self.startsWith('unix://@')",
            "a socket's path is absolute, or abstract and begins with @",
        )
        .rule("!self.startsWith('unix://') || !self.endsWith('/')", "a socket is no directory");
    let ports =
        map(number(PORT), Bounds::most(128)).about("Ports of the workload by the names of the service's ports.").rule(
            "self.all(name, name.size() < 63 && name.matches('^[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?$'))",
            "a port's name has letters, digits and inner hyphens, at most 62",
        );
    object(vec![
        optional("address", address),
        optional("ports", ports),
        optional("labels", map(text(ANY_TEXT), Bounds::most(256)).about("What selectors look for.")),
        optional("network", text(LONG_NAME).about("Workloads of one network reach each other without a gateway.")),
        optional("locality", text(LONG_NAME).about("Where it stands: REGION/ZONE/SUBZONE.")),
        optional(
            "weight",
            number(Bounds::of(0, u32::MAX as u64)).about("Its share of the connections, against others."),
        ),
        optional("serviceAccount", text(Bounds::most(253)).about("Name of the service account that it runs as.")),
    ])
    .rule("has(self.address) || has(self.network)", "a workload has an address, or a network whose gateway leads to it")
    .rule("!has(self.address) || !self.address.startsWith('unix://') || !has(self.ports)", "a socket has no ports")
}
