//! Requests over rtnetlink in the calling thread's namespace.

use std::io;

use rtnetlink::Handle;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};

/// Runs `work` with a connection of its own, and waits for it.
pub(super) fn with_netlink<T, F: Future<Output = io::Result<T>>>(work: impl FnOnce(Handle) -> F) -> io::Result<T> {
    // The socket must be opened on this thread, because the namespace is the thread's.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let (connection, handle, _messages) = rtnetlink::new_connection()?;
        let driver = tokio::spawn(connection);
        let result = work(handle).await;
        driver.abort();
        result
    })
}

/// The kernel's error number, where it gave one.
pub(super) fn errno_of(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => io::Error::from_raw_os_error(-message.raw_code()),
        other => io::Error::other(other),
    }
}

/// The name of an interface.
pub(super) fn name_of(link: &LinkMessage) -> Option<String> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
}
