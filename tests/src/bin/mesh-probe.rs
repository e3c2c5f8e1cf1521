//! Client and server of the tests: runs inside a workload; the client prints what it saw.
//!
//! `serve PORT...`: returns every byte, on all these ports of both families. `hoard FIRST LAST PORT`: the same on one port,
//! and listens on a whole range of others. `once ADDR...`: one connection to each, with
//! the marker there and back; a line for each, in order: `ok` or the kind of the error.
//! `stream ADDR PAUSE_MS`: one connection after the other until standard input ends, each with the marker that the wire
//! checks look for; a line for each: `STARTED_US TOOK_US OUTCOME`, where the outcome is `ok` or the kind of the error. `hold ADDR`: one connection; each
//! line of standard input goes through it, and what comes back is printed; `closed KIND` at its end. `until-ok ADDR`: the
//! marker from the first instruction on, again and again, until it comes back.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use mesh_tests::wire::MARKER;

/// A connection that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["stream", addr, pause] => match (addr.parse(), pause.parse()) {
            (Ok(addr), Ok(pause)) => stream(addr, Duration::from_millis(pause)),
            (Ok(_) | Err(_), _) => return usage(),
        },
        ["hold", addr] => match addr.parse() {
            Ok(addr) => hold(addr),
            Err(_) => return usage(),
        },
        ["until-ok", addr] => match addr.parse() {
            Ok(addr) => until_ok(addr),
            Err(_) => return usage(),
        },
        ["once", ref addrs @ ..] => match addrs.iter().map(|addr| addr.parse()).collect::<Result<Vec<_>, _>>() {
            Ok(addrs) => once(&addrs),
            Err(_) => return usage(),
        },
        ["serve", ref ports @ ..] => match ports.iter().map(|port| port.parse()).collect::<Result<Vec<_>, _>>() {
            Ok(ports) => serve(&ports),
            Err(_) => return usage(),
        },
        ["hoard", first, last, port] => match (first.parse(), last.parse(), port.parse()) {
            (Ok(first), Ok(last), Ok(port)) => hoard(first..=last, port),
            // One of them is not a port.
            _ => return usage(),
        },
        // Anything else is not a command line of ours.
        _ => return usage(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-probe: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!(
        "usage: mesh-probe stream ADDR PAUSE_MS | hold ADDR | until-ok ADDR | once ADDR... | serve PORT... | hoard FIRST LAST PORT"
    );
    ExitCode::FAILURE
}

fn stream(addr: SocketAddr, pause: Duration) -> io::Result<()> {
    let ended = Arc::new(AtomicBool::new(false));
    let watch = Arc::clone(&ended);
    std::thread::spawn(move || {
        // The end of standard input is the signal; an error means the same.
        drop(io::copy(&mut io::stdin(), &mut io::sink()));
        watch.store(true, Ordering::Relaxed);
    });
    let mut out = io::stdout().lock();
    while !ended.load(Ordering::Relaxed) {
        let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let clock = Instant::now();
        let outcome = outcome(&exchange(addr));
        writeln!(out, "{} {} {outcome}", started.as_micros(), clock.elapsed().as_micros())?;
        out.flush()?;
        std::thread::sleep(pause);
    }
    Ok(())
}

/// Ends with the first answer; whoever started it sets the time limit.
fn until_ok(addr: SocketAddr) -> io::Result<()> {
    while exchange(addr).is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn once(addrs: &[SocketAddr]) -> io::Result<()> {
    for addr in addrs {
        println!("{}", outcome(&exchange(*addr)));
    }
    Ok(())
}

fn outcome(done: &io::Result<()>) -> String {
    done.as_ref().map_or_else(|error| format!("{:?}", error.kind()), |()| "ok".to_owned())
}

/// Until the process is killed, or a listener fails.
fn serve(ports: &[u16]) -> io::Result<()> {
    let listeners = ports.iter().map(|port| TcpListener::bind((Ipv6Addr::UNSPECIFIED, *port)));
    let listeners: Vec<TcpListener> = listeners.collect::<io::Result<_>>()?;
    let serving: Vec<_> =
        listeners.into_iter().map(|listener| std::thread::spawn(move || serve_one(&listener))).collect();
    serving
        .into_iter()
        .try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(io::Error::other("a server panicked"))))
}

fn hoard(range: RangeInclusive<u16>, port: u16) -> io::Result<()> {
    let listeners = range.map(|port| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)));
    let _hoard: Vec<TcpListener> = listeners.collect::<io::Result<_>>()?;
    serve(&[port])
}

fn serve_one(listener: &TcpListener) -> io::Result<()> {
    loop {
        let (mut connection, _) = listener.accept()?;
        connection.set_nodelay(true)?;
        // A connection that breaks concerns its client alone, who sees it.
        std::thread::spawn(move || connection.try_clone().and_then(|mut read| io::copy(&mut read, &mut connection)));
    }
}

/// The marker, there and back.
fn exchange(addr: SocketAddr) -> io::Result<()> {
    let mut connection = connect(addr)?;
    connection.write_all(MARKER)?;
    let mut back = [0; MARKER.len()];
    connection.read_exact(&mut back)?;
    if back == *MARKER { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

fn hold(addr: SocketAddr) -> io::Result<()> {
    let mut connection = connect(addr)?;
    connection.set_read_timeout(None)?;
    let mut back = BufReader::new(connection.try_clone()?);
    for line in io::stdin().lines() {
        let line = line?;
        let mut answer = String::new();
        let outcome = writeln!(connection, "{line}").and_then(|()| back.read_line(&mut answer));
        match outcome {
            Ok(0) => println!("closed Eof"),
            Ok(_) => print!("{answer}"),
            Err(error) => println!("closed {:?}", error.kind()),
        }
        io::stdout().flush()?;
    }
    Ok(())
}

fn connect(addr: SocketAddr) -> io::Result<TcpStream> {
    let connection = TcpStream::connect_timeout(&addr, PATIENCE)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.set_write_timeout(Some(PATIENCE))?;
    connection.set_nodelay(true)?;
    Ok(connection)
}
