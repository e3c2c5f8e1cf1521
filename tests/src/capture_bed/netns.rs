//! Network namespaces of a test's own.

use std::fs;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use mesh_node::capture::{in_netns, netns_cookie};

/// A network namespace of the test's.
pub struct Netns {
    pub(super) name: String,
    fd: OwnedFd,
}

impl Netns {
    pub(super) fn create(name: String) -> Self {
        ip(&["netns", "add", &name]);
        let fd = File::open(format!("/run/netns/{name}")).expect("open the new namespace").into();
        ip(&["-n", &name, "link", "set", "lo", "up"]);
        Self { name, fd }
    }

    /// Its descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Its cookie.
    pub fn cookie(&self) -> u64 {
        netns_cookie(self.fd()).expect("cookie")
    }

    /// Writes a sysctl below `/proc/sys/net`.
    pub fn sysctl(&self, key: &str, value: &str) {
        let path = Path::new("/proc/sys/net").join(key);
        in_netns(self.fd(), || fs::write(&path, value))
            .and_then(|written| written)
            .unwrap_or_else(|e| panic!("write {value} to {}: {e}", path.display()));
    }

    /// Reads a sysctl below `/proc/sys/net`.
    pub fn read_sysctl(&self, key: &str) -> String {
        let path = Path::new("/proc/sys/net").join(key);
        in_netns(self.fd(), || fs::read_to_string(path)).and_then(|read| read).expect("read sysctl").trim().to_owned()
    }

    /// How many TCP segments its kernel was given, of IPv4.
    pub fn tcp_segments(&self) -> u64 {
        let read = in_netns(self.fd(), || fs::read_to_string("/proc/thread-self/net/snmp"));
        let text = read.and_then(|read| read).expect("read counters");
        let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: ")).map(|line| line.split(' '));
        let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
        let found = names.zip(values).find(|(name, _)| *name == "InSegs").and_then(|(_, value)| value.parse().ok());
        found.expect("InSegs")
    }

    /// Ethernet address of an interface.
    pub fn mac(&self, interface: &str) -> [u8; 6] {
        let link = self.ip(&["-o", "link", "show", interface]);
        let text = link.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next()).expect("an address");
        let bytes: Vec<u8> = text.split(':').filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
        bytes.try_into().expect("six bytes")
    }

    /// Index of an interface.
    pub fn index(&self, interface: &str) -> u32 {
        let link = self.ip(&["-o", "link", "show", interface]);
        link.split(':').next().and_then(|index| index.trim().parse().ok()).expect("an index")
    }

    /// Switches the merging of received segments (GRO) of an interface.
    pub fn set_gro(&self, interface: &str, on: bool) {
        const ETHTOOL_SGRO: u32 = 0x2c;
        let mut value = [ETHTOOL_SGRO, u32::from(on)];
        let set = in_netns(self.fd(), || {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
            // SAFETY: all zero is a valid `ifreq`.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
                *to = from.cast_signed();
            }
            request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
            // SAFETY: the request is an `ifreq` that points to a `struct ethtool_value`.
            match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
        set.and_then(|set| set).unwrap_or_else(|e| panic!("GRO of {interface}: {e}"));
    }

    /// Runs `tc` in it.
    pub fn tc(&self, arguments: &[&str]) {
        let arguments = [&["-n", self.name.as_str()], arguments].concat();
        let output = Command::new("tc").args(&arguments).output().expect("run tc (apt-get install iproute2)");
        assert!(output.status.success(), "tc {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }

    /// Its name, as `ip` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs lines of `ip` commands in it with one process.
    ///
    /// # Panics
    /// One of them fails.
    pub fn ip_batch(&self, lines: &str) {
        let mut batch = Command::new("ip");
        batch.args(["-n", &self.name, "-batch", "-"]).stdin(Stdio::piped());
        let mut child = batch.spawn().unwrap_or_else(|e| panic!("run ip: {e}"));
        let written = child.stdin.take().map(|mut input| input.write_all(lines.as_bytes()));
        let status = child.wait().unwrap_or_else(|e| panic!("wait for ip: {e}"));
        assert!(status.success() && matches!(written, Some(Ok(()))), "ip -batch: {status}, {written:?}");
    }

    /// Runs `ip` in it and returns what it printed.
    pub fn ip(&self, arguments: &[&str]) -> String {
        ip(&[&["-n", self.name.as_str()], arguments].concat())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = Command::new("ip").args(["netns", "del", &self.name]).status() {
            eprintln!("delete namespace {}: {error}", self.name);
        }
    }
}

fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().expect("run ip (apt-get install iproute2)");
    assert!(output.status.success(), "ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
