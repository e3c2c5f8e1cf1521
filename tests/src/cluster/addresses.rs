//! Which addresses a cluster has: all follow from its id, so that clusters side by side do not meet.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Nodes of one cluster.
pub const MOST_NODES: u8 = 3;
/// The DNS server's place in the ranges of services.
const DNS: u8 = 10;

/// The address plan of one cluster; both families everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    id: u8,
}

impl Addresses {
    /// Of a cluster.
    ///
    /// # Errors
    /// The id is not one of 1 to 9.
    pub fn of(id: u8) -> Result<Self> {
        ensure!((1..=9).contains(&id), "{id} is no id of a cluster: they go from 1 to 9");
        Ok(Self { id })
    }

    /// Of the cluster.
    pub fn id(&self) -> u8 {
        self.id
    }

    /// Starts the names of the cluster's links and cgroups.
    pub fn prefix(&self) -> String {
        format!("mesh-k{}", self.id)
    }

    /// Of the control plane: the machine itself, on the cluster's bridge.
    pub fn host(&self) -> (Ipv4Addr, Ipv6Addr) {
        (Ipv4Addr::new(10, 90, self.id, 1), self.v6(0xfd90, 0, 1))
    }

    /// Of a node, counted from 1.
    pub fn node(&self, number: u8) -> (Ipv4Addr, Ipv6Addr) {
        (Ipv4Addr::new(10, 90, self.id, 10 + number), self.v6(0xfd90, 0, 0x10 + u16::from(number)))
    }

    /// Networks of a node's pods.
    pub fn pods(&self, number: u8) -> (String, String) {
        let third = 16 * self.id + number;
        (format!("10.244.{third}.0/24"), format!("{}/64", self.v6(0xfd44, u16::from(number), 0)))
    }

    /// Networks of the services' addresses.
    pub fn services(&self) -> (String, String) {
        (format!("10.96.{}.0/24", self.id), format!("{}/112", self.v6(0xfd96, 0, 0)))
    }

    /// The `kubernetes` service: always the first address.
    pub fn api_service(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 96, self.id, 1)
    }

    /// Of the cluster's DNS server.
    pub fn dns(&self) -> (Ipv4Addr, Ipv6Addr) {
        (Ipv4Addr::new(10, 96, self.id, DNS), self.v6(0xfd96, 0, DNS.into()))
    }

    /// Where the API server answers.
    pub fn api(&self) -> String {
        format!("https://{}:6443", self.host().0)
    }

    /// Where the store listens, on the loopback interface.
    pub fn store(&self) -> Ipv4Addr {
        Ipv4Addr::new(127, 90, self.id, 1)
    }

    fn v6(&self, start: u16, network: u16, last: u16) -> Ipv6Addr {
        Ipv6Addr::new(start, self.id.into(), 0, network, 0, 0, 0, last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_do_not_meet() {
        let all: Vec<_> = (1..=9).map(|id| Addresses::of(id).unwrap()).collect();
        let pods: std::collections::BTreeSet<_> =
            all.iter().flat_map(|a| (1..=MOST_NODES).map(|number| a.pods(number))).collect();
        assert_eq!(pods.len(), 27);
        assert_eq!(all[4].pods(2), ("10.244.82.0/24".into(), "fd44:5:0:2::/64".into()));
        assert_eq!(all[4].node(1).1.to_string(), "fd90:5::11");
        assert!(Addresses::of(0).is_err() && Addresses::of(10).is_err());
    }
}
