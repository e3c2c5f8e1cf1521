//! The map in `ARCHITECTURE.md` and the tree say the same: every crate and every `.proto` file is on it, and nothing else.

use anyhow::Result;

use crate::metadata::Package;
use crate::tree::Tree;

const PAGE: &str = "ARCHITECTURE.md";

pub(super) fn findings(tree: &Tree, packages: &[Package]) -> Result<Vec<String>> {
    let Some(page) = tree.text(PAGE.as_ref())? else { return Ok(vec![format!("{PAGE} is not text")]) };
    let files: Vec<String> = tree.files()?.iter().map(|file| file.to_string_lossy().into_owned()).collect();
    let crates = packages.iter().filter(|package| package.is_ours).map(|package| package.name.clone());
    let protos = files.iter().filter_map(|file| Some(file.rsplit_once('/')?.1)).filter(|name| name.ends_with(".proto"));
    let exists: Vec<String> = crates.chain(protos.map(str::to_owned)).collect();
    Ok(compare(&page, &exists))
}

/// Names are compared as they stand in backticks.
fn compare(page: &str, exists: &[String]) -> Vec<String> {
    let quoted: Vec<&str> = page.split('`').skip(1).step_by(2).collect();
    let missing = exists.iter().filter(|name| !quoted.contains(&name.as_str()));
    let mut findings: Vec<String> = missing.map(|name| format!("{PAGE}: `{name}` is not on the map")).collect();
    let looks_like_ours = |name: &&&str| {
        (name.ends_with(".proto") && !name.starts_with('.'))
            || (name.starts_with("mesh-") && name.chars().all(|c| c.is_ascii_lowercase() || c == '-'))
    };
    let gone = quoted.iter().filter(looks_like_ours).filter(|name| !exists.iter().any(|exists| exists == *name));
    findings.extend(gone.map(|name| format!("{PAGE}: `{name}` is not in the tree")));
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_and_a_vanished_name_are_found() {
        let exists = ["mesh-core".to_owned(), "zds.proto".to_owned()];
        assert!(compare("`mesh-core` speaks `zds.proto`", &exists).is_empty());
        assert_eq!(compare("`mesh-core` only", &exists), ["ARCHITECTURE.md: `zds.proto` is not on the map"]);
        assert_eq!(compare("`mesh-core` `zds.proto` `mesh-old`", &exists).len(), 1);
    }
}
