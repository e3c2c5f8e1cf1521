//! Writing tar archives (ustar): files, directories and symbolic links, all of them root's and from 1970, so that the same
//! content gives the same bytes.

use anyhow::{Result, ensure};

/// Blocks of the format.
const BLOCK: usize = 512;
/// The longest name that fits into the name field alone.
const NAME_LIMIT: usize = 100;
/// The largest file whose size fits into eleven octal digits.
const SIZE_LIMIT: u64 = 0o77_777_777_777;

/// An archive in memory.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
}

impl Archive {
    /// Adds a file.
    pub(super) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.header(name, mode, b'0', content.len() as u64, "")?;
        self.bytes.extend_from_slice(content);
        let beyond = content.len() % BLOCK;
        if beyond > 0 {
            self.bytes.resize(self.bytes.len() + BLOCK - beyond, 0);
        }
        Ok(())
    }

    /// Adds a directory.
    pub(super) fn directory(&mut self, name: &str, mode: u32) -> Result<()> {
        self.header(&format!("{name}/"), mode, b'5', 0, "")
    }

    /// Adds a symbolic link.
    pub(super) fn link(&mut self, name: &str, target: &str) -> Result<()> {
        self.header(name, 0o777, b'2', 0, target)
    }

    /// The whole archive.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 2 * BLOCK, 0);
        self.bytes
    }

    fn header(&mut self, name: &str, mode: u32, kind: u8, size: u64, target: &str) -> Result<()> {
        ensure!(name.len() <= NAME_LIMIT && target.len() <= NAME_LIMIT, "{name}: too long a name for this archive");
        ensure!(size <= SIZE_LIMIT, "{name}: too large for this archive");
        let mut block = [0u8; BLOCK];
        let mut put = |at: usize, text: &[u8]| block[at..at + text.len()].copy_from_slice(text);
        put(0, name.as_bytes());
        put(100, format!("{mode:07o}\0").as_bytes());
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{size:011o}\0").as_bytes());
        put(136, b"00000000000\0");
        // The sum is taken with blanks in its own place.
        put(148, b"        ");
        put(156, &[kind]);
        put(157, target.as_bytes());
        put(257, b"ustar\x0000");
        let sum: u32 = block.iter().copied().map(u32::from).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&block);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::shell;
    use std::process::Command;

    #[test]
    fn the_tar_program_reads_it() {
        let mut archive = Archive::default();
        archive.directory("bin", 0o755).unwrap();
        archive.file("bin/one", 0o755, b"1").unwrap();
        archive.file("bin/full", 0o644, &[b'x'; BLOCK]).unwrap();
        archive.link("bin/two", "one").unwrap();
        let file = std::env::temp_dir().join(format!("mesh-archive-{}.tar", std::process::id()));
        std::fs::write(&file, archive.finish()).unwrap();
        let listed = shell::output(Command::new("tar").args(["--numeric-owner", "-tvf"]).arg(&file));
        std::fs::remove_file(&file).unwrap();
        let listed = listed.unwrap();
        let lines: Vec<_> = listed.lines().map(|l| l.split_whitespace().collect::<Vec<_>>()).collect();
        assert_eq!((lines[0][0], lines[0][5]), ("drwxr-xr-x", "bin/"), "{listed}");
        assert_eq!((lines[1][0], lines[1][1], lines[1][2]), ("-rwxr-xr-x", "0/0", "1"), "{listed}");
        assert_eq!(lines[2][2], "512", "{listed}");
        assert_eq!(lines[3][5..], ["bin/two", "->", "one"], "{listed}");
    }
}
