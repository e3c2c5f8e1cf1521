//! Malformed input for everything that reads bytes from outside.
//!
//! Each target is a plain function of bytes that must not panic, hang, or use much memory; so cargo-fuzz can drive the same
//! functions where a nightly toolchain and its sanitizers are at hand. The runner here needs neither: inputs are derived
//! from samples and a seed, so that a failing one can be made again from its number.

pub mod input;
mod protobuf;
mod runner;
pub mod targets;
mod text;

pub use runner::{Outcome, Run, supervise, work};
