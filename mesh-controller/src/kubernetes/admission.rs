//! Admission: what the API server is told about an object that somebody wants to write. A function of the question.
//!
//! An object is read and compiled as one of a configuration directory is, alone: an error there refuses it, a warning
//! there is shown to its author. What depends on other objects refuses nothing and is not said here, or the order in which
//! objects are applied would matter; status and the log say it. Not here: who asks and how ([`super::webhook`]).

use mesh_api::admin::Problem;
use mesh_api::k8s::{Item, from_api_server};
use mesh_api::problem;
use mesh_core::config::{Code, Compiler, Delta, Settings};
use serde::Deserialize;
use serde_json::{Value, json};

use super::follow::FOLLOWED;

/// The only version of the question that is understood.
const API_VERSION: &str = "admission.k8s.io/v1";
/// Characters of one finding that are told: a value of the object may be part of it.
const MAX_FINDING_CHARS: usize = 500;

/// The answer to one question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Of the question.
    pub uid: String,
    /// Why not; none if the object may be written.
    pub refusal: Option<String>,
    /// What its author should know.
    pub warnings: Vec<String>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum NotAReview {
    /// It cannot be read.
    #[error("the body is not an AdmissionReview: {0}")]
    Json(#[from] serde_json::Error),
    /// It is of another kind or version.
    #[error("the body is `{kind}` of `{api_version}`, not an AdmissionReview of {API_VERSION}")]
    Kind {
        /// What it says.
        kind: String,
        /// What it says.
        api_version: String,
    },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Review {
    api_version: String,
    kind: String,
    request: Request,
}

#[derive(Debug, Deserialize)]
struct Request {
    uid: String,
    kind: RequestKind,
    operation: Operation,
    #[serde(default)]
    object: Value,
}

#[derive(Debug, Deserialize)]
struct RequestKind {
    #[serde(default)]
    group: String,
    kind: String,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Operation {
    Create,
    Update,
    Delete,
    Connect,
}

/// Answers the body of a request.
pub fn review(body: &[u8], settings: &Settings) -> Result<Answer, NotAReview> {
    let Review { api_version, kind, request } = serde_json::from_slice(body)?;
    if api_version != API_VERSION || kind != "AdmissionReview" {
        return Err(NotAReview::Kind { kind, api_version });
    }
    let is_ours = FOLLOWED.iter().any(|what| what.is_judged() && what.is(&request.kind.group, &request.kind.kind));
    let found = match request.operation {
        Operation::Create | Operation::Update if is_ours && !is_going(&request.object) => {
            findings(request.object, settings)
        }
        Operation::Create | Operation::Update | Operation::Delete | Operation::Connect => Vec::new(),
    };
    let (errors, warnings): (Vec<_>, Vec<_>) = found.into_iter().partition(|p| p.severity == problem::ERROR);
    let refusal = (!errors.is_empty()).then(|| told(&errors).join("; "));
    Ok(Answer { uid: request.uid, refusal, warnings: told(&warnings) })
}

impl Answer {
    /// What the API server reads.
    pub fn to_json(&self) -> Value {
        let mut response = json!({"uid": self.uid, "allowed": self.refusal.is_none()});
        if let Some(refusal) = &self.refusal {
            // Without it the API server says 403, which sounds like a missing right.
            response["status"] = json!({"code": 422, "reason": "Invalid", "message": refusal});
        }
        if !self.warnings.is_empty() {
            response["warnings"] = json!(self.warnings);
        }
        json!({"apiVersion": API_VERSION, "kind": "AdmissionReview", "response": response})
    }
}

/// What is wrong with an object, whatever else there is.
fn findings(object: Value, settings: &Settings) -> Vec<Problem> {
    let object = match from_api_server(object) {
        Item::Object(object) => *object,
        Item::Inert(finding) | Item::Rejected(finding) => return vec![problem::about_object(finding, "")],
    };
    let compiled = Compiler::new(settings.clone()).compile(&[Delta::Upsert(object)]);
    // A compiler that knows nothing else always finds that.
    let of_itself = compiled.problems.iter().filter(|found| found.code != Code::SelectsNothing);
    of_itself.map(problem::of_compiler).collect()
}

/// Whether an object is being deleted: whatever is wrong with it must not keep a finalizer from being taken off.
fn is_going(object: &Value) -> bool {
    !object["metadata"]["deletionTimestamp"].is_null()
}

/// Findings as lines; the compiler bounds their number. The API server says which object they are about.
fn told(found: &[Problem]) -> Vec<String> {
    let line = |found: &Problem| {
        let line = problem::line(&Problem { object: String::new(), ..found.clone() });
        line.chars().take(MAX_FINDING_CHARS).collect()
    };
    found.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use mesh_api::yaml;
    use mesh_core::config::HttpFields;
    use mesh_core::config::problem::MAX_KEPT;

    use super::*;
    use crate::source::{Changed, Source};
    use crate::testing::TempDir;

    const POLICY: &str = "security.istio.io/v1 AuthorizationPolicy";
    const PEER: &str = "security.istio.io/v1 PeerAuthentication";
    const ENTRY: &str = "networking.istio.io/v1 WorkloadEntry";

    fn object(kind: &str, spec: &Value) -> Value {
        let (version, kind) = kind.split_once(' ').unwrap();
        json!({
            "apiVersion": version, "kind": kind, "spec": spec,
            "metadata": {"name": "it", "namespace": "shop", "uid": "1", "generation": 1, "managedFields": []},
        })
    }

    fn question(operation: &str, object: &Value) -> Value {
        let (group, version) = object["apiVersion"].as_str().unwrap().rsplit_once('/').unwrap();
        json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {
                "uid": "u-1", "kind": {"group": group, "version": version, "kind": object["kind"]},
                "operation": operation, "object": object, "oldObject": null, "dryRun": false,
            },
        })
    }

    fn ask(question: &Value) -> Answer {
        let answer = review(question.to_string().as_bytes(), &Settings::default()).unwrap();
        assert_eq!(answer.uid, "u-1");
        answer
    }

    /// A wrong value of each kind of fault, and how its refusal begins.
    fn wrong() -> Vec<(&'static str, Value, &'static str)> {
        let from = |source: Value| json!({"rules": [{"from": [{"source": source}]}]});
        let to = |operation: Value| json!({"rules": [{"to": [{"operation": operation}]}]});
        let when = |condition: Value| json!({"rules": [{"when": [condition]}]});
        vec![
            (
                POLICY,
                from(json!({"ipBlocks": ["not-an-address"]})),
                "MESH101 spec.rules[0].from[0].source.ipBlocks[0]:",
            ),
            (
                POLICY,
                from(json!({"notIpBlocks": ["10.0.0.0/33"]})),
                "MESH101 spec.rules[0].from[0].source.notIpBlocks[0]:",
            ),
            (POLICY, from(json!({"principals": []})), "MESH003 spec.rules[0].from[0].source.principals:"),
            (POLICY, from(json!({"principals": "all"})), "MESH003 spec.rules[0].from[0].source.principals:"),
            (POLICY, from(json!({"principal": ["a"]})), "MESH003 spec.rules[0].from[0].source.principal:"),
            (POLICY, from(json!({"trustDomains": ["a"]})), "MESH003 spec.rules[0].from[0].source.trustDomains:"),
            (POLICY, from(json!({})), "MESH101 spec.rules[0].from[0].source:"),
            (
                POLICY,
                from(json!({"serviceAccounts": ["a"], "namespaces": ["b"]})),
                "MESH101 spec.rules[0].from[0].source.serviceAccounts:",
            ),
            (POLICY, to(json!({"ports": ["99999"]})), "MESH101 spec.rules[0].to[0].operation.ports[0]:"),
            (POLICY, to(json!({"ports": ["http"]})), "MESH101 spec.rules[0].to[0].operation.ports[0]:"),
            (POLICY, to(json!({"ports": [80]})), "MESH003 spec.rules[0].to[0].operation.ports[0]:"),
            (POLICY, when(json!({"key": "source.ip", "values": ["x"]})), "MESH101 spec.rules[0].when[0].values[0]:"),
            (POLICY, when(json!({"values": ["x"]})), "MESH003 spec.rules[0].when[0]"),
            (POLICY, json!({"rules": [{"from": []}]}), "MESH101 spec.rules[0].from:"),
            (POLICY, json!({"rules": {}}), "MESH003 spec.rules:"),
            (POLICY, json!({"action": "REFUSE"}), "MESH003 spec.action:"),
            (POLICY, json!("all"), "MESH003 spec:"),
            (
                POLICY,
                json!({"selector": {"matchLabels": {"a": "b"}}, "targetRefs": [{"kind": "Service", "name": "web"}]}),
                "MESH101 spec.targetRefs:",
            ),
            (PEER, json!({"mtls": {"mode": "MUTUAL"}}), "MESH003 spec.mtls.mode:"),
            (PEER, json!({"portLevelMtls": {"80": {"mode": "STRICT"}}}), "MESH101 spec.portLevelMtls:"),
            (ENTRY, json!({"address": 1}), "MESH003 spec.address:"),
            (ENTRY, json!({"adress": "10.0.0.1"}), "MESH003 spec.adress:"),
        ]
    }

    #[test]
    fn a_wrong_value_is_refused_with_its_field_and_what_to_do() {
        for (kind, spec, begin) in wrong() {
            for operation in ["CREATE", "UPDATE"] {
                let answer = ask(&question(operation, &object(kind, &spec)));
                let refusal = answer.refusal.clone().unwrap_or_else(|| panic!("{kind} {spec} is taken"));
                assert!(refusal.starts_with(begin), "{kind} {spec}: {refusal}");
                let json = answer.to_json();
                assert_eq!(
                    (&json["response"]["allowed"], &json["response"]["status"]["message"]),
                    (&json!(false), &json!(refusal))
                );
            }
        }
    }

    /// The findings of an object as `mesh-controller check` has them.
    fn in_a_directory(object: &Value) -> Vec<String> {
        let temp = TempDir::new();
        fs::write(temp.path().join("object.json"), object.to_string()).unwrap();
        let batch = Source::directories(vec![temp.path().to_owned()]).poll(&Changed::Anything);
        let compiled = Compiler::new(Settings::default()).compile(&batch.deltas);
        let found = batch.problems.into_iter().chain(compiled.problems.iter().map(problem::of_compiler));
        let found = found.map(|p| Problem { file: String::new(), line: 0, object: String::new(), ..p });
        let found = found.filter(|p| p.code != Code::SelectsNothing.as_str());
        found.map(|p| problem::line(&p)).collect()
    }

    #[test]
    fn a_directory_says_the_same() {
        let warned = [
            (POLICY, json!({"action": "AUDIT", "rules": [{}]}), ""),
            (POLICY, json!({"rules": [{"to": [{"operation": {"paths": ["/a"]}}]}]}), ""),
            (PEER, json!({"mtls": {"mode": "STRICT"}}), ""),
            (ENTRY, json!({"address": "10.0.0.1"}), ""),
        ];
        for (kind, spec, _) in wrong().into_iter().chain(warned) {
            let object = object(kind, &spec);
            let answer = ask(&question("CREATE", &object));
            let said: Vec<String> = answer.refusal.into_iter().chain(answer.warnings).collect();
            assert_eq!(said, in_a_directory(&object), "{object}");
        }
    }

    #[test]
    fn what_does_less_than_it_seems_is_taken_with_a_warning() {
        let spec = json!({"action": "DENY", "rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]});
        let answer = ask(&question("CREATE", &object(POLICY, &spec)));
        assert_eq!(answer.refusal, None);
        assert_eq!(answer.warnings.len(), 1);
        assert!(answer.warnings[0].starts_with("MESH102 spec.rules[0]: node proxies do not see methods"), "{answer:?}");
        let json = answer.to_json();
        assert_eq!(
            (&json["response"]["allowed"], &json["response"]["warnings"]),
            (&json!(true), &json!(answer.warnings))
        );
        // The settings of the mesh count.
        let settings = Settings { http_fields: HttpFields::UpstreamBehaviour, ..Settings::default() };
        let body =
            question("CREATE", &object(POLICY, &json!({"action": "CUSTOM", "rules": [{}], "provider": {"name": "a"}})));
        let answer = review(body.to_string().as_bytes(), &settings).unwrap();
        assert!(answer.warnings[0].contains("the policy has no effect there"), "{answer:?}");
    }

    #[test]
    fn everything_else_is_taken_without_a_word() {
        let bad = object(POLICY, &json!({"rules": {}}));
        let mut going = bad.clone();
        going["metadata"]["deletionTimestamp"] = json!("2026-01-31T12:00:00Z");
        let mut deleted = question("DELETE", &bad);
        deleted["request"]["object"] = Value::Null;
        let nothing_selected = object(POLICY, &json!({"selector": {"matchLabels": {"app": "web"}}}));
        let taken = [
            deleted,
            question("CONNECT", &bad),
            question("UPDATE", &going),
            question("CREATE", &nothing_selected),
            question("CREATE", &object("networking.istio.io/v1 VirtualService", &json!({"hosts": 1}))),
            question("CREATE", &object("security.istio.io/v1 RequestAuthentication", &json!({"jwtRules": 1}))),
            question("CREATE", &object("example.org/v1 AuthorizationPolicy", &json!({"rules": 1}))),
            question("CREATE", &object("discovery.k8s.io/v1 EndpointSlice", &json!({"endpoints": 1}))),
        ];
        for question in taken {
            let answer = ask(&question);
            assert_eq!((answer.refusal, answer.warnings), (None, vec![]), "{question}");
        }
    }

    #[test]
    fn an_answer_is_bounded_whatever_the_object_holds() {
        let long = "x".repeat(100_000);
        let blocks: Vec<String> = (0..100).map(|i| format!("{i}{long}")).collect();
        let spec = json!({"rules": [{"from": [{"source": {"ipBlocks": blocks}}]}]});
        let refusal = ask(&question("CREATE", &object(POLICY, &spec))).refusal.unwrap();
        assert!(refusal.len() < (MAX_KEPT + 1) * (MAX_FINDING_CHARS + 2), "{} bytes", refusal.len());
        assert!(refusal.contains(" 84 more errors"), "{refusal}");
    }

    #[test]
    fn what_is_no_question_is_no_review() {
        let good = question("CREATE", &object(POLICY, &json!({})));
        let mut other = good.clone();
        other["apiVersion"] = json!("admission.k8s.io/v1beta1");
        let mut unknown = good.clone();
        unknown["request"]["operation"] = json!("PATCH");
        let nested = "[".repeat(100_000);
        for body in [other.to_string(), unknown.to_string(), String::new(), "null".into(), "{}".into(), nested] {
            assert!(review(body.as_bytes(), &Settings::default()).is_err(), "{}", &body[..body.len().min(200)]);
        }
    }

    #[test]
    fn the_chart_asks_about_the_kinds_that_are_judged_and_no_others() {
        let template = include_str!("../../../deploy/helm/mesh/templates/webhook.yaml");
        let plain: String =
            template.lines().filter(|line| !line.contains("{{")).map(|line| format!("{line}\n")).collect();
        let document = yaml::documents(&plain).remove(0).unwrap();
        let json = yaml::read::<Value>(&document, yaml::Unknown::Ignored).unwrap();
        let rules = json["webhooks"][0]["rules"].as_array().unwrap();
        let asked = rules.iter().flat_map(|rule| {
            let resources = rule["resources"].as_array().unwrap().iter();
            resources
                .map(|resource| format!("{}.{}", resource.as_str().unwrap(), rule["apiGroups"][0].as_str().unwrap()))
        });
        let mut asked: Vec<String> = asked.collect();
        asked.sort();
        let mut judged: Vec<String> = FOLLOWED.iter().filter_map(|what| what.definition()).collect();
        judged.sort();
        assert_eq!(asked, judged);
    }
}
