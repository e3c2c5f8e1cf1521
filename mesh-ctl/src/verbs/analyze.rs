//! `analyze`: what is wrong with the configuration of a mesh as a whole, or with files, or with the mesh once files are applied.
//!
//! Findings are the readers' and the compiler's, by Istio's codes where it has them, and a few of the whole.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_api::admin::Problem;
use mesh_api::k8s::Item;
use mesh_api::problem;
use mesh_core::config::{Compiler, Delta, Enrolment, Object, ObjectKey, Settings, enrolment};
use serde::Serialize;

use super::manifests::Manifests;
use super::{Output, found};
use crate::cli::{AnalyzeArgs, Global};
use crate::render::{self, Column, Row, View};
use crate::target::Configuration;

/// Namespaces that are never meant to be in the mesh.
const SYSTEM: [&str; 3] = ["kube-system", "kube-public", "kube-node-lease"];
/// Labels by which a namespace says whether it is in the mesh.
const MODES: [&str; 2] = ["istio.io/dataplane-mode", "istio-injection"];
/// Namespace of objects in files that name none.
const DEFAULT_NAMESPACE: &str = "default";

/// How grave a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
enum Level {
    Error,
    Warning,
    Info,
}

/// A finding, as `istioctl analyze` writes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Message {
    code: String,
    level: Level,
    /// `Kind namespace/name`.
    origin: String,
    namespace: String,
    /// `FILE:LINE`, or empty.
    reference: String,
    message: String,
}

impl Message {
    /// `Error [IST0106] (Kind ns/name file:line) text`.
    fn line(&self) -> String {
        let place = [self.origin.as_str(), self.reference.as_str()];
        let place = place.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ");
        format!("{:?} [{}] ({place}) {}\n", self.level, self.code, self.message)
    }
}

impl Row for Message {
    const KIND: &'static str = "Analysis";
    const COLUMNS: &'static [Column] = &[
        Column::Narrow("LEVEL"),
        Column::Narrow("CODE"),
        Column::Narrow("OBJECT"),
        Column::Narrow("REFERENCE"),
        Column::Narrow("MESSAGE"),
    ];

    fn cells(&self) -> Vec<String> {
        let level = format!("{:?}", self.level);
        vec![level, self.code.clone(), self.origin.clone(), self.reference.clone(), self.message.clone()]
    }
}

/// Everything that is looked at together.
struct Whole {
    objects: BTreeMap<ObjectKey, Object>,
    problems: Vec<Problem>,
    manifests: Manifests,
    missing: Vec<&'static str>,
}

pub(super) async fn run(global: &Global, args: &AnalyzeArgs) -> Output {
    let (mut namespace, mut objects, mut problems, mut missing) = (None, Vec::new(), Vec::new(), Vec::new());
    let mut manifests = Manifests::read(&args.files)?;
    if !args.offline {
        match Configuration::of(global).await? {
            // What is given with the command line is what would be applied.
            Configuration::Directory(directory) => manifests = manifests.over(Manifests::read(&[directory])?),
            Configuration::Objects { items, missing: unknown, namespace: of_context } => {
                (namespace, missing) = (Some(of_context), unknown);
                for item in items {
                    match item {
                        Item::Object(object) => objects.push(*object),
                        Item::Inert(finding) | Item::Rejected(finding) => {
                            problems.push(problem::about_object(finding, ""));
                        }
                    }
                }
            }
        }
    }
    problems.extend(manifests.problems.iter().cloned());
    // Of an object that is in a file too, the file's version is the one that is looked at.
    let objects = objects.into_iter().chain(manifests.objects.iter().cloned());
    let whole = Whole { objects: objects.map(|o| (o.key(), o)).collect(), problems, manifests, missing };
    let settings = Settings { root_namespace: global.istio_namespace.as_str().into(), ..Settings::default() };
    let mut messages = analyze(&whole, &settings);
    if !global.all_namespaces {
        let only = global.namespace.clone().or(namespace).unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned());
        let scope = [only.as_str(), global.istio_namespace.as_str(), ""];
        // Files are named one by one.
        messages.retain(|m| !m.reference.is_empty() || scope.contains(&m.namespace.as_str()));
    }
    let has_errors = messages.iter().any(|m| m.level == Level::Error);
    let view = View::of(global);
    if !view.is_table() {
        return found(render::list(&messages, view)?, has_errors);
    }
    let text = match messages.is_empty() {
        true => format!("no issues found in {} objects\n", whole.objects.len()),
        false => messages.iter().map(Message::line).collect(),
    };
    found(text, has_errors)
}

