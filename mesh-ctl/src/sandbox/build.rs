//! A sandbox in existence: build, change, run things in it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::agent::control::{self, AgentStatus};
use super::execute::execute;
use super::layout::Layout;
use super::plan::{node_side_link, plan, plan_workload};
use super::process::{self, Place};
use super::state::{Lock, Mesh, Part, Phase, Process, State};
use super::topology::{Enrolment, Topology, Workload};
use super::{Progress, cgroup, files, manifests, names, netns, teardown};

/// A server has to listen within this time after its start.
const LISTENS_WITHIN: Duration = Duration::from_secs(10);
/// Workloads have to be enrolled within this time after their proxy is up.
const ENROLLED_WITHIN: Duration = Duration::from_secs(20);
/// How long a single part may take to end by itself before it is killed.
const PART_ENDS_WITHIN: Duration = Duration::from_secs(15);
/// Pause between looks.
pub(super) const POLL: Duration = Duration::from_millis(10);

/// A sandbox that was built. Changes take its lock for their own duration.
#[derive(Debug)]
pub struct Sandbox {
    /// Its paths.
    pub layout: Layout,
    pub(super) state: State,
}

impl Sandbox {
    /// Builds a sandbox: namespaces, links, cgroups, configuration, then the mesh (if any) and the workloads.
    ///
    /// # Errors
    /// The topology is not valid, the name is in use, or a step failed: then what was made is given back.
    pub fn up(name: &str, topology: Topology, mesh: Option<Mesh>, progress: Progress<'_>) -> Result<Self> {
        let mut sandbox = Self::network(name, topology, mesh, progress)?;
        match sandbox.start(progress) {
            Ok(()) => Ok(sandbox),
            Err(error) => Err(sandbox.abandon(error)),
        }
    }

    /// Builds namespaces, links, cgroups and configuration files; starts nothing.
    ///
    /// # Errors
    /// As [`Self::up`].
    pub fn network(name: &str, mut topology: Topology, mesh: Option<Mesh>, progress: Progress<'_>) -> Result<Self> {
        topology.check()?;
        require_root()?;
        let layout = Layout::of(name)?;
        let lock = Lock::take(&layout)?;
        if State::load(&layout)?.is_some() {
            bail!("the sandbox `{name}` exists already; end it with `mesh-ctl sandbox down --sandbox {name}`");
        }
        for workload in &mut topology.workloads {
            give_uid(workload)?;
        }
        let plan = plan(&topology, &layout);
        files::private_dir(&layout.run)?;
        let state = State::new(name, topology, mesh, plan.handles.clone());
        state.save(&layout)?;
        let sandbox = Self { layout, state };
        progress(&format!(
            "{} nodes, {} workloads: namespaces, links, cgroups",
            sandbox.state.topology.nodes.len(),
            sandbox.state.topology.workloads.len()
        ));
        let built = execute(&plan).and_then(|()| sandbox.write_files());
        match built {
            Ok(()) => Ok(sandbox),
            Err(error) => {
                drop(lock);
                Err(sandbox.abandon(error))
            }
        }
    }

    /// Opens a sandbox by its record.
    ///
    /// # Errors
    /// There is none, or its record cannot be read.
    pub fn open(name: &str) -> Result<Self> {
        let layout = Layout::of(name)?;
        match State::load(&layout)? {
            Some(state) => Ok(Self { layout, state }),
            None => bail!("there is no sandbox `{name}`; make one with `mesh-ctl sandbox up`"),
        }
    }

    /// Starts what does not run yet: the mesh, then the workloads' commands when all are enrolled.
    ///
    /// # Errors
    /// A part does not come up; its log is named.
    pub fn start(&mut self, progress: Progress<'_>) -> Result<()> {
        let _lock = Lock::take(&self.layout)?;
        if self.state.mesh.is_some() {
            self.start_mesh(progress)?;
            self.wait_enrolled()?;
        }
        let keys: Vec<String> =
            self.state.topology.workloads.iter().filter(|w| !w.command.is_empty()).map(Workload::key).collect();
        if !keys.is_empty() {
            progress(&format!("starting {}", keys.join(", ")));
        }
        for key in &keys {
            self.start_workload_locked(key)?;
        }
        self.wait_listening(&keys)?;
        self.state.phase = Phase::Up;
        self.state.save(&self.layout)
    }

