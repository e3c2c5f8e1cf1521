//! AuthorizationPolicy, field by field, with real connections: from a workload of the same namespace, of another one and
//! from outside the mesh, to a workload of the same node and of another, on two ports, in both families. And each time
//! the node proxy must answer the question `authz why` as the connection went.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::net::SocketAddr;

use mesh_core::flow::HBONE_PORT;
use mesh_ctl::sandbox::{Mesh, Topology, Workload};
use mesh_tests::policy_bed::{Family, PolicyBed, server};

/// Ports of every server.
const PORTS: [u16; 2] = [7000, 7001];
/// Whom the servers are asked by; all on node-a.
const CALLERS: [&str; 3] = [CLIENT, BUYER, PLAIN];
/// Same namespace as the servers.
const CLIENT: &str = "client";
/// Another namespace.
const BUYER: &str = "buyer.shop";
/// Outside the mesh.
const PLAIN: &str = "plain";
/// Policies that are in force at a time, each for two servers of its own.
const SLOTS: usize = 4;

/// A connection of the table.
#[derive(Debug, Clone, Copy)]
struct Flow {
    from: &'static str,
    far: bool,
    family: Family,
    port: u16,
}

impl Flow {
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for (from, far, family, port) in CALLERS.into_iter().flat_map(|from| {
            [false, true].into_iter().flat_map(move |far| {
                Family::BOTH.into_iter().flat_map(move |family| PORTS.map(|port| (from, far, family, port)))
            })
        }) {
            all.push(Self { from, far, family, port });
        }
        all
    }

    fn to(self, slot: usize) -> String {
        format!("{}-{slot}", if self.far { "far" } else { "near" })
    }

    fn has_identity(self) -> bool {
        self.from != PLAIN
    }
}

type Which = Box<dyn Fn(Flow) -> bool>;

/// A policy and what it lets in.
struct Case {
    action: &'static str,
    /// The value of `rules`, as YAML; empty: none.
    rules: String,
    lets_in: Which,
    /// Codes of what is reported about it.
    reported: &'static [&'static str],
}

fn case(action: &'static str, rules: &str, lets_in: impl Fn(Flow) -> bool + 'static) -> Case {
    Case { action, rules: rules.to_owned(), lets_in: Box::new(lets_in), reported: &[] }
}

impl Case {
    fn reported(self, reported: &'static [&'static str]) -> Self {
        Self { reported, ..self }
    }

    fn yaml(&self, slot: usize) -> String {
        let rules = if self.rules.is_empty() { String::new() } else { format!("  rules: {}\n", self.rules) };
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {{name: slot-{slot}, namespace: default}}\n\
             spec:\n  selector: {{matchLabels: {{slot: s{slot}}}}}\n  action: {}\n{rules}",
            self.action
        )
    }
}

/// What a field looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum About {
    Identity,
    Network,
}

/// A field with its values in both forms, and which connections the positive one matches.
struct Field {
    about: About,
    is: String,
    not: String,
    matches: fn(Flow) -> bool,
}

fn source(about: About, field: &str, values: &str, matches: fn(Flow) -> bool) -> Field {
    let rule = |field: &str| format!("[{{from: [{{source: {{{field}: [{values}]}}}}]}}]");
    Field { about, is: rule(field), not: rule(&negated(field)), matches }
}

fn operation(field: &str, values: &str, matches: fn(Flow) -> bool) -> Field {
    let rule = |field: &str| format!("[{{to: [{{operation: {{{field}: [{values}]}}}}]}}]");
    Field { about: About::Network, is: rule(field), not: rule(&negated(field)), matches }
}

fn when(about: About, key: &str, values: &str, matches: fn(Flow) -> bool) -> Field {
    let rule = |field: &str| format!("[{{when: [{{key: {key}, {field}: [{values}]}}]}}]");
    Field { about, is: rule("values"), not: rule("notValues"), matches }
}

/// `ports` -> `notPorts`.
fn negated(field: &str) -> String {
    format!("not{}{}", field[..1].to_uppercase(), &field[1..])
}

