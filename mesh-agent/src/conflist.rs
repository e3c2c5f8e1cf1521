//! Keeps our CNI configuration beside the node's: a copy of the main one with our plugin at its end, under a name that sorts
//! first. The main one is never touched, so whoever writes it may write it again.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
pub use mesh_cni::config::PluginConfig;
use mesh_cni::config::{PLUGIN, VERSIONS};
use serde_json::{Map, Value, json};

/// Our file. Names of main configurations begin with `05` or more by custom.
pub const FILE: &str = "00-mesh.conflist";
/// Endings of files that runtimes read.
const ENDINGS: [&str; 3] = ["conf", "conflist", "json"];
/// Pause between two looks at the directory.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Largest configuration in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// A configuration's copy with our plugin at its end: the same network and version, so that whatever asks about the network
/// by name finds it.
///
/// # Errors
/// It is none that a plugin can be chained to.
pub fn wrap(main: &str, ours: &PluginConfig) -> Result<String> {
    let main: Value = serde_json::from_str(main).context("it is not JSON")?;
    let Value::Object(mut list) = main else { bail!("it is not a JSON object") };
    if !list.contains_key("plugins") {
        list = list_of_one(&list)?;
    }
    let version = list.get("cniVersion").and_then(Value::as_str).unwrap_or_default().to_owned();
    if !VERSIONS.contains(&&*version) {
        bail!("its cniVersion is `{version}`: nothing can be chained to it (one of {} is needed)", VERSIONS.join(", "));
    }
    if list.get("name").and_then(Value::as_str).is_none_or(str::is_empty) {
        bail!("it has no name");
    }
    let Some(Value::Array(plugins)) = list.get_mut("plugins") else { bail!("its plugins are no list") };
    plugins.retain(|plugin| plugin.get("type").and_then(Value::as_str) != Some(PLUGIN));
    if plugins.is_empty() {
        bail!("it has no plugins");
    }
    plugins.push(serde_json::to_value(ours).context("our part")?);
    Ok(format!("{:#}\n", Value::Object(list)))
}

/// What runtimes make of a file with a single plugin.
fn list_of_one(plugin: &Map<String, Value>) -> Result<Map<String, Value>> {
    if plugin.get("type").and_then(Value::as_str).is_none_or(str::is_empty) {
        bail!("it has neither plugins nor a type");
    }
    let mut list = Map::new();
    for key in ["cniVersion", "name"] {
        list.insert(key.to_owned(), plugin.get(key).cloned().unwrap_or_default());
    }
    list.insert("plugins".to_owned(), json!([plugin]));
    Ok(list)
}

/// Which of these files, by name, is the main one: the first that is not ours, as runtimes read them.
pub fn candidates(mut names: Vec<String>) -> Vec<String> {
    names.retain(|name| {
        let ending = Path::new(name).extension().and_then(|ending| ending.to_str());
        name != FILE && ending.is_some_and(|ending| ENDINGS.contains(&ending))
    });
    names.sort();
    names
}

/// What was done to our file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// It is as it should be.
    Unchanged,
    /// It was written after this main configuration.
    Written(String),
    /// There is no main configuration, so there is none of ours.
    Absent,
    /// There is one that cannot be wrapped: ours is as it was; without one, pods start without waiting.
    Failed(String),
}

/// Makes our file what it should be.
///
/// # Errors
/// The directory cannot be read or written to.
pub fn keep(dir: &Path, ours: &PluginConfig) -> io::Result<Kept> {
    let names = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().into_string())).collect::<io::Result<Vec<_>>>()?;
    let Some(name) = candidates(names.into_iter().flatten().collect()).into_iter().next() else {
        remove(&dir.join(FILE))?;
        return Ok(Kept::Absent);
    };
    // It may be half written: ours stays as it is until the main one can be read again.
    let wrapped = match wrap(&read(&dir.join(&name))?, ours) {
        Err(error) => return Ok(Kept::Failed(format!("{name}: {error:#}"))),
        Ok(wrapped) => wrapped,
    };
    if name.as_str() < FILE {
        return Ok(Kept::Failed(format!("{name} sorts before {FILE}: give it a name that begins with 05 or more")));
    }
    if read(&dir.join(FILE)).is_ok_and(|now| now == wrapped) {
        return Ok(Kept::Unchanged);
    }
    replace(dir, FILE, (wrapped.as_bytes(), 0o600))?;
    Ok(Kept::Written(name))
}

/// Keeps our file what it should be and the plugin where it should be, on a thread of its own, until it is stopped.
#[derive(Debug)]
pub struct Keeper {
    /// Its end ends the thread.
    running: Sender<()>,
    thread: JoinHandle<()>,
}

