//! Messages generated from our `.proto` files, a module per package.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]

/// `envoy.service.discovery.v3`: the delta stream.
pub mod xds {
    tonic::include_proto!("envoy.service.discovery.v3");
}
/// `istio.v1.auth`: certificate signing.
pub mod ca {
    tonic::include_proto!("istio.v1.auth");
}
/// `istio.workload`: workloads and services; `zds` below it is enrolment.
pub mod workload {
    tonic::include_proto!("istio.workload");
    /// `istio.workload.zds`.
    pub mod zds {
        tonic::include_proto!("istio.workload.zds");
    }
}
/// `istio.security`: L4 policies.
pub mod security {
    tonic::include_proto!("istio.security");
}
