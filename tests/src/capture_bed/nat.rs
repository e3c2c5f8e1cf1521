//! Address translation in a namespace, as its root can have it: one rule of nftables, by netlink.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use mesh_node::capture::in_netns;

use super::Netns;

const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = SUBSYSTEM;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const NESTED: u16 = 0x8000;
const NFPROTO_IPV4: u8 = 2;
/// Registers of the rule's little machine.
const REGISTER_1: u32 = 1;
const REGISTER_2: u32 = 2;
/// Where addresses are in an IPv4 header.
const SOURCE_OFFSET: u32 = 12;
const DESTINATION_OFFSET: u32 = 16;

/// What is translated.
#[derive(Clone, Copy, Debug)]
pub enum Nat {
    /// What this namespace sends to an address goes somewhere else.
    Destination(Ipv4Addr, SocketAddrV4),
    /// What it sends from an address comes from another one.
    Source(Ipv4Addr, Ipv4Addr),
}

/// Translates from now on.
pub fn translate(netns: &Netns, nat: Nat) {
    // Hook and priority where each kind has its place.
    let (hook, priority) = match nat {
        Nat::Destination(..) => (3_u32, -100_i32),
        Nat::Source(..) => (4, 100),
    };
    let at_hook = [attr(1, &hook.to_be_bytes()), attr(2, &priority.to_be_bytes())].concat();
    let table = attr(1, b"attack\0");
    let chain = [attr(1, b"attack\0"), attr(3, b"nat\0"), attr(4 | NESTED, &at_hook), attr(7, b"nat\0")].concat();
    let rule = [attr(1, b"attack\0"), attr(2, b"nat\0"), attr(4 | NESTED, &rule(nat))].concat();
    let begin = message(BATCH_BEGIN, 0, 10, &[]);
    let batch = [
        begin,
        message(NEW_TABLE, NFPROTO_IPV4, 0, &table),
        message(NEW_CHAIN, NFPROTO_IPV4, 0, &chain),
        message(NEW_RULE, NFPROTO_IPV4, 0, &rule),
        message(BATCH_END, 0, 10, &[]),
    ];
    let done = in_netns(netns.fd(), || send(&batch.concat()));
    done.and_then(|done| done).unwrap_or_else(|e| panic!("{nat:?}: {e}"));
}

fn rule(nat: Nat) -> Vec<u8> {
    let (offset, matched) = match nat {
        Nat::Destination(from, _) => (DESTINATION_OFFSET, from),
        Nat::Source(from, _) => (SOURCE_OFFSET, from),
    };
    let load = [attr(1, &word(REGISTER_1)), attr(2, &word(1)), attr(3, &word(offset)), attr(4, &word(4))].concat();
    let equal = [attr(1, &word(REGISTER_1)), attr(2, &word(0)), attr(3 | NESTED, &attr(1, &matched.octets()))].concat();
    let mut all = vec![expression("payload", &load), expression("cmp", &equal)];
    let family = [attr(2, &word(NFPROTO_IPV4.into())), attr(3, &word(REGISTER_1))].concat();
    match nat {
        Nat::Destination(_, to) => {
            all.extend([put(REGISTER_1, &to.ip().octets()), put(REGISTER_2, &to.port().to_be_bytes())]);
            all.push(expression("nat", &[attr(1, &word(1)), family, attr(5, &word(REGISTER_2))].concat()));
        }
        Nat::Source(_, to) => {
            all.push(put(REGISTER_1, &to.octets()));
            all.push(expression("nat", &[attr(1, &word(0)), family].concat()));
        }
    }
    all.concat()
}

fn word(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}

fn put(register: u32, value: &[u8]) -> Vec<u8> {
    expression("immediate", &[attr(1, &word(register)), attr(2 | NESTED, &attr(1, value))].concat())
}

fn expression(name: &str, data: &[u8]) -> Vec<u8> {
    let name = format!("{name}\0");
    attr(1 | NESTED, &[attr(1, name.as_bytes()), attr(2 | NESTED, data)].concat())
}

/// A netlink attribute, padded.
fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = u16::try_from(4 + value.len()).expect("small").to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A message of nfnetlink; those between begin and end are answered.
fn message(kind: u16, family: u8, resource: u16, body: &[u8]) -> Vec<u8> {
    let answered = if kind == BATCH_BEGIN || kind == BATCH_END { 0 } else { libc::NLM_F_ACK | libc::NLM_F_CREATE };
    let flags = u16::try_from(libc::NLM_F_REQUEST | answered).expect("small");
    let mut bytes = u32::try_from(20 + body.len()).expect("small").to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(body);
    bytes
}

/// Sends a batch with three messages that are answered, in the calling thread's namespace.
fn send(batch: &[u8]) -> io::Result<()> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_NETFILTER) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor to us alone.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: pointer and length are of one live buffer.
    if unsafe { libc::send(socket.as_raw_fd(), batch.as_ptr().cast(), batch.len(), 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    for _ in 0..3 {
        let mut answer = [0_u8; 512];
        // SAFETY: pointer and length are of one live buffer.
        let length = unsafe { libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
        // The error number of a `struct nlmsgerr` is behind the header.
        match answer.get(16..20).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes) {
            Some(0) if length >= 20 => {}
            Some(code) => return Err(io::Error::from_raw_os_error(-code)),
            None => return Err(io::Error::other("short answer")),
        }
    }
    Ok(())
}
