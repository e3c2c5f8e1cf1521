//! The proxy's own sockets in the node's namespace. The ports are kept by the supervisor, so that the next proxy has
//! them without a moment in which nobody listens.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::Context;
use tokio::net::{TcpListener, UnixListener};
use tracing::warn;

use crate::supervisor::client::StoreClient;

/// Name of the metrics port with the supervisor.
pub(super) const METRICS: &str = "tcp/metrics";
/// Name of the readiness port with the supervisor.
pub(super) const READY: &str = "tcp/ready";

/// The port that the supervisor kept, or a new one if there is none or it has another address.
pub(super) fn tcp(
    store: &StoreClient,
    kept: Option<OwnedFd>,
    name: &str,
    addr: SocketAddr,
) -> anyhow::Result<TcpListener> {
    if let Some(fd) = kept {
        let kept = std::net::TcpListener::from(fd);
        match kept.local_addr() {
            Ok(found) if found == addr || (addr.port() == 0 && found.ip() == addr.ip()) => {
                return TcpListener::from_std(kept).context("kept port");
            }
            Ok(found) => warn!(%found, wanted = %addr, "port of the last proxy is given up"),
            Err(error) => warn!(%error, "port of the last proxy cannot be used"),
        }
    }
    let listener = std::net::TcpListener::bind(addr).with_context(|| format!("listen on {addr} ({name})"))?;
    listener.set_nonblocking(true).context("non-blocking")?;
    store.put(name, &listener).context("supervisor")?;
    TcpListener::from_std(listener).context("register")
}

/// Listens at `path`, taking the place of whoever listened there, without a moment in which nobody does.
pub(super) fn unix(path: &Path) -> anyhow::Result<UnixListener> {
    let what = || format!("listen at {}", path.display());
    let fresh = path.with_extension(format!("{}.new", std::process::id()));
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).with_context(what),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(&fresh).with_context(what)?;
    std::fs::set_permissions(&fresh, PermissionsExt::from_mode(0o600)).with_context(what)?;
    std::fs::rename(&fresh, path).with_context(what)?;
    Ok(listener)
}