    /// What it is and what runs.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The topology as it is now.
    pub fn topology(&self) -> &Topology {
        &self.state.topology
    }

    /// A workload by `NAME` or `NAME.NAMESPACE`.
    ///
    /// # Errors
    /// There is none; those that there are are named.
    pub fn workload(&self, name: &str) -> Result<&Workload> {
        self.state.topology.find(name).with_context(|| {
            let all: Vec<String> = self.state.topology.workloads.iter().map(Workload::key).collect();
            format!("no workload `{name}` in the sandbox `{}`; there are {}", self.layout.name, all.join(", "))
        })
    }

    /// Adds a workload: namespace, link, cgroup, files, pod object. It is neither announced nor started.
    ///
    /// # Errors
    /// It is not valid here, or a step failed.
    pub fn add_workload(&mut self, mut workload: Workload) -> Result<Workload> {
        let _lock = Lock::take(&self.layout)?;
        give_uid(&mut workload)?;
        let mut topology = self.state.topology.clone();
        let workload = topology.push_workload(workload);
        topology.check()?;
        let plan = plan_workload(&topology, &workload, &self.layout);
        // Not announced before it exists: the agent reads the topology.
        self.state.handles.extend(&plan.handles);
        self.state.save(&self.layout)?;
        execute(&plan)?;
        let enrolment = workload.enrolment;
        if let Some(last) = topology.workloads.last_mut().filter(|_| self.state.mesh.is_some()) {
            last.enrolment = Enrolment::None;
        }
        self.state.topology = topology;
        self.state.save(&self.layout)?;
        self.write_workload_files(&Workload { enrolment, ..workload.clone() })?;
        Ok(workload)
    }

    /// Takes a workload into the mesh or out of it, and waits for its node proxy's answer. Its pod object follows.
    ///
    /// # Errors
    /// The node proxy refuses; its words are given.
    pub fn enrol(&mut self, key: &str, enrolment: Enrolment) -> Result<()> {
        let _lock = Lock::take(&self.layout)?;
        let workload = self.workload_mut(key)?;
        workload.enrolment = enrolment;
        let workload = workload.clone();
        self.state.save(&self.layout)?;
        self.write_workload_files(&workload)?;
        let status = control::sync(&self.layout.agent_control())?;
        match status.workloads.iter().find(|w| w.workload == workload.key() && !w.enrolled) {
            Some(missing) => bail!("enrol {key}: {}", missing.why),
            None => Ok(()),
        }
    }

    /// Starts a workload's command and waits until its port listens.
    ///
    /// # Errors
    /// It does not start, or does not listen in time.
    pub fn start_workload(&mut self, key: &str) -> Result<()> {
        let _lock = Lock::take(&self.layout)?;
        self.start_workload_locked(key)?;
        self.wait_listening(&[key.to_string()])
    }

    /// Removes a workload: command, enrolment, pod object, namespace, cgroup.
    ///
    /// # Errors
    /// Something cannot be given back; it stays recorded.
    pub fn remove_workload(&mut self, key: &str) -> Result<()> {
        let _lock = Lock::take(&self.layout)?;
        let workload = self.workload(key)?.clone();
        let key = workload.key();
        self.end_part_locked(&Part::Workload(key.clone()))?;
        self.state.topology.workloads.retain(|w| w.key() != key);
        self.state.save(&self.layout)?;
        let _absent = std::fs::remove_file(self.layout.config().join(manifests::pod_file(&workload)));
        if self.state.processes.get(&Part::Agent).is_some_and(process::is_alive) {
            control::sync(&self.layout.agent_control())?;
        }
        cgroup::remove(&self.layout.pods_cgroup(&workload.node).join(&key))?;
        let link = super::plan::NetOp::DeleteLink(node_side_link(&workload));
        netns::run_in(&self.layout.netns(&workload.node), || super::links::apply(&[link]))?;
        let bound = self.layout.netns(&key);
        netns::remove(&bound)?;
        self.state.handles.netns.remove(&bound);
        let _absent = std::fs::remove_dir_all(self.layout.workload(&key));
        self.state.save(&self.layout)
    }

