//! What a runtime says in environment variables.

use crate::failure::{Code, Failure};

/// Commands of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

/// The container of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) container: String,
    pub(crate) netns: String,
    /// None: whoever starts this container is not Kubernetes.
    pub(crate) pod: Option<PodName>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodName {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Empty: the runtime does not say it.
    pub(crate) uid: String,
}

impl Command {
    pub(crate) fn read(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, Failure> {
        match required(variable, "CNI_COMMAND")?.as_str() {
            "ADD" => Ok(Self::Add),
            "DEL" => Ok(Self::Del),
            "CHECK" => Ok(Self::Check),
            "GC" => Ok(Self::Gc),
            "STATUS" => Ok(Self::Status),
            "VERSION" => Ok(Self::Version),
            other => Err(invalid(format!("CNI_COMMAND is `{other}`"))),
        }
    }
}

impl Call {
    pub(crate) fn read(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, Failure> {
        let container = required(variable, "CNI_CONTAINERID")?;
        let netns = required(variable, "CNI_NETNS")?;
        required(variable, "CNI_IFNAME")?;
        Ok(Self { container, netns, pod: pod(&variable("CNI_ARGS").unwrap_or_default())? })
    }
}

/// `K8S_POD_NAME=a;K8S_POD_NAMESPACE=b`, in any order.
pub(crate) fn pod(args: &str) -> Result<Option<PodName>, Failure> {
    let value = |key: &str| {
        let pairs = args.split(';').filter_map(|pair| pair.split_once('='));
        pairs.filter(|(name, value)| *name == key && !value.is_empty()).map(|(_, value)| value.to_owned()).next()
    };
    match (value("K8S_POD_NAMESPACE"), value("K8S_POD_NAME")) {
        (Some(namespace), Some(name)) => {
            Ok(Some(PodName { namespace, name, uid: value("K8S_POD_UID").unwrap_or_default() }))
        }
        (None, None) => Ok(None),
        (Some(_), None) | (None, Some(_)) => {
            Err(invalid("CNI_ARGS has only one of K8S_POD_NAMESPACE and K8S_POD_NAME".to_owned()))
        }
    }
}

fn required(variable: &dyn Fn(&str) -> Option<String>, name: &str) -> Result<String, Failure> {
    variable(name).filter(|value| !value.is_empty()).ok_or_else(|| invalid(format!("{name} is not set")))
}

fn invalid(message: String) -> Failure {
    Failure::new(Code::InvalidEnvironment, message, "this program is started by a container runtime, not by hand")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_read_from_arguments_in_any_order() {
        let check = |args: &str, expected: Option<(&str, &str, &str)>| {
            let pod = pod(args).unwrap();
            let found = pod.as_ref().map(|p| (p.namespace.as_str(), p.name.as_str(), p.uid.as_str()));
            assert_eq!(found, expected, "{args}");
        };
        check("IgnoreUnknown=1;K8S_POD_UID=u;K8S_POD_NAME=web;K8S_POD_NAMESPACE=shop", Some(("shop", "web", "u")));
        check("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web", Some(("shop", "web", "")));
        check("", None);
        check("IgnoreUnknown=1;rubbish", None);
        assert!(pod("K8S_POD_NAME=web").is_err());
        assert!(pod("K8S_POD_NAME=web;K8S_POD_NAMESPACE=").is_err());
    }
}
