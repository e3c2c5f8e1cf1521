//! The incremental compiler: whatever the way to a configuration, it comes to the same.

mod history;

mod world;
