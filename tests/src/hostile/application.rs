//! Applications in a workload's namespace that take or give more than they should.

use std::fs::File;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;

use mesh_node::capture::in_netns;
use nix::sys::socket::{setsockopt, sockopt};

/// Receive buffer of an application that reads nothing, bytes: what the kernel takes for it hides what the proxy keeps.
const SMALL_BUFFER_BYTES: usize = 16 * 1024;

/// Sends without end to whoever connects.
///
/// # Panics
/// The address is taken.
pub fn endless(netns: &Path, address: SocketAddr) {
    serve(listen(netns, address), |mut connection| while connection.write_all(&[7; 64 * 1024]).is_ok() {});
}

/// Reads nothing, and keeps the connections.
///
/// # Panics
/// The address is taken.
pub fn deaf(netns: &Path, address: SocketAddr) {
    let listener = listen(netns, address);
    // Inherited by what is accepted.
    setsockopt(&listener, sockopt::RcvBuf, &SMALL_BUFFER_BYTES).expect("receive buffer");
    serve(listener, |connection| {
        // Its error is all that ends the wait: nothing is ever sent.
        let _ended = connection.set_nonblocking(false).and_then(|()| wait_for_error(&connection));
    });
}

fn listen(netns: &Path, address: SocketAddr) -> TcpListener {
    let netns = File::open(netns).expect("namespace");
    in_netns(netns.as_fd(), || TcpListener::bind(address)).expect("enter").expect("listen")
}

fn serve(listener: TcpListener, talk: impl Fn(TcpStream) + Clone + Send + 'static) {
    std::thread::spawn(move || {
        for connection in listener.incoming().map_while(Result::ok) {
            let talk = talk.clone();
            std::thread::spawn(move || talk(connection));
        }
    });
}

fn wait_for_error(connection: &TcpStream) -> io::Result<()> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut gone = [PollFd::new(connection.as_fd(), PollFlags::empty())];
    poll(&mut gone, PollTimeout::NONE)?;
    Ok(())
}
