//! Client of the admin endpoints: HTTP/1.1 over Unix sockets, or over whatever else leads there.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

/// A whole request may take this long; an admin endpoint answers from memory.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// Why an admin endpoint did not answer.
#[derive(Debug)]
pub enum AdminError {
    /// Nobody listens there, or not in time.
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        why: String,
    },
    /// This user may not connect.
    NotPermitted {
        /// The socket.
        socket: PathBuf,
    },
    /// It answered with an error.
    Refused {
        /// Path that was asked for.
        path: String,
        /// HTTP status.
        status: u16,
        /// What it said.
        body: String,
    },
    /// The answer is not what this version expects.
    Malformed {
        /// Path that was asked for.
        path: String,
        /// What does not fit.
        why: String,
    },
}

impl std::fmt::Display for AdminError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreachable { socket, why } => {
                write!(
                    f,
                    "no answer from {}: {why}. Does the process run? See `mesh-ctl sandbox status`",
                    socket.display()
                )
            }
            Self::NotPermitted { socket } => {
                write!(f, "not permitted to open {}: run as root (sudo mesh-ctl ...)", socket.display())
            }
            Self::Refused { path, status, body } => write!(f, "{path} answered {status}: {}", body.trim()),
            Self::Malformed { path, why } => {
                write!(
                    f,
                    "{path} answered in a form that this version does not know ({why}): compare `mesh-ctl version`"
                )
            }
        }
    }
}

impl std::error::Error for AdminError {}

/// `GET path`, decoded.
///
/// # Errors
/// See [`AdminError`].
pub async fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, AdminError> {
    let body = send(socket, "GET", path, Vec::new()).await?;
    decode(path, &body)
}

/// `POST path` with a JSON body, decoded.
///
/// # Errors
/// See [`AdminError`].
pub async fn post<T: DeserializeOwned>(
    socket: &Path,
    path: &str,
    body: &impl serde::Serialize,
) -> Result<T, AdminError> {
    let answer = send(socket, "POST", path, encode(path, body)?).await?;
    decode(path, &answer)
}

/// One request; the body of a 2xx answer.
///
/// # Errors
/// See [`AdminError`].
pub async fn send(socket: &Path, method: &str, path: &str, body: Vec<u8>) -> Result<Bytes, AdminError> {
    let unreachable = |why: String| AdminError::Unreachable { socket: socket.into(), why };
    match tokio::time::timeout(TIMEOUT, exchange(socket, method, path, body)).await {
        Ok(result) => result,
        Err(_) => Err(unreachable(format!("nothing within {} s", TIMEOUT.as_secs()))),
    }
}

async fn exchange(socket: &Path, method: &str, path: &str, body: Vec<u8>) -> Result<Bytes, AdminError> {
    let unreachable =
        |why: &dyn std::fmt::Display| AdminError::Unreachable { socket: socket.into(), why: why.to_string() };
    let stream = UnixStream::connect(socket).await.map_err(|e| match e.kind() {
        std::io::ErrorKind::PermissionDenied => AdminError::NotPermitted { socket: socket.into() },
        _ => unreachable(&e), // Every other kind means that nobody can be talked to.
    })?;
    let mut session = Session::open(stream).await.map_err(|e| unreachable(&e))?;
    session.send(method, path, body).await.map_err(|failed| match failed {
        Failed::Broken(why) => unreachable(&why),
        Failed::Answered(error) => error,
    })
}

/// A connection to an admin endpoint; dropping it closes it.
#[derive(Debug)]
pub(crate) struct Session {
    sender: SendRequest<Full<Bytes>>,
    connection: JoinHandle<hyper::Result<()>>,
}

/// Why there is no answer on a connection.
#[derive(Debug)]
pub(crate) enum Failed {
    /// It has ended, or ended before there was an answer.
    Broken(hyper::Error),
    /// The answer is an error.
    Answered(AdminError),
}

impl Session {
    pub(crate) async fn open(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> hyper::Result<Self> {
        let (sender, connection) = http1::handshake(TokioIo::new(io)).await?;
        Ok(Self { sender, connection: tokio::spawn(connection) })
    }

    /// One request; the body of a 2xx answer.
    pub(crate) async fn send(&mut self, method: &str, path: &str, body: Vec<u8>) -> Result<Bytes, Failed> {
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| Failed::Answered(AdminError::Malformed { path: path.into(), why: e.to_string() }))?;
        self.sender.ready().await.map_err(Failed::Broken)?;
        let response = self.sender.send_request(request).await.map_err(Failed::Broken)?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(Failed::Broken)?.to_bytes();
        if status.is_success() {
            return Ok(body);
        }
        Err(Failed::Answered(AdminError::Refused {
            path: path.into(),
            status: status.as_u16(),
            body: String::from_utf8_lossy(&body).into_owned(),
        }))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

pub(crate) fn decode<T: DeserializeOwned>(path: &str, body: &[u8]) -> Result<T, AdminError> {
    serde_json::from_slice(body).map_err(|e| AdminError::Malformed { path: path.into(), why: e.to_string() })
}

pub(crate) fn encode(path: &str, body: &impl serde::Serialize) -> Result<Vec<u8>, AdminError> {
    serde_json::to_vec(body).map_err(|e| AdminError::Malformed { path: path.into(), why: e.to_string() })
}
