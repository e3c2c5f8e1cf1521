//! The plugin's log: a plugin has no other place to write to.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// Size in bytes at which the file is put aside; there is one old file.
const MAX_BYTES: u64 = 1 << 20;

/// Adds a line. A log that cannot be written keeps no pod from starting.
pub(crate) fn write(path: &Path, fields: &Value) {
    let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
    let line = format!("{}\n", json!({ "at": at, "what": fields }));
    let append = || -> std::io::Result<()> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        if fs::metadata(path).is_ok_and(|metadata| metadata.len() >= MAX_BYTES) {
            let mut old = path.as_os_str().to_owned();
            old.push(".1");
            fs::rename(path, old)?;
        }
        let mut file = File::options().append(true).create(true).mode(0o600).open(path)?;
        file.write_all(line.as_bytes())
    };
    let _lost = append();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_is_put_aside_once() {
        let dir = std::env::temp_dir().join(format!("mesh-cni-log-{}", std::process::id()));
        let path = dir.join("cni.log");
        let long = json!("x".repeat(300_000));
        for _ in 0..12 {
            write(&path, &long);
        }
        let sizes: Vec<u64> = fs::read_dir(&dir).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).collect();
        assert_eq!(sizes.len(), 2);
        assert!(sizes.iter().all(|size| *size < MAX_BYTES + 400_000), "{sizes:?}");
        fs::remove_dir_all(dir).unwrap();
    }
}
