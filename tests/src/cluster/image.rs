//! Container images made of files of this machine, in the OCI layout that containerd imports.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::archive::Archive;
use super::{shell, tools};

/// The image of every pod's pause container: busybox with some of its applets, which tests use as well.
pub const BUSYBOX: &str = "localhost/busybox:1";
/// What it can be called as.
const APPLETS: [&str; 25] = [
    "cat", "chmod", "date", "env", "grep", "head", "hostname", "httpd", "id", "ip", "ls", "mkdir", "mount", "nc",
    "nslookup", "ping", "printf", "ps", "seq", "sh", "sleep", "tail", "timeout", "umount", "wget",
];

/// One layer, and how a container of it starts.
#[derive(Debug, Clone, Default)]
pub struct Image {
    name: String,
    entries: Vec<(String, Content)>,
    entrypoint: Vec<String>,
    command: Vec<String>,
}

#[derive(Debug, Clone)]
enum Content {
    File(PathBuf),
    Text(String),
    Link(String),
}

impl Image {
    /// An empty one. The name is what pods say, such as `localhost/probe:1`; a tag other than `latest` keeps kubelet from
    /// asking a registry.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// [`BUSYBOX`].
    ///
    /// # Errors
    /// busybox is not installed.
    pub fn busybox() -> Result<Self> {
        Ok(Self::new(BUSYBOX).with_busybox()?.command(&["sleep", "infinity"]))
    }

