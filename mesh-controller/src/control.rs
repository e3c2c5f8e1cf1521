//! The configuration loop's one step: read, compile, publish.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, RwLock};

use arc_swap::ArcSwap;
use mesh_api::admin::Problem;
use mesh_api::problem;
use mesh_core::config::{Compiler, Delta, ObjectKey};
use mesh_core::snapshot::Change;
use tokio::sync::watch;

use crate::ads::catalogue::{Catalogue, ResourceType};
use crate::last_good::{LastGood, LogError};
use crate::metrics::{Metrics, TypeLabel};
use crate::place;
use crate::publish::updates;
use crate::source::cluster::Seen;
use crate::source::{Batch, Changed, Source};

/// Everything between a source and the streams.
#[derive(Debug)]
pub struct Control {
    source: Source,
    compiler: Arc<tokio::sync::RwLock<Compiler>>,
    catalogue: Arc<RwLock<Catalogue>>,
    generation: watch::Sender<u64>,
    steps: watch::Sender<u64>,
    problems: Arc<ArcSwap<Vec<Problem>>>,
    verdicts: watch::Sender<Verdicts>,
    /// Of the last compilation; in force until the next.
    compiler_problems: Vec<Problem>,
    started: bool,
    last_good: Option<LastGood>,
    past: Past,
    /// What was compiled and is not published yet.
    unpublished: Vec<Change>,
    metrics: Arc<Metrics>,
}

/// Versions of objects, and what is wrong with just these.
#[derive(Debug, Clone, Default)]
pub struct Verdicts {
    /// Objects whose authors are told.
    pub seen: Arc<BTreeMap<ObjectKey, Seen>>,
    /// Of all objects.
    pub problems: Arc<Vec<Problem>>,
}

/// What is known of the configuration that was in force before.
#[derive(Debug)]
enum Past {
    /// All of it.
    Known,
    /// Nothing: no earlier process has stored it, or there was none.
    Unknown,
    /// An earlier process has stored it, and it cannot be read.
    Lost(LogError),
}

impl Control {
    /// A loop that nothing has gone through yet.
    pub fn new(source: Source, compiler: Compiler, metrics: Arc<Metrics>) -> Self {
        Self {
            source,
            compiler: Arc::new(tokio::sync::RwLock::new(compiler)),
            catalogue: Arc::default(),
            generation: watch::Sender::new(0),
            steps: watch::Sender::new(0),
            problems: Arc::default(),
            verdicts: watch::Sender::default(),
            compiler_problems: Vec::new(),
            started: false,
            last_good: None,
            past: Past::Unknown,
            unpublished: Vec::new(),
            metrics,
        }
    }

    /// Begins with what was in force when an earlier process ended, and from now on stores what is. Blocks.
    pub fn resume(&mut self, path: PathBuf) {
        let (last_good, stored) = LastGood::open(path);
        self.last_good = Some(last_good);
        self.past = match stored {
            Ok(None) => Past::Unknown,
            Ok(Some(objects)) => {
                let deltas: Vec<Delta> = objects.into_iter().map(Delta::Upsert).collect();
                self.compile(&deltas);
                let objects = deltas.into_iter().filter_map(|delta| match delta {
                    Delta::Upsert(object) => Some(object),
                    Delta::Remove(_) => None,
                });
                self.source.resume(objects.collect());
                Past::Known
            }
            Err(error) => Past::Lost(error),
        };
    }

    /// Knows which pods run where.
    pub fn compiler(&self) -> Arc<tokio::sync::RwLock<Compiler>> {
        self.compiler.clone()
    }

    /// What is published.
    pub fn catalogue(&self) -> Arc<RwLock<Catalogue>> {
        self.catalogue.clone()
    }

