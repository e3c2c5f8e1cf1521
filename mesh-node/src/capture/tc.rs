//! Attachment to a workload's interfaces: tcx links where the kernel has them (6.6), else clsact filters.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use super::TcMode;
use super::clsact::{self, Way};
use super::error::{CaptureError, context};
use super::netns::{Interface, LinkLayer};
use super::pins::{InterfacePin, MOVED, entries};
use super::programs::{
    EGRESS_L2_PROGRAM, EGRESS_L3_PROGRAM, HOST_EGRESS_PROGRAM, HOST_INGRESS_PROGRAM, INGRESS_PROGRAM,
    INTERFACE_PROGRAMS, Programs, existing_link, is_at_node_end,
};
use super::sys::{self, AttachType, BPF_F_BEFORE, Target};

/// Both programs of a workload's interface. Called in its namespace.
pub(super) fn attach(
    programs: &Programs,
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
    programs: &Programs,
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
                    detach_clsact(interface.index, program)?;
                }
                std::fs::remove_file(pin)?;
            }
        }
    }
    Ok(())
}

fn attach_one(programs: &Programs, mode: TcMode, place: &Place<'_>, way: Way) -> Result<(), CaptureError> {
    let tcx = match way {
        Way::Ingress => AttachType::TcxIngress,
        Way::Egress => AttachType::TcxEgress,
    };
    match mode {
        TcMode::Auto if attach_tcx(programs, place, tcx)? => Ok(()),
        TcMode::Auto | TcMode::Clsact => attach_clsact(programs, place, way),
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
fn attach_clsact(programs: &Programs, place: &Place<'_>, way: Way) -> Result<(), CaptureError> {
    let pin = place.pin(true);
    let what = || place.describe();
    let program = programs.fd(place.program)?;
    let index = place.interface.index;
    context(clsact::require(index), what)?;
    context(clsact::set(index, way, program, place.program, !pin.exists()), what)?;
    let temporary = pin.with_file_name("new");
    // A process that ended here left it.
    let _absent = std::fs::remove_file(&temporary);
    context(sys::pin(program, &temporary).and_then(|()| std::fs::rename(&temporary, &pin)), what)
}

/// Removes a clsact filter; one that the workload removed itself is fine. Called in the interface's namespace.
pub(super) fn detach_clsact(index: u32, program: &str) -> io::Result<()> {
    let way = match program {
        INGRESS_PROGRAM | HOST_INGRESS_PROGRAM => Way::Ingress,
        _ => Way::Egress,
    };
    clsact::remove(index, way)
}
