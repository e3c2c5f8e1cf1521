//! Words that must not be in the tree: marks of unfinished work, paths of one machine, hosts of package registries.

/// The words are put together from halves, so that this file does not find itself.
const UNFINISHED: [&str; 6] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("to", "do!("),
    concat!("unimpl", "emented!("),
    concat!("#[ig", "nore"),
    concat!("|| tr", "ue"),
];

const MACHINE_PATHS: [&str; 4] =
    [concat!("/wo", "rk/"), concat!("/fa", "rm/"), concat!("/ro", "ot/"), concat!("/ho", "me/")];

const REGISTRIES: [&str; 6] = [
    concat!("deb.", "debian.org"),
    concat!("crates", ".io/api"),
    concat!("index.", "crates.io"),
    concat!("static.", "crates.io"),
    concat!("proxy.", "golang.org"),
    concat!("registry.", "npmjs.org"),
];

/// Downloads a toolchain, from the proxy that everybody has unless the environment names another.
const MAY_NAME_REGISTRY: &str = "xtask/src/setup/go.rs";

/// Findings in any text file; the lock file names the registry by necessity.
pub(super) fn findings(file: &str, text: &str) -> Vec<String> {
    if file.ends_with("Cargo.lock") {
        return Vec::new();
    }
    let mut findings = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let unfinished =
            UNFINISHED.iter().filter(|mark| line.contains(*mark)).map(|mark| ("mark of unfinished work", mark));
        let paths = MACHINE_PATHS.iter().filter(|path| has_path(line, path)).map(|path| ("path of one machine", path));
        let hosts = REGISTRIES
            .iter()
            .filter(|host| file != MAY_NAME_REGISTRY && line.contains(*host))
            .map(|host| ("host of a package registry", host));
        for (what, word) in unfinished.chain(paths).chain(hosts) {
            findings.push(format!("{file}:{number}: {what} `{word}`"));
        }
    }
    findings
}

/// Whether the line has the directory at the start of a path, not in the middle of another.
fn has_path(line: &str, path: &str) -> bool {
    let continues = |c: char| c.is_ascii_alphanumeric() || "_./-".contains(c);
    line.match_indices(path).any(|(at, _)| !line[..at].ends_with(continues))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_paths_and_hosts_are_found() {
        let text = [UNFINISHED[0], MACHINE_PATHS[0], REGISTRIES[0]].join("\n");
        assert_eq!(findings("a.md", &text).len(), 3);
        assert!(findings("Cargo.lock", &text).is_empty());
    }

    #[test]
    fn a_path_inside_another_is_no_machine_path() {
        assert!(!has_path(&format!("docs{}plan.md", MACHINE_PATHS[0]), MACHINE_PATHS[0]));
        assert!(has_path(&format!("see {}plan.md", MACHINE_PATHS[0]), MACHINE_PATHS[0]));
    }
}
