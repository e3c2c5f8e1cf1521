//! One delta stream, as a function of the client's requests and the catalogue.
//!
//! A type has at most one response in flight; what changes meanwhile is gathered into the next one. A new policy is told
//! before the workloads that name it, because a workload that names a policy it does not have refuses everything. For
//! the same reason a removed policy is told after them, and so is a changed one that concerns only workloads which name
//! it: had it concerned all of them before, it would concern nobody until they name it.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use mesh_api::proto::xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource, Status};
use prost_types::Any;

use super::catalogue::{Catalogue, Resource, ResourceType, TooFarBehind};

/// Names that one client may subscribe to, a type.
pub const MAX_SUBSCRIPTIONS: usize = 100_000;
/// Characters of a rejection that are kept.
const MAX_REASON_CHARS: usize = 500;
/// Bytes of a NACK's message that are read: the reasons of some hundred resources.
const MAX_NACK_BYTES: usize = 64 * 1024;
/// Rejected resources that are kept for status, a type.
const MAX_REJECTED: usize = 1_000;

/// A client's stream.
#[derive(Debug, Default)]
pub struct Session {
    types: BTreeMap<ResourceType, TypeSession>,
    last_nonce: u64,
}

#[derive(Debug)]
struct TypeSession {
    subscription: Subscription,
    /// The first response is sent even when it is empty: it tells the client that it is in sync.
    answered: bool,
    /// Wildcard: all changes up to this generation are sent.
    sent_generation: u64,
    /// What the client said that it has; until the first response.
    initial: BTreeMap<String, String>,
    /// Asked for by name since the last response: sent whether or not it changed.
    asked: BTreeSet<Arc<str>>,
    /// By name: what the client was sent, none where there is no such resource.
    held: BTreeMap<Arc<str>, Option<Arc<str>>>,
    /// Wildcard: names that the client has; kept for policies, of which there are few.
    known: BTreeSet<Arc<str>>,
    /// Removals and changes that wait until the other type is told up to this generation. Not until it is told
    /// everything: in a busy mesh with a slow client that may never be.
    waiting: BTreeMap<Arc<str>, u64>,
    in_flight: Option<InFlight>,
    rejected: BTreeMap<String, String>,
}

#[derive(Debug)]
enum Subscription {
    Wildcard,
    Named(BTreeSet<Arc<str>>),
}

#[derive(Debug)]
struct InFlight {
    nonce: String,
    names: Vec<Arc<str>>,
}

/// What a request was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// A new or changed subscription.
    Subscribed(ResourceType),
    /// The response is in force.
    Ack(ResourceType),
    /// Resources of the response were refused, with reasons; the others are in force.
    Nack(ResourceType, BTreeMap<String, String>),
    /// An answer to an older response; says nothing any more.
    Stale(ResourceType),
}

/// Why a stream ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// A type that is not served.
    #[error("the type `{0}` is not served here")]
    Type(String),
    /// More names than [`MAX_SUBSCRIPTIONS`].
    #[error("more than {MAX_SUBSCRIPTIONS} names are subscribed")]
    TooManyNames,
    /// See there.
    #[error(transparent)]
    TooFarBehind(#[from] TooFarBehind),
}

/// State of a stream for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// Nothing was asked for or sent yet.
    NotSent,
    /// Something is in flight.
    Stale,
    /// All that was sent is acknowledged.
    Synced,
}

/// In the order of [`ResourceType::ALL`].
pub type SyncByType = [Sync; ResourceType::ALL.len()];

impl Session {
    /// Takes a request.
    pub fn hear(&mut self, request: DeltaDiscoveryRequest) -> Result<Heard, SessionError> {
        let Some(kind) = ResourceType::from_type_url(&request.type_url) else {
            return Err(SessionError::Type(request.type_url.chars().take(200).collect()));
        };
        let is_new = !self.types.contains_key(&kind);
        let session = self.types.entry(kind).or_insert_with(TypeSession::new);
        let is_subscription = session.subscribe(&request, is_new)?;
        if is_new {
            session.initial = request.initial_resource_versions.into_iter().collect();
        }
        if request.response_nonce.is_empty() {
            return Ok(Heard::Subscribed(kind));
        }
        let answers = session.in_flight.as_ref().is_some_and(|sent| sent.nonce == request.response_nonce);
        let Some(sent) = session.in_flight.take_if(|_| answers) else {
            return Ok(if is_subscription { Heard::Subscribed(kind) } else { Heard::Stale(kind) });
        };
        for name in &sent.names {
            session.rejected.remove(&**name);
        }
        let Some(error) = request.error_detail else { return Ok(Heard::Ack(kind)) };
        let refused = attribute(&sent.names, &error);
        for (name, reason) in &refused {
            if session.rejected.len() < MAX_REJECTED {
                session.rejected.insert(name.clone(), reason.clone());
            }
        }
        Ok(Heard::Nack(kind, refused))
    }

