//! What policies mean, from the object to the verdict.
//!
//! Each test is named after the rule that it holds. Inputs go through the compiler as objects, in the short form that
//! [`language`] reads; the verdict is that of the function which the node proxy asks.

mod advisories;
mod at_the_node_proxy;
mod authorization_policy;
mod language;
mod naive;
mod peer_authentication;
mod ports_and_addresses;
mod property;
