//! Links of our Markdown pages: a relative one must lead to a file, and a `#part` to a heading of it.

use std::path::{Component, Path, PathBuf};

use crate::tree::Tree;

pub(super) fn findings(tree: &Tree, pages: &[(String, String)]) -> Vec<String> {
    let mut findings = Vec::new();
    for (page, text) in pages {
        for (number, target) in links(text) {
            if let Some(what) = broken(tree, pages, page, target) {
                findings.push(format!("{page}:{number}: link to {target}: {what}"));
            }
        }
    }
    findings
}

/// Targets of `[text](target)` outside code, with their line numbers from 1.
fn links(text: &str) -> Vec<(usize, &str)> {
    let mut links = Vec::new();
    for (number, line) in prose(text) {
        for (at, _) in line.match_indices("](") {
            if let Some(target) = line[at + 2..].split_once(')').map(|(target, _)| target)
                && line[..at].matches('`').count().is_multiple_of(2)
            {
                links.push((number, target.split(' ').next().unwrap_or(target)));
            }
        }
    }
    links
}

/// Lines outside fenced blocks.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    (1..).zip(text.lines()).filter(move |(_, line)| {
        let is_fence = line.trim_start().starts_with("```");
        fenced ^= is_fence;
        !fenced && !is_fence
    })
}

/// What is wrong with a link, if anything.
fn broken(tree: &Tree, pages: &[(String, String)], page: &str, target: &str) -> Option<&'static str> {
    if target.contains("://") || target.starts_with("mailto:") {
        return None;
    }
    let (path, part) = target.split_once('#').unwrap_or((target, ""));
    let file = if path.is_empty() { PathBuf::from(page) } else { resolve(page, path)? };
    if !tree.root.join(&file).exists() {
        return Some("no such file");
    }
    if part.is_empty() {
        return None;
    }
    let text = pages.iter().find(|(name, _)| Path::new(name) == file).map(|(_, text)| text.as_str());
    match text {
        Some(text) if anchors(text).any(|anchor| anchor == part) => None,
        Some(_) => Some("no such heading"),
        None => Some("a part of something that is no page"),
    }
}

/// The path of the link from the root of the tree.
fn resolve(page: &str, path: &str) -> Option<PathBuf> {
    let mut file = Path::new(page).parent()?.to_path_buf();
    for component in Path::new(path).components() {
        match component {
            Component::ParentDir => drop(file.pop()),
            Component::Normal(part) => file.push(part),
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => file = PathBuf::from("/"),
        }
    }
    Some(file)
}

/// The names by which headings can be linked to: lower case, spaces as `-`, other signs dropped.
fn anchors(text: &str) -> impl Iterator<Item = String> {
    prose(text).filter(|(_, line)| line.starts_with('#')).map(|(_, line)| {
        let title = line.trim_start_matches('#').trim().to_lowercase();
        title
            .chars()
            .filter_map(|c| match c {
                ' ' => Some('-'),
                '-' | '_' => Some(c),
                other => other.is_alphanumeric().then_some(other),
            })
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_outside_code_are_found_with_their_lines() {
        let text = "a [b](c.md) and [d](e.md#f)\n```\n[x](y)\n```\n`[x](y)` [g](h)";
        assert_eq!(links(text), [(1, "c.md"), (1, "e.md#f"), (5, "h")]);
    }

    #[test]
    fn headings_become_anchors() {
        let text = "# One two\n## What's `this`?\n```\n# no\n```\n";
        assert_eq!(anchors(text).collect::<Vec<_>>(), ["one-two", "whats-this"]);
    }

    #[test]
    fn paths_are_taken_from_the_page() {
        assert_eq!(resolve("docs/adr/a.md", "../b.md"), Some(PathBuf::from("docs/b.md")));
    }
}
