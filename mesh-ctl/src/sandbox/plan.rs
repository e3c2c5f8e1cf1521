//! From a topology to the steps that build it. Pure: the same topology gives the same plan.

use std::net::IpAddr;
use std::path::PathBuf;

use super::layout::Layout;
use super::state::Handles;
use super::topology::{CONTROLLER_HOST, Topology, Workload};

/// The bridge that a node's workloads hang on.
pub const BRIDGE: &str = "pods";
/// A workload's interface.
pub const WORKLOAD_LINK: &str = "eth0";

/// What to create, and how to give it back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Recorded before the first step.
    pub handles: Handles,
    /// In order.
    pub steps: Vec<Step>,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A directory.
    Dir(PathBuf),
    /// A cgroup.
    Cgroup(PathBuf),
    /// A cgroup v2 tree of its own.
    MountCgroup2(PathBuf),
    /// A bpffs.
    MountBpf(PathBuf),
    /// A network namespace, bound to a file.
    Netns(PathBuf),
    /// Changes inside a network namespace.
    Net {
        /// The namespace.
        netns: PathBuf,
        /// In order.
        ops: Vec<NetOp>,
    },
}

/// A change inside a network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetOp {
    /// Writes `/proc/sys/net/KEY`.
    Sysctl(&'static str, &'static str),
    /// Sets a link up.
    Up(String),
    /// Deletes a link (a veth pair goes as a whole) if it is there.
    DeleteLink(String),
    /// A bridge, set up.
    Bridge(String),
    /// A veth pair, both ends set up.
    Veth {
        /// Name of this end.
        name: String,
        /// Bridge that this end joins.
        bridge: Option<String>,
        /// Namespace of the other end.
        peer_netns: PathBuf,
        /// Name of the other end.
        peer: String,
    },
    /// An address.
    Address {
        /// Link.
        link: String,
        /// Address.
        address: IpAddr,
        /// Prefix length.
        prefix: u8,
    },
    /// A route.
    Route {
        /// Network; none: the default route.
        to: Option<(IpAddr, u8)>,
        /// Next hop; none: on the link.
        via: Option<IpAddr>,
        /// Link.
        link: String,
    },
}

/// Steps for nodes, controller host, links between them, and all workloads.
pub fn plan(topology: &Topology, layout: &Layout) -> Plan {
    let mut plan = Plan::default();
    plan.shared(layout);
    let hosts: Vec<&str> =
        std::iter::once(CONTROLLER_HOST).chain(topology.nodes.iter().map(|n| n.name.as_str())).collect();
    for (host, number) in hosts.iter().zip(0u8..) {
        plan.host(layout, host, number);
    }
    for (a, from) in hosts.iter().zip(0u8..) {
        for (b, to) in hosts.iter().zip(0u8..).skip(usize::from(from) + 1) {
            plan.link(layout, (a, from), (b, to));
        }
    }
    for workload in &topology.workloads {
        plan.append(plan_workload(topology, workload, layout));
    }
    plan
}

/// Steps for one workload on a node that exists.
pub fn plan_workload(topology: &Topology, workload: &Workload, layout: &Layout) -> Plan {
    let mut plan = Plan::default();
    let (Some(node), Some(addresses)) = (topology.node_number(&workload.node), topology.addresses(workload)) else {
        return plan; // `Topology::check` refuses it before.
    };
    let key = workload.key();
    let netns = layout.netns(&key);
    plan.steps.push(Step::Dir(layout.workload(&key)));
    plan.steps.push(Step::Cgroup(layout.pods_cgroup(&workload.node).join(&key)));
    plan.netns(netns.clone());
    plan.steps.push(Step::Net { netns: netns.clone(), ops: end_host_sysctls() });
    let veth = NetOp::Veth {
        name: node_side_link(workload),
        bridge: Some(BRIDGE.into()),
        peer_netns: netns.clone(),
        peer: WORKLOAD_LINK.into(),
    };
    plan.steps.push(Step::Net { netns: layout.netns(&workload.node), ops: vec![veth] });
    let mut ops = vec![NetOp::Up("lo".into()), NetOp::Up(WORKLOAD_LINK.into())];
    for ((address, gateway), (_, prefix)) in
        addresses.into_iter().zip(Topology::gateway(node)).zip(Topology::pod_networks(node))
    {
        ops.push(NetOp::Address { link: WORKLOAD_LINK.into(), address, prefix });
        ops.push(NetOp::Route { to: None, via: Some(gateway), link: WORKLOAD_LINK.into() });
    }
    plan.steps.push(Step::Net { netns, ops });
    plan
}