impl Keeper {
    /// Starts.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(dir: PathBuf, bin_dir: Option<PathBuf>, ours: PluginConfig) -> io::Result<Self> {
        let (running, ended) = channel();
        let thread = std::thread::Builder::new().name("conflist".into());
        Ok(Self { running, thread: thread.spawn(move || keep_until(&ended, (&dir, bin_dir.as_deref()), &ours))? })
    }

    /// Ends it: our file is not written any more.
    pub fn stop(self) {
        drop(self.running);
        // It panics nowhere; if it had, it would have ended all the same.
        let _ended = self.thread.join();
    }
}

fn keep_until(ended: &Receiver<()>, (dir, bin_dir): (&Path, Option<&Path>), ours: &PluginConfig) {
    let (mut said, mut said_of_plugin) = (None, None);
    loop {
        // First, so that runtimes have it when they are told to start it.
        if let Some(bin_dir) = bin_dir {
            let now = keep_plugin(bin_dir, &mut || install_plugin(bin_dir)).map_err(|error| format!("{error:#}"));
            match &now {
                Ok(true) => tracing::warn!(dir = %bin_dir.display(), "the CNI plugin was gone and is there again"),
                Err(error) if said_of_plugin.as_ref() != Some(error) => {
                    tracing::error!(error, "the CNI plugin is gone: no pod starts");
                }
                Ok(false) | Err(_) => {}
            }
            said_of_plugin = now.err();
        }
        let now = keep(dir, ours).map_err(|error| error.to_string());
        // Each state once.
        if said.as_ref() != Some(&now) && now != Ok(Kept::Unchanged) {
            say(&now, dir);
            said = Some(now);
        }
        if ended.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Disconnected) {
            return;
        }
    }
}

fn say(kept: &Result<Kept, String>, dir: &Path) {
    match kept {
        Ok(Kept::Written(main)) => tracing::info!(main, file = FILE, "CNI configuration written"),
        Ok(Kept::Absent) => tracing::info!(dir = %dir.display(), "there is no CNI configuration yet"),
        Ok(Kept::Failed(why)) => {
            tracing::error!(why, "our CNI configuration does not follow the main one: pods may start without waiting");
        }
        Ok(Kept::Unchanged) => {}
        Err(error) => tracing::error!(dir = %dir.display(), error, "the CNI configuration cannot be kept"),
    }
}

/// Puts the plugin's program, which lies beside this one, where runtimes look for it.
///
/// # Errors
/// It is not there, or cannot be copied.
pub fn install_plugin(bin_dir: &Path) -> Result<()> {
    let source = std::env::current_exe().context("path of this program")?.with_file_name(PLUGIN);
    let bytes = fs::read(&source).with_context(|| format!("read {}", source.display()))?;
    let target = bin_dir.join(PLUGIN);
    if fs::read(&target).is_ok_and(|now| now == bytes) {
        return Ok(());
    }
    // A runtime may start it at any moment, and one that runs cannot be written to.
    replace(bin_dir, PLUGIN, (&bytes, 0o755)).with_context(|| format!("write {}", target.display()))
}

/// Puts the plugin back if somebody has taken it away, as an agent of another installation does when it ends; whether it had to.
/// One that is there may be that of a newer agent.
fn keep_plugin(bin_dir: &Path, install: &mut dyn FnMut() -> Result<()>) -> Result<bool> {
    let is_there = bin_dir.join(PLUGIN).try_exists().with_context(|| format!("look into {}", bin_dir.display()))?;
    if !is_there {
        install()?;
    }
    Ok(!is_there)
}

/// Takes away all that was installed: first what makes runtimes start the plugin.
///
/// # Errors
/// Something cannot be removed.
pub fn uninstall(conf_dir: &Path, bin_dir: Option<&Path>, state_dir: &Path) -> Result<()> {
    let mut files: Vec<PathBuf> = vec![conf_dir.join(FILE)];
    files.extend(bin_dir.map(|dir| dir.join(PLUGIN)));
    files.extend([mesh_cni::store::path(state_dir), mesh_cni::unasked::path(state_dir)]);
    for file in files {
        remove(&file).with_context(|| format!("remove {}", file.display()))?;
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

fn replace(dir: &Path, name: &str, (bytes, mode): (&[u8], u32)) -> io::Result<()> {
    // Runtimes pass over a name like this. While one agent follows another there are two.
    let fresh = dir.join(format!(".{name}.{}.tmp", std::process::id()));
    // Its mode counts only when it is made.
    remove(&fresh)?;
    let mut file = File::options().write(true).create_new(true).mode(mode).open(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&fresh, dir.join(name))
}

#[cfg(test)]
mod tests;
