//! Kinds of `security.istio.io`.

use super::common::{self, ANY_TEXT, MOST_TARGETS, ONE_AIM};
use super::schema::{
    Bounds, Field, Need, Schema, Shape, filled_object, list, map, object, optional, pattern, required, text, word,
};
use super::{Column, Definition, Effect};

const GROUP: &str = "security.istio.io";
const VERSIONS: &[&str] = &["v1", "v1beta1"];
/// Rules of a policy, and sources of a rule.
const MOST_RULES: Bounds = Bounds::most(512);
/// A list that is there has something in it: whether an empty one means everything or nothing is nobody's guess.
const FILLED: Bounds = Bounds::least(1);

pub(super) fn peer_authentication() -> Definition {
    let mode = || {
        let mode = word(&["UNSET", "DISABLE", "PERMISSIVE", "STRICT"]).about(
            "STRICT takes mutual TLS alone, PERMISSIVE plaintext too, DISABLE plaintext alone. UNSET, and none, is as the \
             namespace or the mesh has it.",
        );
        object(vec![optional("mode", mode)])
    };
    let by_port = map(mode(), FILLED)
        .about("What applies to single ports in place of `mtls`. Ports are those of the workload, not of a service.")
        .rule(
            "self.all(port, port.matches('^[0-9]{1,5}$') && int(port) > 0 && int(port) < 65536)",
            "each key is a port, from 1 to 65535",
        );
    let spec = object(vec![
        optional("selector", common::selector().about("Which workloads; all of the namespace without it.")),
        optional("mtls", mode().about("Which connections the workloads take.")),
        optional("portLevelMtls", by_port),
    ])
    .about("Whether workloads take connections without mutual TLS.")
    .rule(
        "!has(self.portLevelMtls) || \
         (has(self.selector) && has(self.selector.matchLabels) && self.selector.matchLabels.size() > 0)",
        "portLevelMtls needs a selector with labels",
    );
    Definition {
        group: GROUP,
        kind: "PeerAuthentication",
        plural: "peerauthentications",
        short_name: "pa",
        versions: VERSIONS,
        columns: vec![Column { name: "Mode", path: ".spec.mtls.mode", description: "Which connections are taken." }],
        spec,
        spec_need: Need::Optional,
        effect: Effect::Read,
    }
}

pub(super) fn authorization_policy() -> Definition {
    let action = word(&["ALLOW", "DENY", "AUDIT", "CUSTOM"]).about(
        "What happens to a connection or request that a rule matches. ALLOW if there is none; an ALLOW policy without \
         rules lets nothing in.",
    );
    let provider = object(vec![required("name", text(FILLED).about("Its name in the mesh's configuration."))])
        .about("Who decides, for the action CUSTOM.");
    let targets = list(common::target(), MOST_TARGETS).about("Services or gateways that the policy is for.");
    let spec = object(vec![
        optional("selector", common::selector().about("Which workloads; all of the namespace without it.")),
        optional("targetRef", common::target().about("The one service or gateway that the policy is for.")),
        optional("targetRefs", targets),
        optional("action", action),
        optional("provider", provider),
        optional("rules", list(rule(), MOST_RULES).about("The policy matches where one of them does.")),
    ])
    .about("Who may reach workloads, and what they may ask for.")
    .rule(ONE_AIM.0, ONE_AIM.1)
    .rule(
        "has(self.provider) == (has(self.action) && self.action == 'CUSTOM')",
        "the action CUSTOM needs a provider, and no other action has one",
    )
    .rule(
        "has(self.rules) || !has(self.action) || !(self.action in ['DENY', 'CUSTOM'])",
        "DENY and CUSTOM without rules never match: `rules: [{}]` matches all",
    );
    Definition {
        group: GROUP,
        kind: "AuthorizationPolicy",
        plural: "authorizationpolicies",
        short_name: "ap",
        versions: VERSIONS,
        columns: vec![Column { name: "Action", path: ".spec.action", description: "What becomes of a match." }],
        spec,
        spec_need: Need::Optional,
        effect: Effect::Read,
    }
}

pub(super) fn request_authentication() -> Definition {
    let targets = list(common::target(), MOST_TARGETS).about("Services or gateways that the object is for.");
    let spec = object(vec![
        optional("selector", common::selector().about("Which workloads; all of the namespace without it.")),
        optional("targetRef", common::target().about("The one service or gateway that the object is for.")),
        optional("targetRefs", targets),
        optional("jwtRules", list(jwt_rule(), Bounds::most(4096)).about("Tokens that are known. None is demanded.")),
    ])
    .about("Which tokens of requests are looked at. A request with one that is not valid is refused.")
    .rule(ONE_AIM.0, ONE_AIM.1);
    Definition {
        group: GROUP,
        kind: "RequestAuthentication",
        plural: "requestauthentications",
        short_name: "ra",
        versions: VERSIONS,
        columns: vec![],
        spec,
        spec_need: Need::Optional,
        effect: Effect::Stored,
    }
}

