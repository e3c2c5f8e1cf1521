//! Client of the admin endpoints: HTTP/1.1 over Unix sockets.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

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
    let body = serde_json::to_vec(body).map_err(|e| AdminError::Malformed { path: path.into(), why: e.to_string() })?;
    let answer = send(socket, "POST", path, body).await?;
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
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| unreachable(&e))?;
    let connection = tokio::spawn(connection);
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header("host", "localhost")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| AdminError::Malformed { path: path.into(), why: e.to_string() })?;
    let response = sender.send_request(request).await.map_err(|e| unreachable(&e))?;
    let status = response.status();
    let body = response.into_body().collect().await.map_err(|e| unreachable(&e))?.to_bytes();
    connection.abort();
    if status.is_success() {
        return Ok(body);
    }
    Err(AdminError::Refused {
        path: path.into(),
        status: status.as_u16(),
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

fn decode<T: DeserializeOwned>(path: &str, body: &[u8]) -> Result<T, AdminError> {
    serde_json::from_slice(body).map_err(|e| AdminError::Malformed { path: path.into(), why: e.to_string() })
}
