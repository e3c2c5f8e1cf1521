//! A client of a random history: it ends with what is published, and on the way no workload is without a policy that
//! concerned it before and after.

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::catalogue::ResourceType::{Address, Authorization};
use super::super::catalogue::Update;
use super::*;

const HISTORIES: u64 = 300;
const HISTORIES_LONG: u64 = 30_000;
const STEPS: u32 = 60;
const POLICIES: [&str; 3] = ["p", "q", "r"];
const WORKLOADS: [&str; 3] = ["w", "x", "y"];

/// Policies, by whether only workloads that name them are concerned, and workloads with what they name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Mesh {
    policies: BTreeMap<String, bool>,
    workloads: BTreeMap<String, BTreeSet<String>>,
}

impl Mesh {
    /// Another state, in which workloads name policies that are there.
    fn changed(&self, rng: &mut StdRng) -> Self {
        let mut next = self.clone();
        for policy in POLICIES {
            match rng.random_range(0..6) {
                0 => drop(next.policies.remove(policy)),
                1 => drop(next.policies.insert(policy.to_owned(), rng.random_bool(0.6))),
                _ => {}
            }
        }
        for workload in WORKLOADS {
            match rng.random_range(0..6) {
                0 => drop(next.workloads.remove(workload)),
                1 => drop(next.workloads.insert(workload.to_owned(), BTreeSet::new())),
                _ => {}
            }
        }
        let named: Vec<&String> =
            next.policies.iter().filter(|(_, is_named)| **is_named).map(|(name, _)| name).collect();
        for names in next.workloads.values_mut() {
            names.retain(|name| named.contains(&name));
            names.extend(named.iter().filter(|_| rng.random_bool(0.3)).map(|name| (*name).clone()));
        }
        next
    }

    /// As the publisher would tell it; a version is the content.
    fn updates(&self, next: &Self) -> Vec<Update> {
        let resource = |name: &str, version: String, is_named| Resource {
            name: name.into(),
            version: version.as_str().into(),
            body: version.into_bytes(),
            aliases: Vec::new(),
            member_of: Vec::new(),
            is_named,
        };
        let policies = next
            .policies
            .iter()
            .map(|(name, named)| Update::Put(Authorization, resource(name, named.to_string(), *named)));
        let names = |names: &BTreeSet<String>| names.iter().cloned().collect::<Vec<_>>().join(",");
        let workloads = next.workloads.iter().map(|(name, n)| Update::Put(Address, resource(name, names(n), false)));
        let gone = |kind, name: &String| Update::Remove(kind, name.as_str().into());
        let gone_policies =
            self.policies.keys().filter(|n| !next.policies.contains_key(*n)).map(|n| gone(Authorization, n));
        let gone_workloads =
            self.workloads.keys().filter(|n| !next.workloads.contains_key(*n)).map(|n| gone(Address, n));
        policies.chain(workloads).chain(gone_workloads).chain(gone_policies).collect()
    }

    /// Pairs of policy and workload in which the one concerns the other.
    fn concerns(&self) -> BTreeSet<(String, String)> {
        let pairs = self.policies.iter().flat_map(|p| self.workloads.iter().map(move |w| (p, w)));
        let concerned = pairs.filter(|((policy, is_named), (_, names))| !**is_named || names.contains(*policy));
        concerned.map(|((policy, _), (workload, _))| (policy.clone(), workload.clone())).collect()
    }
}

struct Client {
    seed: u64,
    rng: StdRng,
    catalogue: Catalogue,
    published: Mesh,
    session: Session,
    held: Mesh,
    versions: [BTreeMap<String, String>; 2],
    unanswered: Vec<(ResourceType, String)>,
    /// What has concerned what in every state that was published since the client was up to date.
    always: BTreeSet<(String, String)>,
    responses: u32,
}

