//! The data path in this process: real sockets, TLS and HTTP/2 on loopback addresses, without kernel programs, without
//! other processes and without privileges.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod bed;
mod bounds;
mod complaints;
mod records;
mod trust;
mod tunnels;
