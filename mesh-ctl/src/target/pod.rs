//! The admin interface of a process in a pod, and its log, through the API server.
//!
//! Our own program is started in the container, and its standard input and output are the connection. A port that could be
//! forwarded would be open to every process of the node, because a node proxy is in the node's network namespace.

use std::time::Duration;

use anyhow::{Result, anyhow};
use hyper::body::Bytes;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{AttachParams, AttachedProcess, LogParams};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::Mutex;

use super::kubernetes::explain;
use crate::admin::{Failed, Session};
use crate::exit::Unavailable;

/// A request, and the start of the process that carries it, may take this long.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A log may take this long.
const LOG_WITHIN: Duration = Duration::from_secs(30);
/// What a process that failed has to say: its end comes at once, or is not waited for.
const LAST_WORDS_WITHIN: Duration = Duration::from_secs(1);
/// Bytes of that.
const LAST_WORDS_BYTES: u64 = 1024;
/// Bytes of an answer on their way at once.
const BUFFER_BYTES: usize = 64 * 1024;

/// One container's admin interface.
pub struct PodDoor {
    /// Of the pod's namespace.
    pub pods: Api<Pod>,
    /// That namespace.
    pub namespace: String,
    /// The pod.
    pub pod: String,
    /// The container.
    pub container: String,
    /// What is started in it.
    pub command: Vec<String>,
    state: Mutex<State>,
}

#[derive(Default)]
enum State {
    #[default]
    Closed,
    Open(Box<Conversation>),
    /// It did not answer once and is not asked again.
    Silent(String),
}

/// A process that runs in the container, and the HTTP connection that it carries.
struct Conversation {
    session: Session,
    /// Dropping it ends the stream, and with it the process.
    process: AttachedProcess,
    complaints: Box<dyn AsyncRead + Send + Unpin>,
}

impl std::fmt::Debug for PodDoor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PodDoor").field("pod", &self.place()).finish_non_exhaustive()
    }
}

impl PodDoor {
    /// Nothing is started yet.
    pub fn new(pods: Api<Pod>, (namespace, pod): (&str, &str), container: &str, command: Vec<String>) -> Self {
        let (namespace, pod, container) = (namespace.to_owned(), pod.to_owned(), container.to_owned());
        Self { pods, namespace, pod, container, command, state: Mutex::default() }
    }

    fn place(&self) -> String {
        format!("pod {}/{}", self.namespace, self.pod)
    }

    /// One request; the body of a 2xx answer.
    ///
    /// # Errors
    /// This user may not, the pod does not answer in time, or it answers with an error.
    pub async fn send(&self, method: &str, path: &str, body: Vec<u8>) -> Result<Bytes> {
        let mut state = self.state.lock().await;
        // Whatever interrupts this leaves no half of a conversation behind.
        let open = match std::mem::take(&mut *state) {
            State::Silent(why) => {
                *state = State::Silent(why.clone());
                return Err(anyhow!(Unavailable(why)));
            }
            State::Open(open) => Some(open),
            State::Closed => None,
        };
        match tokio::time::timeout(ANSWER_WITHIN, self.converse(open, method, path, body)).await {
            Ok(Ok((conversation, answer))) => {
                *state = State::Open(conversation);
                answer
            }
            Ok(Err(error)) => {
                if error.is::<Unavailable>() {
                    *state = State::Silent(error.to_string());
                }
                Err(error)
            }
            Err(_) => {
                let why = format!("{}: nothing within {} s", self.place(), ANSWER_WITHIN.as_secs());
                *state = State::Silent(why.clone());
                Err(anyhow!(Unavailable(why)))
            }
        }
    }

    async fn converse(
        &self,
        open: Option<Box<Conversation>>,
        method: &str,
        path: &str,
        body: Vec<u8>,
    ) -> Result<(Box<Conversation>, Result<Bytes>)> {
        if let Some(mut open) = open {
            match open.session.send(method, path, body.clone()).await {
                Ok(answer) => return Ok((open, Ok(answer))),
                Err(Failed::Answered(error)) => return Ok((open, Err(error.into()))),
                // An admin interface ends connections after a while.
                Err(Failed::Broken(_)) => {}
            }
        }
        let mut open = Box::new(self.open().await?);
        match open.session.send(method, path, body).await {
            Ok(answer) => Ok((open, Ok(answer))),
            Err(Failed::Answered(error)) => Ok((open, Err(error.into()))),
            Err(Failed::Broken(error)) => {
                let why = last_words(*open).await.unwrap_or_else(|| error.to_string());
                Err(anyhow!(Unavailable(format!("{}: {why}", self.place()))))
            }
        }
    }

    async fn open(&self) -> Result<Conversation> {
        let parameters = AttachParams::default()
            .container(&self.container)
            .stdin(true)
            .stdout(true)
            .stderr(true)
            .max_stdin_buf_size(BUFFER_BYTES)
            .max_stdout_buf_size(BUFFER_BYTES);
        let doing = || format!("start a process in {} (create pods/exec)", self.place());
        let process = self.pods.exec(&self.pod, &self.command, &parameters).await;
        let mut process = process.map_err(|error| explain(error, &doing()))?;
        let none = || anyhow!("the API server gave no standard streams");
        let (stdin, stdout) = (process.stdin().ok_or_else(none)?, process.stdout().ok_or_else(none)?);
        let complaints = Box::new(process.stderr().ok_or_else(none)?);
        let session = Session::open(tokio::io::join(stdout, stdin)).await;
        let session = session.map_err(|error| anyhow!(Unavailable(format!("{}: {error}", self.place()))))?;
        Ok(Conversation { session, process, complaints })
    }

    /// The last lines of the container's log, at most so many seconds old.
    ///
    /// # Errors
    /// This user may not, or the node's kubelet does not answer in time.
    pub async fn log(&self, tail_lines: i64, since_seconds: Option<i64>) -> Result<String> {
        let parameters = LogParams {
            container: Some(self.container.clone()),
            tail_lines: Some(tail_lines),
            since_seconds,
            ..LogParams::default()
        };
        let doing = || format!("read the log of {} (get pods/log)", self.place());
        match tokio::time::timeout(LOG_WITHIN, self.pods.logs(&self.pod, &parameters)).await {
            Ok(log) => log.map_err(|error| explain(error, &doing())),
            Err(_) => Err(anyhow!(Unavailable(format!("{}: no log within {} s", self.place(), LOG_WITHIN.as_secs())))),
        }
    }
}

/// Why a process ended: what it wrote to standard error, or what the container runtime says.
async fn last_words(mut conversation: Conversation) -> Option<String> {
    let status = conversation.process.take_status();
    let mut said = String::new();
    let mut complaints = (&mut conversation.complaints).take(LAST_WORDS_BYTES);
    let heard = tokio::time::timeout(LAST_WORDS_WITHIN, complaints.read_to_string(&mut said)).await;
    let said = said.trim();
    if heard.is_ok() && !said.is_empty() {
        return Some(said.to_owned());
    }
    let status = tokio::time::timeout(LAST_WORDS_WITHIN, status?).await.ok()??;
    status.message
}
