//! A server in a workload that says its name first, and keeps what clients told it.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::ends::{Family, Listener, reset};
use crate::mesh_bed::MeshBed;

/// Pause between looks for connections.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// What it does with a client that has said all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Ends the connection in order.
    Polite,
    /// Resets it.
    Rude,
}

/// A running server. Ends when dropped: its port refuses from then on.
#[derive(Debug)]
pub struct Greeter {
    heard: Arc<Mutex<Vec<String>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Greeter {
    /// At a port of a workload, on its addresses of both families.
    pub fn start(bed: &MeshBed, workload: &str, port: u16, manner: Manner) -> Self {
        let listeners = [Family::V4, Family::V6]
            .map(|family| bed.listen(workload, SocketAddr::new(bed.address_of(workload, family), port)));
        let (heard, stop) = (Arc::<Mutex<Vec<String>>>::default(), Arc::<AtomicBool>::default());
        let (name, words, ended) = (workload.to_owned(), Arc::clone(&heard), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                let mut clients = listeners.iter().filter_map(Listener::accept_now).peekable();
                if clients.peek().is_none() {
                    std::thread::sleep(LOOK_EVERY);
                }
                for client in clients {
                    let (name, words) = (name.clone(), Arc::clone(&words));
                    // Ends with its client, or when reading has waited long enough.
                    std::thread::spawn(move || serve(client, &name, manner, &words));
                }
            }
        });
        Self { heard, stop, thread: Some(thread) }
    }

    /// What each client said, in no order.
    pub fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Greeter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // It panics only with the test.
        drop(self.thread.take().map(JoinHandle::join));
    }
}

fn serve(mut client: TcpStream, name: &str, manner: Manner, heard: &Mutex<Vec<String>>) {
    let mut said = String::new();
    // A client that goes away has said what it has said.
    drop(client.write_all(name.as_bytes()));
    drop(client.read_to_string(&mut said));
    heard.lock().unwrap_or_else(PoisonError::into_inner).push(said);
    if manner == Manner::Rude {
        reset(client);
    }
}

impl MeshBed {
    /// Tells a server something; the name that it says. An error when it refuses or resets.
    pub fn ask(&self, from: &str, to: SocketAddr, words: &str) -> std::io::Result<String> {
        let mut client = self.dial(from, to)?;
        client.write_all(words.as_bytes())?;
        client.shutdown(Shutdown::Write)?;
        let mut name = String::new();
        client.read_to_string(&mut name)?;
        Ok(name)
    }
}
