//! What a node proxy's metrics port shows of a running mesh.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use mesh_tests::mesh_bed::{Attempt, MeshBed, eventually, two_nodes};

/// The value of the one series of a metric that has all these labels.
fn value(bed: &MeshBed, metric: &str, labels: &[&str]) -> Option<u64> {
    let page = bed.page("node-a", 15020, "/metrics")?;
    let named = |line: &&str| line.starts_with(&format!("{metric}{{")) || line.starts_with(&format!("{metric} "));
    let line = page.lines().filter(named).find(|line| labels.iter().all(|label| line.contains(label)))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[test]
fn the_metrics_port_shows_what_the_kernel_did_by_hook_and_reason() {
    let bed = MeshBed::up("metrics", two_nodes());
    let captured = ["hook=\"connect4\"", "reason=\"captured\"", "verdict=\"redirect\""];
    let outcomes = |labels: &[&str]| value(&bed, "mesh_kernel_outcomes_total", labels).unwrap_or_default();
    let before = outcomes(&captured);
    let mut stream = bed.stream("client", bed.address("far"));
    stream.wait("traffic", Attempt::is_ok);
    eventually("a captured connection", || (outcomes(&captured) > before).then_some(()));
    let refused = ["hook=\"connect4\"", "reason=\"hbone_port\"", "verdict=\"refuse\""];
    let mut hbone = bed.address("far");
    hbone.set_port(15008);
    assert!(
        !bed.stream("client", hbone).wait("an attempt", |_| true).is_ok(),
        "a tunnel port that is dialled directly"
    );
    eventually("a refused connection", || (outcomes(&refused) > 0).then_some(()));
}

#[test]
fn the_metrics_port_has_istios_build_and_stream_metrics() {
    let mut bed = MeshBed::up("istio", two_nodes());
    let ended = |reason: &str, bed: &MeshBed| {
        value(bed, "istio_xds_connection_terminations_total", &[&format!("reason=\"{reason}\"")]).unwrap_or_default()
    };
    assert_eq!(value(&bed, "istio_build", &["component=\"ztunnel\"", "tag=\""]), Some(1));
    for kind in ["istio.workload.Address", "istio.security.Authorization"] {
        let url = format!("url=\"type.googleapis.com/{kind}\"");
        let messages = value(&bed, "istio_xds_message_total", &[&url]).expect(kind);
        let bytes = value(&bed, "istio_xds_message_bytes_total", &[&url]).expect(kind);
        assert!(messages >= 1 && bytes > messages, "{kind}: {messages} messages, {bytes} bytes");
    }
    assert_eq!((ended("Error", &bed), ended("Reconnect", &bed)), (0, 0));
    bed.sandbox.end_part(&mesh_ctl::sandbox::Part::Controller).unwrap();
    eventually("the end of the stream", || (ended("Error", &bed) + ended("Reconnect", &bed) == 1).then_some(()));
    eventually("attempts without a controller", || (ended("ConnectionError", &bed) > 0).then_some(()));
}
