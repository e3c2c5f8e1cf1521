//! The log on stderr, whose level can be changed while the process runs.

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::config::LogFormat;

/// What is logged unless `RUST_LOG` says otherwise.
const DEFAULT_FILTER: &str = "info";

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Stricter than `RUST_LOG`, where a mistyped level is the name of a module of which everything is logged.
fn is_directive(text: &str) -> bool {
    let (module, level) = text.split_once('=').unwrap_or(("", text));
    LEVELS.contains(&level) && module.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_:".contains(&byte))
}

/// Reads and changes what is logged.
#[derive(Debug, Clone)]
pub struct LogHandle(reload::Handle<EnvFilter, Registry>);

impl LogHandle {
    /// What is logged, in `RUST_LOG`'s words; empty where there is no log.
    pub fn filter(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Changes what is logged from now on. An error names what is wrong with `filter`.
    pub fn set(&self, filter: &str) -> Result<(), String> {
        if let Some(wrong) = filter.split(',').find(|directive| !is_directive(directive)) {
            return Err(format!("`{wrong}` is neither LEVEL nor MODULE=LEVEL; levels are {}", LEVELS.join(", ")));
        }
        let parsed = EnvFilter::try_new(filter).map_err(|error| format!("`{filter}`: {error}"))?;
        self.0.reload(parsed).map_err(|error| error.to_string())
    }
}

/// The filter as a part of a log, and what changes it.
pub fn filter(filter: EnvFilter) -> (reload::Layer<EnvFilter, Registry>, LogHandle) {
    let (layer, handle) = reload::Layer::new(filter);
    (layer, LogHandle(handle))
}

/// Starts the log of this process.
pub fn init(format: LogFormat) -> LogHandle {
    let wanted = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    let (filter, handle) = filter(wanted);
    let stderr = fmt::layer().with_writer(std::io::stderr).with_target(false);
    let lines = match format {
        LogFormat::Text => stderr.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => stderr.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(lines).init();
    handle
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_reads_back_and_nonsense_changes_nothing() {
        let (_layer, handle) = filter(EnvFilter::new("info"));
        assert_eq!(handle.filter(), "info");
        handle.set("debug,h2=warn").expect("good");
        let now = handle.filter();
        assert!(now.contains("h2=warn") && now.contains("debug"), "{now}");
        for nonsense in ["h2=loud=quiet", "dbug", "nonsense=", "", "info,", "a b=info"] {
            assert!(handle.set(nonsense).is_err(), "{nonsense}");
        }
        assert_eq!(handle.filter(), now);
    }
}
