//! The kernel programs: entry points only. They gather facts, ask `mesh_ebpf_common::decide`, and carry the answer out.
//!
//! Compiled for the kernel by `cargo xtask ebpf`; on the host this is an empty program.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
// Every helper of the kernel is an unsafe call.
#![allow(unsafe_code)]

#[cfg(target_arch = "bpf")]
mod connect;
#[cfg(target_arch = "bpf")]
mod egress;
#[cfg(target_arch = "bpf")]
mod host;
#[cfg(target_arch = "bpf")]
mod ingress;
#[cfg(target_arch = "bpf")]
mod lookup;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod report;
#[cfg(target_arch = "bpf")]
mod segment;
#[cfg(target_arch = "bpf")]
mod sock_ops;

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::macros::{cgroup_sock_addr, classifier, sk_lookup, sock_ops};
    use aya_ebpf::programs::{SkLookupContext, SockAddrContext, SockOpsContext, TcContext};
    use mesh_ebpf_common::outcome::Hook;

    use crate::{connect, egress, host, ingress, lookup, sock_ops};

    #[cgroup_sock_addr(connect4)]
    fn connect4(ctx: SockAddrContext) -> i32 {
        connect::connect4(&ctx)
    }

    #[cgroup_sock_addr(connect6)]
    fn connect6(ctx: SockAddrContext) -> i32 {
        connect::connect6(&ctx)
    }

    #[cgroup_sock_addr(getpeername4)]
    fn getpeername4(ctx: SockAddrContext) -> i32 {
        connect::getpeername4(&ctx)
    }

    #[cgroup_sock_addr(getpeername6)]
    fn getpeername6(ctx: SockAddrContext) -> i32 {
        connect::getpeername6(&ctx)
    }

    #[cgroup_sock_addr(getsockname4)]
    fn getsockname4(ctx: SockAddrContext) -> i32 {
        connect::getsockname4(&ctx)
    }

    #[cgroup_sock_addr(getsockname6)]
    fn getsockname6(ctx: SockAddrContext) -> i32 {
        connect::getsockname6(&ctx)
    }

    #[sock_ops]
    fn sock_ops(ctx: SockOpsContext) -> u32 {
        sock_ops::on_event(&ctx)
    }

    #[classifier]
    fn tc_ingress(ctx: TcContext) -> i32 {
        ingress::on_segment(&ctx)
    }

    /// For interfaces with Ethernet headers.
    #[classifier]
    fn tc_egress_l2(ctx: TcContext) -> i32 {
        egress::on_frame(&ctx, Hook::Egress)
    }

    /// For the node's end of a workload's link.
    #[classifier]
    fn tc_host_ingress(ctx: TcContext) -> i32 {
        egress::on_frame(&ctx, Hook::HostIngress)
    }

    /// For the node's end of a workload's link, too.
    #[classifier]
    fn tc_host_egress(ctx: TcContext) -> i32 {
        host::on_frame(&ctx)
    }

    /// For interfaces without a link layer header.
    #[classifier]
    fn tc_egress_l3(ctx: TcContext) -> i32 {
        egress::on_packet(&ctx)
    }

    #[sk_lookup]
    fn lookup_listener(ctx: SkLookupContext) -> u32 {
        lookup::on_lookup(&ctx)
    }

    /// Needed by `bpf_sk_assign` and others, which the kernel gives to GPL programs only.
    #[unsafe(no_mangle)]
    #[unsafe(link_section = "license")]
    static LICENSE: [u8; 4] = *b"GPL\0";

    #[panic_handler]
    fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
        // The verifier refuses a program that could get here.
        loop {}
    }
}
