//! Conditions of policies: their authors see in the status what became of what they wrote.
//!
//! `ZtunnelAccepted` says what node proxies do with a policy, `WaypointAccepted` what waypoints do with one that has
//! targets; names, reasons and forms are Istio's. They are written only when they say something else than before, for the
//! version of the spec that was judged, and conditions of others are kept. Of several replicas the leader writes.

use std::collections::BTreeMap;
use std::time::Duration;

use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use mesh_api::admin::Problem;
use mesh_api::problem;
use mesh_core::config::{Code, ObjectKey};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;

use super::follow::Followed;
use crate::control::Verdicts;
use crate::source::cluster::Seen;

/// At node proxies.
const AT_NODES: &str = "ZtunnelAccepted";
/// At waypoints.
const AT_WAYPOINTS: &str = "WaypointAccepted";
/// Pause after a round of writing: who changes objects all the time, or writes other conditions, makes no more of them.
const PAUSE: Duration = Duration::from_millis(300);
/// Pause after the API server has refused.
const RETRY: Duration = Duration::from_secs(5);
/// Characters of a message.
const MAX_MESSAGE_CHARS: usize = 2000;

/// What became of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verdict {
    at: &'static str,
    is_accepted: bool,
    reason: &'static str,
    message: String,
}

/// Keeps the conditions as they should be while this replica leads, for ever.
pub async fn keep(client: Client, mut verdicts: watch::Receiver<Verdicts>, mut leads: watch::Receiver<bool>) {
    let mut complained = None;
    loop {
        if leads.wait_for(|leads| *leads).await.is_err() {
            return;
        }
        let now = verdicts.borrow_and_update().clone();
        let written = tokio::select! {
            // Whoever leads now writes the rest; what is under way holds for the version that was judged only.
            lost = leads.wait_for(|leads| !leads) => match lost {
                Ok(_) => continue,
                Err(_) => return,
            },
            written = write_all(&client, &now) => written,
        };
        let complaint = written.err().map(|error| error.to_string());
        if let Some(error) = complaint.as_ref().filter(|_| complained != complaint) {
            tracing::warn!(error, "the status of policies is not written; trying again");
        }
        complained = complaint;
        if complained.is_some() {
            tokio::time::sleep(RETRY).await;
            continue;
        }
        tokio::time::sleep(PAUSE).await;
        tokio::select! {
            changed = verdicts.changed() => if changed.is_err() { return },
            // Whoever led meanwhile may have written something else.
            lost = leads.wait_for(|leads| !leads) => if lost.is_err() { return },
        }
    }
}

async fn write_all(client: &Client, now: &Verdicts) -> kube::Result<()> {
    let mut found: BTreeMap<&str, Vec<&Problem>> = BTreeMap::new();
    for problem in now.problems.iter() {
        found.entry(&problem.object).or_default().push(problem);
    }
    let mut failed = None;
    for (key, seen) in now.seen.iter() {
        let verdict = judge(seen, found.get(&*key.to_string()).map_or(&[], Vec::as_slice));
        let Some(conditions) = conditions(seen, &verdict, OffsetDateTime::now_utc()) else { continue };
        match write(client, key, seen, conditions).await {
            Ok(()) => {}
            // It is another one by now, or gone, and the watch will say so.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            // Others may be written all the same.
            Err(error) => failed = Some(error),
        }
    }
    failed.map_or(Ok(()), Err)
}