/// All findings, the gravest first.
fn analyze(whole: &Whole, settings: &Settings) -> Vec<Message> {
    let deltas: Vec<Delta> = whole.objects.values().cloned().map(Delta::Upsert).collect();
    let compiled = Compiler::new(settings.clone()).compile(&deltas);
    let of_compiler = compiled.problems.iter().map(|found| whole.manifests.of_compiler(found));
    let mut messages: Vec<Message> = whole.problems.iter().cloned().chain(of_compiler).map(of_problem).collect();
    messages.extend(outside(&whole.objects, settings));
    messages.extend(whole.missing.iter().map(|kind| missing(kind)));
    let order = |m: &Message| (m.level, m.namespace.clone(), m.origin.clone(), m.reference.clone(), m.message.clone());
    messages.sort_by_key(order);
    messages.dedup();
    messages
}

fn of_problem(found: Problem) -> Message {
    let level = if found.severity == problem::ERROR { Level::Error } else { Level::Warning };
    let reference = match found.line {
        _ if found.file.is_empty() => String::new(),
        0 => found.file.clone(),
        line => format!("{}:{line}", found.file),
    };
    let named = found.object.split_once(' ').map_or("", |(_, name)| name);
    let namespace = named.split_once('/').map_or("", |(namespace, _)| namespace).to_owned();
    let field = if found.field.is_empty() { String::new() } else { format!("{}: ", found.field) };
    let hint = if found.hint.is_empty() { String::new() } else { format!(". {}", found.hint) };
    Message {
        code: istios(&found.code, level).to_owned(),
        level,
        origin: found.object,
        namespace,
        reference,
        message: format!("{field}{}{hint}", found.message),
    }
}

/// Istio's code for the same finding, or our own.
fn istios(code: &str, level: Level) -> &str {
    match (code, level) {
        // SchemaValidationError; SchemaWarning.
        ("MESH003" | "MESH101" | "MESH106" | "MESH109", Level::Error) => "IST0106",
        ("MESH003" | "MESH101" | "MESH106" | "MESH109", Level::Warning | Level::Info) => "IST0133",
        // NoMatchingWorkloadsFound.
        ("MESH105", _) => "IST0127",
        // Istio has none for the rest.
        (own, _) => own,
    }
}

/// Namespaces with pods of which none is in the mesh, and that do not say that this is meant.
fn outside(objects: &BTreeMap<ObjectKey, Object>, settings: &Settings) -> Vec<Message> {
    let mut pods: BTreeMap<Arc<str>, Vec<_>> = BTreeMap::new();
    for object in objects.values() {
        if let Object::Pod(pod) = object {
            pods.entry(pod.meta.namespace.clone()).or_default().push(pod);
        }
    }
    let mut messages = Vec::new();
    for object in objects.values() {
        let Object::Namespace(namespace) = object else { continue };
        let name = &*namespace.meta.name;
        let is_system = SYSTEM.contains(&name) || name == &*settings.root_namespace;
        let has_said = MODES.iter().any(|label| !namespace.meta.label(label).is_empty());
        let Some(pods) = pods.get(name).filter(|_| !is_system && !has_said) else { continue };
        if pods.iter().any(|pod| enrolment(Some(namespace), pod) != Enrolment::Outside) {
            continue;
        }
        let origin = &namespace.meta.origin;
        messages.push(Message {
            // NamespaceNotInjected.
            code: "IST0102".to_owned(),
            level: Level::Info,
            origin: format!("Namespace {name}"),
            namespace: name.to_owned(),
            reference: if origin.file.is_empty() { String::new() } else { format!("{}:{}", origin.file, origin.line) },
            message: format!(
                "the namespace is not in the mesh. `mesh-ctl enroll {name}` takes its pods in, and the label \
                 istio.io/dataplane-mode=none says that it is not meant to be"
            ),
        });
    }
    messages
}

