//! The `/etc/hosts` and `/etc/resolv.conf` that a workload sees.
//!
//! There is no DNS server in the sandbox yet, so names come from a file. An enrolled workload finds a service under
//! its virtual addresses, which only the mesh knows. A workload outside the mesh could not reach those (nothing plays
//! kube-proxy here), so it finds the addresses of the pods behind the service, as with a headless service: it dials
//! the target port.

use std::fmt::Write;
use std::net::IpAddr;

use super::topology::{Enrolment, Service, Topology, Workload};

/// No resolver answers: what is not in the hosts file does not exist.
pub const RESOLV_CONF: &str = "# Names come from /etc/hosts in the sandbox.\noptions timeout:1 attempts:1\n";

/// Text of `/etc/hosts` for a workload.
pub fn hosts(topology: &Topology, workload: &Workload) -> String {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost\n");
    for address in topology.addresses(workload).into_iter().flatten() {
        line(&mut text, address, std::slice::from_ref(&workload.name));
    }
    for service in &topology.services {
        let names = names(service, &workload.namespace);
        for address in service_addresses(topology, service, workload.enrolment) {
            line(&mut text, address, &names);
        }
    }
    text
}

fn service_addresses(topology: &Topology, service: &Service, enrolment: Enrolment) -> Vec<IpAddr> {
    match enrolment {
        Enrolment::Mesh if !service.headless => topology.vips(service),
        Enrolment::Mesh | Enrolment::None => {
            topology.endpoints(service).filter_map(|w| topology.addresses(w)).flatten().collect()
        }
    }
}

/// The names that a search path of the client's namespace would find.
fn names(service: &Service, client_namespace: &str) -> Vec<String> {
    let qualified = format!("{}.{}", service.name, service.namespace);
    let mut names = vec![qualified.clone(), format!("{qualified}.svc"), format!("{qualified}.svc.cluster.local")];
    if service.namespace == client_namespace {
        names.insert(0, service.name.clone());
    }
    names
}

fn line(text: &mut String, address: IpAddr, names: &[String]) {
    // Writing to a String cannot fail.
    let _ok = writeln!(text, "{address} {}", names.join(" "));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inside_the_mesh_a_service_is_its_virtual_addresses_outside_its_pods() {
        let demo = Topology::demo();
        let client = hosts(&demo, demo.find("client").unwrap());
        assert!(
            client.contains("10.96.0.10 web web.default web.default.svc web.default.svc.cluster.local\n"),
            "{client}"
        );
        assert!(client.contains("fd00:10:96::a web web.default"), "{client}");
        assert!(client.contains("10.244.1.10 client\n"), "{client}");
        let legacy = hosts(&demo, demo.find("legacy").unwrap());
        assert!(legacy.contains("10.244.1.11 web web.default"), "{legacy}");
        assert!(!legacy.contains("10.96."), "{legacy}");
    }

    #[test]
    fn short_names_only_inside_their_own_namespace() {
        let t = Topology::new()
            .node("n")
            .workload(Workload::new("c", "n").namespace("shop"))
            .service(Service::new("web").port("http", 80, 80));
        let text = hosts(&t, t.find("c.shop").unwrap());
        assert!(text.contains("10.96.0.10 web.default "), "{text}");
    }
}