    /// The next response, if there is something to say and room to say it. Call it until it gives none.
    pub fn next(&mut self, catalogue: &Catalogue) -> Result<Option<DeltaDiscoveryResponse>, SessionError> {
        for kind in ResourceType::ALL {
            let before = match kind {
                ResourceType::Authorization => self.told_up_to(ResourceType::Address, catalogue)?,
                // Workloads may name new ones, and need no longer name those that concern all now.
                ResourceType::Address if self.owes_policies(catalogue)? => continue,
                ResourceType::Address => Some(catalogue.generation()),
            };
            let Some(session) = self.types.get_mut(&kind) else { continue };
            if session.in_flight.is_some() {
                continue;
            }
            // The first response may come before the client has subscribed to the other type.
            let before = before.filter(|_| session.answered || kind == ResourceType::Address);
            let told = session.collect(kind, catalogue, before)?;
            if session.answered && told.put.is_empty() && told.removed.is_empty() {
                continue;
            }
            session.answered = true;
            self.last_nonce += 1;
            let nonce = self.last_nonce.to_string();
            for name in &told.removed {
                session.rejected.remove(&**name);
            }
            let names = told.put.iter().map(|(_, resource)| resource.name.clone()).collect();
            session.in_flight = Some(InFlight { nonce: nonce.clone(), names });
            return Ok(Some(told.into_response(kind, nonce, catalogue.generation())));
        }
        Ok(None)
    }

    /// For status.
    pub fn sync(&self) -> Sync {
        if self.types.values().all(|session| !session.answered) {
            Sync::NotSent
        } else if self.types.values().any(|session| session.in_flight.is_some() || !session.answered) {
            Sync::Stale
        } else {
            Sync::Synced
        }
    }

    /// The same for each type.
    pub fn sync_by_type(&self) -> SyncByType {
        ResourceType::ALL.map(|kind| match self.types.get(&kind) {
            Some(session) if session.answered && session.in_flight.is_none() => Sync::Synced,
            Some(session) if session.answered => Sync::Stale,
            Some(_) | None => Sync::NotSent,
        })
    }

    /// Resources that the client refused and that did not change since, with reasons.
    pub fn rejected(&self) -> BTreeMap<String, String> {
        self.types.values().flat_map(|session| session.rejected.clone()).collect()
    }

    /// Whether there are policies to be told before workloads, and the client has not answered the last ones.
    fn owes_policies(&self, catalogue: &Catalogue) -> Result<bool, TooFarBehind> {
        let kind = ResourceType::Authorization;
        let Some(session) = self.types.get(&kind).filter(|session| session.in_flight.is_some()) else {
            return Ok(false);
        };
        match &session.subscription {
            Subscription::Wildcard => {
                let mut changed = catalogue.since(kind, session.sent_generation)?;
                Ok(changed.any(|(name, resource)| resource.is_some_and(|policy| !session.comes_after(name, policy))))
            }
            Subscription::Named(names) => {
                let mut named = names.iter().flat_map(|name| catalogue.resolve(kind, name));
                Ok(named.any(|policy| session.held.get(&policy.name) != Some(&Some(policy.version.clone()))))
            }
        }
    }

    /// The generation up to which the client was told a type: the latest one for a type that it does not read.
    fn told_up_to(&self, kind: ResourceType, catalogue: &Catalogue) -> Result<Option<u64>, TooFarBehind> {
        let latest = catalogue.generation();
        let Some(session) = self.types.get(&kind) else { return Ok(Some(latest)) };
        let is_behind = match session.subscription {
            Subscription::Wildcard if !session.answered => return Ok(None),
            Subscription::Wildcard => catalogue.since(kind, session.sent_generation)?.next().is_some(),
            Subscription::Named(_) => session.in_flight.is_some(),
        };
        Ok(Some(if is_behind { session.sent_generation } else { latest }))
    }
}

/// What a response will say.
#[derive(Default)]
struct Told {
    /// With the name under which it was asked for, if that is not its own.
    put: Vec<(Option<Arc<str>>, Arc<Resource>)>,
    removed: Vec<Arc<str>>,
}

impl TypeSession {
    fn new() -> Self {
        Self {
            subscription: Subscription::Named(BTreeSet::new()),
            answered: false,
            sent_generation: 0,
            initial: BTreeMap::new(),
            asked: BTreeSet::new(),
            held: BTreeMap::new(),
            known: BTreeSet::new(),
            waiting: BTreeMap::new(),
            in_flight: None,
            rejected: BTreeMap::new(),
        }
    }

