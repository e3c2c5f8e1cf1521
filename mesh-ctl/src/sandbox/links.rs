//! Links, addresses and routes by netlink, in the namespace of the calling thread.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::{Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::netns;
use super::plan::NetOp;

/// Carries the changes out in order.
///
/// # Errors
/// Names the first that failed.
pub(super) fn apply(ops: &[NetOp]) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().context("runtime")?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().context("open a netlink socket")?;
        let connection = tokio::spawn(connection);
        for op in ops {
            apply_one(&handle, op).await.with_context(|| format!("{op:?}"))?;
        }
        connection.abort();
        Ok(())
    })
}

async fn apply_one(handle: &Handle, op: &NetOp) -> Result<()> {
    match op {
        NetOp::Sysctl(key, value) => std::fs::write(format!("/proc/sys/net/{key}"), value).context("write sysctl"),
        NetOp::Up(link) => {
            handle.link().set(LinkUnspec::new_with_index(index(link)?).up().build()).execute().await?;
            Ok(())
        }
        NetOp::DeleteLink(link) => match index(link) {
            Ok(index) => Ok(handle.link().del(index).execute().await?),
            Err(_absent) => Ok(()),
        },
        NetOp::Bridge(name) => Ok(handle.link().add(LinkBridge::new(name).up().build()).execute().await?),
        NetOp::Veth { name, bridge, peer_netns, peer } => {
            let target = netns::open(peer_netns)?;
            let mut message = LinkMessageBuilder::<LinkVeth>::new(name, peer);
            message = message.set_info_data(InfoData::Veth(InfoVeth::Peer(peer_message(peer, &target)))).up();
            if let Some(bridge) = bridge {
                message = message.controller(index(bridge)?);
            }
            Ok(handle.link().add(message.build()).execute().await?)
        }
        NetOp::Address { link, address, prefix } => {
            Ok(handle.address().add(index(link)?, *address, *prefix).execute().await?)
        }
        NetOp::Route { to, via, link } => add_route(handle, *to, *via, index(link)?).await,
    }
}

/// The peer cannot be set up here: while the pair is being made it has no peer of its own yet, and says ENOTCONN.
fn peer_message(name: &str, netns: &File) -> rtnetlink::packet_route::link::LinkMessage {
    LinkMessageBuilder::<LinkUnspec>::new().name(name).setns_by_fd(netns.as_raw_fd()).build()
}

async fn add_route(handle: &Handle, to: Option<(IpAddr, u8)>, via: Option<IpAddr>, link: u32) -> Result<()> {
    let v4 = to.map(|(a, _)| a).or(via).is_none_or(|a| a.is_ipv4());
    let default = if v4 { IpAddr::from([0u8; 4]) } else { IpAddr::from([0u8; 16]) };
    let (network, prefix) = to.unwrap_or((default, 0));
    let mut route = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(network, prefix)
        .context("destination")?
        .output_interface(link);
    match via {
        Some(gateway) => route = route.onlink().gateway(gateway).context("gateway")?,
        None => route = route.scope(rtnetlink::packet_route::route::RouteScope::Link),
    }
    Ok(handle.route().add(route.build()).execute().await?)
}

fn index(link: &str) -> Result<u32> {
    if_nametoindex(link).with_context(|| format!("link `{link}`"))
}
