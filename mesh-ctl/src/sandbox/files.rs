//! Small file operations with errors that name the path.

use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result};

/// Creates a directory (and its parents) that only root enters.
///
/// # Errors
/// Not permitted, or something else has that name.
pub fn private_dir(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("create directory {}", path.display()))
}

/// Writes a file that is replaced as a whole.
///
/// # Errors
/// The directory does not exist or is not writable.
pub fn replace(path: &Path, contents: &str, mode: u32) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    // A name that no reader of the configuration directory takes for YAML.
    temporary.push(".new");
    let write = || -> std::io::Result<()> {
        use std::io::Write;
        let mut file =
            std::fs::OpenOptions::new().create(true).write(true).truncate(true).mode(mode).open(&temporary)?;
        file.write_all(contents.as_bytes())?;
        std::fs::rename(&temporary, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// Mount points below a directory, deepest first, as this process sees them.
///
/// # Errors
/// `/proc/self/mountinfo` cannot be read.
pub fn mounts_below(dir: &Path) -> Result<Vec<std::path::PathBuf>> {
    let info = std::fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let mut found: Vec<_> = info
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(std::path::PathBuf::from)
        .filter(|p| p.starts_with(dir))
        .collect();
    found.sort();
    found.reverse();
    Ok(found)
}
