//! Runs test binaries of the standard harness and counts what they report.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::process::{self, End};
use crate::stages::Tally;

/// Runs the command, shows its output, adds up its `test result:` lines.
///
/// An ignored test counts as failed: nothing in the tree may be left out by a mark.
pub(crate) fn run(command: Command, limit: Duration) -> Result<Tally> {
    let name = process::shown(&command);
    let mut tally = Tally::default();
    let end = process::watch(command, limit, |line| {
        println!("{line}");
        if let Some(result) = parse_result(line) {
            tally += result;
        }
    })?;
    match end {
        End::OutOfTime => bail!("`{name}` was ended after {} minutes", limit.as_secs() / 60),
        // Tests that failed are counted; anything else (no compilation, a crash) is an error of its own.
        End::Exited(status) if !status.success() && tally.failed == 0 => bail!("`{name}` failed: {status}"),
        End::Exited(_) => Ok(tally),
    }
}

/// The counts of a line such as `test result: ok. 12 passed; 0 failed; 0 ignored; ...`.
pub(crate) fn parse_result(line: &str) -> Option<Tally> {
    let counts = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let count = |word: &str| {
        let number = counts.split(';').find_map(|part| part.trim().strip_suffix(word))?;
        number.trim().parse::<u64>().ok()
    };
    Some(Tally { passed: count(" passed")?, failed: count(" failed")? + count(" ignored")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_counted_and_ignored_tests_fail() {
        let line = "test result: FAILED. 12 passed; 2 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.11s";
        assert_eq!(parse_result(line), Some(Tally { passed: 12, failed: 3 }));
        assert_eq!(parse_result("test a::b ... ok"), None);
        assert_eq!(parse_result("test result: ok"), None);
    }

    #[test]
    fn a_command_that_fails_without_a_failed_test_is_an_error() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo 'test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured'; exit 101"]);
        assert!(run(command, Duration::from_secs(30)).is_err());
    }
}
