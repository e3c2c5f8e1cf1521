//! Routing for the proxy's own connection to the application, which carries the client's address.
//!
//! That connection leaves and arrives in one namespace: the proxy marks its socket, `tcp_fwmark_accept` makes the
//! application's accepted socket inherit the mark, `fwmark_reflect` does it for refusals, and marked packets are routed
//! to loopback, so that the answers to the client's address find the proxy. By netlink, without iptables.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use mesh_ebpf_common::INNER_MARK;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::{RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleMessage};

use super::netlink::{errno_of, with_netlink};
use super::sysctl;

const FWMARK_ACCEPT: &str = "ipv4/tcp_fwmark_accept";
/// Refusals have no socket to take the mark from: without these a dial to a port where nobody listens would time out.
const FWMARK_REFLECT: [&str; 2] = ["ipv4/fwmark_reflect", "ipv6/fwmark_reflect"];
const LOOPBACK_IFINDEX: u32 = 1;
/// Before `main` (32766), and where nothing else is by default.
const RULE_PRIORITY: u32 = 1338;

/// Sets routing up in the calling thread's namespace; again is fine.
pub(super) fn set_up() -> io::Result<()> {
    sysctl::set(FWMARK_ACCEPT, "1")?;
    set_reflect("1")?;
    with_netlink(|handle| async move {
        let v4 = handle.rule().add().v4().fw_mark(INNER_MARK).table_id(INNER_MARK).priority(RULE_PRIORITY);
        exists_is_fine(v4.action(RuleAction::ToTable).execute().await)?;
        loopback_down_is_fine(exists_is_fine(handle.route().add(route_v4()).execute().await))?;
        let v6 = handle.rule().add().v6().fw_mark(INNER_MARK).table_id(INNER_MARK).priority(RULE_PRIORITY);
        no_ipv6_is_fine(exists_is_fine(v6.action(RuleAction::ToTable).execute().await))?;
        loopback_down_is_fine(no_ipv6_is_fine(exists_is_fine(handle.route().add(route_v6()).execute().await)))
    })
}

/// Undoes [`set_up`] in the calling thread's namespace; what is not there is fine.
pub(super) fn tear_down() -> io::Result<()> {
    sysctl::set(FWMARK_ACCEPT, "0")?;
    set_reflect("0")?;
    with_netlink(|handle| async move {
        let mut rules: Vec<RuleMessage> = Vec::new();
        for request in [handle.rule().add().v4().message_mut().clone(), handle.rule().add().v6().message_mut().clone()]
        {
            rules.push(rule(request));
        }
        for rule in rules {
            absent_is_fine(handle.rule().del(rule).execute().await)?;
        }
        for route in [route_v4(), route_v6()] {
            absent_is_fine(handle.route().del(route).execute().await)?;
        }
        Ok(())
    })
}

fn set_reflect(value: &str) -> io::Result<()> {
    for path in FWMARK_REFLECT {
        match sysctl::set(path, value) {
            // A kernel or a namespace without IPv6 has no such file.
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.contains("ipv6") => {}
            result => result?,
        }
    }
    Ok(())
}

fn rule(mut message: RuleMessage) -> RuleMessage {
    use rtnetlink::packet_route::rule::RuleAttribute;
    message.header.action = RuleAction::ToTable;
    message.attributes.push(RuleAttribute::FwMark(INNER_MARK));
    message.attributes.push(RuleAttribute::Table(INNER_MARK));
    message.attributes.push(RuleAttribute::Priority(RULE_PRIORITY));
    message
}

fn route_v4() -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .table_id(INNER_MARK)
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .output_interface(LOOPBACK_IFINDEX)
        .build()
}

fn route_v6() -> RouteMessage {
    RouteMessageBuilder::<Ipv6Addr>::new()
        .table_id(INNER_MARK)
        .kind(RouteType::Local)
        .output_interface(LOOPBACK_IFINDEX)
        .build()
}

fn exists_is_fine(result: Result<(), rtnetlink::Error>) -> io::Result<()> {
    forgive(result.map_err(errno_of), &[libc::EEXIST])
}

fn absent_is_fine(result: Result<(), rtnetlink::Error>) -> io::Result<()> {
    forgive(result.map_err(errno_of), &[libc::ENOENT, libc::ESRCH, libc::EAFNOSUPPORT])
}

/// A namespace with IPv6 switched off has no IPv6 to route.
fn no_ipv6_is_fine(result: io::Result<()>) -> io::Result<()> {
    forgive(result, &[libc::EAFNOSUPPORT, libc::EACCES])
}

/// As in a pod that is being taken down. Nobody reaches an application over it then; that it is up again is heard of.
fn loopback_down_is_fine(result: io::Result<()>) -> io::Result<()> {
    forgive(result, &[libc::ENETDOWN])
}

fn forgive(result: io::Result<()>, codes: &[i32]) -> io::Result<()> {
    match result {
        Err(e) if e.raw_os_error().is_some_and(|code| codes.contains(&code)) => Ok(()),
        other => other,
    }
}
