//! The kernel programs: loading them, and putting them in the place of their predecessors.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use aya::programs::Program;
use aya::{Ebpf, EbpfLoader};
use mesh_ebpf_common::maps;

use super::error::{CaptureError, context};
use super::pins::{InterfacePin, LOOKUP, MOVED, Pins, entries};
use super::sys::{self, AttachType, Target};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf.o"));

/// Programs attached to the workloads' cgroup. The order of attachment matters: whoever is rewritten must be noted.
pub(super) const CGROUP_PROGRAMS: [(&str, AttachType); 7] = [
    ("sock_ops", AttachType::SockOps),
    ("getpeername4", AttachType::Getpeername4),
    ("getpeername6", AttachType::Getpeername6),
    ("getsockname4", AttachType::Getsockname4),
    ("getsockname6", AttachType::Getsockname6),
    ("connect4", AttachType::Connect4),
    ("connect6", AttachType::Connect6),
];
/// Attached to each workload's namespace.
pub(super) const LOOKUP_PROGRAM: &str = "lookup_listener";
/// Attached to each of a workload's interfaces.
pub(super) const INGRESS_PROGRAM: &str = "tc_ingress";
/// For interfaces with Ethernet headers.
pub(super) const EGRESS_L2_PROGRAM: &str = "tc_egress_l2";
/// For interfaces without.
pub(super) const EGRESS_L3_PROGRAM: &str = "tc_egress_l3";
/// For the node's end of a workload's link: what comes out of the workload.
pub(super) const HOST_INGRESS_PROGRAM: &str = "tc_host_ingress";
/// For the node's end of a workload's link: what goes into the workload.
pub(super) const HOST_EGRESS_PROGRAM: &str = "tc_host_egress";
/// All that attach to interfaces.
pub(super) const INTERFACE_PROGRAMS: [&str; 5] =
    [INGRESS_PROGRAM, EGRESS_L2_PROGRAM, EGRESS_L3_PROGRAM, HOST_INGRESS_PROGRAM, HOST_EGRESS_PROGRAM];
/// Where the programs have the id of the pods' cgroup.
const PODS_CGROUP: &str = "PODS_CGROUP";

/// Whether a program attaches to an interface of the node's, not of the workload's.
pub(super) fn is_at_node_end(program: &str) -> bool {
    program == HOST_INGRESS_PROGRAM || program == HOST_EGRESS_PROGRAM
}

/// Size of the built-in object in bytes; `None` when the binary was built without.
pub fn object_size() -> Option<usize> {
    (!OBJECT.is_empty()).then_some(OBJECT.len())
}

/// The loaded programs of this process' version.
pub(super) struct Programs {
    fds: BTreeMap<&'static str, OwnedFd>,
}

