//! The configuration files of a cluster's programs, as texts.

use std::path::Path;

use serde_json::json;

use super::addresses::Addresses;
use super::image::BUSYBOX;

/// Without CAP_SYS_RESOURCE no process may be spared from the kernel's killer more than its parent is.
pub(super) fn containerd() -> String {
    format!(
        "version = 2\n\
         [plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"{BUSYBOX}\"\n  restrict_oom_score_adj = true\n"
    )
}

/// The API server asks kubelet without a client certificate. A test must not depend on how full the machine's disk is.
pub(super) fn kubelet(addresses: &Addresses) -> String {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "oomScoreAdj": 0,
        "maxOpenFiles": 20000,
        "failSwapOn": false,
        "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
        "authorization": {"mode": "AlwaysAllow"},
        "clusterDomain": "cluster.local",
        "clusterDNS": [addresses.dns().0],
        "resolvConf": "",
        "volumePluginDir": "/var/lib/kubelet/volumeplugins",
        "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
    })
    .to_string()
}

/// Limits of connection tracking can be written in the machine's first network namespace only, so they are left alone.
pub(super) fn kube_proxy(kubeconfig: &Path) -> String {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": kubeconfig},
        "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    })
    .to_string()
}

/// The network of a node's pods.
pub(super) fn pods(addresses: &Addresses, node: u8) -> String {
    let (v4, v6) = addresses.pods(node);
    json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": v4}], [{"subnet": v6}]],
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
    .to_string()
}

/// A node's own addresses and its way to the pods of the others, as lines for `ip -batch`.
pub(super) fn network(addresses: &Addresses, node: u8, nodes: u8) -> String {
    let ((v4, v6), host) = (addresses.node(node), addresses.host());
    let mut lines = format!(
        "address add {v4}/24 dev eth0\naddress add {v6}/64 dev eth0 nodad\nlink set eth0 up\n\
         route add default via {}\nroute add default via {}\n",
        host.0, host.1
    );
    for other in (1..=nodes).filter(|other| *other != node) {
        lines.push_str(&routes(addresses, other));
    }
    lines
}

/// The way to the pods of one node.
pub(super) fn routes(addresses: &Addresses, node: u8) -> String {
    let (pods, via) = (addresses.pods(node), addresses.node(node));
    format!("route replace {} via {}\nroute replace {} via {}\n", pods.0, via.0, pods.1, via.1)
}

/// The machine's end: a bridge with no way out.
pub(super) fn bridge(addresses: &Addresses, nodes: u8) -> String {
    let (name, host) = (addresses.prefix(), addresses.host());
    let mut lines = format!(
        "link add {name} type bridge\naddress add {}/24 dev {name}\naddress add {}/64 dev {name} nodad\nlink set {name} up\n",
        host.0, host.1
    );
    for node in 1..=nodes {
        lines.push_str(&routes(addresses, node));
    }
    lines
}

/// Of one user, known by a token.
pub(super) fn kubeconfig(addresses: &Addresses, authority: &Path, token: &str) -> String {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "cluster",
        "clusters": [{"name": "cluster", "cluster": {"server": addresses.api(), "certificate-authority": authority}}],
        "users": [{"name": "user", "user": {"token": token}}],
        "contexts": [{"name": "cluster", "context": {"cluster": "cluster", "user": "user"}}],
    })
    .to_string()
}