/// Every field that the node proxy can judge. `$NAME4` and `$NAME6` are addresses.
fn fields() -> Vec<Field> {
    use About::{Identity, Network};
    let client = |f: Flow| f.from == CLIENT;
    let buyer = |f: Flow| f.from == BUYER;
    vec![
        source(Identity, "principals", "cluster.local/ns/default/sa/client", client),
        source(Identity, "principals", "cluster.local/ns/shop/*", buyer),
        source(Identity, "principals", "'*/sa/client'", client),
        source(Identity, "principals", "'*'", Flow::has_identity),
        source(Identity, "principals", "nobody, cluster.local/ns/shop/sa/buyer", buyer),
        source(Identity, "namespaces", "default", client),
        source(Identity, "namespaces", "sh*, '*efault'", Flow::has_identity),
        source(Identity, "serviceAccounts", "client", client),
        source(Identity, "serviceAccounts", "shop/buyer", buyer),
        source(Network, "ipBlocks", "$plain4", |f| f.from == PLAIN && f.family == Family::V4),
        source(Network, "ipBlocks", "$client4/32, '$buyer6/128'", |f| match f.family {
            Family::V4 => f.from == CLIENT,
            Family::V6 => f.from == BUYER,
        }),
        source(Network, "ipBlocks", "10.0.0.0/8", |f| f.family == Family::V4),
        operation("ports", "'7000'", |f| f.port == 7000),
        when(Network, "source.ip", "$client4, '$client6'", client),
        when(Identity, "source.namespace", "shop", buyer),
        when(Identity, "source.principal", "cluster.local/ns/default/sa/client", client),
        when(Identity, "source.serviceAccount", "shop/buyer", buyer),
        when(Network, "destination.ip", "10.244.2.0/24, 'fd00:10:244:2::/64'", |f| f.far),
        when(Network, "destination.port", "'7001'", |f| f.port == 7001),
    ]
}

/// A field in four forms. "Everybody but these" in an ALLOW is said of those who prove who they are.
fn forms(field: Field) -> [Case; 4] {
    let Field { about, is, not, matches } = field;
    let could_be_them = move |f: Flow| about == About::Identity && !f.has_identity();
    [
        case("ALLOW", &is, matches),
        case("ALLOW", &not, move |f| !matches(f) && !could_be_them(f)),
        case("DENY", &is, move |f| !matches(f)),
        case("DENY", &not, matches),
    ]
}

const CLIENT_ONLY: &str = "{source: {principals: [cluster.local/ns/default/sa/client]}}";
const BUYER_ONLY: &str = "{source: {namespaces: [shop]}}";
const PORT_7000: &str = "{operation: {ports: ['7000']}}";

/// How fields, entries and rules combine.
fn combinations() -> Vec<Case> {
    let client = |f: Flow| f.from == CLIENT;
    vec![
        // Different fields of one entry: both. Entries: either. Both forms of one field: both.
        case("ALLOW", "[{from: [{source: {namespaces: [default], ipBlocks: [$client4]}}]}]", move |f| {
            client(f) && f.family == Family::V4
        }),
        case("ALLOW", &format!("[{{from: [{CLIENT_ONLY}, {BUYER_ONLY}]}}]"), Flow::has_identity),
        case(
            "ALLOW",
            "[{from: [{source: {principals: ['*'], notPrincipals: [cluster.local/ns/shop/sa/buyer]}}]}]",
            client,
        ),
        case("DENY", "[{from: [{source: {namespaces: [default], ipBlocks: [$plain4]}}]}]", |_| true),
        // from, to and when: all of them. Rules: either.
        case(
            "ALLOW",
            &format!(
                "[{{from: [{CLIENT_ONLY}], to: [{PORT_7000}], when: [{{key: source.ip, values: ['$client6']}}]}}]"
            ),
            move |f| client(f) && f.port == 7000 && f.family == Family::V6,
        ),
        case("ALLOW", &format!("[{{from: [{CLIENT_ONLY}]}}, {{to: [{PORT_7000}]}}]"), move |f| {
            client(f) || f.port == 7000
        }),
        case("DENY", &format!("[{{from: [{CLIENT_ONLY}], to: [{PORT_7000}]}}]"), move |f| {
            !(client(f) && f.port == 7000)
        }),
        case(
            "ALLOW",
            "[{when: [{key: source.namespace, values: [shop]}, {key: source.namespace, values: [default]}]}]",
            |_| false,
        ),
        // Nothing in a rule, and no rule.
        case("ALLOW", "[{}]", |_| true),
        case("DENY", "[{}]", |_| false),
        case("ALLOW", "", |_| false),
        case("DENY", "", |_| true),
    ]
}

