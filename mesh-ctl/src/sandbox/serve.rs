//! The servers that run in the sandbox's workloads, and a client without dependencies.

use std::convert::Infallible;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Connections that a server takes at a time; more wait in the backlog.
const MAX_CONNECTIONS: usize = 4096;
/// Read buffer of a connection in bytes.
const BUFFER: usize = 16 * 1024;

/// What a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Protocol {
    /// Answers every request with its name, version and the peer address that it saw.
    Http,
    /// Greets first, then echoes lines: a server-first protocol.
    Db,
    /// Returns every byte.
    Echo,
}

/// Who a server says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// Workload.
    pub workload: String,
    /// Version, or empty.
    pub version: String,
}

/// Serves a port of both families until the process ends.
///
/// # Errors
/// The port is taken.
pub async fn serve(protocol: Protocol, port: u16, name: Name) -> Result<()> {
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on port {port}"))?;
    let (slots, name) = (Arc::new(Semaphore::new(MAX_CONNECTIONS)), Arc::new(name));
    loop {
        let slot = Arc::clone(&slots).acquire_owned().await.context("slots")?;
        let Ok((stream, peer)) = listener.accept().await else { continue };
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let name = Arc::clone(&name);
        tokio::spawn(async move {
            let _slot = slot;
            let _nodelay = stream.set_nodelay(true);
            let result = match protocol {
                Protocol::Http => http(stream, peer, &name).await,
                Protocol::Db => db(stream, peer, &name).await.map_err(Into::into),
                Protocol::Echo => echo(stream).await.map_err(Into::into),
            };
            if let Err(error) = result {
                eprintln!("{peer}: {error:#}");
            }
        });
    }
}

async fn http(stream: TcpStream, peer: SocketAddr, name: &Name) -> Result<()> {
    let service = service_fn(|request: http::Request<Incoming>| {
        let text = format!("{} {} says hello to {peer}\n", name.workload, name.version);
        println!("{peer} {} {}", request.method(), request.uri().path());
        let response = http::Response::builder()
            .header("content-type", "text/plain; charset=utf-8")
            .header("x-workload", &name.workload)
            .body(Full::new(Bytes::from(text)));
        async move { Ok::<_, Infallible>(response.unwrap_or_default()) }
    });
    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await?;
    Ok(())
}

async fn db(mut stream: TcpStream, peer: SocketAddr, name: &Name) -> std::io::Result<()> {
    let greeting = format!("220 {} ready, you are {peer}\r\n", name.workload);
    stream.write_all(greeting.as_bytes()).await?;
    println!("{peer} connected");
    echo(stream).await
}

async fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0u8; BUFFER];
    loop {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            return stream.shutdown().await;
        }
        stream.write_all(&buffer[..n]).await?;
    }
}

/// `GET http://HOST:PORT/` by the names that the calling process sees; the body of a 200.
///
/// # Errors
/// Nobody answers, or not with 200.
pub async fn fetch(host: &str, port: u16) -> Result<String> {
    let stream = TcpStream::connect((host, port)).await.with_context(|| format!("connect to {host}:{port}"))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = http::Request::get("/").header("host", host).body(Full::new(Bytes::new()))?;
    let response = sender.send_request(request).await.with_context(|| format!("request to {host}:{port}"))?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    connection.abort();
    if status != http::StatusCode::OK {
        bail!("{host}:{port} answered {status}");
    }
    Ok(String::from_utf8_lossy(&body).into_owned())
}
