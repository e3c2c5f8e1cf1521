//! Whether the installation that this agent is a part of is still there when the agent is told to end.

use std::pin::pin;
use std::str::FromStr;
use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::Client;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::watch;
use tokio::time::timeout;

/// The API server has to say within this time; then what was heard counts.
const SAID_WITHIN: Duration = Duration::from_secs(5);

/// The DaemonSet that runs the agents of all nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl FromStr for Owner {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(format!("`{text}` is not NAMESPACE/NAME")),
        }
    }
}

/// Asks about the owner and listens meanwhile: a watch that was opened in time outlives the account and the role that it was opened
/// with, which an uninstallation deletes a moment after the DaemonSet.
#[derive(Debug)]
pub(super) struct Watched {
    owner: Owner,
    heard: watch::Receiver<Heard>,
}

/// Whether it stands.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Standing {
    #[default]
    Unknown,
    Stands,
    Deleted,
}

/// What the watch has said.
#[derive(Debug, Default)]
struct Heard {
    standing: Standing,
    /// The list that is being read has it.
    is_listed: bool,
}

impl Standing {
    fn of(set: &DaemonSet) -> Self {
        if set.metadata.deletion_timestamp.is_some() { Self::Deleted } else { Self::Stands }
    }
}

impl Heard {
    fn take(&mut self, event: &Event<DaemonSet>) {
        match event {
            Event::Init => self.is_listed = false,
            Event::InitApply(set) | Event::Apply(set) => (self.is_listed, self.standing) = (true, Standing::of(set)),
            // Deleted while there was no watch.
            Event::InitDone if !self.is_listed && self.standing == Standing::Stands => {
                self.standing = Standing::Deleted;
            }
            Event::InitDone => {}
            Event::Delete(_) => self.standing = Standing::Deleted,
        }
    }
}

impl Owner {
    /// Listens from now on, on a task of its own: whatever becomes of this watch, the others do not feel it.
    pub(super) fn watch(self, client: Client) -> Watched {
        let (sender, heard) = watch::channel(Heard::default());
        let api = Api::<DaemonSet>::namespaced(client, &self.namespace);
        let by_name = watcher::Config::default().fields(&format!("metadata.name={}", self.name));
        tokio::spawn(async move {
            let mut events = pin!(watcher(api, by_name).default_backoff());
            while let Some(event) = events.next().await {
                match event {
                    Ok(event) => sender.send_modify(|heard| heard.take(&event)),
                    Err(error) => tracing::warn!(%error, "the watch of the agents' DaemonSet failed and begins anew"),
                }
            }
        });
        Watched { owner: self, heard }
    }
}

impl Watched {
    /// Whether it was deleted. Only who says so counts. An API server that does not answer, or does not let the agent ask, says
    /// nothing of the kind: the token of a pod ends with the pod, and an agent that is replaced, or whose node shuts down, leaves
    /// pods waiting for the next one.
    pub(super) async fn is_gone(&self, client: Client) -> bool {
        let api = Api::<DaemonSet>::namespaced(client, &self.owner.namespace);
        let answered = match timeout(SAID_WITHIN, api.get_opt(&self.owner.name)).await {
            Ok(Ok(found)) => Some(found.as_ref().map_or(Standing::Deleted, Standing::of)),
            Ok(Err(error)) => {
                tracing::info!(%error, "the API server does not say whether the mesh is uninstalled");
                None
            }
            Err(_) => None,
        };
        is_gone(answered, self.heard.borrow().standing)
    }
}