/// What the node proxy cannot see makes a rule stricter, and is reported.
fn unseen() -> Vec<Case> {
    let report = &["MESH102"][..];
    let get = "{operation: {methods: [GET]}}";
    vec![
        case("ALLOW", &format!("[{{from: [{CLIENT_ONLY}], to: [{get}]}}, {{from: [{BUYER_ONLY}]}}]"), |f| {
            f.from == BUYER
        })
        .reported(report),
        case("DENY", &format!("[{{from: [{CLIENT_ONLY}], to: [{get}]}}]"), |f| f.from != CLIENT).reported(report),
        case("DENY", "[{to: [{operation: {ports: ['7000'], paths: [/admin]}}]}]", |f| f.port != 7000).reported(report),
        case("DENY", &format!("[{{to: [{PORT_7000}, {get}]}}]"), |_| false).reported(report),
        case("ALLOW", "[{from: [{source: {remoteIpBlocks: [10.0.0.0/8]}}]}]", |_| false).reported(report),
        case("DENY", "[{from: [{source: {remoteIpBlocks: [203.0.113.0/24]}}]}]", |_| false).reported(report),
        case("DENY", "[{from: [{source: {notRemoteIpBlocks: [10.0.0.0/8], ipBlocks: [$plain4]}}]}]", |f| {
            !(f.from == PLAIN && f.family == Family::V4)
        })
        .reported(report),
        case("ALLOW", "[{when: [{key: 'request.headers[x-user]', values: [root]}]}]", |_| false).reported(report),
        case("DENY", &format!("[{{from: [{CLIENT_ONLY}], when: [{{key: remote.ip, values: [10.0.0.0/8]}}]}}]"), |f| {
            f.from != CLIENT
        })
        .reported(report),
        case("DENY", &format!("[{{from: [{CLIENT_ONLY}], when: [{{key: source.colour, values: [red]}}]}}]"), |f| {
            f.from != CLIENT
        })
        .reported(&["MESH102", "MESH106"]),
        case("CUSTOM", &format!("[{{from: [{CLIENT_ONLY}]}}]"), |f| f.from != CLIENT).reported(&["MESH103"]),
        case("AUDIT", &format!("[{{from: [{CLIENT_ONLY}]}}]"), |_| true).reported(&["MESH103"]),
    ]
}

fn topology() -> Topology {
    let mut topology = Topology::new()
        .node("node-a")
        .node("node-b")
        .namespace("default", &[("istio.io/dataplane-mode", "ambient")])
        .namespace("shop", &[("istio.io/dataplane-mode", "ambient")])
        .workload(Workload::new("client", "node-a"))
        .workload(Workload::new("buyer", "node-a").namespace("shop"))
        .workload(Workload::new("plain", "node-a").outside_mesh());
    for slot in 0..SLOTS {
        for (name, node) in [("near", "node-a"), ("far", "node-b")] {
            let name = format!("{name}-{slot}");
            topology = topology.workload(server(&name, node, &PORTS).label("slot", &format!("s{slot}")));
        }
    }
    topology
}

/// Puts addresses in place of `$NAME4` and `$NAME6`.
fn with_addresses(bed: &PolicyBed, text: &str) -> String {
    let mut text = text.to_owned();
    for caller in CALLERS {
        let name = caller.split('.').next().unwrap();
        for (family, digit) in Family::BOTH.into_iter().zip(["4", "6"]) {
            text = text.replace(&format!("${name}{digit}"), &bed.ip(caller, family).to_string());
        }
    }
    text
}

