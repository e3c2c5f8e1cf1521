//! Names of workloads and services as people write them: `POD`, `POD.NS`, `pod/NAME`, `svc/NAME[.NS]`.

use anyhow::{Result, anyhow};
use mesh_api::admin::{EndpointRow, ServiceRow, WorkloadRow};

use crate::cli::Global;
use crate::exit::Usage;
use crate::render::OnNode;
use crate::target::{Section, Target};

/// The configuration that names are looked up in: what any node has, because all have the same.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) workloads: Vec<WorkloadRow>,
    pub(super) services: Vec<ServiceRow>,
    namespace: String,
}

/// A destination.
#[derive(Debug)]
pub(super) enum Destination<'a> {
    Workload(&'a WorkloadRow),
    Service(&'a ServiceRow),
}

impl Directory {
    /// Asks the nodes; the first that answers is believed.
    pub(super) async fn of(target: &Target, global: &Global) -> Result<Self> {
        let namespace = global.namespace.as_deref().unwrap_or(target.namespace()).to_owned();
        let workloads = first(target.gather::<Vec<WorkloadRow>>(Section::Workloads).await)?;
        let services = first(target.gather::<Vec<ServiceRow>>(Section::Services).await)?;
        Ok(Self { workloads: workloads.item, services: services.item, namespace })
    }

    /// The workload of `POD`, `POD.NS` or `pod/POD[.NS]`.
    pub(super) fn workload(&self, text: &str) -> Result<&WorkloadRow> {
        let plain = text.strip_prefix("pod/").unwrap_or(text);
        let (name, namespace) = self.split(plain);
        let all =
            || self.workloads.iter().map(|w| format!("{}.{}", w.name, w.namespace)).collect::<Vec<_>>().join(", ");
        self.workloads.iter().find(|w| w.name == name && w.namespace == namespace).ok_or_else(|| {
            anyhow!(Usage(format!("no workload `{name}` in namespace `{namespace}`; there are {}", all())))
        })
    }

    /// A workload, or the service of `svc/NAME[.NS]`.
    pub(super) fn destination(&self, text: &str) -> Result<Destination<'_>> {
        let Some(plain) = text.strip_prefix("svc/") else { return self.workload(text).map(Destination::Workload) };
        let (name, namespace) = self.split(plain);
        let all =
            || self.services.iter().map(|s| format!("svc/{}.{}", s.name, s.namespace)).collect::<Vec<_>>().join(", ");
        let found = self.services.iter().find(|s| s.name == name && s.namespace == namespace);
        let found = found.map(Destination::Service);
        found.ok_or_else(|| {
            anyhow!(Usage(format!("no service `{name}` in namespace `{namespace}`; there are {}", all())))
        })
    }

    /// The workload behind an endpoint.
    pub(super) fn endpoint(&self, endpoint: &EndpointRow) -> Option<&WorkloadRow> {
        self.workloads.iter().find(|w| w.uid == endpoint.workload)
    }

    fn split<'a>(&'a self, text: &'a str) -> (&'a str, &'a str) {
        text.rsplit_once('.').unwrap_or((text, &self.namespace))
    }
}

fn first<T>(gathered: crate::target::Gathered<T>) -> Result<OnNode<T>> {
    let mut errors = gathered.errors;
    match gathered.answers.into_iter().next() {
        Some(answer) => Ok(answer),
        None if errors.is_empty() => Err(anyhow!(crate::exit::Unavailable("no node to ask".to_owned()))),
        None => Err(errors.swap_remove(0)),
    }
}