/// An answer is newer than what was heard.
fn is_gone(answered: Option<Standing>, heard: Standing) -> bool {
    answered.unwrap_or(heard) == Standing::Deleted
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    fn set(is_being_deleted: bool) -> DaemonSet {
        let mut set = DaemonSet::default();
        set.metadata.deletion_timestamp = is_being_deleted.then(|| Time(Default::default()));
        set
    }

    #[test]
    fn the_watch_hears_of_a_deletion_in_each_of_its_forms_and_of_a_new_one_after_it() {
        let check = |events: &[Event<DaemonSet>], expected: Standing| {
            let mut heard = Heard::default();
            events.iter().for_each(|event| heard.take(event));
            assert_eq!(heard.standing, expected, "{events:?}");
        };
        let listed = [Event::Init, Event::InitApply(set(false)), Event::InitDone];
        let after = |more: &[Event<DaemonSet>]| [&listed[..], more].concat();
        check(&[], Standing::Unknown);
        check(&[Event::Init, Event::InitDone], Standing::Unknown);
        check(&listed, Standing::Stands);
        check(&after(&[Event::Apply(set(false))]), Standing::Stands);
        check(&after(&[Event::Apply(set(true))]), Standing::Deleted);
        check(&after(&[Event::Delete(set(false))]), Standing::Deleted);
        check(&after(&[Event::Init]), Standing::Stands);
        check(&after(&[Event::Init, Event::InitDone]), Standing::Deleted);
        check(&after(&listed), Standing::Stands);
        check(&after(&[Event::Delete(set(false)), Event::Apply(set(false))]), Standing::Stands);
    }

    #[test]
    fn an_answer_counts_for_more_than_what_was_heard_and_silence_is_no_proof() {
        use Standing::{Deleted, Stands, Unknown};
        for (answered, heard, expected) in [
            (Some(Deleted), Stands, true),
            (Some(Stands), Deleted, false),
            // 401, 403, a server that is away: the account may be gone, or only the pod.
            (None, Deleted, true),
            (None, Stands, false),
            (None, Unknown, false),
        ] {
            assert_eq!(is_gone(answered, heard), expected, "{answered:?} {heard:?}");
        }
    }

    const LIST: &str = r#"{"kind":"DaemonSetList","apiVersion":"apps/v1","metadata":{"resourceVersion":"7"},"items":[
        {"metadata":{"name":"mesh-node","namespace":"istio-system","resourceVersion":"7"}}]}"#;
    const DELETED: &str = r#"{"type":"DELETED","object":{"kind":"DaemonSet","apiVersion":"apps/v1",
        "metadata":{"name":"mesh-node","namespace":"istio-system","resourceVersion":"8"}}}"#;
    const FORBIDDEN: &str =
        r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","reason":"Forbidden","code":403}"#;

    /// One request to an API server that lists and watches the DaemonSet by its name alone, and lets nobody get it.
    async fn answer(mut stream: TcpStream, events: &'static str) {
        let mut head = String::new();
        BufReader::new(&mut stream).read_line(&mut head).await.unwrap();
        let is_named =
            head.contains("/namespaces/istio-system/daemonsets?") && head.contains("metadata.name%3Dmesh-node");
        let is_watch = is_named && head.contains("watch=true");
        let (status, body) = match (is_named, is_watch) {
            (true, true) => ("200 OK", events.replace('\n', "") + "\n"),
            (true, false) => ("200 OK", LIST.to_owned()),
            (false, _) => ("403 Forbidden", FORBIDDEN.to_owned()),
        };
        let head = format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n");
        stream.write_all((head + &body).as_bytes()).await.unwrap();
        if is_watch {
            // It stays open.
            std::future::pending::<()>().await;
        }
    }

    async fn watched(events: &'static str) -> (Watched, Client) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream, events));
            }
        });
        let client = Client::try_from(kube::Config::new(url.parse().unwrap())).unwrap();
        let watched = "istio-system/mesh-node".parse::<Owner>().unwrap().watch(client.clone());
        (watched, client)
    }

    #[tokio::test]
    async fn an_agent_that_may_not_ask_goes_by_its_watch() {
        let within = Duration::from_secs(20);
        let (mut watched_on, client) = watched("").await;
        let stands = watched_on.heard.wait_for(|heard| heard.standing == Standing::Stands);
        drop(timeout(within, stands).await.expect("it is listed").unwrap());
        assert!(!watched_on.is_gone(client).await, "its pod may have been deleted by force");
        let (mut watched_to_end, client) = watched(DELETED).await;
        let deleted = watched_to_end.heard.wait_for(|heard| heard.standing == Standing::Deleted);
        drop(timeout(within, deleted).await.expect("its deletion is heard").unwrap());
        assert!(watched_to_end.is_gone(client).await);
    }

    #[test]
    fn an_owner_has_a_namespace_and_a_name() {
        let owner = Owner { namespace: "istio-system".into(), name: "mesh-node".into() };
        assert_eq!("istio-system/mesh-node".parse(), Ok(owner));
        for wrong in ["", "mesh-node", "/mesh-node", "istio-system/", "a/b/c"] {
            assert!(wrong.parse::<Owner>().is_err(), "{wrong}");
        }
    }
}
