//! Configuration directories: bad input, and the examples that the product must take.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{ADDRESS, AUTHORIZATION, DENY_ALL, Mesh, TempDir, names, pod};
use mesh_api::admin::Problem;

const WEB: &str = "Kubernetes//Pod/default/web";

/// `code severity file:line field` of a problem.
fn brief(p: &Problem) -> String {
    let file = Path::new(&p.file).file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    format!("{} {} {file}:{} {}", p.code, p.severity, p.line, p.field)
}

fn errors(problems: &[Problem]) -> Vec<String> {
    problems.iter().filter(|p| p.severity == "error").map(brief).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_object_keeps_its_last_good_version_and_the_rest_applies() {
    let mesh = Mesh::start(&[("web.yaml", &pod("web", "node-a", "web", "10.0.0.1")), ("policy.yaml", DENY_ALL)]).await;
    let mut stream = mesh.stream("node-a").await;
    stream.subscribe(AUTHORIZATION).await;
    stream.next().await;
    stream.subscribe(ADDRESS).await;
    stream.next().await;

    // The policy turns bad, the pod beside it changes: only the pod is pushed.
    let bad = DENY_ALL.replace("spec: {}", "spec: {rulse: []}");
    mesh.write("policy.yaml", &format!("{bad}{}", pod("new", "node-a", "new", "10.0.0.2")));
    assert_eq!(names(&stream.next().await), ["Kubernetes//Pod/default/new"]);
    assert_eq!(errors(&mesh.problems().await), ["MESH003 error policy.yaml:5 spec.rulse"]);
    assert_eq!(mesh.status().await.resources[AUTHORIZATION], 2, "the last good policy is in force");

    // Bad by meaning, not by form: the compiler refuses it, with the same effect.
    let bad = DENY_ALL.replace("spec: {}", "spec: {rules: [{to: [{operation: {ports: ['99999']}}]}]}");
    mesh.write("policy.yaml", &bad);
    let response = stream.next().await;
    assert_eq!(response.removed_resources, ["Kubernetes//Pod/default/new"]);
    let found = mesh.until("the bad port is found", |s| s.problems.iter().any(|p| p.code == "MESH101")).await.problems;
    assert_eq!(errors(&found), ["MESH101 error policy.yaml:5 spec.rules[0].to[0].operation.ports[0]"]);
    assert_eq!(mesh.status().await.resources[AUTHORIZATION], 2);

    mesh.write("policy.yaml", DENY_ALL);
    mesh.until("no errors", |s| errors(&s.problems).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_bad_input_is_reported_with_its_place() {
    let authz = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\n";
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec:\n  ports:\n";
    let cases = [
        ("syntax.yaml", "a: [1\n".to_owned(), "MESH002 error syntax.yaml:"),
        ("twice.yaml", "kind: Pod\nkind: Pod\n".into(), "MESH002 error twice.yaml:2 "),
        ("field.yaml", format!("{authz}spec:\n  rule: []\n"), "MESH003 error field.yaml:5 spec.rule"),
        ("type.yaml", format!("{service}  - port: http\n"), "MESH003 error type.yaml:6 spec.ports[0].port"),
        ("port.yaml", format!("{service}  - port: 65536\n"), "MESH003 error port.yaml:6 spec.ports[0].port"),
        ("kind.yaml", "apiVersion: v1\nkind: Prod\nmetadata: {name: x}\n".into(), "MESH004 error kind.yaml:2 kind"),
        (
            "cidr.yaml",
            format!("{authz}spec:\n  rules: [{{from: [{{source: {{ipBlocks: [10.0.0.0/33]}}}}]}}]\n"),
            "MESH101 error cidr.yaml:5 spec.rules[0].from[0].source.ipBlocks[0]",
        ),
        (
            "selects.yaml",
            format!("{authz}spec: {{selector: {{matchLabels: {{app: nobody}}}}, rules: [{{}}]}}\n"),
            "MESH105 warning selects.yaml:4 spec.selector",
        ),
        (
            "deployment.yaml",
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n".into(),
            "MESH006 warning deployment.yaml:2 kind",
        ),
        (
            "name.yaml",
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a/b}\n".into(),
            "MESH003 error name.yaml:3 metadata.name",
        ),
    ];
    let web = pod("web", "node-a", "web", "10.0.0.1");
    let mesh = Mesh::start(&[("web.yaml", &web)]).await;
    for (file, text, expected) in &cases {
        mesh.write(file, text);
        let is_found = |p: &Problem| brief(p).starts_with(expected) && !p.message.is_empty();
        mesh.until(expected, |s| s.problems.iter().any(is_found)).await;
        assert_eq!(mesh.status().await.resources[ADDRESS], 1, "the rest is in force: {file}");
        mesh.remove(file);
        mesh.until("the problem is gone", |s| !s.problems.iter().any(|p| p.file.ends_with(file))).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_objects_of_one_name_the_first_file_wins() {
    let one = pod("web", "node-a", "one", "10.0.0.1");
    let two = pod("web", "node-a", "two", "10.0.0.2");
    let mesh = Mesh::start(&[("a.yaml", &one), ("b.yaml", &two)]).await;
    let found = mesh.problems().await;
    assert_eq!(errors(&found), ["MESH005 error b.yaml:2 metadata.name"]);
    assert!(found[0].message.contains("a.yaml:2"), "{}", found[0].message);
    let mut stream = mesh.stream("node-a").await;
    stream.subscribe(ADDRESS).await;
    assert_eq!(names(&stream.next().await), [WEB]);
    mesh.remove("a.yaml");
    assert_eq!(names(&stream.next().await), [WEB], "the second takes its place");
    assert!(mesh.problems().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_batch_is_one_step() {
    let mesh = Mesh::start(&[("web.yaml", &pod("web", "node-a", "web", "10.0.0.1"))]).await;
    let mut stream = mesh.stream("node-a").await;
    stream.subscribe(ADDRESS).await;
    stream.next().await;
    let many: String = (0..200)
        .map(|i| pod(&format!("p{i:03}"), "node-a", "many", &format!("10.1.{}.{}", i / 250, i % 250 + 1)))
        .collect();
    mesh.write("many.yaml", &many);
    assert_eq!(stream.next().await.resources.len(), 200, "one response for one file");
    mesh.remove("many.yaml");
    assert_eq!(stream.next().await.removed_resources.len(), 200);
}

/// One of the examples that the data path tests apply to a running mesh too.
fn example(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/examples").join(name)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mtls_example_compiles() {
    let legacy = pod("legacy-app", "node-a", "legacy", "10.0.0.1");
    let production = pod("backend", "node-a", "backend", "10.0.0.2")
        .replace("name: backend\n", "name: backend\n  namespace: production\n");
    let mesh =
        Mesh::start(&[("06.yaml", &example("06-mtls.yaml")), ("pods.yaml", &format!("{legacy}{production}"))]).await;
    assert_eq!(errors(&mesh.problems().await), [""; 0]);
    let mut stream = mesh.stream("node-a").await;
    stream.subscribe(AUTHORIZATION).await;
    let policies = stream.next().await;
    assert!(names(&policies).contains(&"istio-system/istio_converted_static_strict"), "{:?}", names(&policies));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_authorization_example_compiles_and_says_what_is_stricter() {
    let mesh = Mesh::start(&[("07.yaml", &example("07-authorization.yaml"))]).await;
    let found = mesh.problems().await;
    assert_eq!(errors(&found), [""; 0], "{found:#?}");
    let http: Vec<_> = found.iter().filter(|p| p.code == "MESH102").map(|p| p.object.as_str()).collect();
    for policy in [
        "production/allow-frontend-to-backend",
        "default/require-jwt",
        "default/read-only-access",
        "default/deny-delete",
    ] {
        assert!(http.contains(&format!("AuthorizationPolicy {policy}").as_str()), "{policy}: {http:?}");
    }
    let mut stream = mesh.stream("node-a").await;
    stream.subscribe(AUTHORIZATION).await;
    let published = stream.next().await;
    for policy in ["production/deny-all", "production/allow-frontend-to-backend", "default/allow-internal-ips"] {
        assert!(names(&published).contains(&policy), "{policy}: {:?}", names(&published));
    }
}

/// The example shows one PeerAuthentication in two phases: in one directory they are one name twice, the first wins.
#[tokio::test(flavor = "multi_thread")]
async fn the_migration_example_compiles_phase_by_phase() {
    let text = example("14-migration.yaml");
    let phases: Vec<&str> = text.split("---\n").collect();
    assert_eq!(phases.len(), 3);
    let mesh = Mesh::start(&[("14.yaml", &text), ("pod.yaml", &pod("app", "node-a", "app", "10.0.0.1"))]).await;
    let found: Vec<String> = mesh.problems().await.iter().map(brief).collect();
    assert!(found.iter().any(|p| p.starts_with("MESH006 warning 14.yaml:3 kind")), "{found:?}");
    assert!(found.iter().any(|p| p.starts_with("MESH005 error 14.yaml:32 ")), "{found:?}");

    let mut stream = mesh.stream("node-a").await;
    stream.subscribe(ADDRESS).await;
    stream.next().await;
    mesh.write("14.yaml", phases[2]);
    let strict = stream.next().await;
    assert_eq!(names(&strict), ["Kubernetes//Pod/default/app"], "STRICT reaches the workload");
    mesh.until("no errors", |s| errors(&s.problems).is_empty()).await;
}

#[test]
fn check_reports_and_exits_with_79() {
    let temp = TempDir::new();
    let check = |extra: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_mesh-controller"))
            .args(["check", "--config-dir"])
            .arg(temp.path())
            .args(extra)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    fs::write(temp.path().join("good.yaml"), pod("web", "node-a", "web", "10.0.0.1")).unwrap();
    assert_eq!(check(&[]), (Some(0), "1 objects read, 0 errors, 0 warnings\n".into()));
    fs::write(temp.path().join("bad.yaml"), pod("bad", "node-a", "web", "10.0.0.300")).unwrap();
    let (code, text) = check(&[]);
    assert_eq!(code, Some(79));
    assert!(
        text.contains("error   MESH003 ") && text.contains("bad.yaml:8: Pod default/bad status.podIP: `10.0.0.300`"),
        "{text}"
    );
    let (code, json) = check(&["-o", "json"]);
    let problems: Vec<Problem> = serde_json::from_str(&json).unwrap();
    assert_eq!((code, problems.len(), problems[0].line), (Some(79), 1, 8));
}
