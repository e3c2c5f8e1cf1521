//! Whether the installation that this agent is a part of is still there when the agent is told to end.

use std::str::FromStr;
use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use kube::Client;
use kube::api::Api;
use tokio::time::timeout;

/// The API server has to say within this time; then the installation counts as there.
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

impl Owner {
    /// Whether it was deleted. An API server that does not answer says nothing of the kind: an agent that is replaced, or whose
    /// node shuts down, leaves pods waiting for the next one.
    pub(super) async fn is_gone(&self, client: Client) -> bool {
        let api = Api::<DaemonSet>::namespaced(client, &self.namespace);
        match timeout(SAID_WITHIN, api.get_opt(&self.name)).await {
            Ok(said) => says_gone(&said.map(|found| found.map(|set| set.metadata.deletion_timestamp.is_some()))),
            Err(_) => false,
        }
    }
}

/// What an answer means: found or not, and if found whether it is being deleted.
fn says_gone(said: &kube::Result<Option<bool>>) -> bool {
    match said {
        Ok(None) => true,
        Ok(Some(is_being_deleted)) => *is_being_deleted,
        // The agent's account, or the role that lets it ask, has been deleted as well.
        Err(kube::Error::Api(status)) => matches!(status.code, 401 | 403),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_gone_when_the_api_server_says_so_and_not_when_it_says_nothing() {
        let status = |code| kube::Error::Api(Box::new(kube::core::Status { code, ..Default::default() }));
        for (said, expected) in [
            (Ok(None), true),
            (Ok(Some(true)), true),
            (Ok(Some(false)), false),
            (Err(status(401)), true),
            (Err(status(403)), true),
            (Err(status(500)), false),
            (Err(kube::Error::LinesCodecMaxLineLengthExceeded), false),
        ] {
            assert_eq!(says_gone(&said), expected, "{said:?}");
        }
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
