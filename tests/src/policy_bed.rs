//! Policies applied as a user applies them, and connections tried one by one.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use mesh_api::admin::{AuthzAnswer, AuthzQuestion, Problem};
use mesh_ctl::sandbox::{Mesh, Topology, Workload, binaries_beside};

use crate::mesh_bed::MeshBed;
use crate::sandbox_bed::{Ran, finish, mesh_ctl};

/// A running mesh and the command line for it.
pub struct PolicyBed {
    /// The mesh.
    pub mesh: MeshBed,
}

/// Family of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];
}

/// A workload, labelled `app` by its own name, that returns every byte on these ports.
///
/// # Panics
/// The test's binaries are not built.
pub fn server(name: &str, node: &str, ports: &[u16]) -> Workload {
    let probe = probe().display().to_string();
    let argv = [probe, "serve".to_owned()].into_iter().chain(ports.iter().map(ToString::to_string));
    let workload = Workload::new(name, node).label("app", name).runs(argv);
    match ports.first() {
        Some(port) => workload.ready_on(*port),
        None => workload,
    }
}

fn probe() -> PathBuf {
    binaries_beside().expect("binaries").join("mesh-probe")
}

impl PolicyBed {
    /// Builds a sandbox; the name is a part of its name, a few letters.
    pub fn up(name: &str, topology: Topology) -> Self {
        Self::with(name, topology, |_mesh| {})
    }

    /// As [`Self::up`], with other arguments for the parts.
    ///
    /// # Panics
    /// A binary is not built.
    pub fn with(name: &str, topology: Topology, change: impl FnOnce(&mut Mesh)) -> Self {
        let mut mesh = Mesh::beside().expect("binaries");
        change(&mut mesh);
        Self { mesh: MeshBed::with(name, topology, mesh) }
    }

    /// `mesh-ctl ARGUMENTS` for this sandbox.
    pub fn ctl(&self, arguments: &[&str]) -> Ran {
        let mut command = Command::new(mesh_ctl());
        command.args(arguments).env("MESH_SANDBOX", &self.mesh.sandbox.layout.name).stdin(Stdio::null());
        finish(command)
    }

    /// `mesh-ctl sandbox apply` of a file with this name and contents, in force when this returns; what is wrong with it.
    ///
    /// # Panics
    /// It cannot be applied at all.
    pub fn apply(&self, file: &str, text: &str) -> Vec<Problem> {
        let path = self.given(file);
        std::fs::create_dir_all(path.parent().expect("directory")).expect("create the directory");
        std::fs::write(&path, text).expect("write the file");
        let ran = self.ctl(&["sandbox", "apply", &path.display().to_string(), "-o", "json"]);
        let problems: Vec<Problem> = serde_json::from_value(ran.json()["items"].clone()).expect("problems");
        let is_refused = problems.iter().any(|problem| problem.severity == "error");
        ran.exits(if is_refused { 79 } else { 0 });
        problems
    }

    /// `mesh-ctl sandbox delete` of a file that was applied under this name.
    pub fn delete(&self, file: &str) {
        self.ctl(&["sandbox", "delete", &self.given(file).display().to_string()]).succeeds();
    }

    fn given(&self, file: &str) -> PathBuf {
        self.mesh.sandbox.layout.run.join("given").join(file)
    }

    /// A workload's address.
    ///
    /// # Panics
    /// There is no such workload.
    pub fn ip(&self, workload: &str, family: Family) -> IpAddr {
        let workload = self.sandbox_workload(workload);
        let [v4, v6] = self.mesh.sandbox.topology().addresses(workload).expect("address");
        match family {
            Family::V4 => v4,
            Family::V6 => v6,
        }
    }

    fn sandbox_workload(&self, name: &str) -> &Workload {
        self.mesh.sandbox.workload(name).expect("workload")
    }

    /// One connection from a workload to each address, with a marker there and back; which of them came about.
    ///
    /// # Panics
    /// The probe does not answer for each.
    pub fn reaches(&self, from: &str, to: &[SocketAddr]) -> Vec<bool> {
        let mut command = self.mesh.sandbox.command(from, &probe().display().to_string()).expect("workload");
        command.arg("once").args(to.iter().map(ToString::to_string)).stdin(Stdio::null());
        let output = command.output().expect("run the probe");
        let text = String::from_utf8_lossy(&output.stdout);
        let answers: Vec<bool> = text.lines().map(|line| line == "ok").collect();
        assert_eq!(answers.len(), to.len(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        answers
    }

    /// Whether one connection comes about: IPv4, to the workload itself.
    pub fn reaches_one(&self, from: &str, to: &str, port: u16) -> bool {
        self.reaches(from, &[SocketAddr::new(self.ip(to, Family::V4), port)])[0]
    }

    /// What the destination's node says that it would do.
    ///
    /// # Panics
    /// It does not answer.
    pub fn authz(&self, from: &str, to: &str, (family, port): (Family, u16)) -> AuthzAnswer {
        let question = AuthzQuestion {
            client: self.identity(from),
            source: self.ip(from, family).to_string(),
            destination: SocketAddr::new(self.ip(to, family), port).to_string(),
        };
        let socket = self.mesh.sandbox.layout.node_admin(&self.sandbox_workload(to).node);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(mesh_ctl::admin::post(&socket, "/authz", &question)).expect("answer")
    }

    /// SPIFFE ID of a workload in the mesh; empty for one outside.
    fn identity(&self, workload: &str) -> String {
        let workload = self.sandbox_workload(workload);
        match workload.enrolment {
            mesh_ctl::sandbox::Enrolment::None => String::new(),
            mesh_ctl::sandbox::Enrolment::Mesh => {
                format!("spiffe://cluster.local/ns/{}/sa/{}", workload.namespace, workload.service_account)
            }
        }
    }
}
