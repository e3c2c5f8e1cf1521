//! `--config-dir`: directories of YAML and JSON files, read as a whole, told as deltas.
//!
//! An object that cannot be used keeps its last good version in force: by its key where that can be read, else, when a
//! document is not YAML at all, because its file may still hold it. An object is removed only when every file that could
//! hold it was understood and none does.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use mesh_core::config::{Delta, Object, ObjectKey};

use super::listing::{LIMITS, Limits};
use super::scan::{Index, Look};
use super::{Batch, Changed};

/// The state of a set of configuration directories.
#[derive(Debug)]
pub struct Directories {
    dirs: Vec<PathBuf>,
    limits: Limits,
    index: Index,
    /// Last good version of each object.
    accepted: BTreeMap<ObjectKey, Arc<Object>>,
    /// Keys of those that no file is known to have: each look decides anew whether they are gone.
    unclaimed: BTreeSet<ObjectKey>,
}

impl Directories {
    /// Directories in order of precedence; nothing is read yet.
    pub fn new(dirs: Vec<PathBuf>) -> Self {
        let (accepted, unclaimed) = (BTreeMap::new(), BTreeSet::new());
        Self { dirs, limits: LIMITS, index: Index::default(), accepted, unclaimed }
    }

    /// Their paths.
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// Takes over the last good versions of an earlier process.
    pub fn resume(&mut self, objects: Vec<Object>) {
        self.accepted = objects.into_iter().map(|object| (object.key(), Arc::new(object))).collect();
        self.unclaimed = self.accepted.keys().cloned().collect();
    }

    /// Looks at what may have changed.
    pub fn poll(&mut self, changed: &Changed) -> Batch {
        let mut look = self.index.look(&self.dirs, self.limits, changed);
        let mut affected = std::mem::take(&mut look.affected);
        affected.append(&mut self.unclaimed);
        let (mut gone, mut new) = (Vec::new(), Vec::new());
        for key in affected {
            match (self.index.first(&key), self.accepted.get(&key)) {
                (Some(found), accepted) => {
                    if accepted != Some(found) {
                        new.push(Delta::Upsert((**found).clone()));
                    }
                    self.accepted.insert(key, found.clone());
                }
                (None, Some(accepted)) if look.rejected.contains(&key) || may_still_hold(&look, accepted) => {
                    self.unclaimed.insert(key);
                }
                (None, Some(_)) => {
                    self.accepted.remove(&key);
                    gone.push(Delta::Remove(key));
                }
                (None, None) => {}
            }
        }
        gone.append(&mut new);
        Batch { deltas: gone, doubtful: !look.doubts.paths.is_empty(), problems: look.doubts.problems }
    }
}