    /// What pods call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds busybox and its applets below `bin`.
    ///
    /// # Errors
    /// busybox is not installed.
    pub fn with_busybox(mut self) -> Result<Self> {
        let program = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from).into_iter().find(|path| path.is_file());
        let program = program.context("busybox is missing: run `cargo xtask setup`")?;
        self = self.file("bin/busybox", &program);
        for applet in APPLETS {
            self = self.link(&format!("bin/{applet}"), "busybox");
        }
        Ok(self)
    }

    /// Adds a file of this machine, with its mode.
    #[must_use]
    pub fn file(self, name: &str, path: &Path) -> Self {
        self.entry(name, Content::File(path.to_owned()))
    }

    /// Adds a text.
    #[must_use]
    pub fn text(self, name: &str, text: &str) -> Self {
        self.entry(name, Content::Text(text.to_owned()))
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn link(self, name: &str, target: &str) -> Self {
        self.entry(name, Content::Link(target.to_owned()))
    }

    /// Adds a program of this machine with the shared libraries that it asks for.
    ///
    /// # Errors
    /// It cannot be read, or a library is not found.
    pub fn program(self, name: &str, path: &Path) -> Result<Self> {
        let mut image = self.file(name, path);
        for library in libraries(path)? {
            let inside = library.to_string_lossy().trim_start_matches('/').to_owned();
            if !image.entries.iter().any(|(existing, _)| *existing == inside) {
                image = image.file(&inside, &library);
            }
        }
        Ok(image)
    }

    /// Sets what always runs.
    #[must_use]
    pub fn entrypoint(mut self, words: &[&str]) -> Self {
        self.entrypoint = words.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// Sets what runs unless a pod says otherwise.
    #[must_use]
    pub fn command(mut self, words: &[&str]) -> Self {
        self.command = words.iter().map(|&word| word.to_owned()).collect();
        self
    }

    fn entry(mut self, name: &str, content: Content) -> Self {
        self.entries.push((name.trim_start_matches('/').to_owned(), content));
        self
    }

    /// The file name of its archive.
    pub(super) fn file_name(&self) -> String {
        format!("{}.tar", self.name.replace(['/', ':'], "_"))
    }

    /// The whole image as one archive.
    pub(super) fn archive(&self) -> Result<Vec<u8>> {
        ensure!(!self.name.is_empty(), "an image needs a name");
        let mut archive = Archive::default();
        let platform = json!({"architecture": architecture(), "os": "linux"});
        let layer = blob(&mut archive, "layer.v1.tar", &self.layer()?)?;
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {"Entrypoint": self.entrypoint, "Cmd": self.command, "Env": ["PATH=/bin:/usr/bin:/usr/local/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        });
        let config = blob(&mut archive, "config.v1+json", config.to_string().as_bytes())?;
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": [layer]});
        let mut manifest = blob(&mut archive, "manifest.v1+json", manifest.to_string().as_bytes())?;
        manifest["platform"] = platform;
        manifest["annotations"] = json!({"io.containerd.image.name": self.name});
        archive.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        archive.file("index.json", 0o644, index.to_string().as_bytes())?;
        Ok(archive.finish())
    }

    fn layer(&self) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        let mut directories = BTreeSet::from(["tmp".to_owned()]);
        for (name, _) in &self.entries {
            let parents = Path::new(name).ancestors().skip(1).map(|parent| parent.to_string_lossy().into_owned());
            directories.extend(parents.filter(|parent| !parent.is_empty()));
        }
        for directory in &directories {
            archive.directory(directory, if directory == "tmp" { 0o1777 } else { 0o755 })?;
        }
        for (name, content) in &self.entries {
            match content {
                Content::Link(target) => archive.link(name, target)?,
                Content::Text(text) => archive.file(name, 0o644, text.as_bytes())?,
                Content::File(path) => {
                    let read = || Ok::<_, std::io::Error>((fs::metadata(path)?.permissions().mode(), fs::read(path)?));
                    let (mode, bytes) = read().with_context(|| format!("read {}", path.display()))?;
                    archive.file(name, mode & 0o7777, &bytes)?;
                }
            }
        }
        Ok(archive.finish())
    }
}

fn blob(archive: &mut Archive, kind: &str, bytes: &[u8]) -> Result<Value> {
    let digest = tools::hex(&Sha256::digest(bytes));
    archive.file(&format!("blobs/sha256/{digest}"), 0o644, bytes)?;
    Ok(json!({
        "mediaType": format!("application/vnd.oci.image.{kind}"),
        "digest": format!("sha256:{digest}"),
        "size": bytes.len(),
    }))
}

/// As Go calls it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The shared libraries of a program and its loader, as the loader of this machine finds them; none if it is static.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let mut command = Command::new("ldd");
    let ran = command.arg(program).output().context("start ldd")?;
    let said = String::from_utf8_lossy(&ran.stderr);
    if !ran.status.success() {
        ensure!(said.contains("not a dynamic executable"), "`{}`: {}", shell::shown(&command), said.trim());
        return Ok(Vec::new());
    }
    parse_libraries(&String::from_utf8_lossy(&ran.stdout))
}

/// Lines such as `libc.so.6 => /lib/libc.so.6 (0x7f..)`, `/lib64/ld-linux-x86-64.so.2 (0x7f..)` and `linux-vdso.so.1 (0x7f..)`.
fn parse_libraries(text: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in text.lines() {
        ensure!(!line.ends_with("not found"), "a library is missing: {}", line.trim());
        let path = line.split_once("=> ").map_or(line, |(_, path)| path).trim();
        let path = path.split(' ').next().unwrap_or_default();
        if path.starts_with('/') {
            found.push(PathBuf::from(path));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x2)\n\t/lib64/ld.so.2 (0x3)\n";
        assert_eq!(parse_libraries(text).unwrap(), ["/lib/x/libc.so.6", "/lib64/ld.so.2"].map(PathBuf::from));
        assert!(parse_libraries("\tlibx.so => not found").is_err());
        assert!(parse_libraries("\tstatically linked\n").unwrap().is_empty());
    }

    #[test]
    fn the_same_files_make_the_same_image() {
        let image = || Image::new("localhost/x:1").text("etc/motd", "hello").link("motd", "etc/motd").command(&["x"]);
        assert_eq!(image().archive().unwrap(), image().archive().unwrap());
        assert_eq!(image().file_name(), "localhost_x_1.tar");
    }
}
