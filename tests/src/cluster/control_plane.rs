//! etcd, kube-apiserver, kube-controller-manager and kube-scheduler: on the machine itself, with its addresses on the
//! cluster's bridge.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use mesh_ctl::sandbox::files;
use mesh_ctl::sandbox::process::{self, Place};

use super::addresses::{Addresses, MOST_NODES};
use super::record::Record;
use super::{configuration, pki, shell, tools, watch};

/// Part of the record that is not a node.
pub(super) const PART: &str = "plane";
/// Users that are not nodes: name, user, groups.
const USERS: [(&str, &str, &str); 4] = [
    ("admin", "admin", "system:masters"),
    ("kube-controller-manager", "system:kube-controller-manager", ""),
    ("kube-scheduler", "system:kube-scheduler", ""),
    ("kube-proxy", "system:kube-proxy", ""),
];
/// The API server is ready after three seconds on an idle machine.
const READY_WITHIN: Duration = Duration::from_secs(90);
/// Bytes of randomness in a token.
const TOKEN_BYTES: usize = 16;

/// What is started, in this order.
pub(super) struct ControlPlane<'a> {
    directory: PathBuf,
    record: &'a mut Record,
}

impl<'a> ControlPlane<'a> {
    pub(super) fn of(record: &'a mut Record) -> Self {
        Self { directory: Record::directory(record.addresses.id()), record }
    }

    /// Starts all four and returns when the API server is ready.
    pub(super) fn start(mut self) -> Result<()> {
        let addresses = self.record.addresses;
        pki::write(&self.directory.join("pki"), &addresses)?;
        write_users(&self.directory, &addresses)?;
        let flags = flags(&self.directory, &addresses);
        self.spawn("etcd", &flags["etcd"])?;
        self.spawn("kube-apiserver", &flags["kube-apiserver"])?;
        let (log, api) = (self.log("kube-apiserver"), self.record.processes["kube-apiserver"].clone());
        watch::until(&format!("kube-apiserver is ready (see {})", log.display()), READY_WITHIN, || {
            if !process::is_alive(&api) {
                return Ok(None);
            }
            let mut kubectl = Command::new(self.record.programs.join("kubectl"));
            kubectl.env("KUBECONFIG", self.directory.join("admin.conf")).args(["get", "--raw", "/readyz"]);
            shell::output(&mut kubectl).map(Some)
        })?;
        self.spawn("kube-controller-manager", &flags["kube-controller-manager"])?;
        self.spawn("kube-scheduler", &flags["kube-scheduler"])
    }

    fn log(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.log"))
    }

    fn spawn(&mut self, name: &str, flags: &str) -> Result<()> {
        let program = self.record.programs.join(name).to_string_lossy().into_owned();
        let line: Vec<String> = [program].into_iter().chain(flags.split_whitespace().map(str::to_owned)).collect();
        let place = Place::open(&self.record.cgroups[PART].unified, None)?;
        let started = process::spawn(&line, &[], place, &self.log(name))?;
        self.record.processes.insert(name.to_owned(), started);
        self.record.save()
    }
}

/// Every program's command line. Nothing here has a blank in it.
fn flags(directory: &Path, addresses: &Addresses) -> BTreeMap<&'static str, String> {
    let (here, pki) = (directory.display(), directory.join("pki"));
    let (pki, store, host) = (pki.display(), addresses.store(), addresses.host().0);
    let (services, services6) = addresses.services();
    let etcd = format!(
        "--data-dir={here}/etcd --unsafe-no-fsync --log-level=warn --listen-client-urls=http://{store}:2379 \
         --advertise-client-urls=http://{store}:2379 --listen-peer-urls=http://{store}:2380"
    );
    // Webhooks are called by the endpoints' own addresses: no kube-proxy runs beside the API server.
    let api = format!(
        "--etcd-servers=http://{store}:2379 --bind-address={host} --advertise-address={host} \
         --tls-cert-file={pki}/apiserver.crt --tls-private-key-file={pki}/apiserver.key --client-ca-file={pki}/ca.crt \
         --token-auth-file={here}/tokens.csv --authorization-mode=Node,RBAC \
         --enable-admission-plugins=NodeRestriction --service-cluster-ip-range={services},{services6} \
         --service-account-issuer=https://kubernetes.default.svc.cluster.local \
         --service-account-key-file={pki}/sa.pub --service-account-signing-key-file={pki}/sa.key \
         --allow-privileged --kubelet-preferred-address-types=InternalIP --enable-aggregator-routing"
    );
    // At the usual rate the default service account comes seconds late, and pods are refused until then.
    let controllers = format!(
        "--kubeconfig={here}/kube-controller-manager.conf --leader-elect=false --use-service-account-credentials \
         --kube-api-qps=500 --kube-api-burst=1000 --service-account-private-key-file={pki}/sa.key \
         --root-ca-file={pki}/ca.crt --cluster-signing-cert-file={pki}/ca.crt \
         --cluster-signing-key-file={pki}/ca.key --secure-port=0 --flex-volume-plugin-dir={here}/flex"
    );
    let scheduler = format!("--kubeconfig={here}/kube-scheduler.conf --leader-elect=false --secure-port=0");
    BTreeMap::from([
        ("etcd", etcd),
        ("kube-apiserver", api),
        ("kube-controller-manager", controllers),
        ("kube-scheduler", scheduler),
    ])
}

/// A token and a kubeconfig for each user, `NAME.conf`.
fn write_users(directory: &Path, addresses: &Addresses) -> Result<()> {
    let nodes = (1..=MOST_NODES).map(|number| {
        let name = format!("n{number}");
        (name.clone(), format!("system:node:{name}"), "system:nodes".to_owned())
    });
    let others = USERS.iter().map(|(name, user, groups)| (name.to_string(), user.to_string(), groups.to_string()));
    let mut tokens = String::new();
    for (name, user, groups) in others.chain(nodes) {
        let token = token()?;
        tokens.push_str(&format!("{token},{user},{user},\"{groups}\"\n"));
        let config = configuration::kubeconfig(addresses, &directory.join("pki/ca.crt"), &token);
        files::replace(&directory.join(format!("{name}.conf")), &config, 0o600)?;
    }
    files::replace(&directory.join("tokens.csv"), &tokens, 0o600)
}

fn token() -> Result<String> {
    use std::io::Read;
    let mut bytes = [0; TOKEN_BYTES];
    let random = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    random.context("read /dev/urandom")?;
    Ok(tools::hex(&bytes))
}