fn jwt_rule() -> Schema {
    let uri = || {
        text(Bounds::of(1, 2048)).about("Where the issuer's keys are.").rule(
            "isURL(self) && url(self).getScheme() in ['http', 'https']",
            "the keys' address begins with http:// or https://",
        )
    };
    let header = object(vec![
        required("name", text(FILLED).about("Name of the header.")),
        optional("prefix", text(ANY_TEXT).about("What stands before the token, with its space.")),
    ]);
    let copy = object(vec![
        required("header", pattern(FILLED, "^[-_A-Za-z0-9]+$").about("The header that is written.")),
        required("claim", text(FILLED).about("The claim that it gets; a dot leads into an object.")),
    ]);
    let texts = |about| list(text(FILLED), Bounds::NONE).about(about);
    object(vec![
        optional("issuer", text(FILLED).about("Who has issued the token.")),
        optional("audiences", texts("Whom the token is for: one of them. The service's own name without it.")),
        optional("jwksUri", uri()),
        optional("jwks_uri", uri()),
        optional("jwks", text(ANY_TEXT).about("The issuer's keys themselves, a JSON Web Key Set.")),
        optional("fromHeaders", list(header, Bounds::NONE).about("Headers that carry the token.")),
        optional("fromParams", texts("Parameters of the query that carry it.")),
        optional("fromCookies", texts("Cookies that carry it.")),
        optional(
            "outputPayloadToHeader",
            text(ANY_TEXT).about("The header in which the token's claims are passed on."),
        ),
        optional("forwardOriginalToken", Schema::new(Shape::Bool).about("Whether the token itself is passed on.")),
        optional("outputClaimToHeaders", list(copy, Bounds::NONE).about("Single claims that are passed on.")),
        optional(
            "spaceDelimitedClaims",
            list(text(FILLED), Bounds::most(64)).about("Claims that are lists of words in one text."),
        ),
        optional(
            "timeout",
            text(ANY_TEXT)
                .about("How long keys may take to arrive, such as 5s.")
                .rule("duration(self) >= duration('1ms')", "a duration has a unit and is at least 1ms"),
        ),
    ])
    .about("Tokens of one issuer, and where they are found.")
    .rule(
        "[has(self.jwks), has(self.jwksUri), has(self.jwks_uri)].filter(is_set, is_set).size() < 2",
        "jwks and jwksUri exclude each other",
    )
    .rule(
        "has(self.issuer) || has(self.jwksUri) || has(self.jwks_uri)",
        "a token is known by its issuer or by the address of the keys",
    )
}

fn rule() -> Schema {
    let from = object(vec![required("source", source())]);
    let to = object(vec![required("operation", operation())]);
    object(vec![
        optional("from", list(from, Bounds::of(1, 512)).about("Who asks; anybody without it. One of them is enough.")),
        optional("to", list(to, FILLED).about("What is asked for; anything without it. One of them is enough.")),
        optional("when", list(condition(), FILLED).about("Further conditions, all of which have to hold.")),
    ])
}

fn source() -> Schema {
    let account = || list(text(Bounds::of(1, 320)), Bounds::of(1, 16));
    let mut fields = vec![
        optional(
            "serviceAccounts",
            account().about("Service accounts, as NAMESPACE/NAME or NAME of the policy's own."),
        ),
        optional("notServiceAccounts", account().about("None of these service accounts.")),
    ];
    fields.extend(values([
        [
            ("principals", "Identities of mutual TLS: TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT."),
            ("notPrincipals", "None of these identities."),
        ],
        [
            ("requestPrincipals", "ISSUER/SUBJECT of a JWT that was found valid."),
            ("notRequestPrincipals", "None of these of a JWT."),
        ],
        [("namespaces", "Namespaces of the client's identity."), ("notNamespaces", "None of these namespaces.")],
        [
            ("ipBlocks", "Addresses that packets come from, or ranges of them."),
            ("notIpBlocks", "None of these addresses."),
        ],
        [
            ("remoteIpBlocks", "Addresses of the first client, as gateways pass them on."),
            ("notRemoteIpBlocks", "None of these first addresses."),
        ],
        [
            ("trustDomains", "Trust domains of the client's identity."),
            ("notTrustDomains", "None of these trust domains."),
        ],
    ]));
    filled_object(fields).about("All that is given has to match.").rule(
        "!(has(self.serviceAccounts) || has(self.notServiceAccounts)) || !(has(self.principals) || \
         has(self.notPrincipals) || has(self.namespaces) || has(self.notNamespaces))",
        "service accounts say the namespace and the identity: neither principals nor namespaces go with them",
    )
}

fn operation() -> Schema {
    let port = || list(pattern(ANY_TEXT, "^[0-9]{1,5}$"), FILLED);
    let mut fields = vec![
        optional("ports", port().about("Ports, in quotes.")),
        optional("notPorts", port().about("None of these ports.")),
    ];
    fields.extend(values([
        [("hosts", "Hosts of HTTP requests."), ("notHosts", "None of these hosts.")],
        [("methods", "Methods of HTTP requests."), ("notMethods", "None of these methods.")],
        [("paths", "Paths of HTTP requests."), ("notPaths", "None of these paths.")],
    ]));
    filled_object(fields).about("All that is given has to match.")
}

fn condition() -> Schema {
    object(vec![
        required("key", text(FILLED).about("An attribute, such as source.ip or request.headers[NAME].")),
        optional("values", list(text(ANY_TEXT), FILLED).about("The attribute has one of them.")),
        optional("notValues", list(text(ANY_TEXT), FILLED).about("The attribute has none of them.")),
    ])
    .rule("has(self.values) || has(self.notValues)", "a condition needs values or notValues")
}

/// Lists of texts, each with its opposite: names and descriptions of both.
fn values<const N: usize>(pairs: [[(&'static str, &'static str); 2]; N]) -> impl Iterator<Item = Field> {
    pairs.into_iter().flatten().map(|(name, about)| optional(name, list(text(FILLED), FILLED).about(about)))
}
