//! The kernel ABI.
#![no_std]
