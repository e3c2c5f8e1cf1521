//! Runs one target in a process of its own for some seconds and finds the input at which it failed.
//!
//! The worker notes the number of each input before it runs it. When it ends badly (panic, abort, out of memory) or stands still on
//! one input, the supervisor makes that input again from its number and keeps it as a file.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, setrlimit};

use crate::input;
use crate::targets::Target;

/// Processor time that one input may take.
const MAX_INPUT_TIME: Duration = Duration::from_secs(1);
/// Address space of a worker, in bytes: an input of some KiB has no business with more.
const MAX_MEMORY: u64 = 1 << 30;
/// How often the supervisor looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The kernel counts processor time in these, in `/proc/PID/stat`.
const TICKS_PER_SECOND: u64 = 100;

/// What to run, and where failing inputs go.
#[derive(Debug, Clone)]
pub struct Run {
    /// Inputs differ from seed to seed.
    pub seed: u64,
    /// How long.
    pub time: Duration,
    /// Directory of the files.
    pub directory: PathBuf,
}

/// How a target did.
#[derive(Debug)]
pub enum Outcome {
    /// So many inputs did no harm.
    Passed(u64),
    /// What happened, and the file with the input.
    Failed {
        /// The worker's end.
        how: String,
        /// Number of the input.
        number: u64,
        /// Its bytes.
        file: PathBuf,
    },
}

/// The worker: runs inputs until the time is over.
pub fn work(target: &Target, run: &Run) -> Result<()> {
    setrlimit(Resource::RLIMIT_AS, MAX_MEMORY, MAX_MEMORY).context("limit memory")?;
    run_inputs(target, run)
}

fn run_inputs(target: &Target, run: &Run) -> Result<()> {
    let note = File::options().write(true).open(note_file(target, run)).context("open the note file")?;
    let samples = (target.samples)();
    let end = Instant::now() + run.time;
    for number in 0.. {
        note.write_all_at(&u64::to_ne_bytes(number), 0).context("note the input's number")?;
        (target.run)(&input::nth(&samples, target.format, run.seed, number));
        if Instant::now() >= end {
            break;
        }
    }
    Ok(())
}

/// The supervisor: starts `worker` (this program again, told to `work`) and watches it.
pub fn supervise(target: &Target, run: &Run, mut worker: Command) -> Result<Outcome> {
    fs::create_dir_all(&run.directory).with_context(|| format!("create {}", run.directory.display()))?;
    let note = note_file(target, run);
    fs::write(&note, u64::to_ne_bytes(0)).with_context(|| format!("write {}", note.display()))?;
    let mut child = worker.stdin(Stdio::null()).spawn().context("start the worker")?;
    let how = watch(&mut child, &note)?;
    let number = noted(&note)?;
    fs::remove_file(&note).with_context(|| format!("remove {}", note.display()))?;
    let Some(how) = how else { return Ok(Outcome::Passed(number + 1)) };
    let bytes = input::nth(&(target.samples)(), target.format, run.seed, number);
    let file = run.directory.join(format!("{}-{}-{number}", target.name, run.seed));
    fs::write(&file, bytes).with_context(|| format!("write {}", file.display()))?;
    Ok(Outcome::Failed { how, number, file })
}

/// Waits for the worker; `None` if it ended well, else how it ended.
fn watch(child: &mut Child, note: &Path) -> Result<Option<String>> {
    let mut last = (0, Duration::ZERO);
    loop {
        if let Some(status) = child.try_wait().context("wait for the worker")? {
            return Ok((!status.success()).then(|| status.to_string()));
        }
        let number = noted(note)?;
        let used = processor_time(child.id()).unwrap_or(last.1);
        if number != last.0 {
            last = (number, used);
        } else if used.saturating_sub(last.1) > MAX_INPUT_TIME {
            child.kill().context("end the worker")?;
            child.wait().context("wait for the worker")?;
            return Ok(Some(format!("more than {} s on one input", MAX_INPUT_TIME.as_secs())));
        }
        thread::sleep(LOOK_EVERY);
    }
}

fn note_file(target: &Target, run: &Run) -> PathBuf {
    run.directory.join(format!("{}-{}.number", target.name, run.seed))
}

fn noted(note: &Path) -> Result<u64> {
    let mut bytes = [0; 8];
    let file = File::open(note).with_context(|| format!("open {}", note.display()))?;
    file.read_exact_at(&mut bytes, 0).with_context(|| format!("read {}", note.display()))?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Processor time of a process so far, so that a busy machine is not taken for a slow target.
fn processor_time(pid: u32) -> io::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let field = |index: usize| after_name.split_whitespace().nth(index).and_then(|ticks| ticks.parse::<u64>().ok());
    let (Some(user), Some(system)) = (field(11), field(12)) else {
        return Err(io::Error::other("no processor times in the process's record"));
    };
    Ok(Duration::from_millis((user + system) * 1_000 / TICKS_PER_SECOND))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Format;

    /// A target whose worker is a shell script.
    fn supervised(script: &str, name: &'static str) -> Outcome {
        let samples = || vec![b"first".to_vec(), b"second".to_vec()];
        let target = Target { name, format: Format::Text, samples, run: |_| {} };
        let directory = std::env::temp_dir().join(format!("mesh-fuzz-{}-{name}", std::process::id()));
        let run = Run { seed: 1, time: Duration::ZERO, directory: directory.clone() };
        let mut worker = Command::new("sh");
        worker.arg("-c").arg(script).env("NOTE", note_file(&target, &run)).stderr(Stdio::null());
        let outcome = supervise(&target, &run, worker).unwrap();
        if let Outcome::Failed { file, number, .. } = &outcome {
            assert_eq!(fs::read(file).unwrap(), input::nth(&samples(), Format::Text, 1, *number));
        }
        fs::remove_dir_all(directory).unwrap();
        outcome
    }

    #[test]
    fn a_worker_that_ends_badly_leaves_its_input_as_a_file() {
        let script = r"printf '\001\0\0\0\0\0\0\0' >$NOTE; kill -ABRT $$";
        assert!(matches!(supervised(script, "abort"), Outcome::Failed { number: 1, .. }));
    }

    #[test]
    fn a_worker_that_stands_still_is_ended() {
        let Outcome::Failed { how, .. } = supervised("while :; do :; done", "hang") else { panic!("it passed") };
        assert!(how.contains("on one input"), "{how}");
    }

    #[test]
    fn a_worker_that_ends_well_passed() {
        assert!(matches!(supervised("exit 0", "good"), Outcome::Passed(1)));
    }

    #[test]
    fn the_worker_runs_inputs_until_the_time_is_over() {
        let target = Target { name: "count", format: Format::Text, samples: || vec![b"a".to_vec()], run: |_| {} };
        let directory = std::env::temp_dir().join(format!("mesh-fuzz-{}-count", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let run = Run { seed: 1, time: Duration::from_millis(50), directory: directory.clone() };
        fs::write(note_file(&target, &run), [0; 8]).unwrap();
        run_inputs(&target, &run).unwrap();
        assert!(noted(&note_file(&target, &run)).unwrap() > 10);
        fs::remove_dir_all(directory).unwrap();
    }
}