    /// A command that will run inside a workload: its cgroup, network namespace and names.
    ///
    /// # Errors
    /// There is no such workload.
    pub fn command(&self, workload: &str, program: &str) -> Result<Command> {
        let place = self.place(self.workload(workload)?)?;
        let mut command = Command::new(program);
        place.place(&mut command);
        Ok(command)
    }

    /// A command that will run in a host's network namespace (a node, or `controller`), outside all captured cgroups.
    ///
    /// # Errors
    /// There is no such host.
    pub fn host_command(&self, host: &str, program: &str) -> Result<Command> {
        let mut command = Command::new(program);
        self.host_place(host, "tools")?.place(&mut command);
        Ok(command)
    }

    /// The place of a workload's processes.
    ///
    /// # Errors
    /// Its namespace or cgroup is gone.
    pub fn place(&self, workload: &Workload) -> Result<Place> {
        let (key, dir) = (workload.key(), self.layout.workload(&workload.key()));
        let cgroup = self.layout.pods_cgroup(&workload.node).join(&key);
        Place::open(&cgroup, Some(&self.layout.netns(&key)))?
            .bind(&dir.join("hosts"), Path::new("/etc/hosts"))?
            .bind(&dir.join("resolv.conf"), Path::new("/etc/resolv.conf"))
    }

    /// A process of the sandbox: the record's, if it still runs.
    pub fn running(&self, part: &Part) -> Option<&Process> {
        self.state.processes.get(part).filter(|p| process::is_alive(p))
    }

    /// Parts that should run and do not.
    pub fn dead_parts(&self) -> Vec<Part> {
        let mut parts = Vec::new();
        if self.state.mesh.is_some() {
            parts.extend([Part::Controller, Part::Agent]);
            parts.extend(self.state.topology.nodes.iter().map(|n| Part::Node(n.name.clone())));
        }
        let commands = self.state.topology.workloads.iter().filter(|w| !w.command.is_empty());
        parts.extend(commands.map(|w| Part::Workload(w.key())));
        parts.retain(|part| self.running(part).is_none());
        parts
    }

    /// Ends one part: SIGTERM, then SIGKILL after a while.
    ///
    /// # Errors
    /// It survives.
    pub fn end_part(&mut self, part: &Part) -> Result<()> {
        let _lock = Lock::take(&self.layout)?;
        self.end_part_locked(part)
    }

    /// Ends the sandbox.
    ///
    /// # Errors
    /// Something is left; `down` can be repeated.
    pub fn down(self) -> Result<()> {
        teardown::down(&self.layout).map(|_| ())
    }

    pub(super) fn end_part_locked(&mut self, part: &Part) -> Result<()> {
        if let Some(process) = self.state.processes.get(part).cloned() {
            process::end_all(&[process], PART_ENDS_WITHIN)?;
            self.state.processes.remove(part);
            self.state.save(&self.layout)?;
        }
        Ok(())
    }

    pub(super) fn spawn(&mut self, part: Part, argv: &[String], env: &[(&str, &str)], place: Place) -> Result<()> {
        let process = process::spawn(argv, env, place, &self.layout.log(&part))?;
        self.state.processes.insert(part, process);
        self.state.save(&self.layout)
    }

    pub(super) fn host_place(&self, host: &str, part: &str) -> Result<Place> {
        let cgroup = self.layout.part_cgroup(part);
        cgroup::create(&cgroup)?;
        Place::open(&cgroup, Some(&self.layout.netns(host)))
    }

