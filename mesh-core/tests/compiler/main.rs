//! The incremental compiler: whatever the way to a configuration, it comes to the same.

mod fleet;
mod history;
mod scale;

mod world;
