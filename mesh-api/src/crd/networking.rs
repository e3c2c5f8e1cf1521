//! Kinds of `networking.istio.io`.

use super::common::ANY_TEXT;
use super::schema::{Bounds, Need, Schema, keyed_list, list, map, number, object, optional, required, text, word};
use super::{Column, Definition, Effect};

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
        effect: Effect::Read,
    }
}

pub(super) fn service_entry() -> Definition {
    let host = text(ANY_TEXT).rule("self != '*'", "a host is more than a wildcard");
    let labels = map(
        text(Bounds::most(63)).rule("!self.contains('*')", "a label's value is matched as it is: no wildcards"),
        Bounds::most(256),
    );
    let spec = object(vec![
        required("hosts", list(host, Bounds::of(1, 256)).about("Names of the service.")),
        optional("addresses", list(text(Bounds::most(64)), Bounds::most(256)).about("Addresses that stand for it.")),
        optional("ports", service_ports()),
        optional(
            "location",
            word(&["MESH_EXTERNAL", "MESH_INTERNAL"]).about("Whether its workloads belong to the mesh."),
        ),
        optional(
            "resolution",
            word(&["NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS"])
                .about("How an address is found: where the client went, from the endpoints, or by DNS."),
        ),
        optional("endpoints", list(workload(), Bounds::most(4096)).about("Workloads of the service.")),
        optional(
            "workloadSelector",
            object(vec![optional("labels", labels)]).about("Picks pods and WorkloadEntries of the namespace instead."),
        ),
        optional("exportTo", list(text(ANY_TEXT), Bounds::NONE).about("Namespaces that see it; all without it.")),
        optional(
            "subjectAltNames",
            list(text(ANY_TEXT), Bounds::NONE).about("Names of which the server's certificate has one."),
        ),
    ])
    .about("A service that Kubernetes does not know.")
    .rule("!(has(self.workloadSelector) && has(self.endpoints))", "workloadSelector and endpoints exclude each other")
    .rule(
        "!has(self.addresses) || !has(self.resolution) || self.resolution in ['NONE', 'STATIC'] || \
         !self.addresses.exists(address, address.contains('/'))",
        "ranges of addresses need the resolution NONE or STATIC",
    )
    .rule(
        "!has(self.endpoints) || (has(self.resolution) && self.resolution != 'NONE')",
        "endpoints need a resolution other than NONE",
    )
    .rule(
        "!has(self.endpoints) || !has(self.resolution) || self.resolution != 'DNS_ROUND_ROBIN' || \
         self.endpoints.size() < 2",
        "DNS_ROUND_ROBIN takes one endpoint",
    );
    let column = |name, path, description| Column { name, path, description };
    Definition {
        group: GROUP,
        kind: "ServiceEntry",
        plural: "serviceentries",
        short_name: "se",
        versions: VERSIONS,
        columns: vec![
            column("Hosts", ".spec.hosts", "Names of the service."),
            column("Location", ".spec.location", "Whether its workloads belong to the mesh."),
            column("Resolution", ".spec.resolution", "How an address is found."),
        ],
        spec,
        spec_need: Need::Required,
        effect: Effect::Stored,
    }
}

fn service_ports() -> Schema {
    let port = object(vec![
        required("number", number(PORT).about("Port of the service.")),
        required("name", text(Bounds::most(256)).about("Its name, which no other port has.")),
        optional("protocol", text(Bounds::most(256)).about("What is spoken there, such as HTTP or TLS.")),
        optional("targetPort", number(PORT).about("Port of the workloads; the same without it.")),
    ]);
    keyed_list("name", port, Bounds::most(256)).about("Ports of the service.").rule(
        "self.all(port, self.filter(other, other.number == port.number).size() == 1)",
        "no two ports have the same number",
    )
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
