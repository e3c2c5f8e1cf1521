//! `--config-dir`: directories of YAML and JSON files, read as a whole, told as deltas.
//!
//! An object that cannot be used keeps its last good version in force: by its key where that can be read, else, when a
//! document is not YAML at all, because its file may still hold it. An object is removed only when every file that could
//! hold it was understood and none does.

use std::collections::BTreeMap;
use std::path::PathBuf;

use mesh_core::config::{Delta, Object, ObjectKey};

use super::Batch;
use super::scan::{LIMITS, Limits, Parsed, Scan, scan};

/// The state of a set of configuration directories.
#[derive(Debug)]
pub struct Directories {
    dirs: Vec<PathBuf>,
    limits: Limits,
    parsed: Parsed,
    /// Last good version of each object.
    accepted: BTreeMap<ObjectKey, Object>,
}

impl Directories {
    /// Directories in order of precedence; nothing is read yet.
    pub fn new(dirs: Vec<PathBuf>) -> Self {
        Self { dirs, limits: LIMITS, parsed: Parsed::default(), accepted: BTreeMap::new() }
    }

    /// Their paths.
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// Takes over the last good versions of an earlier process.
    pub fn resume(&mut self, objects: Vec<Object>) {
        self.accepted = objects.into_iter().map(|object| (object.key(), object)).collect();
    }

    /// Reads all of them.
    pub fn poll(&mut self) -> Batch {
        let found = scan(&self.dirs, self.limits, &mut self.parsed);
        let deltas = step(&self.accepted, &found);
        for delta in &deltas {
            match delta {
                Delta::Upsert(object) => self.accepted.insert(object.key(), object.clone()),
                Delta::Remove(key) => self.accepted.remove(key),
            };
        }
        Batch { deltas, problems: found.problems, doubtful: !found.doubtful.is_empty() }
    }
}

fn step(accepted: &BTreeMap<ObjectKey, Object>, found: &Scan) -> Vec<Delta> {
    let is_gone = |(key, object): &(&ObjectKey, &Object)| {
        !found.objects.contains_key(*key) && !found.rejected.contains(*key) && !may_still_hold(found, object)
    };
    let gone = accepted.iter().filter(is_gone).map(|(key, _)| Delta::Remove(key.clone()));
    let new = found.objects.iter().filter(|(key, object)| accepted.get(*key) != Some(*object));
    gone.chain(new.map(|(_, object)| Delta::Upsert(object.clone()))).collect()
}

