//! Certificates while traffic runs: renewal, a CA that is away, and roots that are replaced.
//!
//! Expiry while nobody issues: `fail_closed`. Who gets which identity: `mesh-controller/tests/certificates.rs`.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use http::{Method, StatusCode};
use mesh_api::admin::{CertificateInfo, CertificateRow};
use mesh_ctl::sandbox::{Mesh, Part};
use mesh_tests::cacerts::{PluggedCa, write_roots};
use mesh_tests::hostile::{Approach, Ca, Claim, ask, shown, tunnel};
use mesh_tests::mesh_bed::{Attempt, ECHO, MeshBed, eventually, two_nodes};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::runtime::Runtime;
use x509_parser::prelude::{FromDer, X509Certificate};

const NODES: [&str; 2] = ["node-a", "node-b"];
const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
const FAR: &str = "spiffe://cluster.local/ns/default/sa/far";
const HBONE: u16 = 15008;

fn bed(name: &str, controller_args: &[&str]) -> MeshBed {
    let mut mesh = Mesh::beside().unwrap();
    mesh.controller_args = controller_args.iter().map(ToString::to_string).collect();
    MeshBed::with(name, two_nodes(), mesh)
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn rows(bed: &MeshBed, node: &str) -> Vec<CertificateRow> {
    eventually("certificates", || bed.admin(node, "/certificates"))
}

/// What a node says of an identity's certificate.
fn row(bed: &MeshBed, node: &str, identity: &str) -> CertificateRow {
    eventually(identity, || {
        rows(bed, node).into_iter().find(|row| row.identity == identity && !row.certificates.is_empty())
    })
}

fn secs(time: &str) -> i64 {
    OffsetDateTime::parse(time, &Rfc3339).unwrap_or_else(|error| panic!("`{time}`: {error}")).unix_timestamp()
}

/// Waits for another certificate than `old`.
fn renewed(bed: &MeshBed, node: &str, identity: &str, old: &CertificateInfo) -> CertificateInfo {
    eventually(&format!("another certificate of {identity}"), || {
        Some(row(bed, node, identity).certificates.remove(0)).filter(|leaf| leaf.serial != old.serial)
    })
}

fn serial(der: &[u8]) -> String {
    X509Certificate::from_der(der).unwrap().1.raw_serial_as_string().replace(':', "")
}

/// Tunnels that a node has dialled.
fn dialled(bed: &MeshBed, node: &str) -> u64 {
    let metrics = bed.page(node, 15020, "/metrics").expect("metrics");
    let line = metrics.lines().find_map(|line| line.strip_prefix("mesh_tunnels_dialled_total "));
    line.unwrap_or_else(|| panic!("not counted in {metrics}")).parse().unwrap()
}

/// Life of the certificates that are renewed before the test's eyes, seconds.
const LIFE_SECS: i64 = 6;

#[test]
fn certificates_are_renewed_at_half_life_under_traffic_and_new_connections_use_the_new_ones() {
    let bed = bed("renew", &["--leaf-ttl", "6s"]);
    let (runtime, far) = (runtime(), bed.address("far"));
    let hbone = SocketAddr::new(far.ip(), HBONE);
    let ca = Ca::of_the_mesh(&bed.sandbox.layout.controller().join("state"));
    let mut held = bed.hold("client", far);
    assert_eq!(held.say("before"), "before");
    let mut stream = bed.stream("client", far);
    stream.wait("traffic", Attempt::is_ok);
    let mut server = row(&bed, "node-b", FAR).certificates.remove(0);
    for round in 0..2 {
        let before = dialled(&bed, "node-a");
        let client = row(&bed, "node-a", CLIENT).certificates.remove(0);
        server = renewed(&bed, "node-b", FAR, &server);
        let now = row(&bed, "node-b", FAR);
        let issued = secs(&now.certificates[0].not_after) - LIFE_SECS;
        let due_after = secs(&now.renew_at) - issued;
        assert!((2..=4).contains(&due_after), "renewal is due {due_after} s after the issue: {now:?}");
        eventually("the new certificate on the wire", || {
            let approach = Approach::with(ca.issue(&Claim::of(CLIENT)));
            let leaf = runtime.block_on(shown(&bed.sandbox.layout.netns("node-a"), hbone, approach)).unwrap().remove(0);
            (serial(&leaf) == row(&bed, "node-b", FAR).certificates[0].serial).then_some(())
        });
        renewed(&bed, "node-a", CLIENT, &client);
        // One tunnel carries connections that come one after the other, as long as its certificate is the last one.
        eventually("a tunnel with the client's new certificate", || {
            stream.wait("traffic", |_| true);
            (dialled(&bed, "node-a") > before).then_some(())
        });
        assert_eq!(held.say("still here"), "still here", "round {round}");
    }
    let attempts = stream.end();
    let failed: Vec<_> = attempts.iter().filter(|attempt| !attempt.is_ok()).collect();
    assert!(failed.is_empty(), "{failed:?} of {}", attempts.len());
}

#[test]
fn a_ca_that_is_away_at_half_life_is_reported_and_missed_by_nobody_until_it_is_back() {
    let mut bed = bed("away", &["--leaf-ttl", "12s"]);
    let mut stream = bed.stream("client", bed.address("far"));
    stream.wait("traffic", Attempt::is_ok);
    bed.sandbox.end_part(&Part::Controller).unwrap();
    let kept = row(&bed, "node-b", FAR);
    let log = bed.sandbox.layout.log(&Part::Node("node-b".into()));
    let line = eventually("the complaint", || {
        let said = fs::read_to_string(&log).ok()?;
        said.lines().find(|line| line.contains("no certificate; trying again") && line.contains(FAR)).map(str::to_owned)
    });
    let now = row(&bed, "node-b", FAR);
    assert_eq!((&now.certificates[0], now.state.as_str()), (&kept.certificates[0], "Available"), "{line}");
    bed.sandbox.start_controller().unwrap();
    renewed(&bed, "node-b", FAR, &kept.certificates[0]);
    stream.wait("traffic", Attempt::is_ok);
    let attempts = stream.end();
    let failed: Vec<_> = attempts.iter().filter(|attempt| !attempt.is_ok()).collect();
    assert!(failed.is_empty(), "{failed:?} of {}", attempts.len());
}

/// A directory of plugged files; it goes with the value.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mesh-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("a fresh name");
        Self(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What comes of a tunnel to `far` with a certificate of `ca`.
fn attempt(bed: &MeshBed, runtime: &Runtime, ca: &PluggedCa) -> Result<StatusCode, String> {
    let (netns, ip) = (bed.sandbox.layout.netns("node-a"), bed.address("far").ip());
    let approach = Approach::with(ca.ca().issue(&Claim::of(CLIENT)));
    runtime.block_on(async {
        let send = tunnel(&netns, SocketAddr::new(ip, HBONE), approach).await?;
        ask(&send, Method::CONNECT, &SocketAddr::new(ip, ECHO).to_string()).await
    })
}

/// Waits until all certificates of both nodes are as wanted.
fn everywhere(bed: &MeshBed, what: &str, wanted: impl Fn(&CertificateRow) -> bool) {
    for node in NODES {
        eventually(&format!("{what} on {node}"), || {
            let rows = rows(bed, node);
            (!rows.is_empty() && rows.iter().all(&wanted)).then_some(())
        });
    }
}

fn roots(row: &CertificateRow) -> usize {
    row.certificates.iter().filter(|certificate| certificate.kind == "Root").count()
}

/// Whether the leaf was signed by the intermediate with this common name.
fn signed_by(row: &CertificateRow, name: &str) -> bool {
    let der = mesh_controller::ca::authority::certificates(&row.certificates[0].pem).remove(0);
    let (_, leaf) = X509Certificate::from_der(&der).unwrap();
    leaf.issuer().iter_common_name().any(|issuer| issuer.as_str() == Ok(name))
}

fn write(cacerts: &Path, signer: &PluggedCa, trusted: &[&PluggedCa]) {
    signer.write_signer(cacerts);
    write_roots(cacerts, trusted);
}

#[test]
fn plugged_roots_are_replaced_under_traffic_and_the_removed_one_opens_nothing() {
    let dir = Dir::new("cacerts");
    let (old, new) = (PluggedCa::new("old"), PluggedCa::new("new"));
    write(&dir.0, &old, &[&old]);
    let bed = bed("roots", &["--leaf-ttl", "10s", "--cacerts", dir.0.to_str().unwrap()]);
    let (runtime, far) = (runtime(), bed.address("far"));
    let mut held = bed.hold("client", far);
    assert_eq!(held.say("before"), "before");
    let mut stream = bed.stream("client", far);
    stream.wait("traffic", Attempt::is_ok);
    everywhere(&bed, "certificates of the old signer", |row| signed_by(row, "old signer") && roots(row) == 1);
    assert_eq!(attempt(&bed, &runtime, &old), Ok(StatusCode::OK), "a peer of the only root");
    assert!(attempt(&bed, &runtime, &new).is_err(), "a root that is not trusted yet");

    write(&dir.0, &old, &[&old, &new]);
    everywhere(&bed, "two roots", |row| roots(row) == 2);
    for (what, ca) in [("old", &old), ("new", &new)] {
        assert_eq!(attempt(&bed, &runtime, ca), Ok(StatusCode::OK), "a peer of the {what} root");
    }
    assert_eq!(held.say("two roots"), "two roots");

    write(&dir.0, &new, &[&old, &new]);
    everywhere(&bed, "certificates of the new signer", |row| signed_by(row, "new signer") && roots(row) == 2);
    assert_eq!(held.say("the new one signs"), "the new one signs");
    // A tunnel that was dialled meanwhile may have met a server with a certificate of the old signer.
    let before = dialled(&bed, "node-a");
    let client = row(&bed, "node-a", CLIENT).certificates.remove(0);
    renewed(&bed, "node-a", CLIENT, &client);
    eventually("a tunnel that both ends proved anew", || (dialled(&bed, "node-a") > before).then_some(()));
    let mut proved = bed.hold("client", far);
    assert_eq!(proved.say("proved by the new one"), "proved by the new one");

    write(&dir.0, &new, &[&new]);
    everywhere(&bed, "one root", |row| signed_by(row, "new signer") && roots(row) == 1);
    assert!(attempt(&bed, &runtime, &old).is_err(), "a peer of the removed root");
    assert_eq!(attempt(&bed, &runtime, &new), Ok(StatusCode::OK), "a peer of the root that is left");
    assert_eq!(proved.say("the old one is gone"), "the old one is gone");
    eventually("the end of what the removed root vouched for", || held.say("?").starts_with("closed").then_some(()));
    // Both ends distrust each other; whoever hears of it first ends the connection and says why.
    let logs = NODES.map(|node| bed.sandbox.layout.node(node).join("access.log"));
    eventually("the reason", || {
        let said = |log| fs::read_to_string(log).is_ok_and(|log| log.contains("leads to no trusted root"));
        logs.iter().any(said).then_some(())
    });
    for node in NODES {
        eventually("the stream from the controller", || bed.status(node).filter(|status| status.controller_connected));
    }
    stream.wait("traffic", Attempt::is_ok);
    let attempts = stream.end();
    let failed: Vec<_> = attempts.iter().filter(|attempt| !attempt.is_ok()).collect();
    assert!(failed.is_empty(), "{failed:?} of {}", attempts.len());
}

#[test]
fn a_root_that_only_vouches_for_the_controller_lets_no_workload_in() {
    let dir = Dir::new("foreign");
    let foreign = PluggedCa::new("foreign");
    write_roots(&dir.0, &[&foreign]);
    let bed = bed("file", &[]);
    let (runtime, leaf) = (runtime(), row(&bed, "node-b", FAR).certificates.remove(0));
    let argv = bed.sandbox.node_argv("node-b").unwrap();
    let at = argv.iter().position(|argument| argument == "--root-cert").expect("a flag");
    let file = Path::new(&argv[at + 1]);
    let both = fs::read_to_string(file).unwrap() + &fs::read_to_string(dir.0.join("root-cert.pem")).unwrap();
    fs::write(dir.0.join("both.pem"), both).unwrap();
    fs::copy(dir.0.join("both.pem"), file).unwrap();
    // It has seen the file: that is what it asks for another certificate for.
    renewed(&bed, "node-b", FAR, &leaf);
    assert!(attempt(&bed, &runtime, &foreign).is_err(), "a peer of the controller's root");
    assert_eq!(roots(&row(&bed, "node-b", FAR)), 1, "roots of workloads");
    bed.stream("client", bed.address("far")).wait("traffic", Attempt::is_ok);
}