/// Tries all connections to the servers of a slot; those that went otherwise than the case says.
fn wrong(bed: &PolicyBed, slot: usize, case: &Case) -> Vec<String> {
    let mut wrong = Vec::new();
    for from in CALLERS {
        let flows: Vec<Flow> = Flow::all().into_iter().filter(|flow| flow.from == from).collect();
        let to = flows.iter().map(|flow| SocketAddr::new(bed.ip(&flow.to(slot), flow.family), flow.port));
        let went = bed.reaches(from, &to.collect::<Vec<_>>());
        for (flow, went) in flows.into_iter().zip(went) {
            let wanted = (case.lets_in)(flow);
            let answer = bed.authz(from, &flow.to(slot), (flow.family, flow.port));
            let said = answer.decision == "allow";
            if went != wanted || said != wanted {
                wrong.push(format!("{flow:?}: wanted {wanted}, went {went}, authz why: {answer:?}"));
            }
        }
    }
    wrong
}

/// Applies the cases, several at a time, and tries everything.
fn check(bed: &PolicyBed, cases: &[Case]) {
    for group in cases.chunks(SLOTS) {
        let text: String = group.iter().enumerate().map(|(slot, case)| case.yaml(slot)).collect();
        let problems = bed.apply("cases.yaml", &with_addresses(bed, &text));
        for (slot, case) in group.iter().enumerate() {
            let object = format!("AuthorizationPolicy default/slot-{slot}");
            let mut codes: Vec<_> = problems.iter().filter(|p| p.object == object).map(|p| &*p.code).collect();
            codes.sort_unstable();
            assert_eq!(codes, case.reported, "reported about {}", case.yaml(slot));
            let wrong = wrong(bed, slot, case);
            assert!(wrong.is_empty(), "{}\n{}", case.yaml(slot), wrong.join("\n"));
        }
    }
    bed.delete("cases.yaml");
    for slot in 0..SLOTS {
        let wrong = wrong(bed, slot, &case("ALLOW", "", |_| true));
        assert!(wrong.is_empty(), "without a policy: {}", wrong.join("\n"));
    }
}

#[test]
fn every_field_of_l4_in_allow_and_deny_and_each_with_its_negation() {
    let cases: Vec<Case> = fields().into_iter().flat_map(forms).collect();
    check(&PolicyBed::up("fields", topology()), &cases);
}

#[test]
fn fields_entries_and_rules_combine_and_what_cannot_be_seen_makes_a_rule_stricter() {
    let cases: Vec<Case> = combinations().into_iter().chain(unseen()).collect();
    check(&PolicyBed::up("combine", topology()), &cases);
}

/// The same policies under `--http-fields upstream`, where istiod and ztunnel let in what the default keeps out.
#[test]
fn with_the_switch_what_cannot_be_seen_is_judged_as_upstream_judges_it() {
    let get = "{operation: {methods: [GET]}}";
    let report = &["MESH102"][..];
    let cases = [
        // A DENY of which nothing is left in from or to never fires.
        case("DENY", &format!("[{{from: [{CLIENT_ONLY}], to: [{get}]}}]"), |_| true).reported(report),
        case("DENY", &format!("[{{to: [{PORT_7000}, {get}]}}]"), |f| f.port != 7000).reported(report),
        case("DENY", "[{to: [{operation: {ports: ['7000'], paths: [/admin]}}]}]", |f| f.port != 7000).reported(report),
        case("DENY", "[{when: [{key: 'request.headers[x-user]', values: [root]}]}]", |_| true).reported(report),
        // An ALLOW is as strict as ever, but for clients of whom nobody knows who they are.
        case("ALLOW", &format!("[{{from: [{CLIENT_ONLY}], to: [{get}]}}]"), |_| false).reported(report),
        case("ALLOW", "[{from: [{source: {notNamespaces: [shop]}}]}]", |f| f.from != BUYER),
        case("ALLOW", "[{from: [{source: {notPrincipals: ['*/sa/client']}}]}]", |f| f.from != CLIENT),
        case("CUSTOM", &format!("[{{from: [{CLIENT_ONLY}]}}]"), |_| true).reported(&["MESH103"]),
    ];
    let upstream = |mesh: &mut Mesh| mesh.controller_args = ["--http-fields", "upstream"].map(str::to_owned).into();
    check(&PolicyBed::with("upstream", topology(), upstream), &cases);
}