fn missing(kind: &str) -> Message {
    Message {
        // ReferencedResourceNotFound.
        code: "IST0101".to_owned(),
        level: Level::Error,
        origin: format!("CustomResourceDefinition {kind}"),
        namespace: String::new(),
        reference: String::new(),
        message: format!(
            "the API server does not know {kind}. Install the definitions: kubectl apply --server-side -f crds/"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOP: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";
    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: shop, labels: {app: a}}\n\
                       status: {podIP: 10.0.0.1, phase: Running}\n";

    fn policy(spec: &str) -> String {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec: {spec}\n"
        )
    }

    /// `Level CODE origin` of each finding.
    fn check(name: &str, documents: &[&str], expected: &[&str]) {
        let path = std::env::temp_dir().join(format!("mesh-ctl-analyze-{name}-{}.yaml", std::process::id()));
        std::fs::write(&path, documents.join("---\n")).expect("writes");
        let manifests = Manifests::read(std::slice::from_ref(&path)).expect("reads");
        std::fs::remove_file(&path).expect("is there");
        let objects = manifests.objects.iter().map(|o| (o.key(), o.clone())).collect();
        let whole = Whole { objects, problems: manifests.problems.clone(), manifests, missing: Vec::new() };
        let found = analyze(&whole, &Settings::default());
        let found: Vec<String> = found.iter().map(|m| format!("{:?} {} {}", m.level, m.code, m.origin)).collect();
        assert_eq!(found, expected, "{documents:?}");
    }

    #[test]
    fn findings_of_the_whole_have_istios_codes() {
        let ambient = SHOP.replace("shop}", "shop, labels: {istio.io/dataplane-mode: ambient}}");
        let of_a = policy("{selector: {matchLabels: {app: a}}}");
        let of_nobody = policy("{selector: {matchLabels: {app: b}}}");
        check("good", &[&ambient, POD, &of_a], &[]);
        check("nobody", &[&ambient, POD, &of_nobody], &["Warning IST0127 AuthorizationPolicy shop/p"]);
        check("value", &[&ambient, POD, &policy("{action: MAYBE}")], &["Error IST0106 AuthorizationPolicy shop/p"]);
        check("outside", &[SHOP, POD], &["Info IST0102 Namespace shop"]);
        check("meant", &[&SHOP.replace("shop}", "shop, labels: {istio.io/dataplane-mode: none}}"), POD], &[]);
        check("empty", &[SHOP], &[]);
        check("by itself", &[SHOP, &POD.replace("app: a", "istio.io/dataplane-mode: ambient")], &[]);
    }

    #[test]
    fn lines_are_those_of_istioctl() {
        let found = Message {
            code: "IST0106".into(),
            level: Level::Error,
            origin: "AuthorizationPolicy shop/p".into(),
            namespace: "shop".into(),
            reference: "a.yaml:4".into(),
            message: "no".into(),
        };
        assert_eq!(found.line(), "Error [IST0106] (AuthorizationPolicy shop/p a.yaml:4) no\n");
        let bare = Message { reference: String::new(), ..found };
        assert_eq!(bare.line(), "Error [IST0106] (AuthorizationPolicy shop/p) no\n");
    }
}