/// Whether the object's file, or a directory above it, could not be understood where the object may be.
fn may_still_hold(look: &Look, object: &Object) -> bool {
    let meta = object.meta();
    let file = &meta.origin.file;
    let doubtful = &look.doubts.paths;
    let is_named = |(f, ns, name): &(_, String, String)| {
        f == file && **name == *meta.name && (meta.namespace.is_empty() || **ns == *meta.namespace)
    };
    doubtful.contains(file)
        || look.nameless.iter().any(is_named)
        || doubtful.iter().any(|above| file.strip_prefix(&**above).is_some_and(|rest| rest.starts_with('/')))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::{Duration, Instant};

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
            let batch = self.source.poll(&Changed::Anything);
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
    fn only_what_has_changed_is_read_again() {
        let mut files = Files::new();
        files.source.limits.settling = Duration::ZERO;
        files.write("a.yaml", &pod("a", "10.0.0.1"));
        files.write("b.yaml", &pod("b", "10.0.0.2"));
        files.check(&["+Pod default/a", "+Pod default/b"], &[]);
        // Until the clock of the file system has gone on, a change might not show.
        let end = Instant::now() + Duration::from_secs(20);
        while files.source.index.read > 0 {
            assert!(Instant::now() < end, "read again and again");
            files.check(&[], &[]);
        }
        // In place and of the same length; then another file in its place, with the times of the old one.
        files.write("b.yaml", &pod("b", "10.0.0.3"));
        files.check(&["+Pod default/b"], &[]);
        assert_eq!(files.source.index.read, 1);
        let path = files.temp.path().join("a.yaml");
        let times = fs::metadata(&path).unwrap().modified().unwrap();
        files.write(".a.new", &pod("a", "10.0.0.4"));
        fs::rename(files.temp.path().join(".a.new"), &path).unwrap();
        fs::File::open(&path).unwrap().set_modified(times).unwrap();
        files.check(&["+Pod default/a"], &[]);
    }

    #[test]
    fn a_change_whose_place_is_known_costs_no_look_at_the_rest() {
        let mut files = Files::new();
        let root = files.temp.path().to_owned();
        let paths = |names: &[&str]| Changed::Paths(names.iter().map(|name| root.join(name)).collect());
        files.write("a.yaml", &pod("a", "10.0.0.1"));
        files.write("b.yaml", &pod("b", "10.0.0.2"));
        files.check(&["+Pod default/a", "+Pod default/b"], &[]);
        // Both have changed: who looks at one does not see the other.
        files.write("a.yaml", &pod("a", "10.0.0.3"));
        files.write("b.yaml", &pod("b", "10.0.0.4"));
        assert_eq!(files.source.poll(&paths(&["a.yaml", ".a.yaml.swp", "notes.txt"])).deltas.len(), 1);
        assert_eq!(files.source.index.read, 1);
        files.check(&["+Pod default/b"], &[]);
        // A directory is more than can be told from its path.
        fs::create_dir(root.join("sub")).unwrap();
        files.write("sub/c.yaml", &pod("c", "10.0.0.5"));
        assert_eq!(files.source.poll(&paths(&["sub"])).deltas.len(), 1);
    }

    /// Numbers that are the same in each run.
    struct Dice(u64);

    impl Dice {
        fn roll(&mut self, sides: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(self.0 >> 33).unwrap() % sides
        }
    }

    #[test]
    fn who_looks_where_something_changed_knows_what_a_look_at_everything_finds() {
        let temp = TempDir::new();
        let root = temp.path().to_owned();
        let [mut partial, mut whole] = [(); 2].map(|()| Directories::new(vec![root.clone()]));
        let mut dice = Dice(7);
        let mut looks_at_paths = 0;
        let names = ["a.yaml", "b.yaml", "s/a.yaml", "s/c.yml", "s", "s.yaml", "t/x.json", "t", "u.txt", "link.yaml"];
        for step in 0..600 {
            let mut changed = BTreeSet::new();
            for _ in 0..=dice.roll(2) {
                let [one, other] = [(); 2].map(|()| root.join(names[dice.roll(names.len())]));
                let objects = pod(["p", "q"][dice.roll(2)], &format!("10.0.0.{}", 1 + dice.roll(9)));
                // What does not work with what is there is as if it had not been tried.
                let _ = match dice.roll(9) {
                    _ if step % 40 > 5 && one.is_symlink() => fs::remove_file(&one),
                    0..=2 => fs::write(&one, objects),
                    3 if dice.roll(2) == 0 => fs::write(&one, [0xff, 0xfe]),
                    3 => fs::write(&one, pod("p", "nonsense")),
                    4 => fs::write(&one, "kind: [\n"),
                    5 => fs::remove_file(&one).or_else(|_| fs::remove_dir_all(&one)),
                    6 => fs::rename(&one, &other),
                    7 => fs::create_dir(&one),
                    _ if step % 40 < 5 => symlink(&other, &one),
                    _ => Ok(()),
                };
                changed.extend([one, other]);
            }
            let before = partial.index.dirs.len();
            let told = partial.poll(&Changed::Paths(changed));
            looks_at_paths += usize::from(before > 0);
            let found = whole.poll(&Changed::Anything);
            assert_eq!(told, found, "step {step}");
            assert_eq!(partial.accepted, whole.accepted, "step {step}");
            // Somebody was woken for nothing: what cannot be read stays in force.
            let again = partial.poll(&Changed::Paths(BTreeSet::new()));
            assert_eq!((again.deltas.len(), again.problems), (0, found.problems), "step {step}");
        }
        assert!(looks_at_paths > 100, "{looks_at_paths}");
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
        files.source.limits = Limits { depth: 0, ..LIMITS };
        files.check(&[], &["MESH007 1:0 ", "MESH007 2:0 ", "MESH007 3:0 "]);
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
