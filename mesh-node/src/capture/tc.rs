//! Attachment to a workload's interfaces: tcx links where the kernel has them (6.6), else clsact filters.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use aya::Ebpf;
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, qdisc_add_clsact};
use aya::programs::{Program, SchedClassifier, TcAttachType};
use futures_util::TryStreamExt;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle};

use super::TcMode;
use super::error::{CaptureError, context};
use super::netlink::{errno_of, with_netlink};
use super::netns::{Interface, LinkLayer};
use super::pins::{InterfacePin, MOVED, entries};
use super::programs::{
    EGRESS_L2_PROGRAM, EGRESS_L3_PROGRAM, HOST_EGRESS_PROGRAM, HOST_INGRESS_PROGRAM, INGRESS_PROGRAM,
    INTERFACE_PROGRAMS, Programs, existing_link, is_at_node_end,
};
use super::sys::{self, AttachType, BPF_F_BEFORE, Target};

/// Our filter's place among clsact filters: first, and always the same, so that the next version replaces it.
const CLSACT_PRIORITY: u16 = 1;
const CLSACT_HANDLE: tc::TcHandle = tc::TcHandle::new(0, 1);

/// Both programs of a workload's interface. Called in its namespace.
pub(super) fn attach(
    programs: &mut Programs,
    mode: TcMode,
    directory: &Path,
    interface: &Interface,
) -> Result<(), CaptureError> {
    let egress = match interface.link_layer {
        LinkLayer::Ethernet => EGRESS_L2_PROGRAM,
        LinkLayer::None => EGRESS_L3_PROGRAM,
    };
    attach_one(programs, mode, &Place { directory, interface, program: egress }, Way::Egress)?;
    attach_one(programs, mode, &Place { directory, interface, program: INGRESS_PROGRAM }, Way::Ingress)
}

/// Both programs of the node's end of a workload's link. Called in the node's namespace, after [`attach`]: what they let pass is
/// guarded inside.
pub(super) fn attach_node_end(
    programs: &mut Programs,
    mode: TcMode,
    directory: &Path,
    interface: &Interface,
) -> Result<(), CaptureError> {
    attach_one(programs, mode, &Place { directory, interface, program: HOST_INGRESS_PROGRAM }, Way::Ingress)?;
    attach_one(programs, mode, &Place { directory, interface, program: HOST_EGRESS_PROGRAM }, Way::Egress)
}

/// Undoes [`attach_node_end`]. Called in the node's namespace.
pub(super) fn detach_node_end(directory: &Path, interface: &Interface) -> io::Result<()> {
    for program in [HOST_EGRESS_PROGRAM, HOST_INGRESS_PROGRAM] {
        let place = Place { directory, interface, program };
        for clsact in [false, true] {
            let pin = place.pin(clsact);
            if pin.exists() {
                if clsact {
                    detach_clsact(interface, program)?;
                }
                std::fs::remove_file(pin)?;
            }
        }
    }
    Ok(())
}

/// Which way the packets go that a program sees.
#[derive(Clone, Copy)]
enum Way {
    Ingress,
    Egress,
}

fn attach_one(programs: &mut Programs, mode: TcMode, place: &Place<'_>, way: Way) -> Result<(), CaptureError> {
    let (tcx, clsact) = match way {
        Way::Ingress => (AttachType::TcxIngress, TcAttachType::Ingress),
        Way::Egress => (AttachType::TcxEgress, TcAttachType::Egress),
    };
    match mode {
        TcMode::Auto if attach_tcx(programs, place, tcx)? => Ok(()),
        TcMode::Auto | TcMode::Clsact => attach_clsact(programs, place, clsact),
    }
}

struct Place<'a> {
    directory: &'a Path,
    interface: &'a Interface,
    program: &'static str,
}

impl Place<'_> {
    fn pin(&self, clsact: bool) -> std::path::PathBuf {
        let pin = InterfacePin { index: self.interface.index, program: self.program, clsact };
        self.directory.join(pin.file_name())
    }

    fn describe(&self) -> String {
        format!("attach {} to interface {}", self.program, self.interface.name)
    }
}

/// False if the kernel has no tcx.
fn attach_tcx(programs: &Programs, place: &Place<'_>, kind: AttachType) -> Result<bool, CaptureError> {
    let pin = place.pin(false);
    let what = || place.describe();
    let program = programs.fd(place.program)?;
    if let Some(link) = existing_link(&pin)? {
        let info = context(sys::link_info(link.as_fd()), what)?;
        if context(sys::links_at(place.interface.index, kind), what)?.contains(&info.id) {
            context(sys::update_link(link.as_fd(), program), what)?;
            return Ok(true);
        }
        context(put_aside(&pin, place.program, &info), what)?;
    }
    let link = match sys::link(program, Target::Interface(place.interface.index), kind, BPF_F_BEFORE) {
        Ok(link) => link,
        // An attach type that the kernel does not know, before 6.6.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Ok(false),
        Err(source) => return Err(CaptureError::Io { what: what(), source }),
    };
    context(sys::pin(link.as_fd(), &pin), what)?;
    Ok(true)
}

/// The pin of another interface that had this index. One that lives on in another namespace keeps its program.
fn put_aside(pin: &Path, program: &str, link: &sys::LinkInfo) -> io::Result<()> {
    if is_detached(link) {
        return std::fs::remove_file(pin);
    }
    std::fs::rename(pin, pin.with_file_name(format!("{MOVED}{}_{program}", link.id)))
}