#[test]
fn a_client_ends_with_what_is_published_and_is_never_less_guarded_on_the_way() {
    let is_long = std::env::var("MESH_TEST_LONG").is_ok_and(|value| value == "1");
    let mut responses = 0;
    for seed in 0..if is_long { HISTORIES_LONG } else { HISTORIES } {
        responses += Client::new(seed).live();
    }
    assert!(responses > 5_000, "{responses} responses");
}

impl Client {
    fn new(seed: u64) -> Self {
        Self {
            seed,
            rng: StdRng::seed_from_u64(seed),
            catalogue: Catalogue::default(),
            published: Mesh::default(),
            session: Session::default(),
            held: Mesh::default(),
            versions: Default::default(),
            unanswered: Vec::new(),
            always: BTreeSet::new(),
            responses: 0,
        }
    }

    fn live(mut self) -> u32 {
        self.publish();
        self.connect();
        for _ in 0..STEPS {
            match self.rng.random_range(0..12) {
                0..=3 => self.publish(),
                4 => {
                    self.connect();
                }
                _ => self.answer(),
            }
            self.listen();
        }
        while !self.unanswered.is_empty() {
            self.answer();
            self.listen();
        }
        assert_eq!(self.held, self.published, "seed {}", self.seed);
        self.responses
    }

    fn publish(&mut self) {
        let next = self.published.changed(&mut self.rng);
        self.catalogue.apply(self.published.updates(&next));
        if self.held == self.published && self.unanswered.is_empty() {
            self.always = self.published.concerns();
        }
        self.published = next;
        self.always = self.always.intersection(&self.published.concerns()).cloned().collect();
    }

    /// A new stream, with what the client has; it says both subscriptions before it answers anything.
    fn connect(&mut self) {
        self.session = Session::default();
        self.unanswered.clear();
        for kind in [Authorization, Address] {
            let versions = self.versions[usize::from(kind == Address)].clone();
            let request = DeltaDiscoveryRequest {
                type_url: kind.type_url().into(),
                initial_resource_versions: versions.into_iter().collect(),
                ..DeltaDiscoveryRequest::default()
            };
            self.session.hear(request).expect("served");
            self.listen();
        }
    }

    fn answer(&mut self) {
        if self.unanswered.is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.unanswered.len());
        let (kind, response_nonce) = self.unanswered.remove(at);
        let ack = DeltaDiscoveryRequest { type_url: kind.type_url().into(), response_nonce, ..Default::default() };
        assert_eq!(self.session.hear(ack), Ok(Heard::Ack(kind)), "seed {}", self.seed);
    }

    fn listen(&mut self) {
        while let Some(response) = self.session.next(&self.catalogue).expect("not far behind") {
            self.responses += 1;
            self.take(response);
        }
    }

    fn take(&mut self, response: DeltaDiscoveryResponse) {
        let kind = ResourceType::from_type_url(&response.type_url).expect("asked for");
        for resource in response.resources {
            let content = String::from_utf8(resource.resource.expect("a body").value.to_vec()).expect("text");
            self.versions[usize::from(kind == Address)].insert(resource.name.clone(), resource.version);
            match kind {
                Authorization => drop(self.held.policies.insert(resource.name, content == "true")),
                Address => {
                    let names = content.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
                    self.held.workloads.insert(resource.name, names);
                }
            }
        }
        for name in response.removed_resources {
            self.versions[usize::from(kind == Address)].remove(&name);
            match kind {
                Authorization => drop(self.held.policies.remove(&name)),
                Address => drop(self.held.workloads.remove(&name)),
            }
        }
        self.unanswered.push((kind, response.nonce));
        self.look();
    }

    fn look(&self) {
        for (workload, names) in &self.held.workloads {
            for name in names {
                assert!(self.held.policies.contains_key(name), "seed {}: {workload} names {name}", self.seed);
            }
        }
        let concerns = self.held.concerns();
        for pair in &self.always {
            // A workload that the client does not know yet takes no traffic.
            let is_known = self.held.workloads.contains_key(&pair.1);
            assert!(!is_known || concerns.contains(pair), "seed {}: {pair:?} is missing in {:?}", self.seed, self.held);
        }
    }
}
