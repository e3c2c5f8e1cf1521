//! Exit codes (those of sysexits.h where one fits) and the errors that choose them.

use std::io;

/// Ended well.
pub const OK: u8 = 0;
/// Failed.
pub const FAILED: u8 = 1;
/// The command line is wrong.
pub const USAGE: u8 = 64;
/// An input file is wrong.
pub const BAD_INPUT: u8 = 65;
/// Mesh, node or controller cannot be reached.
pub const UNAVAILABLE: u8 = 69;
/// Not permitted.
pub const NOT_PERMITTED: u8 = 77;
/// It ran, and found something that needs attention.
pub const FINDINGS: u8 = 79;
/// A command to be run in a workload is there and cannot be run (as shells have it).
pub const NOT_RUNNABLE: u8 = 126;
/// A command to be run in a workload does not exist (as shells have it).
pub const NO_COMMAND: u8 = 127;

/// Root is needed.
#[derive(Debug)]
pub struct NotPermitted(pub String);

/// The API server refuses this user.
#[derive(Debug)]
pub struct Forbidden(pub String);

/// There is no mesh that could be meant.
#[derive(Debug)]
pub struct NoMesh(pub String);

/// An input file cannot be used.
#[derive(Debug)]
pub struct BadInput(pub String);

/// Nothing to talk to.
#[derive(Debug)]
pub struct Unavailable(pub String);

/// The output is complete, and it names findings.
#[derive(Debug)]
pub struct Findings;

/// The command line names something that does not exist.
#[derive(Debug)]
pub struct Usage(pub String);

/// A command could not be run in a workload.
#[derive(Debug)]
pub struct NotRun {
    /// The command.
    pub program: String,
    /// What the system said.
    pub source: io::Error,
}

impl std::fmt::Display for NotRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.program, self.source)
    }
}

impl std::error::Error for NotRun {}

impl std::fmt::Display for NotPermitted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: run it as root (sudo mesh-ctl ...)", self.0)
    }
}

macro_rules! display_text {
    ($($name:ident),*) => {$(
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}
display_text!(BadInput, Forbidden, NoMesh, Unavailable, Usage);

impl std::fmt::Display for Findings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("there are findings")
    }
}

impl std::error::Error for NotPermitted {}
impl std::error::Error for BadInput {}
impl std::error::Error for Forbidden {}
impl std::error::Error for NoMesh {}
impl std::error::Error for Unavailable {}
impl std::error::Error for Findings {}
impl std::error::Error for Usage {}

/// The exit code of an error: that of the first cause that chooses one.
pub fn code(error: &anyhow::Error) -> u8 {
    use crate::admin::AdminError;
    for cause in error.chain() {
        if let Some(NotRun { source, .. }) = cause.downcast_ref() {
            return if source.kind() == io::ErrorKind::NotFound { NO_COMMAND } else { NOT_RUNNABLE };
        } else if cause.is::<NotPermitted>() || cause.is::<Forbidden>() {
            return NOT_PERMITTED;
        } else if cause.is::<BadInput>() {
            return BAD_INPUT;
        } else if cause.is::<Unavailable>() || cause.is::<NoMesh>() {
            return UNAVAILABLE;
        } else if cause.is::<Findings>() {
            return FINDINGS;
        } else if cause.is::<Usage>() {
            return USAGE;
        } else if cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::PermissionDenied) {
            return NOT_PERMITTED;
        } else if let Some(admin) = cause.downcast_ref::<AdminError>() {
            return match admin {
                AdminError::Unreachable { .. } => UNAVAILABLE,
                AdminError::NotPermitted { .. } => NOT_PERMITTED,
                // What it was asked came from the command line.
                AdminError::Refused { status: 400 | 404, .. } => USAGE,
                AdminError::Refused { .. } | AdminError::Malformed { .. } => FAILED,
            };
        }
    }
    FAILED
}