/// Whether the interface of a tcx link is gone.
fn is_detached(link: &sys::LinkInfo) -> bool {
    link.target & u64::from(u32::MAX) == 0
}

/// Removes pins of interfaces that are gone: a workload may make and delete as many as it likes. `inside` are its own,
/// `outside` the node's.
pub(super) fn prune(directory: &Path, inside: &[Interface], outside: &[Interface]) -> Result<(), CaptureError> {
    let what = || format!("remove what is left in {}", directory.display());
    for path in context(entries(directory), what)? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let moved = name.strip_prefix(MOVED);
        let Some(pin) = InterfacePin::parse(moved.unwrap_or(name), &INTERFACE_PROGRAMS) else { continue };
        let gone = if pin.clsact {
            let present = if is_at_node_end(pin.program) { outside } else { inside };
            !present.iter().any(|interface| interface.index == pin.index)
        } else {
            let Some(link) = existing_link(&path)? else { continue };
            is_detached(&context(sys::link_info(link.as_fd()), what)?)
        };
        if gone {
            context(std::fs::remove_file(&path), what)?;
        }
    }
    Ok(())
}

/// The filter holds the program; the pin beside it says that the filter is ours.
fn attach_clsact(programs: &mut Programs, place: &Place<'_>, kind: TcAttachType) -> Result<(), CaptureError> {
    let pin = place.pin(true);
    let what = || place.describe();
    let name = &place.interface.name;
    context(require_clsact(place.interface), what)?;
    let classifier = classifier(&mut programs.object, place.program)?;
    // The filter may be gone with its interface, or taken away by root of the workload.
    let replaced = if pin.exists() { replace_filter(classifier, name, kind).ok() } else { None };
    let link = match replaced {
        Some(link) => link,
        None => context(create_filter(classifier, name, kind), what)?,
    };
    // Dropping the link would detach the filter, which has to outlive this process.
    std::mem::forget(link);
    let temporary = pin.with_file_name("new");
    // A process that ended here left it.
    let _absent = std::fs::remove_file(&temporary);
    let pinned = sys::pin(programs.fd(place.program)?, &temporary).and_then(|()| std::fs::rename(&temporary, &pin));
    context(pinned, what)
}

fn replace_filter(program: &mut SchedClassifier, name: &str, kind: TcAttachType) -> io::Result<SchedClassifierLink> {
    let link = SchedClassifierLink::attached(name, kind, CLSACT_PRIORITY, CLSACT_HANDLE, None)?;
    let id = program.attach_to_link(link).map_err(io::Error::other)?;
    program.take_link(id).map_err(io::Error::other)
}

fn create_filter(program: &mut SchedClassifier, name: &str, kind: TcAttachType) -> io::Result<SchedClassifierLink> {
    let options =
        TcAttachOptions::Netlink(NlOptions { priority: CLSACT_PRIORITY, handle: CLSACT_HANDLE, classid: None });
    let id = program.attach_with_options(name, kind, options).map_err(io::Error::other)?;
    program.take_link(id).map_err(io::Error::other)
}

/// Sees to it that there is a clsact. Its older kin, `ingress`, takes filters of both directions and runs them all on
/// what comes in.
fn require_clsact(interface: &Interface) -> io::Result<()> {
    let index = interface.index.cast_signed();
    let kind = with_netlink(|handle| async move {
        let mut all = handle.qdisc().get().index(index).execute();
        while let Some(qdisc) = all.try_next().await.map_err(errno_of)? {
            if qdisc.header.index == index && qdisc.header.parent == TcHandle::CLSACT {
                return Ok(qdisc.attributes.into_iter().find_map(|attribute| match attribute {
                    TcAttribute::Kind(kind) => Some(kind),
                    _ => None,
                }));
            }
        }
        Ok(None)
    })?;
    match kind.as_deref() {
        None => qdisc_add_clsact(&interface.name).map_err(io::Error::other),
        Some("clsact") => Ok(()),
        Some(other) => Err(io::Error::other(format!("its queueing discipline {other} is in the place of clsact"))),
    }
}

/// Removes a clsact filter; one that the workload removed itself is fine. Called in the interface's namespace.
pub(super) fn detach_clsact(interface: &Interface, program: &str) -> io::Result<()> {
    let kind = match program {
        INGRESS_PROGRAM | HOST_INGRESS_PROGRAM => TcAttachType::Ingress,
        _ => TcAttachType::Egress,
    };
    let link = SchedClassifierLink::attached(&interface.name, kind, CLSACT_PRIORITY, CLSACT_HANDLE, None)?;
    // Dropping detaches, but would hide the error.
    match aya::programs::links::Link::detach(link) {
        // No such filter, or (`EINVAL`) no clsact to have it.
        Err(error) if matches!(cause_of(&error), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
        result => result.map_err(io::Error::other),
    }
}

/// The system call's error among the causes.
fn cause_of(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        cause = error.source();
    }
    None
}

fn classifier<'a>(object: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, CaptureError> {
    match object.program_mut(name) {
        Some(Program::SchedClassifier(program)) => Ok(program),
        Some(_) | None => Err(CaptureError::NoProgram(name)),
    }
}
