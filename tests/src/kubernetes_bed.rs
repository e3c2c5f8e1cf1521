//! A cluster with the mesh on it, installed by its chart.

use std::path::{Path, PathBuf};

use mesh_ctl::sandbox::binaries_beside;

use crate::cluster::{Cluster, Dns, Image};
use crate::cluster_bed::ClusterBed;

/// Programs of an image.
const IMAGES: [(&str, &[&str]); 2] =
    [("mesh-controller", &["mesh-controller"]), ("mesh-node", &["mesh-node", "mesh-cni"])];

/// `client` on n1 and `web`, with a service, on n2, in namespace `shop`; and `stranger` in `default`, which is in no mesh.
pub const SHOP: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  nodeName: n2
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: localhost/busybox:1
    command: [sh, -c, "mkdir -p /w && hostname >/w/name && httpd -f -p 8080 -h /w"]
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop}
spec:
  nodeName: n1
  terminationGracePeriodSeconds: 0
  containers: [{name: c, image: "localhost/busybox:1", command: [sleep, infinity]}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: stranger}
spec:
  nodeName: n1
  terminationGracePeriodSeconds: 0
  containers: [{name: c, image: "localhost/busybox:1", command: [sleep, infinity]}]
"#;

/// Takes [`SHOP`] into the mesh.
pub const SHOP_IN_THE_MESH: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
";

/// Who is not in the mesh gets in nowhere in this namespace.
pub fn strict(namespace: &str) -> String {
    format!(
        r"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: default, namespace: {namespace}}}
spec: {{mtls: {{mode: STRICT}}}}
"
    )
}

/// A two-node cluster with the mesh.
pub struct KubernetesBed {
    bed: ClusterBed,
}

impl KubernetesBed {
    /// Brings the cluster up, has `before` prepare it, and installs the mesh.
    ///
    /// # Panics
    /// Something of that fails; the report has what the mesh's parts have logged.
    pub fn up(values: &[&str], before: impl FnOnce(&Cluster)) -> Self {
        let bed = Self { bed: ClusterBed::up(2, Dns::CoreDns) };
        before(bed.cluster());
        bed.install(values).unwrap_or_else(|error| panic!("{error:#}\n{}", bed.logs()));
        bed
    }

    /// The cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.bed.cluster
    }

    fn install(&self, values: &[&str]) -> anyhow::Result<()> {
        let cluster = self.cluster();
        for (name, programs) in IMAGES {
            let mut image = Image::new(&format!("localhost/{name}:dev"));
            for program in programs {
                image = image.program(&format!("bin/{program}"), &binaries_beside()?.join(program))?;
            }
            cluster.load(&image)?;
        }
        let crds = tree().join("crds").display().to_string();
        cluster.kubectl(&["apply", "--server-side", "-f", &crds])?;
        let chart = tree().join("deploy/helm/mesh").display().to_string();
        let arguments = ["install", "mesh", &chart, "--namespace=istio-system", "--create-namespace"];
        let values = values.iter().flat_map(|value| ["--set", value]);
        cluster.helm(&arguments.into_iter().chain(values).collect::<Vec<_>>())?;
        for workload in ["deployment/mesh-controller", "daemonset/mesh-node"] {
            cluster.kubectl(&["-n", "istio-system", "rollout", "status", workload, "--timeout=60s"])?;
        }
        Ok(())
    }

    /// What a command in a pod prints.
    ///
    /// # Errors
    /// The command fails.
    pub fn exec(&self, namespace: &str, pod: &str, command: &[&str]) -> anyhow::Result<String> {
        let mut arguments = vec!["-n", namespace, "exec", pod, "--"];
        arguments.extend(command);
        self.cluster().kubectl(&arguments)
    }

    /// The proxy's log of a node.
    ///
    /// # Errors
    /// There is none.
    pub fn proxy_log(&self, node: &str) -> anyhow::Result<String> {
        let at = format!("--field-selector=spec.nodeName={node}");
        let name = ["-n", "istio-system", "get", "pod", "-l", "app=mesh-node", &at];
        let name = self.cluster().kubectl(&[&name[..], &["-o", "jsonpath={.items[0].metadata.name}"]].concat())?;
        self.cluster().kubectl(&["-n", "istio-system", "logs", name.trim(), "-c", "node-proxy"])
    }

    /// What the mesh's parts have logged last, and the state of the cluster.
    pub fn logs(&self) -> String {
        let of = |selector: &str| {
            let arguments =
                ["-n", "istio-system", "logs", "-l", selector, "--all-containers", "--prefix", "--tail=200"];
            self.cluster().kubectl(&arguments).unwrap_or_else(|error| error.to_string())
        };
        format!("{}\n{}\n{}", self.cluster().report(), of("app=mesh-controller"), of("app=mesh-node"))
    }
}

fn tree() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_owned()
}