/// Name of the node's end of a workload's link.
pub fn node_side_link(workload: &Workload) -> String {
    format!("pod{}", workload.host)
}

/// Name of the link from a host to another.
pub fn host_link(to: &str) -> String {
    format!("to-{to}")
}

impl Plan {
    fn append(&mut self, other: Self) {
        self.handles.extend(&other.handles);
        self.steps.extend(other.steps);
    }

    fn shared(&mut self, layout: &Layout) {
        for dir in ["netns", "config", "nodes", "workloads", "bpf", "controller"] {
            self.steps.push(Step::Dir(layout.run.join(dir)));
        }
        if let Some(mount) = &layout.own_cgroup_mount {
            self.handles.mounts.insert(mount.clone());
            self.steps.extend([Step::Dir(mount.clone()), Step::MountCgroup2(mount.clone())]);
        }
        self.handles.mounts.insert(layout.bpf());
        self.steps.push(Step::MountBpf(layout.bpf()));
        self.handles.cgroups.insert(layout.cgroup.clone());
        for part in ["controller", "agent"] {
            self.steps.push(Step::Cgroup(layout.part_cgroup(part)));
        }
    }

    fn netns(&mut self, path: PathBuf) {
        self.handles.netns.insert(path.clone());
        self.steps.push(Step::Netns(path));
    }

    /// The controller's host has number 0 and no workloads.
    fn host(&mut self, layout: &Layout, name: &str, number: u8) {
        let netns = layout.netns(name);
        self.netns(netns.clone());
        let mut ops = end_host_sysctls();
        ops.push(NetOp::Up("lo".into()));
        if number > 0 {
            self.steps.push(Step::Dir(layout.node(name)));
            self.steps.push(Step::Dir(layout.bpf().join(name)));
            self.steps.extend([layout.proxy_cgroup(name), layout.pods_cgroup(name)].map(Step::Cgroup));
            ops.push(NetOp::Sysctl("ipv4/ip_forward", "1"));
            ops.push(NetOp::Sysctl("ipv6/conf/all/forwarding", "1"));
            ops.push(NetOp::Bridge(BRIDGE.into()));
            for (address, (_, prefix)) in Topology::gateway(number).into_iter().zip(Topology::pod_networks(number)) {
                ops.push(NetOp::Address { link: BRIDGE.into(), address, prefix });
            }
        }
        self.steps.push(Step::Net { netns, ops });
    }

    /// Joins two hosts by a link of their own, so that nothing but their traffic is seen on it.
    fn link(&mut self, layout: &Layout, a: (&str, u8), b: (&str, u8)) {
        let veth =
            NetOp::Veth { name: host_link(b.0), bridge: None, peer_netns: layout.netns(b.0), peer: host_link(a.0) };
        self.steps.push(Step::Net { netns: layout.netns(a.0), ops: vec![veth] });
        for ((here, number), (there, peer)) in [(a, b), (b, a)] {
            let link = host_link(there);
            let mut ops = vec![NetOp::Up(link.clone())];
            for address in Topology::host_addresses(number) {
                ops.push(NetOp::Address { link: link.clone(), address, prefix: full_prefix(address) });
            }
            for gateway in Topology::host_addresses(peer) {
                let to = Some((gateway, full_prefix(gateway)));
                ops.push(NetOp::Route { to, via: None, link: link.clone() });
                let pods = Topology::pod_networks(peer).into_iter().filter(|_| peer > 0);
                for (network, prefix) in pods.filter(|(n, _)| n.is_ipv4() == gateway.is_ipv4()) {
                    ops.push(NetOp::Route { to: Some((network, prefix)), via: Some(gateway), link: link.clone() });
                }
            }
            self.steps.push(Step::Net { netns: layout.netns(here), ops });
        }
    }
}

