//! `validate`: what is wrong with each object of files, alone, without a mesh.

use std::path::PathBuf;

use anyhow::{Context, Result};
use mesh_api::admin::Problem;
use mesh_api::problem;
use mesh_core::config::{Code, Compiler, Delta, Settings};

use super::manifests::Manifests;
use super::overview::ProblemRow;
use super::{Output, found};
use crate::cli::{Global, ValidateArgs};
use crate::render::{self, View};

pub(super) fn run(global: &Global, args: &ValidateArgs) -> Output {
    let paths: Vec<PathBuf> = args.filename.iter().chain(&args.files).cloned().collect();
    let settings = Settings { root_namespace: global.istio_namespace.as_str().into(), ..Settings::default() };
    let manifests = Manifests::read(&paths)?;
    let problems = findings(&manifests, &settings);
    let errors = problems.iter().filter(|p| p.severity == problem::ERROR).count();
    let sum =
        format!("{} objects read, {errors} errors, {} warnings", manifests.objects.len(), problems.len() - errors);
    found(rendered(problems, &sum, View::of(global))?, errors > 0)
}

/// Findings as a list; for people with a sum, and without a list if there are none.
pub(super) fn rendered(problems: Vec<Problem>, sum: &str, view: View) -> Result<String> {
    let rows: Vec<ProblemRow> = problems.into_iter().map(ProblemRow).collect();
    if !view.is_table() {
        return render::list(&rows, view);
    }
    let list = if rows.is_empty() { String::new() } else { render::list(&rows, view).context("findings")? };
    Ok(format!("{list}{sum}\n"))
}

/// What the API server would be told about each object: nothing that depends on others.
fn findings(manifests: &Manifests, settings: &Settings) -> Vec<Problem> {
    let mut problems = manifests.problems.clone();
    for object in &manifests.objects {
        let compiled = Compiler::new(settings.clone()).compile(&[Delta::Upsert(object.clone())]);
        // A compiler that knows nothing else always finds that.
        let of_itself = compiled.problems.iter().filter(|found| found.code != Code::SelectsNothing);
        problems.extend(of_itself.map(|found| manifests.of_compiler(found)));
    }
    problems.sort_by(|a, b| (&a.file, a.line, &a.code, &a.field).cmp(&(&b.file, b.line, &b.code, &b.field)));
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `CODE LINE FIELD` of each finding.
    fn check(name: &str, text: &str, expected: &[&str]) {
        let path = std::env::temp_dir().join(format!("mesh-ctl-validate-{name}-{}.yaml", std::process::id()));
        std::fs::write(&path, text).expect("writes");
        let manifests = Manifests::read(std::slice::from_ref(&path)).expect("reads");
        std::fs::remove_file(&path).expect("is there");
        let found = findings(&manifests, &Settings::default());
        let found: Vec<String> = found.iter().map(|p| format!("{} {} {}", p.code, p.line, p.field)).collect();
        assert_eq!(found, expected, "{text}");
    }

    const POLICY: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\n";

    #[test]
    fn every_object_is_judged_alone_with_the_lines_of_its_fields() {
        check("good", &format!("{POLICY}spec:\n  selector: {{matchLabels: {{app: nobody}}}}\n"), &[]);
        let rules =
            "spec:\n  rules:\n  - from:\n    - source:\n        ipBlocks:\n        - 10.0.0.0/8\n        - nonsense\n";
        check("value", &format!("{POLICY}{rules}"), &["MESH101 10 spec.rules[0].from[0].source.ipBlocks[1]"]);
        check("field", &format!("{POLICY}spec: {{rulez: []}}\n"), &["MESH003 4 spec.rulez"]);
        let list = format!("kind: List\nitems:\n- {}", POLICY.trim_end().replace('\n', "\n  "));
        check("list", &format!("{list}\n  spec: {{action: AUDIT}}\n"), &["MESH103 6 spec.action"]);
    }

    #[test]
    fn what_is_not_an_object_of_ours_and_what_is_there_twice_is_said() {
        check("syntax", &format!("{POLICY}---\na: [\n"), &["MESH002 5 "]);
        check("kind", "apiVersion: x/v1\nkind: Thing\nmetadata: {name: a}\n", &["MESH004 2 kind"]);
        check("inert", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\n", &["MESH006 2 kind"]);
        check("twice", &format!("{POLICY}---\n{POLICY}"), &["MESH005 5 metadata.name"]);
    }
}
