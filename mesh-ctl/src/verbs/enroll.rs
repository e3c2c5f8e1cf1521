//! `enroll` and `unenroll`: the label by which a namespace's pods are in the mesh.

use std::time::Duration;

use anyhow::anyhow;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;

use super::Output;
use crate::cli::{EnrollArgs, Global};
use crate::exit::{NoMesh, Unavailable, Usage};
use crate::target::{client, explain};

/// The label, and its value for what is in the mesh.
const MODE: (&str, &str) = ("istio.io/dataplane-mode", "ambient");
/// The sidecar's switch, which counts where the label does not say.
const INJECTION: &str = "istio-injection";
/// The API server may take this long.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);

/// What becomes of the label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    Enrolled,
    Outside,
}

pub(super) async fn run(global: &Global, args: &EnrollArgs, wish: Wish) -> Output {
    let none = || anyhow!(NoMesh("no kubeconfig names a cluster: name one with --kubeconfig".to_owned()));
    let (client, _namespace) = client(global).await?.ok_or_else(none)?;
    let namespaces = Api::<Namespace>::all(client);
    let value = match wish {
        Wish::Enrolled => json!(MODE.1),
        Wish::Outside => json!(null),
    };
    let patch = Patch::Merge(json!({"metadata": {"labels": {MODE.0: value}}}));
    let mut text = String::new();
    for written in &args.namespaces {
        let name = written.strip_prefix("ns/").unwrap_or(written);
        let parameters = PatchParams::default();
        let asked = tokio::time::timeout(ANSWER_WITHIN, namespaces.patch(name, &parameters, &patch)).await;
        let error = match asked {
            Ok(Ok(namespace)) => {
                text += &said(name, wish, namespace.labels().get(INJECTION).map(String::as_str));
                continue;
            }
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => anyhow!(Usage(format!("no namespace `{name}`"))),
            Ok(Err(error)) => explain(error, &format!("label namespace {name} (patch namespaces)")),
            Err(_) => anyhow!(Unavailable(format!("the API server says nothing for {ANSWER_WITHIN:?}"))),
        };
        // Those before it are labelled.
        return Err(super::Failure { text, error });
    }
    Ok(text)
}

fn said(name: &str, wish: Wish, injection: Option<&str>) -> String {
    match wish {
        Wish::Outside if injection == Some("enabled") => format!(
            "namespace {name} has no label {} any more, and {INJECTION}=enabled, by which its pods stay in the mesh: take that \
             away too\n",
            MODE.0
        ),
        Wish::Enrolled => {
            format!("namespace {name} is enrolled: its pods are taken into the mesh, those that run too\n")
        }
        Wish::Outside => format!("namespace {name} is not enrolled any more: its pods leave the mesh\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_that_stays_in_by_another_label_is_not_said_to_leave() {
        assert!(said("shop", Wish::Outside, None).contains("leave the mesh"));
        assert!(said("shop", Wish::Outside, Some("disabled")).contains("leave the mesh"));
        let stays = said("shop", Wish::Outside, Some("enabled"));
        assert!(stays.contains("stay in the mesh") && stays.contains("istio-injection=enabled"), "{stays}");
        assert!(said("shop", Wish::Enrolled, Some("enabled")).contains("is enrolled"));
    }
}
