//! What can happen at a hook, and the one table that turns it into a verdict.

/// Where a program runs.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    /// cgroup `connect4`
    Connect4 = 0,
    /// cgroup `connect6`
    Connect6 = 1,
    /// `sock_ops` of the workloads' cgroup
    SockOps = 2,
    /// tc ingress on a workload's interface
    Ingress = 3,
    /// tc egress on a workload's interface
    Egress = 4,
    /// `sk_lookup` of a workload's namespace
    Lookup = 5,
    /// tc ingress on the node's end of a workload's link
    HostIngress = 6,
    /// tc egress on the node's end of a workload's link
    HostEgress = 7,
}

impl Hook {
    /// Every hook, by number.
    pub const ALL: [Self; 8] = [
        Self::Connect4,
        Self::Connect6,
        Self::SockOps,
        Self::Ingress,
        Self::Egress,
        Self::Lookup,
        Self::HostIngress,
        Self::HostEgress,
    ];

    /// The name in metrics and `mesh-ctl`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connect4 => "connect4",
            Self::Connect6 => "connect6",
            Self::SockOps => "sock_ops",
            Self::Ingress => "tc_ingress",
            Self::Egress => "tc_egress",
            Self::Lookup => "sk_lookup",
            Self::HostIngress => "tc_host_ingress",
            Self::HostEgress => "tc_host_egress",
        }
    }

    /// The hook with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}

/// What a program does with a connection or a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Leaves it alone.
    Pass,
    /// Sends it to the proxy.
    Proxy,
    /// Answers at once with "connection refused".
    Refuse,
    /// Discards it silently.
    Drop,
}

macro_rules! reasons {
    ($($variant:ident = $number:literal, $name:literal, $verdict:ident, $doc:literal;)*) => {
        /// Why; every outcome of every program is one of these.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason { $(#[doc = $doc] $variant = $number,)* }

        impl Reason {
            /// Every reason, by number.
            pub const ALL: [Self; REASONS] = [$(Self::$variant,)*];

            /// The name in metrics, logs and `mesh-ctl`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What it means, in one sentence.
            pub const fn explanation(self) -> &'static str {
                match self { $(Self::$variant => $doc,)* }
            }

            /// The table: outcome to verdict.
            #[inline(always)]
            pub const fn verdict(self) -> Verdict {
                match self { $(Self::$variant => Verdict::$verdict,)* }
            }
        }
    };
}

/// How many reasons there are.
pub const REASONS: usize = 42;

