//! A run of stages one after the other: each is timed and counted, none can fail unseen, and a table closes the run.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;

/// How many checks or tests a stage had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
}

impl Tally {
    /// A stage that is one check.
    pub(crate) const ONE: Tally = Tally { passed: 1, failed: 0 };
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

struct Row {
    name: String,
    took: Duration,
    outcome: Outcome,
}

enum Outcome {
    Ran(Tally),
    Skipped(String),
}

/// The stages so far.
#[derive(Default)]
pub(crate) struct Stages {
    rows: Vec<Row>,
}

impl Stages {
    /// Runs one stage; an error counts as one failure. Whether all of it passed.
    pub(crate) fn run(&mut self, name: &str, stage: impl FnOnce() -> Result<Tally>) -> bool {
        println!("\n=== {name}");
        let started = Instant::now();
        let tally = stage().unwrap_or_else(|error| {
            eprintln!("error: {name}: {error:#}");
            Tally { passed: 0, failed: 1 }
        });
        self.rows.push(Row { name: name.to_owned(), took: started.elapsed(), outcome: Outcome::Ran(tally) });
        tally.failed == 0
    }

    /// Leaves a stage out, and says so at the end.
    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        self.rows.push(Row { name: name.to_owned(), took: Duration::ZERO, outcome: Outcome::Skipped(why.to_owned()) });
    }

    /// Prints the table and the closing line. Success needs no failure and at least one pass.
    pub(crate) fn close(self) -> ExitCode {
        let total = self.total();
        println!("\n{}", self.table());
        println!("{} passed, {} failed", total.passed, total.failed);
        if total.failed == 0 && total.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    fn total(&self) -> Tally {
        let mut total = Tally::default();
        for row in &self.rows {
            if let Outcome::Ran(tally) = row.outcome {
                total += tally;
            }
        }
        total
    }

    fn table(&self) -> String {
        let mut table = format!("{:<32} {:>8} {:>8} {:>8}\n", "stage", "minutes", "passed", "failed");
        for Row { name, took, outcome } in &self.rows {
            table += &match outcome {
                Outcome::Ran(Tally { passed, failed }) => {
                    format!("{name:<32} {:>8.1} {passed:>8} {failed:>8}\n", minutes(*took))
                }
                Outcome::Skipped(why) => format!("{name:<32} not run: {why}\n"),
            };
        }
        let whole = self.rows.iter().map(|row| row.took).sum();
        table + &format!("{:<32} {:>8.1}\n", "all", minutes(whole))
    }
}

fn minutes(time: Duration) -> f64 {
    time.as_secs_f64() / 60.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_a_failure_and_a_skip_is_shown() {
        let mut stages = Stages::default();
        assert!(stages.run("good", || Ok(Tally { passed: 3, failed: 0 })));
        assert!(!stages.run("bad", || anyhow::bail!("no compiler")));
        stages.skip("slow", "a filter was given");
        assert_eq!(stages.total(), Tally { passed: 3, failed: 1 });
        assert!(stages.table().contains("not run: a filter was given"));
        assert_eq!(stages.close(), ExitCode::FAILURE);
    }

    #[test]
    fn a_run_in_which_nothing_ran_is_no_success() {
        assert_eq!(Stages::default().close(), ExitCode::FAILURE);
    }
}