    /// Whether the request changed the subscription.
    fn subscribe(&mut self, request: &DeltaDiscoveryRequest, is_new: bool) -> Result<bool, SessionError> {
        let (add, drop) = (&request.resource_names_subscribe, &request.resource_names_unsubscribe);
        let is_star = |name: &String| name == "*";
        let unsubscribes_star = drop.iter().any(is_star);
        // No names in a type's first request mean all (xDS, "wildcard subscription").
        let asks_for_all = (is_new && add.is_empty()) || add.iter().any(is_star);
        if asks_for_all && !unsubscribes_star {
            if !matches!(self.subscription, Subscription::Wildcard) {
                self.subscription = Subscription::Wildcard;
                self.answered = false;
                // The first response compares with what the client has.
                let held = std::mem::take(&mut self.held);
                self.initial.extend(held.into_iter().filter_map(|(n, v)| Some((n.to_string(), v?.to_string()))));
            }
        } else if unsubscribes_star && matches!(self.subscription, Subscription::Wildcard) {
            self.subscription = Subscription::Named(BTreeSet::new());
        }
        for name in add.iter().filter(|name| !is_star(name)) {
            let name: Arc<str> = name.as_str().into();
            if let Subscription::Named(names) = &mut self.subscription {
                names.insert(name.clone());
            }
            self.asked.insert(name);
        }
        for name in drop {
            self.asked.remove(name.as_str());
            self.held.remove(name.as_str());
            if let Subscription::Named(names) = &mut self.subscription {
                names.remove(name.as_str());
            }
        }
        let count = match &self.subscription {
            Subscription::Wildcard => self.asked.len(),
            Subscription::Named(names) => names.len().max(self.asked.len()),
        };
        if count > MAX_SUBSCRIPTIONS {
            return Err(SessionError::TooManyNames);
        }
        Ok(!add.is_empty() || !drop.is_empty())
    }

    /// Whether a change is told after the other type.
    fn comes_after(&self, name: &Arc<str>, resource: &Resource) -> bool {
        resource.is_named && self.known.contains(name)
    }

    /// `other`: the generation up to which the other type was told.
    fn collect(&mut self, kind: ResourceType, catalogue: &Catalogue, other: Option<u64>) -> Result<Told, SessionError> {
        let mut told = Told::default();
        let latest = catalogue.generation();
        match &self.subscription {
            Subscription::Wildcard if !self.answered => self.collect_all(kind, catalogue, &mut told),
            Subscription::Wildcard => {
                for (name, resource) in catalogue.since(kind, self.sent_generation)? {
                    self.waiting.remove(name);
                    match resource {
                        Some(resource) if self.comes_after(name, resource) => {
                            self.waiting.insert(name.clone(), latest);
                        }
                        Some(resource) => told.put.push((None, resource.clone())),
                        None => told.removed.push(name.clone()),
                    }
                }
            }
            Subscription::Named(_) => self.collect_named(kind, catalogue, &mut told),
        }
        self.sent_generation = latest;
        self.collect_asked(kind, catalogue, &mut told);
        let is_ready = |generation: u64| other.is_some_and(|other| generation <= other);
        if !is_ready(latest) {
            self.waiting.extend(told.removed.drain(..).map(|name| (name, latest)));
        }
        let is_wildcard = matches!(self.subscription, Subscription::Wildcard);
        for (name, _) in self.waiting.extract_if(.., |_, generation| is_ready(*generation)) {
            match catalogue.named(kind, &name) {
                None => told.removed.push(name),
                Some(resource) if is_wildcard => told.put.push((None, resource.clone())),
                // Dropped by the client and still there.
                Some(_) => {}
            }
        }
        if kind == ResourceType::Authorization {
            self.known.extend(told.put.iter().map(|(_, resource)| resource.name.clone()));
            for name in &told.removed {
                self.known.remove(name);
            }
        }
        Ok(told)
    }

    /// Everything, but for what the client has already.
    fn collect_all(&mut self, kind: ResourceType, catalogue: &Catalogue, told: &mut Told) {
        let initial = std::mem::take(&mut self.initial);
        for resource in catalogue.all(kind) {
            match initial.get(&*resource.name) {
                Some(version) if **version == *resource.version => {}
                Some(_) if resource.is_named => {
                    self.waiting.insert(resource.name.clone(), catalogue.generation());
                }
                Some(_) | None => told.put.push((None, resource.clone())),
            }
        }
        let initial: BTreeSet<Arc<str>> = initial.into_keys().map(Arc::from).collect();
        told.removed.extend(initial.iter().filter(|name| catalogue.named(kind, name).is_none()).cloned());
        if kind == ResourceType::Authorization {
            self.known = initial;
        }
    }