/// No duplicate address detection: an address can be used when it is there.
fn end_host_sysctls() -> Vec<NetOp> {
    ["ipv6/conf/all/accept_dad", "ipv6/conf/default/accept_dad", "ipv6/conf/default/accept_ra"]
        .map(|key| NetOp::Sysctl(key, "0"))
        .to_vec()
}

fn full_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout {
            name: "t".into(),
            run: "/run/mesh-sandbox/t".into(),
            cgroup: "/cg/mesh-sandbox-t".into(),
            own_cgroup_mount: None,
        }
    }

    #[test]
    fn every_namespace_mount_and_cgroup_of_the_steps_is_a_handle() {
        let plan = plan(&Topology::demo(), &layout());
        let mut namespaces = 0;
        for step in &plan.steps {
            match step {
                Step::Netns(path) => {
                    namespaces += 1;
                    assert!(plan.handles.netns.contains(path), "{path:?}");
                }
                Step::MountBpf(path) | Step::MountCgroup2(path) => assert!(plan.handles.mounts.contains(path)),
                Step::Cgroup(path) => assert!(plan.handles.cgroups.iter().any(|top| path.starts_with(top))),
                Step::Dir(path) => assert!(path.starts_with(&layout().run)),
                Step::Net { .. } => {}
            }
        }
        assert_eq!(namespaces, 5 + 2 + 1, "workloads, nodes, controller");
    }

    #[test]
    fn nothing_is_changed_before_it_exists() {
        let plan = plan(&Topology::demo(), &layout());
        let mut made = std::collections::BTreeSet::new();
        for step in &plan.steps {
            match step {
                Step::Netns(path) => {
                    made.insert(path.clone());
                }
                Step::Net { netns, ops } => {
                    assert!(made.contains(netns), "{netns:?}");
                    for op in ops {
                        if let NetOp::Veth { peer_netns, .. } = op {
                            assert!(made.contains(peer_netns), "{peer_netns:?}");
                        }
                    }
                }
                Step::Dir(_) | Step::Cgroup(_) | Step::MountBpf(_) | Step::MountCgroup2(_) => {}
            }
        }
    }

    #[test]
    fn three_nodes_are_joined_in_pairs_and_each_knows_the_pods_of_the_others() {
        let topology = Topology::new().node("n1").node("n2").node("n3");
        let plan = plan(&topology, &layout());
        let ops = |wanted: &str| -> Vec<NetOp> {
            let of = |s: &Step| match s {
                Step::Net { netns, ops } if *netns == layout().netns(wanted) => ops.clone(),
                Step::Net { .. }
                | Step::Dir(_)
                | Step::Cgroup(_)
                | Step::MountBpf(_)
                | Step::MountCgroup2(_)
                | Step::Netns(_) => Vec::new(),
            };
            plan.steps.iter().flat_map(of).collect()
        };
        let veths =
            plan.steps.iter().filter(|s| matches!(s, Step::Net { ops, .. } if matches!(ops[..], [NetOp::Veth { .. }])));
        assert_eq!(veths.count(), 6, "4 hosts in pairs");
        for other in [2, 3] {
            for ((network, prefix), gateway) in
                Topology::pod_networks(other).into_iter().zip(Topology::host_addresses(other))
            {
                let route = NetOp::Route {
                    to: Some((network, prefix)),
                    via: Some(gateway),
                    link: host_link(&format!("n{other}")),
                };
                assert!(ops("n1").contains(&route), "{route:?}");
            }
        }
        let to_pods = |op: &NetOp| matches!(op, NetOp::Route { via: Some(_), .. });
        assert_eq!(ops(CONTROLLER_HOST).iter().filter(|op| to_pods(op)).count(), 6);
    }
}