/// Whether the object's file, or a directory above it, could not be understood where the object may be.
fn may_still_hold(found: &Scan, object: &Object) -> bool {
    let meta = object.meta();
    let file = &meta.origin.file;
    let is_named = |(f, ns, name): &(_, String, String)| {
        f == file && **name == *meta.name && (meta.namespace.is_empty() || **ns == *meta.namespace)
    };
    found.doubtful.contains(file)
        || found.nameless.iter().any(is_named)
        || found
            .doubtful
            .iter()
            .any(|doubtful| file.strip_prefix(&**doubtful).is_some_and(|rest| rest.starts_with('/')))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::testing::TempDir;

    struct Files {
        temp: TempDir,
        source: Directories,
    }

    impl Files {
        fn new() -> Self {
            let temp = TempDir::new();
            let source = Directories::new(vec![temp.path().to_owned()]);
            Self { temp, source }
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.temp.path().join(name), text).unwrap();
        }

        /// `+Kind ns/name` and `-Kind ns/name`, then `code file:line field`.
        fn poll(&mut self) -> (Vec<String>, Vec<String>) {
            let batch = self.source.poll();
            let deltas = batch.deltas.iter().map(|d| match d {
                Delta::Upsert(object) => format!("+{}", object.key()),
                Delta::Remove(key) => format!("-{key}"),
            });
            let root = format!("{}/", self.temp.path().display());
            let problems = batch
                .problems
                .iter()
                .map(|p| format!("{} {}:{} {}", p.code, p.file.replace(&root, ""), p.line, p.field));
            (deltas.collect(), problems.collect())
        }

        fn check(&mut self, deltas: &[&str], problems: &[&str]) {
            let (got_deltas, got_problems) = self.poll();
            assert_eq!((got_deltas, got_problems), (owned(deltas), owned(problems)));
        }
    }

    fn owned(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|t| (*t).to_owned()).collect()
    }

    fn pod(name: &str, ip: &str) -> String {
        format!("---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nstatus: {{podIP: {ip}}}\n")
    }

    #[test]
    fn changes_are_told_once() {
        let mut files = Files::new();
        files.write("a.yaml", &format!("{}{}", pod("a", "10.0.0.1"), pod("b", "10.0.0.2")));
        fs::create_dir(files.temp.path().join("sub")).unwrap();
        files.write("sub/c.json", r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "c"}}"#);
        files.write("notes.txt", "{{{");
        files.check(&["+Namespace c", "+Pod default/a", "+Pod default/b"], &[]);
        files.check(&[], &[]);
        files.write("a.yaml", &format!("{}{}", pod("a", "10.0.0.1"), pod("b", "10.0.0.3")));
        files.check(&["+Pod default/b"], &[]);
        files.write("a.yaml", &pod("a", "10.0.0.1"));
        fs::remove_file(files.temp.path().join("sub/c.json")).unwrap();
        files.check(&["-Namespace c", "-Pod default/b"], &[]);
    }

    #[test]
    fn what_cannot_be_used_keeps_its_last_good_version() {
        let mut files = Files::new();
        files.write("a.yaml", &format!("{}{}", pod("a", "10.0.0.1"), pod("b", "10.0.0.2")));
        files.check(&["+Pod default/a", "+Pod default/b"], &[]);

        // A field that does not fit: the key is known, the neighbour is read.
        files.write("a.yaml", &format!("{}{}", pod("a", "10.0.0.999"), pod("b", "10.0.0.4")));
        files.check(&["+Pod default/b"], &["MESH003 a.yaml:5 status.podIP"]);

        // Not YAML: nobody knows what it holds, so nothing of the file goes.
        files.write("a.yaml", &format!("{}---\nkind: [\n", pod("b", "10.0.0.5")));
        let (deltas, problems) = files.poll();
        assert_eq!(deltas, ["+Pod default/b"]);
        assert!(problems[0].starts_with("MESH002 a.yaml:"), "{problems:?}");

        // Understood again, and `a` is not in it.
        files.write("a.yaml", &pod("b", "10.0.0.5"));
        files.check(&["-Pod default/a"], &[]);
    }

    #[test]
    fn a_misspelt_kind_keeps_the_object_of_that_name_only() {
        let mut files = Files::new();
        files.write("a.yaml", &format!("{}{}", pod("a", "10.0.0.1"), pod("b", "10.0.0.2")));
        files.check(&["+Pod default/a", "+Pod default/b"], &[]);
        files.write("a.yaml", &pod("a", "10.0.0.1").replace("Pod", "Prod"));
        files.check(&["-Pod default/b"], &["MESH004 a.yaml:3 kind"]);
    }

    #[test]
    fn an_unreadable_file_or_directory_removes_nothing() {
        let mut files = Files::new();
        let sub = files.temp.path().join("sub");
        fs::create_dir(&sub).unwrap();
        files.write("sub/a.yaml", &pod("a", "10.0.0.1"));
        files.check(&["+Pod default/a"], &[]);
        fs::write(sub.join("a.yaml"), b"kind: \xff\n").unwrap();
        files.check(&[], &["MESH001 sub/a.yaml:0 "]);
        fs::remove_dir_all(files.temp.path()).unwrap();
        let (deltas, problems) = files.poll();
        assert!(deltas.is_empty() && problems[0].starts_with("MESH001 "), "{problems:?}");
        fs::create_dir(files.temp.path()).unwrap();
        files.check(&["-Pod default/a"], &[]);
    }

    #[test]
    fn a_link_that_leads_nowhere_removes_nothing() {
        let mut files = Files::new();
        let root = files.temp.path().to_owned();
        let outside = TempDir::new();
        fs::write(outside.path().join("a.yaml"), pod("a", "10.0.0.1")).unwrap();
        fs::create_dir(outside.path().join("sub")).unwrap();
        fs::write(outside.path().join("sub/b.yaml"), pod("b", "10.0.0.2")).unwrap();
        symlink(outside.path().join("a.yaml"), root.join("a.yaml")).unwrap();
        symlink(outside.path().join("sub"), root.join("sub")).unwrap();
        files.check(&["+Pod default/a", "+Pod default/b"], &[]);

        // What they lead to was on a volume that is not mounted any more.
        drop(outside);
        files.check(&[], &["MESH001 a.yaml:0 ", "MESH001 sub:0 "]);
        fs::remove_file(root.join("a.yaml")).unwrap();
        fs::remove_file(root.join("sub")).unwrap();
        files.check(&["-Pod default/a", "-Pod default/b"], &[]);
    }

    #[test]
    fn what_lies_beyond_a_bound_is_not_gone() {
        let mut files = Files::new();
        for dir in ["1", "2", "3"] {
            fs::create_dir(files.temp.path().join(dir)).unwrap();
            files.write(&format!("{dir}/x.yaml"), &pod(&format!("x{dir}"), &format!("10.0.0.{dir}")));
        }
        files.check(&["+Pod default/x1", "+Pod default/x2", "+Pod default/x3"], &[]);

        // The root is the first directory.
        files.source.limits = Limits { dirs: 2, ..LIMITS };
        files.check(&[], &["MESH007 2:0 ", "MESH007 3:0 "]);
        files.source.limits = Limits { files: 1, ..LIMITS };
        files.check(&[], &["MESH007 2/x.yaml:0 "]);

        // What was read and is not there any more goes all the same.
        fs::remove_file(files.temp.path().join("1/x.yaml")).unwrap();
        files.check(&["-Pod default/x1"], &["MESH007 3/x.yaml:0 "]);
        files.source.limits = LIMITS;
        files.check(&[], &[]);
    }

    #[test]
    fn the_first_of_two_equal_names_wins() {
        let mut files = Files::new();
        files.write("b.yaml", &pod("x", "10.0.0.2"));
        files.check(&["+Pod default/x"], &[]);
        files.write("a.yaml", &pod("x", "10.0.0.1"));
        files.check(&["+Pod default/x"], &["MESH005 b.yaml:2 metadata.name"]);
        fs::remove_file(files.temp.path().join("a.yaml")).unwrap();
        files.check(&["+Pod default/x"], &[]);
    }

    #[test]
    fn a_rejected_object_hides_no_good_one_of_another_file() {
        let mut files = Files::new();
        files.write("a.yaml", &pod("x", "nonsense"));
        files.write("b.yaml", &pod("x", "10.0.0.2"));
        files.check(&["+Pod default/x"], &["MESH003 a.yaml:5 status.podIP"]);
    }

    #[test]
    fn a_mounted_config_map_is_swapped_as_a_whole() {
        let mut files = Files::new();
        let root = files.temp.path().to_owned();
        for (version, ip) in [("..v1", "10.0.0.1"), ("..v2", "10.0.0.2")] {
            fs::create_dir(root.join(version)).unwrap();
            files.write(&format!("{version}/a.yaml"), &pod("a", ip));
        }
        symlink("..v1", root.join("..data")).unwrap();
        symlink("..data/a.yaml", root.join("a.yaml")).unwrap();
        files.check(&["+Pod default/a"], &[]);
        symlink("..v2", root.join("..tmp")).unwrap();
        fs::rename(root.join("..tmp"), root.join("..data")).unwrap();
        files.check(&["+Pod default/a"], &[]);
        symlink(".", root.join("loop")).unwrap();
        let (deltas, _) = files.poll();
        assert!(deltas.is_empty(), "a loop of links ends: {deltas:?}");
    }
}
