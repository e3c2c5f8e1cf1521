//! Delta ADS over real TLS.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{ADDRESS, AUTHORIZATION, DENY_ALL, Mesh, names, pod, versions};
use mesh_api::MAX_DISCOVERY_REQUEST_BYTES;
use mesh_api::proto::xds::DeltaDiscoveryRequest;
use mesh_api::wds;
use mesh_core::snapshot::Change;
use prost::Message;

const WEB: &str = "Kubernetes//Pod/default/web";
const DB: &str = "Kubernetes//Pod/default/db";
const SERVICE: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  clusterIP: 10.96.0.1\n  selector: {app: web}\n  ports: [{port: 80, targetPort: 8080}]\n";

async fn mesh() -> Mesh {
    let web = pod("web", "node-a", "web", "10.0.0.1");
    let db = pod("db", "node-b", "db", "10.0.0.2");
    Mesh::start(&[("web.yaml", &web), ("db.yaml", &db), ("service.yaml", SERVICE), ("policy.yaml", DENY_ALL)]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_responses_hold_everything_and_decode() {
    let mesh = mesh().await;
    let mut stream = mesh.stream("node-a").await;
    stream.subscribe(ADDRESS).await;
    let addresses = stream.next().await;
    assert_eq!(names(&addresses), [DB, WEB, "default/web.default.svc.cluster.local"]);
    stream.subscribe(AUTHORIZATION).await;
    let policies = stream.next().await;
    assert_eq!(names(&policies), ["default/deny-all", "istio-system/istio_converted_static_strict"]);
    for resource in addresses.resources.iter().chain(&policies.resources) {
        let any = resource.resource.as_ref().unwrap();
        let change = wds::decode(&any.type_url, &any.value).unwrap();
        assert_eq!(wds::version(&any.value), resource.version);
        if let Change::UpsertWorkload(workload) = change {
            assert_eq!(resource.aliases, [format!("/{}", workload.addresses[0])]);
            assert_eq!(&*workload.identity.trust_domain, "cluster.local");
        }
    }
    let status = mesh.until("synced", |s| s.nodes.first().is_some_and(|n| n.sync == "SYNCED")).await;
    assert_eq!(
        (status.nodes[0].node.as_str(), status.resources[ADDRESS], status.resources[AUTHORIZATION]),
        ("node-a", 3, 2)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_of_the_largest_size_is_read() {
    let mesh = mesh().await;
    let mut stream = mesh.stream("node-a").await;
    let entry =
        |i: usize| (format!("Kubernetes//Pod/default/a-pod-with-a-long-name-of-a-deployment-{i:06}"), "0".repeat(16));
    let mut request = DeltaDiscoveryRequest { type_url: ADDRESS.into(), ..Default::default() };
    request.initial_resource_versions = (0..300_000).map(entry).collect();
    let spare = MAX_DISCOVERY_REQUEST_BYTES - request.encoded_len();
    // Tag and length of the nonce take five bytes.
    request.response_nonce = "n".repeat(spare - 5);
    assert_eq!(request.encoded_len(), MAX_DISCOVERY_REQUEST_BYTES);
    stream.send(request).await;
    let response = stream.next().await;
    assert_eq!((response.resources.len(), response.removed_resources.len()), (3, 300_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_change_pushes_one_resource() {
    let mesh = mesh().await;
    let mut stream = mesh.stream("node-a").await;
    stream.subscribe(ADDRESS).await;
    stream.next().await;
    mesh.write("web.yaml", &pod("web", "node-a", "other", "10.0.0.1"));
    let response = stream.next().await;
    assert_eq!((names(&response), response.removed_resources.len()), (vec![WEB], 0));

    // Comments and order change nothing.
    mesh.write("web.yaml", &format!("# note\n{}", pod("web", "node-a", "other", "10.0.0.1")));
    assert!(stream.is_silent_for(Duration::from_millis(700)).await);

    mesh.remove("web.yaml");
    let response = stream.next().await;
    assert_eq!((response.resources.len(), response.removed_resources), (0, vec![WEB.to_owned()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reconnect_gets_the_difference_only() {
    let mesh = mesh().await;
    let mut stream = mesh.stream("node-a").await;
    stream.subscribe(ADDRESS).await;
    let mut held = versions(&stream.next().await);
    drop(stream);

    let mut stream = mesh.stream("node-a").await;
    stream.subscribe_having(ADDRESS, held.clone()).await;
    let same = stream.next().await;
    assert_eq!((same.resources.len(), same.removed_resources.len()), (0, 0), "nothing changed");
    drop(stream);

    mesh.write("web.yaml", &pod("web", "node-a", "web", "10.0.0.9"));
    mesh.remove("db.yaml");
    mesh.until("db is gone", |s| s.resources[ADDRESS] == 2).await;
    held.insert("Kubernetes//Pod/default/long-gone".into(), "1".into());
    let mut stream = mesh.stream("node-a").await;
    stream.subscribe_having(ADDRESS, held).await;
    let difference = stream.next().await;
    assert_eq!(names(&difference), [WEB]);
    assert_eq!(difference.removed_resources, [DB, "Kubernetes//Pod/default/long-gone"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_resource_shows_in_status_and_the_others_work() {
    let mesh = mesh().await;
    let mut stream = mesh.stream("node-a").await;
    stream.subscribe(ADDRESS).await;
    let first = stream.receive().await.unwrap();
    stream.answer(&first, Some(&format!("{WEB}: no such network"))).await;
    let status = mesh.until("the refusal is known", |s| s.nodes.iter().any(|n| !n.rejected.is_empty())).await;
    assert_eq!(status.nodes[0].rejected, BTreeMap::from([(WEB.to_owned(), "no such network".to_owned())]));

    mesh.write("db.yaml", &pod("db", "node-b", "other", "10.0.0.2"));
    assert_eq!(names(&stream.next().await), [DB], "others go on, and the refused one is not sent again");
    mesh.write("web.yaml", &pod("web", "node-a", "other", "10.0.0.1"));
    assert_eq!(names(&stream.next().await), [WEB]);
    mesh.until("the refusal is over", |s| s.nodes.iter().all(|n| n.rejected.is_empty())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_answer_gets_the_latest_state_when_it_does() {
    let mesh = mesh().await;
    let mut slow = mesh.stream("node-a").await;
    let mut quick = mesh.stream("node-b").await;
    slow.subscribe(ADDRESS).await;
    quick.subscribe(ADDRESS).await;
    let unanswered = slow.receive().await.unwrap();
    quick.next().await;
    let mut last = BTreeMap::new();
    for i in 1..=5 {
        mesh.write("web.yaml", &pod("web", "node-a", &format!("account-{i}"), "10.0.0.1"));
        last = versions(&quick.next().await);
    }
    slow.answer(&unanswered, None).await;
    assert_eq!(versions(&slow.next().await), last, "one response with the last of five changes");
    assert!(slow.is_silent_for(Duration::from_millis(300)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_served_on_demand() {
    let mesh = mesh().await;
    let mut stream = mesh.stream("node-a").await;
    let star = vec!["*".to_owned()];
    let first = DeltaDiscoveryRequest {
        type_url: ADDRESS.into(),
        resource_names_subscribe: star.clone(),
        resource_names_unsubscribe: star,
        ..Default::default()
    };
    stream.send(first).await;
    assert_eq!(names(&stream.next().await), [""; 0]);
    let ask = |name: &str| DeltaDiscoveryRequest {
        type_url: ADDRESS.into(),
        resource_names_subscribe: vec![name.into()],
        ..Default::default()
    };
    stream.send(ask("/10.0.0.2")).await;
    let by_address = stream.next().await;
    assert_eq!((names(&by_address), &by_address.resources[0].aliases), (vec![DB], &vec!["/10.0.0.2".to_owned()]));
    stream.send(ask("default/web.default.svc.cluster.local")).await;
    let by_host = stream.next().await;
    assert_eq!(names(&by_host), [WEB, "default/web.default.svc.cluster.local"], "a service with its endpoints");
    stream.send(ask("/10.9.9.9")).await;
    assert_eq!(stream.next().await.removed_resources, ["/10.9.9.9"], "nothing is there");
    mesh.write("late.yaml", &pod("late", "node-b", "late", "10.9.9.9"));
    assert_eq!(names(&stream.next().await), ["Kubernetes//Pod/default/late"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_policy_arrives_before_the_workload_that_names_it() {
    let mesh = mesh().await;
    let mut stream = mesh.stream("node-a").await;
    stream.subscribe(AUTHORIZATION).await;
    stream.next().await;
    stream.subscribe(ADDRESS).await;
    stream.next().await;
    let selecting = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: for-web}\n\
                     spec: {selector: {matchLabels: {app: web}}, rules: [{}]}\n";
    mesh.write("selecting.yaml", selecting);
    assert_eq!(names(&stream.next().await), ["default/for-web"]);
    assert_eq!(names(&stream.next().await), [WEB]);
    mesh.remove("selecting.yaml");
    assert_eq!(names(&stream.next().await), [WEB]);
    assert_eq!(stream.next().await.removed_resources, ["default/for-web"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_nodes_see_the_same() {
    let mesh = mesh().await;
    let mut streams = Vec::new();
    for i in 0..20 {
        let mut stream = mesh.stream(&format!("node-{i}")).await;
        stream.subscribe(ADDRESS).await;
        stream.next().await;
        streams.push(stream);
    }
    mesh.write("web.yaml", &pod("web", "node-a", "changed", "10.0.0.1"));
    let mut seen = Vec::new();
    for stream in &mut streams {
        seen.push(versions(&stream.next().await));
    }
    assert!(seen.iter().all(|v| *v == seen[0] && v.len() == 1));
    drop(streams);
    mesh.until("all are gone", |s| s.nodes.is_empty()).await;
}
