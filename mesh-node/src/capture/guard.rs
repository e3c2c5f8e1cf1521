//! The guard of a workload's interfaces: programs on each of them, and the gate for those that have none.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use mesh_ebpf_common::abi::Workload;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::error::{CaptureError, context};
use super::netns::{Interface, in_netns, interfaces, merges_received};
use super::node_end::node_end;
use super::programs::Programs;
use super::{Capture, gate, inner_route, sys, tc};

/// Interfaces of one workload that are guarded; no connection comes in by further ones. A pod has two or three.
const MAX_INTERFACES: usize = 1024;

/// Interfaces of a workload, and the node's ends of their links.
pub(super) type Guarded = (Vec<Interface>, Vec<Interface>);

/// A workload's namespace, for what is attached there.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    /// Names it in errors.
    pub(super) name: &'a str,
    pub(super) cookie: u64,
    pub(super) netns: BorrowedFd<'a>,
    /// Where its pins are.
    pub(super) directory: &'a Path,
}

impl Capture {
    /// Polls readable when [`Self::changed`] has something to say.
    pub fn changes(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let descriptor = self.watches.descriptor()?;
        // SAFETY: the descriptor is owned by what it is registered with, so it stays open and the same until then.
        Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
    }

    /// Cookies of enrolled namespaces in which an interface came or a guard went; `None` when there is no more to hear.
    /// Does not wait, so that a runtime's thread may call it.
    pub fn changed(&self) -> io::Result<Option<Vec<u64>>> {
        self.watches.changed()
    }

    /// Guards a namespace as it is now. Returns the interfaces that had no guard; of one that is not enrolled any more,
    /// none.
    pub fn guard_again(&self, cookie: u64) -> Result<Vec<Interface>, CaptureError> {
        let name = format!("the namespace with cookie {cookie}");
        let programs = &*self.programs();
        let _alone = self.lock()?;
        let netns = context(self.watches.netns(cookie), || format!("open {name}"))?;
        let Some(netns) = netns else { return Ok(Vec::new()) };
        let enrolled: Option<Workload> =
            context(sys::lookup(self.maps.workloads.as_fd(), &cookie), || format!("look up {name}"))?;
        if enrolled.is_none_or(|workload| workload.is_let_go()) {
            // Another proxy, which this one takes over from, has ended the enrolment.
            self.watches.remove(cookie);
            return Ok(Vec::new());
        }
        let directory = self.pins.workload(cookie);
        let place = Place { name: &name, cookie, netns: netns.as_fd(), directory: &directory };
        let before = self.watches.guarded(cookie);
        let inside = in_netns(netns.as_fd(), || {
            let (now, _ends) = self.guard(programs, &place)?;
            context(inner_route::set_up(), || format!("set up routing of {name}"))?;
            Ok(now)
        });
        let mut now = context(inside, || format!("enter {name}"))??;
        now.retain(|interface| !before.contains(&interface.index));
        Ok(now)
    }

    /// Attaches to all interfaces, and then lets new connections in by these alone. Called in the namespace. Returns them
    /// and the node's ends of their links that are guarded too.
    ///
    /// An interface that cannot be guarded is an error, and stays shut; the others are guarded nevertheless.
    pub(super) fn guard(&self, programs: &Programs, place: &Place<'_>) -> Result<Guarded, CaptureError> {
        let list = || context(interfaces(), || format!("list interfaces of {}", place.name));
        // Before the list, so that whatever comes is in it or is heard of.
        context(self.watches.add(place.cookie), || format!("watch interfaces of {}", place.name))?;
        let found = list()?;
        let outside = || "list interfaces of the node".to_owned();
        let outside = context(context(in_netns(self.node.as_fd(), interfaces), outside)?, outside)?;
        tc::prune(place.directory, &found, &outside)?;
        let (mut guarded, mut ends, mut failed) = (Vec::with_capacity(found.len()), Vec::new(), Vec::new());
        for interface in found.into_iter().take(MAX_INTERFACES) {
            match self.attach(programs, place.directory, &interface) {
                Ok(end) => {
                    guarded.push(interface);
                    ends.extend(end);
                }
                Err(error) => failed.push((interface.index, error)),
            }
        }
        let indexes: Vec<u32> = guarded.iter().map(|interface| interface.index).collect();
        let gate = gate::set(place.directory, place.netns, self.maps.counters.as_fd(), &indexes);
        context(gate, || format!("set the gate of {}", place.name))?;
        self.watches.set_guarded(place.cookie, &indexes);
        if failed.is_empty() {
            return Ok((guarded, ends));
        }
        // One that went while we were at it needs no guard.
        let present = list()?;
        match failed.into_iter().find(|(index, _)| present.iter().any(|interface| interface.index == *index)) {
            Some((_, error)) => Err(error),
            None => Ok((guarded, ends)),
        }
    }

    /// Attaches to an interface, and to the node's end of its link where there is one and it can be guarded: that is
    /// returned.
    fn attach(
        &self,
        programs: &Programs,
        directory: &Path,
        interface: &Interface,
    ) -> Result<Option<Interface>, CaptureError> {
        tc::attach(programs, self.tc, directory, interface)?;
        let what = || format!("find the node's end of interface {}", interface.name);
        let Some(end) = context(node_end(interface, self.node.as_fd()), what)? else { return Ok(None) };
        let attach = || -> Result<bool, CaptureError> {
            // What is merged has lost its socket (`skb_prepare_for_gro`, Linux 5.14): nothing would get through.
            if context(merges_received(&end.name), what)? {
                context(tc::detach_node_end(directory, &end), what)?;
                return Ok(false);
            }
            tc::attach_node_end(programs, self.tc, directory, &end)?;
            Ok(true)
        };
        if context(in_netns(self.node.as_fd(), attach), what)?? {
            return Ok(Some(end));
        }
        tracing::warn!(interface = %end.name, "not guarded at the node's end: switch its GRO off");
        Ok(None)
    }
}
