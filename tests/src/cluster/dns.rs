//! The cluster's DNS server: CoreDNS, from an image of our own.

use anyhow::Result;

use super::addresses::Addresses;
use super::{Image, Progress, tools};

const IMAGE: &str = "localhost/coredns:1";
const MANIFESTS: &str = include_str!("../../cluster/coredns/manifests.yaml");

/// Builds CoreDNS if it is not there.
pub(super) fn image(progress: Progress<'_>) -> Result<Image> {
    let program = tools::COREDNS.program("coredns", progress)?;
    Ok(Image::new(IMAGE).file("bin/coredns", &program).entrypoint(&["/bin/coredns"]))
}

/// With the cluster's addresses in them.
pub(super) fn manifests(addresses: &Addresses) -> String {
    let (v4, v6) = addresses.dns();
    MANIFESTS.replace("$IMAGE", IMAGE).replace("$ADDRESS4", &v4.to_string()).replace("$ADDRESS6", &v6.to_string())
}
