//! Checks of the tree that no compiler makes. Findings fail; the report of sizes only informs, up to its hard caps.

use std::process::ExitCode;

use anyhow::Result;

use crate::metadata;
use crate::tree::Tree;

mod edges;
mod links;
mod map;
mod marks;
mod rust;
mod sizes;

use rust::Source;

/// Prints the size report and the findings; fails if there are any.
pub(crate) fn run(tree: &Tree) -> Result<ExitCode> {
    let findings = findings(tree)?;
    for finding in &findings {
        println!("{finding}");
    }
    println!("tidy: {} findings", findings.len());
    Ok(if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Everything wrong, one line each; the size report goes to standard output.
pub(crate) fn findings(tree: &Tree) -> Result<Vec<String>> {
    let packages = metadata::packages(tree)?;
    let mut findings = edges::findings(&packages);
    let mut pages = Vec::new();
    let mut report = Vec::new();
    for file in tree.files()? {
        let Some(text) = tree.text(&file)? else { continue };
        let name = file.to_string_lossy().into_owned();
        findings.extend(marks::findings(&name, &text));
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("rs") => {
                let source = Source::read(&text);
                findings.extend(edges::source_findings(&name, &source));
                let sizes = sizes::measure(&name, &source);
                findings.extend(sizes.over_caps);
                report.extend(sizes.over_budget);
            }
            Some("md") => pages.push((name, text)),
            Some(_) | None => {}
        }
    }
    findings.extend(links::findings(tree, &pages));
    findings.extend(map::findings(tree, &packages)?);
    if !report.is_empty() {
        println!("sizes over budget (a report, no finding):\n  {}", report.join("\n  "));
    }
    Ok(findings)
}