    fn start_workload_locked(&mut self, key: &str) -> Result<()> {
        let workload = self.workload(key)?.clone();
        let part = Part::Workload(workload.key());
        if self.running(&part).is_some() || workload.command.is_empty() {
            return Ok(());
        }
        let mut argv = workload.command.clone();
        if let Some(program) = argv.first_mut().filter(|p| *p == "mesh-ctl") {
            *program = self.own_binary()?.display().to_string();
        }
        let place = self.place(&workload)?;
        self.spawn(part, &argv, &[], place)
    }

    /// `mesh-ctl` itself: the one beside the mesh's binaries, for a library's user too.
    pub(super) fn own_binary(&self) -> Result<PathBuf> {
        let dir = match &self.state.mesh {
            Some(mesh) => mesh.binaries.clone(),
            None => super::mesh::binaries_beside()?,
        };
        super::mesh::binary(&dir, "mesh-ctl")
    }

    fn wait_listening(&self, keys: &[String]) -> Result<()> {
        let deadline = Instant::now() + LISTENS_WITHIN;
        for key in keys {
            let part = Part::Workload(key.clone());
            let Some(port) = self.workload(key)?.ready_port else { continue };
            let log = self.layout.log(&part);
            loop {
                let Some(process) = self.running(&part) else {
                    bail!("{key} ended at once; see {}", log.display());
                };
                if process::listens(process.pid, port) {
                    break;
                }
                if Instant::now() > deadline {
                    bail!("{key} does not listen on port {port}; see {}", log.display());
                }
                std::thread::sleep(POLL);
            }
        }
        Ok(())
    }

    fn wait_enrolled(&self) -> Result<()> {
        let deadline = Instant::now() + ENROLLED_WITHIN;
        loop {
            let status = control::status(&self.layout.agent_control())?;
            let missing = status.missing();
            if missing.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("not enrolled: {}; see `mesh-ctl sandbox logs`", missing.join("; "));
            }
            std::thread::sleep(POLL);
        }
    }

    /// What the agent knows.
    ///
    /// # Errors
    /// It does not run.
    pub fn agent_status(&self) -> Result<AgentStatus> {
        control::status(&self.layout.agent_control())
    }

    fn write_files(&self) -> Result<()> {
        for (name, text) in manifests::manifests(&self.state.topology)? {
            files::replace(&self.layout.config().join(name), &text, 0o600)?;
        }
        self.state.topology.workloads.iter().try_for_each(|w| self.write_names(w))
    }

    /// Pod object and names of one workload.
    fn write_workload_files(&self, workload: &Workload) -> Result<()> {
        let topology = Topology { workloads: vec![workload.clone()], ..self.state.topology.clone() };
        let file = manifests::pod_file(workload);
        if let Some(text) = manifests::manifests(&topology)?.get(&file) {
            files::replace(&self.layout.config().join(&file), text, 0o600)?;
        }
        self.write_names(workload)
    }

    fn write_names(&self, workload: &Workload) -> Result<()> {
        let dir = self.layout.workload(&workload.key());
        files::replace(&dir.join("hosts"), &names::hosts(&self.state.topology, workload), 0o644)?;
        files::replace(&dir.join("resolv.conf"), names::RESOLV_CONF, 0o644)
    }

    fn workload_mut(&mut self, name: &str) -> Result<&mut Workload> {
        let key = self.workload(name)?.key();
        self.state.topology.workloads.iter_mut().find(|w| w.key() == key).context("found just now")
    }

    /// Gives back what was made, because the builder cannot go on.
    fn abandon(self, error: anyhow::Error) -> anyhow::Error {
        match teardown::down(&self.layout) {
            Ok(_) => error,
            Err(second) => error.context(format!("and giving back what was made failed: {second:#}")),
        }
    }
}

/// A UID of its own for each creation, as Kubernetes gives it.
fn give_uid(workload: &mut Workload) -> Result<()> {
    if workload.uid.is_empty() {
        let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid").context("read a random UUID")?;
        workload.uid = uuid.trim().to_string();
    }
    Ok(())
}

fn require_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(anyhow::Error::new(crate::exit::NotPermitted("a sandbox makes network namespaces and cgroups".into())))
}