async fn write(client: &Client, key: &ObjectKey, seen: &Seen, conditions: Vec<Value>) -> kube::Result<()> {
    let Some(resource) = Followed::resource_of(key.kind, &seen.api_version) else { return Ok(()) };
    let objects: Api<DynamicObject> = Api::namespaced_with(client.clone(), &key.namespace, &resource);
    let patch = json!({
        "metadata": {"resourceVersion": seen.resource_version},
        "status": {"conditions": conditions},
    });
    objects.patch_status(&key.name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
}

/// What to say of an object, from what is wrong with it.
fn judge(seen: &Seen, found: &[&Problem]) -> Verdict {
    let at = if seen.has_targets { AT_WAYPOINTS } else { AT_NODES };
    let has = |code: Code| found.iter().any(|problem| problem.code == code.as_str());
    let (is_accepted, reason) = if found.iter().any(|problem| problem.severity == problem::ERROR) {
        (false, "Invalid")
    } else if seen.has_targets {
        (false, "AncestorNotBound")
    } else if has(Code::ActionAtNodeProxy) {
        (false, "UnsupportedValue")
    } else if has(Code::NotEffective) {
        (false, "NotEffective")
    } else if has(Code::HttpAtNodeProxy) || has(Code::UnknownCondition) || has(Code::UnknownValue) {
        (true, "UnsupportedValue")
    } else {
        (true, "Accepted")
    };
    let lines = found.iter().map(|found| problem::line(&Problem { object: String::new(), ..(*found).clone() }));
    let message = match lines.collect::<Vec<_>>().join("; ") {
        nothing if nothing.is_empty() => "in force at node proxies".to_owned(),
        lines => lines.chars().take(MAX_MESSAGE_CHARS).collect(),
    };
    Verdict { at, is_accepted, reason, message }
}

/// `status.conditions` as they should be; none if they are so.
fn conditions(seen: &Seen, verdict: &Verdict, now: OffsetDateTime) -> Option<Vec<Value>> {
    let is_ours = |condition: &&Value| [AT_NODES, AT_WAYPOINTS].iter().any(|name| condition["type"] == *name);
    let ours: Vec<&Value> = seen.conditions.iter().filter(is_ours).collect();
    let mut wanted = json!({
        "type": verdict.at,
        "status": if verdict.is_accepted { "True" } else { "False" },
        "reason": verdict.reason,
        "message": verdict.message,
        // As text: Istio has it so.
        "observedGeneration": seen.generation.to_string(),
    });
    let last = ours.iter().find(|condition| condition["type"] == verdict.at);
    if let (Some(last), 1) = (last, ours.len()) {
        let says_the_same =
            ["status", "reason", "message", "observedGeneration"].iter().all(|field| last[field] == wanted[field]);
        if says_the_same {
            return None;
        }
    }
    wanted["lastTransitionTime"] = match last.filter(|last| last["status"] == wanted["status"]) {
        Some(last) if last["lastTransitionTime"].is_string() => last["lastTransitionTime"].clone(),
        Some(_) | None => now.format(&Rfc3339).unwrap_or_default().into(),
    };
    let others = seen.conditions.iter().filter(|condition| !is_ours(condition)).cloned();
    Some(others.chain([wanted]).collect())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use http::{Request, Response};
    use http_body_util::Full;
    use mesh_core::config::Kind;
    use tokio::sync::mpsc;

    use super::*;

    fn found(code: &str, severity: &str) -> Problem {
        Problem {
            code: code.into(),
            severity: severity.into(),
            object: "AuthorizationPolicy shop/it".into(),
            file: String::new(),
            line: 0,
            field: "spec.rules[0]".into(),
            message: "the fact".into(),
            hint: "what to do".into(),
        }
    }

    #[test]
    fn a_verdict_follows_from_the_worst_finding() {
        let check = |has_targets: bool, findings: &[(&str, &str)], expected: (&str, bool, &str)| {
            let found: Vec<Problem> = findings.iter().map(|(code, severity)| found(code, severity)).collect();
            let verdict = judge(&Seen { has_targets, ..Seen::default() }, &found.iter().collect::<Vec<_>>());
            assert_eq!((verdict.at, verdict.is_accepted, verdict.reason), expected, "{findings:?}");
            let is_told = verdict.message.contains("spec.rules[0]: the fact. what to do");
            assert_eq!(is_told, !findings.is_empty(), "{}", verdict.message);
        };
        check(false, &[], ("ZtunnelAccepted", true, "Accepted"));
        check(false, &[("MESH105", "warning")], ("ZtunnelAccepted", true, "Accepted"));
        check(false, &[("MESH105", "warning"), ("MESH102", "warning")], ("ZtunnelAccepted", true, "UnsupportedValue"));
        check(false, &[("MESH102", "warning"), ("MESH103", "warning")], ("ZtunnelAccepted", false, "UnsupportedValue"));
        check(false, &[("MESH108", "warning")], ("ZtunnelAccepted", false, "NotEffective"));
        check(false, &[("MESH102", "warning"), ("MESH101", "error")], ("ZtunnelAccepted", false, "Invalid"));
        check(true, &[("MESH104", "warning")], ("WaypointAccepted", false, "AncestorNotBound"));
        check(true, &[("MESH003", "error")], ("WaypointAccepted", false, "Invalid"));
    }

    #[test]
    fn conditions_are_written_only_when_they_say_something_else() {
        let at = |secs| OffsetDateTime::from_unix_timestamp(secs).unwrap();
        let mut seen = Seen { generation: 1, ..Seen::default() };
        seen.conditions = vec![json!({"type": "Reconciled", "status": "True"})];
        let good = judge(&seen, &[]);
        let first = conditions(&seen, &good, at(0)).unwrap();
        let ours = json!({
            "type": "ZtunnelAccepted", "status": "True", "reason": "Accepted", "message": "in force at node proxies",
            "observedGeneration": "1", "lastTransitionTime": "1970-01-01T00:00:00Z",
        });
        assert_eq!(first, [json!({"type": "Reconciled", "status": "True"}), ours]);
        seen.conditions = first;
        assert_eq!(conditions(&seen, &good, at(1)), None);
        // Another version: the same is said of it, and it has been said for as long as before.
        seen.generation = 2;
        let second = conditions(&seen, &good, at(2)).unwrap();
        assert_eq!(second[1]["observedGeneration"], "2");
        assert_eq!(second[1]["lastTransitionTime"], "1970-01-01T00:00:00Z");
        seen.conditions = second;
        let bad = judge(&seen, &[&found("MESH101", "error")]);
        let third = conditions(&seen, &bad, at(3)).unwrap();
        assert_eq!(
            (&third[1]["status"], &third[1]["lastTransitionTime"]),
            (&json!("False"), &json!("1970-01-01T00:00:03Z"))
        );
        // It is for waypoints now: what was said of node proxies goes.
        (seen.conditions, seen.has_targets) = (third, true);
        let fourth = conditions(&seen, &judge(&seen, &[&found("MESH104", "warning")]), at(4)).unwrap();
        assert_eq!(fourth.len(), 2);
        assert_eq!(fourth[1]["type"], "WaypointAccepted");
    }

    /// Says when it is dropped.
    struct Given(mpsc::UnboundedSender<&'static str>);

    impl Drop for Given {
        fn drop(&mut self) {
            let _ = self.0.send("given up");
        }
    }

    #[tokio::test]
    async fn who_does_not_lead_any_more_writes_nothing_more() {
        let (said, mut heard) = mpsc::unbounded_channel();
        // An API server that answers nothing.
        let service = tower::service_fn(move |_: Request<kube::client::Body>| {
            let _ = said.send("asked");
            let given = Given(said.clone());
            async move {
                std::future::pending::<()>().await;
                drop(given);
                Ok::<_, tower::BoxError>(Response::new(Full::<Bytes>::default()))
            }
        });
        let key = ObjectKey::new(Kind::AuthorizationPolicy, "shop", "it");
        let seen = Seen { api_version: "security.istio.io/v1".into(), ..Seen::default() };
        let all = Verdicts { seen: Arc::new(BTreeMap::from([(key, seen)])), ..Verdicts::default() };
        let ((_verdicts, verdicts), (leads, is_leader)) = (watch::channel(all), watch::channel(false));
        tokio::spawn(keep(Client::new(service, "shop"), verdicts, is_leader));
        for _ in 0..2 {
            leads.send_replace(true);
            assert_eq!(heard.recv().await, Some("asked"));
            leads.send_replace(false);
            let end = tokio::time::timeout(RETRY, heard.recv()).await.expect("what is under way is given up");
            assert_eq!(end, Some("given up"));
        }
    }
}