    /// Generation of the catalogue.
    pub fn generation(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Counts finished steps that changed inputs.
    pub fn steps(&self) -> watch::Receiver<u64> {
        self.steps.subscribe()
    }

    /// What is wrong now.
    pub fn problems(&self) -> Arc<ArcSwap<Vec<Problem>>> {
        self.problems.clone()
    }

    /// What is to be told to the authors of objects.
    pub fn verdicts(&self) -> watch::Receiver<Verdicts> {
        self.verdicts.subscribe()
    }

    /// Paths of the source.
    pub fn sources(&self) -> Vec<String> {
        self.source.describe()
    }

    /// Whether an earlier process has stored what was in force.
    pub fn knows_the_past(&self) -> bool {
        matches!(self.past, Past::Known)
    }

    /// Whether there was a step that was published.
    pub fn is_published(&self) -> bool {
        self.started && self.knows_the_past()
    }

    /// Looks at the source once and carries what changed to the streams. Blocks: run it where blocking is allowed.
    pub fn step(&mut self, changed: &Changed) {
        let mut batch = self.source.poll(changed);
        if !batch.deltas.is_empty() || !self.started {
            self.compile(&batch.deltas);
        }
        let is_first = !std::mem::replace(&mut self.started, true);
        let withheld = self.withheld(&batch);
        let is_withheld = withheld.is_some();
        batch.problems.extend(withheld);
        // Problems first: who sees a push can see what is wrong with it.
        self.report(batch.problems);
        if is_withheld {
            return;
        }
        self.past = Past::Known;
        self.verdicts.send_replace(Verdicts { seen: self.source.seen(), problems: self.problems.load_full() });
        if is_first || !batch.deltas.is_empty() || !self.unpublished.is_empty() {
            let changes = std::mem::take(&mut self.unpublished);
            self.publish(batch.deltas.len(), &changes);
            self.steps.send_modify(|count| *count += 1);
        }
        if let Some(last_good) = &mut self.last_good {
            last_good.note(&batch.deltas, &self.compiler.blocking_read());
        }
    }

    fn compile(&mut self, deltas: &[Delta]) {
        let compiled = self.compiler.blocking_write().compile(deltas);
        self.compiler_problems = place::of_compiler(&compiled.problems);
        self.unpublished.extend(compiled.changes);
    }

    /// Why nothing may be published yet: node proxies would drop a policy that this process does not know of.
    fn withheld(&self, batch: &Batch) -> Option<Problem> {
        let (is_unsafe, why) = match &self.past {
            Past::Known => return None,
            Past::Unknown => (batch.doubtful, "no earlier configuration is stored".to_owned()),
            Past::Lost(error) => {
                let mut all = batch.problems.iter().chain(&self.compiler_problems);
                (
                    all.any(|p| p.severity == problem::ERROR),
                    format!("the stored configuration cannot be used ({error})"),
                )
            }
        };
        let message = format!("nothing is published: {why}, so what the other errors hide may be a policy in force");
        let hint = "mend the other errors, or take away the files that have them";
        is_unsafe.then(|| problem::about_file(problem::WITHHELD, "", 0, message, hint))
    }

    fn publish(&self, objects: usize, changes: &[Change]) {
        let updates = updates(changes);
        let (changed, generation, counts) = {
            // A poisoned catalogue is still a whole one: each change is applied before the next begins.
            let mut catalogue = self.catalogue.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            let changed = catalogue.apply(updates);
            (changed, catalogue.generation(), ResourceType::ALL.map(|kind| (kind, catalogue.len(kind))))
        };
        for (kind, count) in counts {
            let label = match kind {
                ResourceType::Authorization => "Authorization",
                ResourceType::Address => "Address",
            };
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.metrics.resources.get_or_create(&TypeLabel { r#type: label }).set(count);
        }
        tracing::info!(objects, resources = changed, generation, "configuration published");
        self.generation.send_if_modified(|current| std::mem::replace(current, generation) != generation);
    }

    /// Puts the problems into status, and logs those that are new or gone.
    fn report(&self, mut all: Vec<Problem>) {
        all.extend(self.compiler_problems.iter().cloned());
        all.sort();
        all.dedup();
        let before = self.problems.load_full();
        let (old, new): (BTreeSet<_>, BTreeSet<_>) = (before.iter().collect(), all.iter().collect());
        for found in new.difference(&old) {
            if found.severity == problem::ERROR {
                tracing::error!("{}", problem::line(found));
            } else {
                tracing::warn!("{}", problem::line(found));
            }
        }
        for gone in old.difference(&new) {
            tracing::info!(code = gone.code, object = gone.object, file = gone.file, "problem is gone");
        }
        let errors = all.iter().filter(|p| p.severity == problem::ERROR).count();
        self.metrics.config_errors.set(i64::try_from(errors).unwrap_or(i64::MAX));
        self.problems.store(Arc::new(all));
    }
}