    /// What the subscribed names stand for now, compared with what was sent.
    fn collect_named(&mut self, kind: ResourceType, catalogue: &Catalogue, told: &mut Told) {
        let Subscription::Named(names) = &self.subscription else { return };
        let initial = std::mem::take(&mut self.initial);
        self.held.extend(initial.into_iter().map(|(name, version)| (Arc::from(name), Some(Arc::from(version)))));
        let mut want: BTreeMap<Arc<str>, (&Arc<str>, &Arc<Resource>)> = BTreeMap::new();
        for name in names {
            for resource in catalogue.resolve(kind, name) {
                want.entry(resource.name.clone()).or_insert((name, resource));
            }
        }
        for (name, (asked_as, resource)) in &want {
            if self.held.get(name) != Some(&Some(resource.version.clone())) {
                told.put.push((alias(name, asked_as), (*resource).clone()));
                self.held.insert(name.clone(), Some(resource.version.clone()));
            }
        }
        let gone: Vec<_> = self
            .held
            .iter()
            .filter(|(name, v)| v.is_some() && !want.contains_key(*name))
            .map(|(n, _)| n.clone())
            .collect();
        for name in gone {
            self.held.remove(&name);
            told.removed.push(name);
        }
    }

    /// A name that was asked for is answered, even when nothing changed or nothing is there.
    fn collect_asked(&mut self, kind: ResourceType, catalogue: &Catalogue, told: &mut Told) {
        if self.asked.is_empty() {
            return;
        }
        // There may be as many as [`MAX_SUBSCRIPTIONS`] of each.
        let mut put: HashSet<Arc<str>> = told.put.iter().map(|(_, resource)| resource.name.clone()).collect();
        let removed: HashSet<Arc<str>> = told.removed.iter().cloned().collect();
        for asked in std::mem::take(&mut self.asked) {
            let mut found = false;
            for resource in catalogue.resolve(kind, &asked) {
                found = true;
                if put.insert(resource.name.clone()) {
                    told.put.push((alias(&resource.name, &asked), resource.clone()));
                }
            }
            if !found && !removed.contains(&asked) {
                told.removed.push(asked);
            }
        }
    }
}

fn alias(name: &Arc<str>, asked_as: &Arc<str>) -> Option<Arc<str>> {
    (name != asked_as).then(|| asked_as.clone())
}

impl Told {
    fn into_response(self, kind: ResourceType, nonce: String, generation: u64) -> DeltaDiscoveryResponse {
        let wire = |(asked_as, resource): (Option<Arc<str>>, Arc<Resource>)| WireResource {
            version: resource.version.to_string(),
            resource: Some(Any { type_url: kind.type_url().to_owned(), value: resource.body.clone() }),
            name: resource.name.to_string(),
            aliases: {
                let mut aliases: BTreeSet<String> = resource.aliases.iter().map(ToString::to_string).collect();
                aliases.extend(asked_as.map(|name| name.to_string()));
                aliases.into_iter().collect()
            },
            ttl: None,
        };
        DeltaDiscoveryResponse {
            system_version_info: generation.to_string(),
            resources: self.put.into_iter().map(wire).collect(),
            type_url: kind.type_url().to_owned(),
            nonce,
            removed_resources: self.removed.iter().map(ToString::to_string).collect(),
        }
    }
}

/// Which resources of a response a NACK means. Node proxies write `NAME: REASON`, joined by `; `; a NACK that names
/// none of them means all.
fn attribute(names: &[Arc<str>], error: &Status) -> BTreeMap<String, String> {
    let message = &error.message[..error.message.floor_char_boundary(MAX_NACK_BYTES)];
    let names_sent: HashSet<&str> = names.iter().map(|name| &**name).collect();
    let mut attributed = BTreeMap::new();
    for (colon, _) in message.match_indices(": ") {
        let start = message[..colon].rfind([' ', ';', '\n']).map_or(0, |before| before + 1);
        let (name, reason) = (&message[start..colon], &message[colon + 2..]);
        if names_sent.contains(name) {
            let reason = reason.split("; ").next().unwrap_or(reason);
            attributed.entry(name.to_owned()).or_insert_with(|| shorten(reason));
        }
    }
    if attributed.is_empty() {
        return names.iter().take(MAX_REJECTED).map(|name| (name.to_string(), shorten(message))).collect();
    }
    attributed
}

fn shorten(reason: &str) -> String {
    reason.chars().take(MAX_REASON_CHARS).collect()
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
