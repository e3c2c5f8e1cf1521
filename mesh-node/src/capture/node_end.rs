//! The node's ends of a workload's links.
//!
//! Who has `CAP_NET_ADMIN` in the workload's namespace can take off what is attached there (clsact before Linux 6.6), go
//! around it, or change packets behind it. The other end of a veth pair is in the node's namespace and out of its reach.
//! Links of other kinds (macvlan, a device of the machine's) have no end there.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::Handle;
use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::packet_route::nsid::{NsidAttribute, NsidMessage};

use super::netlink::{errno_of, name_of, with_netlink};
use super::netns::{Interface, LinkLayer, in_netns};

/// The other end of `interface`, if the two are a veth pair and the other end is in `node`. Called in the namespace of
/// `interface`.
pub(super) fn node_end(interface: &Interface, node: BorrowedFd<'_>) -> io::Result<Option<Interface>> {
    let index = interface.index;
    let (far, same_namespace) = with_netlink(|handle| async move {
        let Some(link) = link(&handle, index).await?.filter(is_veth) else { return Ok((None, false)) };
        // The kernel numbers namespaces by whoever asks; it has just numbered the other end's.
        let (far, namespace) = (far_index(&link), far_namespace(&link));
        Ok((far, namespace.is_some() && namespace == number_of(&handle, node).await?))
    })?;
    let Some(far) = far.filter(|_| same_namespace) else { return Ok(None) };
    in_netns(node, || {
        let link = with_netlink(|handle| async move { link(&handle, far).await })?;
        let link = link.filter(|link| is_veth(link) && far_index(link) == Some(index));
        let name = link.as_ref().and_then(name_of);
        Ok(name.map(|name| Interface { index: far, name, link_layer: LinkLayer::Ethernet }))
    })?
}

/// `None` if there is no interface with this index.
async fn link(handle: &Handle, index: u32) -> io::Result<Option<LinkMessage>> {
    match handle.link().get().match_index(index).execute().try_next().await.map_err(errno_of) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        result => result,
    }
}

/// The calling thread's namespace's number for `namespace`; `None` if it has none.
async fn number_of(handle: &Handle, namespace: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    let mut request = NsidMessage::default();
    request.attributes.push(NsidAttribute::Fd(namespace.as_raw_fd().cast_unsigned()));
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(request));
    message.header.flags = NLM_F_REQUEST;
    let mut answers = handle.clone().request(message).map_err(errno_of)?;
    match answers.next().await.map(|answer| answer.payload) {
        Some(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(answer))) => {
            Ok(answer.attributes.iter().find_map(|attribute| match attribute {
                NsidAttribute::Id(number) if *number >= 0 => Some(*number),
                _ => None,
            }))
        }
        Some(NetlinkPayload::Error(error)) => Err(error.to_io()),
        Some(_) | None => Err(io::Error::other("the kernel does not number namespaces")),
    }
}

fn is_veth(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos)
            if infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Veth))))
    })
}

fn far_index(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    })
}

fn far_namespace(link: &LinkMessage) -> Option<i32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkNetNsId(number) => Some(*number),
        _ => None,
    })
}