reasons! {
    Unknown = 0, "unknown", Drop, "An outcome that the program did not expect.";
    NotEnrolled = 1, "not_enrolled", Pass, "The workload is not part of the mesh.";
    NotTcp = 2, "not_tcp", Pass, "Only TCP is captured.";
    Loopback = 3, "loopback", Pass, "The destination is the workload itself, over loopback.";
    Captured = 4, "captured", Proxy, "The connection goes to the proxy's outbound listener.";
    OwnProxyPort = 5, "own_proxy_port", Refuse, "The application dialled a port of the proxy in its own namespace.";
    HbonePort = 6, "hbone_port", Refuse, "The application dialled another workload's tunnel port directly.";
    BoundDevice = 7, "bound_device", Refuse, "The socket is bound to a device and could not be released from it.";
    StorageFull = 8, "storage_full", Refuse, "The kernel had no memory for the original destination.";
    MptcpSocket = 9, "mptcp_socket", Refuse, "Multipath TCP cannot be captured.";
    Noted = 10, "noted", Pass, "The original destination was noted for the proxy.";
    NotesFull = 11, "notes_full", Refuse, "There is no room for the original destination, or the workload has used up its own; the proxy refuses the connection.";
    NoteConflict = 12, "note_conflict", Refuse, "Two connections claim one peer address; the proxy refuses both.";
    NoteRemoved = 13, "note_removed", Pass, "A connection failed or was reset before the proxy looked up its destination.";
    ProxySocket = 14, "proxy_socket", Pass, "The segment belongs to a connection of the proxy.";
    Preexisting = 15, "preexisting", Pass, "The connection is from before enrolment.";
    TimeWait = 16, "time_wait", Pass, "A segment for a connection that has ended.";
    TimeWaitSyn = 17, "time_wait_syn", Proxy, "A client comes back from a port whose last connection has just ended.";
    HboneListener = 18, "hbone_listener", Pass, "A new connection for the proxy's tunnel port.";
    Assigned = 19, "assigned", Proxy, "The segment goes to the proxy's plaintext listener.";
    NoListener = 20, "no_listener", Refuse, "The proxy does not listen in this namespace.";
    ReservedPort = 21, "reserved_port", Refuse, "The port belongs to the proxy and is not for peers.";
    ForeignSocket = 22, "foreign_socket", Drop, "The segment belongs to a socket that the mesh does not know.";
    AssignFailed = 23, "assign_failed", Drop, "The kernel did not accept the proxy's listener for this segment.";
    Fragment = 24, "fragment", Drop, "Fragmented TCP cannot be judged.";
    Malformed = 25, "malformed", Drop, "The headers could not be read.";
    HeaderChain = 26, "header_chain", Drop, "Too many IPv6 extension headers.";
    SynPayload = 27, "syn_payload", Drop, "Data in a SYN where the proxy's listener cannot be assigned directly.";
    NoteFailed = 28, "note_failed", Drop, "The note for sk_lookup could not be made.";
    KernelReply = 29, "kernel_reply", Pass, "A reply of the kernel without data and without a socket.";
    PacketSocket = 30, "packet_socket", Drop, "TCP from a packet socket.";
    RawSocket = 31, "raw_socket", Drop, "TCP from a raw socket.";
    OutsideCgroup = 32, "outside_cgroup", Drop, "TCP from a socket that is not the proxy's and was not captured.";
    NoSocket = 33, "no_socket", Drop, "TCP that belongs to no socket.";
    LookupAssigned = 34, "lookup_assigned", Proxy, "sk_lookup chose the proxy's listener.";
    LookupRefused = 35, "lookup_refused", Refuse, "sk_lookup refused a noted segment.";
    UnguardedInterface = 36, "unguarded_interface", Refuse, "A new connection came by an interface that has no guard yet.";
    Rewritten = 37, "rewritten", Drop, "The addresses of a segment of the proxy's were changed inside the workload.";
    InnerConnection = 38, "inner_connection", Drop, "The proxy's connection to the application stays in the workload.";
    HostFlow = 39, "host_flow", Pass, "The connection was opened by a process of the node itself.";
    ForgedHostFlow = 40, "forged_host_flow", Drop, "The segment belongs to a connection of the node's own, but does not come from the node.";
    NotHost = 41, "not_host", Pass, "Not a connection of the node's own: it is judged inside the workload.";
}

impl Reason {
    /// The reason with this number; an unknown number is [`Reason::Unknown`], which drops.
    pub fn from_number(number: u8) -> Self {
        Self::ALL.get(usize::from(number)).copied().unwrap_or(Self::Unknown)
    }
}

/// Entries of the counters map.
pub const COUNTERS: usize = Hook::ALL.len() * REASONS;

/// Where a hook counts a reason.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "there are a few dozen reasons")]
pub const fn counter_index(hook: Hook, reason: Reason) -> u32 {
    hook as u32 * REASONS as u32 + reason as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_places_agree() {
        for (i, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i, "{}", reason.name());
        }
        for (i, hook) in Hook::ALL.iter().enumerate() {
            assert_eq!(*hook as usize, i, "{}", hook.name());
        }
        assert_eq!(counter_index(Hook::HostEgress, Reason::ALL[REASONS - 1]) as usize, COUNTERS - 1);
    }

    #[test]
    fn names_are_unique() {
        for (i, a) in Reason::ALL.iter().enumerate() {
            assert!(Reason::ALL[i + 1..].iter().all(|b| a.name() != b.name()), "{}", a.name());
        }
    }

    #[test]
    fn an_unknown_outcome_drops() {
        assert_eq!(Reason::from_number(250).verdict(), Verdict::Drop);
        assert_eq!(Reason::Unknown.verdict(), Verdict::Drop);
    }
}
