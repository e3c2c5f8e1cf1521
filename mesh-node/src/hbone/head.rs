//! Heads of HBONE requests and responses: `baggage`, `forwarded`, `traceparent`.
//!
//! Pure functions. What a peer says here is for telemetry only: nothing is decided by it.

use std::fmt::Write as _;
use std::net::SocketAddr;

use http::{HeaderMap, HeaderValue, Method, Request, Uri};
use mesh_core::workload::{Workload, WorkloadType};
use rand::Rng;

/// Header that carries the workload's description (W3C Baggage).
pub const BAGGAGE: &str = "baggage";
/// Header with the client's address (RFC 7239).
pub const FORWARDED: &str = "forwarded";
/// Header with the trace's identifiers (W3C Trace Context).
pub const TRACEPARENT: &str = "traceparent";

/// Longest `forwarded` that is read, bytes: an address, and a name of at most 253.
const MAX_FORWARDED_BYTES: usize = 1024;

/// What a CONNECT says.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// Where to.
    pub authority: &'a str,
    /// On whose behalf.
    pub source: &'a Workload,
    /// Cluster of workloads that do not say.
    pub cluster: &'a str,
    /// The client's own address.
    pub client: SocketAddr,
    /// Name of the service that it addressed, if it did.
    pub service_host: Option<&'a str>,
}

impl Head<'_> {
    /// The request, with a fresh trace.
    pub fn request(&self, rng: &mut impl Rng) -> Result<Request<()>, http::Error> {
        let authority: Uri = self.authority.parse().map_err(http::Error::from)?;
        let mut request = Request::builder().method(Method::CONNECT).uri(authority).body(())?;
        let headers = request.headers_mut();
        insert(headers, BAGGAGE, &baggage(self.source, self.cluster));
        insert(headers, FORWARDED, &forwarded(self.client, self.service_host));
        insert(headers, TRACEPARENT, &traceparent(rng));
        Ok(request)
    }
}

/// Sets a header, unless a name from the configuration has characters that HTTP does not allow: telemetry is not worth
/// a refused connection.
pub fn insert(headers: &mut HeaderMap, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// The description of a workload, keys as OpenTelemetry has them.
pub fn baggage(workload: &Workload, cluster: &str) -> String {
    let kind = match workload.workload_type {
        WorkloadType::Deployment => "deployment",
        WorkloadType::CronJob => "cronjob",
        WorkloadType::Pod => "pod",
        WorkloadType::Job => "job",
    };
    let cluster = if workload.cluster.is_empty() { cluster } else { &workload.cluster };
    format!(
        "k8s.cluster.name={cluster},k8s.namespace.name={},k8s.{kind}.name={},service.name={},service.version={},\
         cloud.region={},cloud.availability_zone={}",
        workload.namespace(),
        workload.workload_name,
        workload.canonical_name,
        workload.canonical_revision,
        workload.locality.region,
        workload.locality.zone,
    )
}

/// Who connects, and to which service if one was addressed.
pub fn forwarded(client: SocketAddr, service_host: Option<&str>) -> String {
    let mut value = format!("for=\"{client}\"");
    if let Some(host) = service_host {
        // Writing to a `String` cannot fail.
        let _ = write!(value, ";host={host}");
    }
    value
}

/// The host name of the service that a client's node proxy says was addressed.
pub fn said_service(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(FORWARDED)?.to_str().ok().filter(|value| value.len() <= MAX_FORWARDED_BYTES)?;
    // Each proxy on the way appends an element; the first one is the client's.
    let client = value.split(',').next()?;
    let host = client.split(';').find_map(|pair| pair.trim().strip_prefix("host="))?.trim_matches('"');
    (!host.is_empty()).then_some(host)
}

/// A fresh trace, not sampled.
pub fn traceparent(rng: &mut impl Rng) -> String {
    // All zeros is invalid (W3C Trace Context 3.2.2.3).
    let (trace, parent) = (rng.random::<u128>().max(1), rng.random::<u64>().max(1));
    format!("00-{trace:032x}-{parent:016x}-00")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_that_a_client_addressed_is_read_back() {
        let check = |forwarded: &str, expected: Option<&str>| {
            let mut headers = HeaderMap::new();
            insert(&mut headers, FORWARDED, forwarded);
            assert_eq!(said_service(&headers), expected, "{forwarded}");
        };
        let client = "[fd00::1]:40000".parse().unwrap();
        check(&forwarded(client, Some("web.default.svc.cluster.local")), Some("web.default.svc.cluster.local"));
        check(&forwarded(client, None), None);
        check("for=10.0.0.1; host=\"web\" ;proto=http", Some("web"));
        check("host=first, host=second", Some("first"));
        check("for=a, host=second", None);
        check("host=", None);
        check("", None);
        check(&format!("host={}", "x".repeat(MAX_FORWARDED_BYTES)), None);
        assert_eq!(said_service(&HeaderMap::new()), None);
    }
}
