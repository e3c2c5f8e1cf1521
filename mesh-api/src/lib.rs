//! THE WIRE: what crosses a process boundary, and its conversion to `mesh-core`.
//!
//! Here: protobuf messages (xDS, certificates, enrolment), Kubernetes and Istio YAML, the JSON of the admin endpoints.
//! Not here: decisions.

pub mod admin;
pub mod admin_pipe;
pub mod crd;
pub mod k8s;
pub mod problem;
pub mod proto;
pub mod wds;
pub mod yaml;

/// Type URL of workloads and services.
pub const ADDRESS_TYPE_URL: &str = "type.googleapis.com/istio.workload.Address";
/// Type URL of L4 policies.
pub const AUTHORIZATION_TYPE_URL: &str = "type.googleapis.com/istio.security.Authorization";
/// Largest request on a configuration stream, bytes: the versions of 200,000 resources. A client that holds more does not
/// say what it has.
pub const MAX_DISCOVERY_REQUEST_BYTES: usize = 32 << 20;
