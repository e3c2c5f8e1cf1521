//! The certificate authority: X.509 SVIDs for workloads, and the controller's own TLS certificate.
//!
//! - [`authority`]: the signer and its trust bundle as one immutable value; what a certificate looks like.
//! - [`csr`]: what a signing request must be.
//! - [`store`]: the signer's files, plugged or self-made, and root rotation.
//! - [`service`]: the gRPC service.
//!
//! Whom an identity may be given to is decided in [`crate::entitlement`].

pub mod authority;
pub mod csr;
pub mod service;
pub mod store;
