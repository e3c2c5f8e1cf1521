//! The Kubernetes objects of a topology, as the controller reads them from its configuration directory.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::topology::{Enrolment, Node, Service, Topology, Workload};

/// Files of the configuration directory: name and contents. One pod a file, so that a pod that comes or goes touches
/// one file.
///
/// # Errors
/// An object cannot be written as YAML.
pub fn manifests(topology: &Topology) -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::from([
        ("00-namespaces.yaml".to_string(), yaml(&namespaces(topology))?),
        ("00-nodes.yaml".to_string(), yaml(&nodes(topology))?),
        ("10-services.yaml".to_string(), yaml(&services(topology))?),
    ]);
    for workload in &topology.workloads {
        files.insert(pod_file(workload), yaml(&[pod(topology, workload)])?);
    }
    Ok(files)
}

/// Name of the file of a workload's pod.
pub fn pod_file(workload: &Workload) -> String {
    format!("20-pod-{}.yaml", workload.key())
}

fn yaml(objects: &[Value]) -> Result<String> {
    let texts: Vec<String> =
        objects.iter().map(|o| serde_saphyr::to_string(o).context("write YAML")).collect::<Result<_>>()?;
    Ok(texts.join("---\n"))
}

fn namespaces(topology: &Topology) -> Vec<Value> {
    let mut objects: Vec<Value> = topology
        .all_namespaces()
        .into_iter()
        .map(|(name, labels)| {
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        })
        .collect();
    let accounts: BTreeSet<_> = topology.workloads.iter().map(|w| (&w.namespace, &w.service_account)).collect();
    objects.extend(accounts.into_iter().map(|(namespace, name)| {
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}})
    }));
    objects
}

/// Where the nodes are, for preferences by place.
fn nodes(topology: &Topology) -> Vec<Value> {
    let node = |node: &Node| {
        let labels = json!({"topology.kubernetes.io/region": node.region, "topology.kubernetes.io/zone": node.zone});
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name, "labels": labels}})
    };
    topology.nodes.iter().map(node).collect()
}

fn services(topology: &Topology) -> Vec<Value> {
    topology.services.iter().map(|s| service(topology, s)).collect()
}

fn service(topology: &Topology, service: &Service) -> Value {
    let vips: Vec<String> = topology.vips(service).iter().map(ToString::to_string).collect();
    let first = vips.first().cloned().unwrap_or_else(|| "None".into());
    let all = if vips.is_empty() { vec!["None".to_string()] } else { vips };
    let ports: Vec<Value> = service
        .ports
        .iter()
        .map(|p| json!({"name": p.name, "port": p.port, "targetPort": p.target_port, "protocol": "TCP"}))
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": service.name, "namespace": service.namespace},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": first,
            "clusterIPs": all,
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "PreferDualStack",
            "selector": service.selector,
            "ports": ports,
        },
    })
}

fn pod(topology: &Topology, workload: &Workload) -> Value {
    let mut labels = workload.labels.clone();
    let mut annotations = BTreeMap::new();
    match workload.enrolment {
        // What the enrolment part writes on a pod that it has captured.
        Enrolment::Mesh => annotations.insert("ambient.istio.io/redirection", "enabled"),
        Enrolment::None => {
            labels.insert("istio.io/dataplane-mode".into(), "none".into());
            None
        }
    };
    let addresses: Vec<String> = topology.addresses(workload).into_iter().flatten().map(|a| a.to_string()).collect();
    let pod_ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    let host_ip = topology.node_number(&workload.node).map(|n| Topology::host_addresses(n)[0].to_string());
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": workload.name,
            "namespace": workload.namespace,
            "uid": workload.uid,
            "labels": labels,
            "annotations": annotations,
        },
        "spec": {
            "nodeName": workload.node,
            "serviceAccountName": workload.service_account,
            "containers": [{"name": "main", "image": "sandbox", "command": workload.command}],
        },
        "status": {
            "phase": "Running",
            "podIP": addresses.first(),
            "podIPs": pod_ips,
            "hostIP": host_ip,
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_is_read_back_as_the_objects_that_were_written() {
        let files = manifests(&Topology::demo()).unwrap();
        let names: Vec<_> = files.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "00-namespaces.yaml",
                "00-nodes.yaml",
                "10-services.yaml",
                "20-pod-client.yaml",
                "20-pod-db.yaml",
                "20-pod-legacy.yaml",
                "20-pod-web-v1.yaml",
                "20-pod-web-v2.yaml"
            ]
        );
        let nodes: Vec<Value> = serde_saphyr::from_multiple(&files["00-nodes.yaml"]).unwrap();
        assert_eq!(nodes[1]["metadata"]["labels"]["topology.kubernetes.io/zone"], "node-b");
        let services: Vec<Value> = serde_saphyr::from_multiple(&files["10-services.yaml"]).unwrap();
        assert_eq!(services[0]["spec"]["clusterIPs"], json!(["10.96.0.10", "fd00:10:96::a"]));
        assert_eq!(services[1]["metadata"]["name"], "db");
        let legacy: Value = serde_saphyr::from_str(&files["20-pod-legacy.yaml"]).unwrap();
        assert_eq!(legacy["metadata"]["labels"]["istio.io/dataplane-mode"], "none");
        let web: Value = serde_saphyr::from_str(&files["20-pod-web-v2.yaml"]).unwrap();
        assert_eq!(web["spec"]["serviceAccountName"], "web");
        assert_eq!(web["status"]["podIPs"][1]["ip"], "fd00:10:244:2::a");
        let namespaces: Vec<Value> = serde_saphyr::from_multiple(&files["00-namespaces.yaml"]).unwrap();
        assert_eq!(namespaces[0]["metadata"]["labels"]["istio.io/dataplane-mode"], "ambient");
        let accounts = namespaces.iter().filter(|o| o["kind"] == "ServiceAccount").count();
        assert_eq!(accounts, 4, "web v1 and v2 share one");
    }
}