impl Programs {
    /// Loads the object; its maps are those that are pinned already, or are created and pinned now.
    pub(super) fn load(pins: &Pins, pods_cgroup: u64, sizes: &[(&'static str, u32)]) -> Result<Self, CaptureError> {
        if OBJECT.is_empty() {
            return Err(CaptureError::NoObject);
        }
        let mut loader = EbpfLoader::new();
        loader.override_global(PODS_CGROUP, &pods_cgroup, true);
        for name in maps::ALL {
            loader.map_pin_path(name, pins.map(name));
        }
        for (name, entries) in sizes {
            loader.map_max_entries(name, *entries);
        }
        let mut object = loader.load(OBJECT).map_err(|e| CaptureError::Load(Box::new(e)))?;
        let names = CGROUP_PROGRAMS.iter().map(|(name, _)| *name).chain(INTERFACE_PROGRAMS).chain([LOOKUP_PROGRAM]);
        let mut fds = BTreeMap::new();
        for name in names {
            fds.insert(name, load_program(&mut object, name)?);
        }
        Ok(Self { fds })
    }

    pub(super) fn fd(&self, program: &'static str) -> Result<BorrowedFd<'_>, CaptureError> {
        self.fds.get(program).map(AsFd::as_fd).ok_or(CaptureError::NoProgram(program))
    }

    /// Attaches to the cgroup, or replaces what is attached there, hook by hook; never a moment without a program.
    pub(super) fn attach_to_cgroup(&self, pins: &Pins, cgroup: &Path) -> Result<(), CaptureError> {
        let describe = || format!("open cgroup {}", cgroup.display());
        let directory = context(std::fs::File::open(cgroup), describe)?;
        let wanted = context(super::cgroup::id(cgroup), describe)?;
        for (program, kind) in CGROUP_PROGRAMS {
            let pin = pins.link(program);
            let what = || format!("attach {program} to cgroup {}", cgroup.display());
            if let Some(link) = existing_link(&pin)? {
                let found = context(sys::link_info(link.as_fd()), what)?.target;
                if found != wanted && found != 0 {
                    return Err(CaptureError::OtherCgroup { pin, found, wanted: cgroup.to_owned() });
                }
                if found == wanted {
                    context(sys::update_link(link.as_fd(), self.fd(program)?), what)?;
                    continue;
                }
                // The cgroup that it served is gone; nothing runs there any more.
                context(std::fs::remove_file(&pin), what)?;
            }
            let link = context(sys::link(self.fd(program)?, Target::Fd(directory.as_fd()), kind, 0), what)?;
            context(sys::pin(link.as_fd(), &pin), what)?;
        }
        Ok(())
    }

    /// Replaces the programs of every workload that was enrolled before. A clsact filter can be replaced only with its
    /// namespace at hand, which the next enrolment brings.
    pub(super) fn replace_in_workloads(&self, pins: &Pins) -> Result<(), CaptureError> {
        let dirs = context(entries(&pins.workloads()), || format!("read {}", pins.workloads().display()))?;
        for dir in dirs {
            for pin in context(entries(&dir), || format!("read {}", dir.display()))? {
                let Some(program) = pin.file_name().and_then(|name| program_of(name.to_str()?)) else { continue };
                let Some(link) = existing_link(&pin)? else { continue };
                match sys::update_link(link.as_fd(), self.fd(program)?) {
                    Ok(()) => {}
                    // The interface or the namespace is gone; unenrolment will remove the pin.
                    Err(e) if e.raw_os_error() == Some(libc::ENOLINK) => {}
                    Err(source) => {
                        let what = format!("replace {}", pin.display());
                        return Err(CaptureError::Io { what, source });
                    }
                }
            }
        }
        Ok(())
    }
}

fn program_of(file_name: &str) -> Option<&'static str> {
    if file_name == LOOKUP {
        return Some(LOOKUP_PROGRAM);
    }
    let file_name = file_name.strip_prefix(MOVED).unwrap_or(file_name);
    InterfacePin::parse(file_name, &INTERFACE_PROGRAMS).filter(|pin| !pin.clsact).map(|pin| pin.program)
}

/// The link pinned at `path`, if there is one.
pub(super) fn existing_link(path: &Path) -> Result<Option<OwnedFd>, CaptureError> {
    match sys::open_pin(path) {
        Ok(link) => Ok(Some(link)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CaptureError::Io { what: format!("open {}", path.display()), source }),
    }
}

fn load_program(object: &mut Ebpf, name: &'static str) -> Result<OwnedFd, CaptureError> {
    let program = object.program_mut(name).ok_or(CaptureError::NoProgram(name))?;
    let loaded = match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SockOps(program) => program.load(),
        // The object has no other kinds.
        _ => return Err(CaptureError::NoProgram(name)),
    };
    let failed = |e| CaptureError::Program { program: name, source: Box::new(e) };
    loaded.map_err(failed)?;
    let fd = program.fd().map_err(failed)?;
    context(fd.as_fd().try_clone_to_owned(), || format!("keep program {name}"))
}
