//! Filters of a `clsact` queueing discipline, for kernels without tcx (before 6.6): by rtnetlink, and by the index of the
//! interface, because root of a workload may rename its own at any moment.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::Handle;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};

use super::netlink::{errno_of, with_netlink};

const CLSACT: &str = "clsact";
/// Our filter's place: the first, and always the same, so that the next version replaces it.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle { major: 0, minor: 1 };
/// `ETH_P_ALL`, in the byte order of the wire.
const ALL_PROTOCOLS: u16 = 3_u16.to_be();

/// Which way the packets go that a filter sees.
#[derive(Clone, Copy)]
pub(super) enum Way {
    Ingress,
    Egress,
}

/// Sees to it that the interface has a clsact. Its older kin, `ingress`, takes filters of both directions and runs them all on
/// what comes in. Called in the interface's namespace.
pub(super) fn require(index: u32) -> io::Result<()> {
    with_netlink(|handle| async move {
        match kind_in_place(&handle, index).await?.as_deref() {
            None => add(handle, index).await,
            Some(CLSACT) => Ok(()),
            Some(other) => Err(io::Error::other(format!("its queueing discipline {other} is in the place of clsact"))),
        }
    })
}

/// The kind of the queueing discipline that is where a clsact would be.
async fn kind_in_place(handle: &Handle, index: u32) -> io::Result<Option<String>> {
    let index = index.cast_signed();
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
}

async fn add(handle: Handle, index: u32) -> io::Result<()> {
    let mut qdisc = TcMessage::with_index(index.cast_signed());
    qdisc.header.parent = TcHandle::CLSACT;
    qdisc.header.handle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
    qdisc.attributes.push(TcAttribute::Kind(CLSACT.to_owned()));
    request(handle, RouteNetlinkMessage::NewQueueDiscipline(qdisc), NLM_F_CREATE | NLM_F_EXCL).await
}

/// Puts a program into our place, or in the stead of the one that is there; never a moment without one. With `alone`, a
/// filter that is there is another's, and an error. Called in the interface's namespace.
pub(super) fn set(index: u32, way: Way, program: BorrowedFd<'_>, name: &str, alone: bool) -> io::Result<()> {
    let mut filter = place(index, way);
    filter.attributes.push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
    let options = [
        TcFilterBpfOption::ProgFd(program.as_raw_fd().cast_unsigned()),
        TcFilterBpfOption::ProgName(name.to_owned()),
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    filter.attributes.push(TcAttribute::Options(options.into_iter().map(TcOption::Bpf).collect()));
    let flags = if alone { NLM_F_CREATE | NLM_F_EXCL } else { NLM_F_CREATE };
    with_netlink(|handle| request(handle, RouteNetlinkMessage::NewTrafficFilter(filter), flags))
}

/// Removes the filter in our place; one that the workload removed itself is fine. Called in the interface's namespace.
pub(super) fn remove(index: u32, way: Way) -> io::Result<()> {
    let filter = RouteNetlinkMessage::DelTrafficFilter(place(index, way));
    match with_netlink(|handle| request(handle, filter, 0)) {
        // No such filter, or (`EINVAL`) no clsact to have it.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
        result => result,
    }
}

fn place(index: u32, way: Way) -> TcMessage {
    let minor = match way {
        Way::Ingress => TcHandle::MIN_INGRESS,
        Way::Egress => TcHandle::MIN_EGRESS,
    };
    let mut filter = TcMessage::with_index(index.cast_signed());
    filter.header.parent = TcHandle { major: TcHandle::CLSACT.major, minor };
    filter.header.handle = HANDLE;
    filter.header.info = TcHandle { major: PRIORITY, minor: ALL_PROTOCOLS }.into();
    filter
}

/// One request, and the kernel's answer to it.
async fn request(mut handle: Handle, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    let mut answers = handle.request(message).map_err(errno_of)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            return Err(io::Error::from_raw_os_error(-error.raw_code()));
        }
    }
    Ok(())
}
