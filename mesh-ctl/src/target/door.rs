//! Ways to the admin interface of one process.

use anyhow::{Result, anyhow};
use hyper::body::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::PathBuf;

use super::pod::PodDoor;
use crate::admin;
use crate::exit::Unavailable;

/// How the admin interface of a process is reached.
#[derive(Debug)]
pub enum Door {
    /// A socket of this machine.
    Socket(PathBuf),
    /// By a process that the API server starts in the container.
    Pod(Box<PodDoor>),
    /// Not at all, and why.
    Shut(String),
}

impl Door {
    /// `GET path`, decoded.
    ///
    /// # Errors
    /// It cannot be reached, or answers with an error or in an unknown form.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        Ok(admin::decode(path, &self.send("GET", path, Vec::new()).await?)?)
    }

    /// `POST path` with a JSON body, decoded.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        Ok(admin::decode(path, &self.send("POST", path, admin::encode(path, body)?).await?)?)
    }

    /// One request; the body of a 2xx answer.
    ///
    /// # Errors
    /// It cannot be reached, or answers with an error.
    pub async fn send(&self, method: &str, path: &str, body: Vec<u8>) -> Result<Bytes> {
        match self {
            Self::Socket(socket) => Ok(admin::send(socket, method, path, body).await?),
            Self::Pod(pod) => pod.send(method, path, body).await,
            Self::Shut(why) => Err(anyhow!(Unavailable(why.clone()))),
        }
    }
}