#[test]
fn the_same_is_decided_when_connections_of_one_node_go_through_a_tunnel_too() {
    let bed = PolicyBed::with("tunnel", topology(), |mesh| mesh.node_args.push("--force-tunnel".to_owned()));
    check(&bed, &combinations());
    let near = SocketAddr::new(bed.ip("near-0", Family::V4), HBONE_PORT);
    bed.mesh.logged("node-a", &["connection complete", "\"direction\":\"inbound\"", &format!("\"{near}\"")]);
}

/// Who reaches the servers of each slot, by IPv4 on the first port: `SLOT CALLER`, sorted.
fn reached(bed: &PolicyBed) -> Vec<String> {
    let mut reached = Vec::new();
    for from in CALLERS {
        let to = |slot| {
            let flow = |far| Flow { from, far, family: Family::V4, port: PORTS[0] };
            [false, true].map(|far| SocketAddr::new(bed.ip(&flow(far).to(slot), Family::V4), PORTS[0]))
        };
        let all: Vec<SocketAddr> = (0..SLOTS).flat_map(to).collect();
        for (slot, went) in bed.reaches(from, &all).chunks(2).enumerate() {
            assert_eq!(went[0], went[1], "{from} at slot {slot}: on one node {}, across nodes {}", went[0], went[1]);
            reached.extend(went[0].then(|| format!("{slot} {from}")));
        }
    }
    reached.sort();
    reached
}

fn policy(name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: {namespace}, annotations: {{}}}}\nspec: {spec}\n"
    )
}

/// All callers at all slots but for those of which `but` says so.
fn everybody(but: impl Fn(usize, &str) -> bool) -> Vec<String> {
    let mut all: Vec<String> = (0..SLOTS)
        .flat_map(|slot| CALLERS.map(|from| (slot, from)))
        .filter(|(slot, from)| !but(*slot, from))
        .map(|(slot, from)| format!("{slot} {from}"))
        .collect();
    all.sort();
    all
}

#[test]
fn namespace_selector_and_action_say_whom_a_policy_concerns_and_which_of_several_decides() {
    let bed = PolicyBed::up("scope", topology());
    let deny_client = format!("action: DENY, rules: [{{from: [{CLIENT_ONLY}]}}]");
    let slot_1 = "selector: {matchLabels: {slot: s1}}";
    let allow_all = policy("all", "default", "{rules: [{}]}");
    let client = |_: usize, from: &str| from == CLIENT;
    let client_at_1 = |slot: usize, from: &str| from == CLIENT && slot == 1;
    for (says, text, but) in [
        (
            "its own namespace",
            policy("p", "default", &format!("{{{deny_client}}}")),
            &client as &dyn Fn(usize, &str) -> bool,
        ),
        ("not another one's", policy("p", "shop", &format!("{{{deny_client}}}")), &|_, _| false),
        ("the root namespace's concern the mesh", policy("p", "istio-system", &format!("{{{deny_client}}}")), &client),
        ("selected workloads", policy("p", "default", &format!("{{{slot_1}, {deny_client}}}")), &client_at_1),
        ("not those of another namespace", policy("p", "shop", &format!("{{{slot_1}, {deny_client}}}")), &|_, _| false),
        (
            "those of all namespaces from the root",
            policy("p", "istio-system", &format!("{{{slot_1}, {deny_client}}}")),
            &client_at_1,
        ),
        (
            "DENY before ALLOW, whatever the scope",
            policy("p", "istio-system", &format!("{{{deny_client}}}")) + &allow_all,
            &client,
        ),
        (
            "any ALLOW of several",
            policy("p", "default", "{}")
                + &policy("q", "default", &format!("{{{slot_1}, rules: [{{from: [{CLIENT_ONLY}]}}]}}")),
            &|slot, from| !(slot == 1 && from == CLIENT),
        ),
        (
            "a dry run changes nothing",
            policy("p", "default", &format!("{{{deny_client}}}"))
                .replace("annotations: {}", "annotations: {istio.io/dry-run: 'true'}"),
            &|_, _| false,
        ),
    ] {
        bed.apply("scope.yaml", &text);
        assert_eq!(reached(&bed), everybody(but), "{says}\n{text}");
    }
    bed.delete("scope.yaml");
    assert_eq!(reached(&bed), everybody(|_, _| false), "without policies");
}
