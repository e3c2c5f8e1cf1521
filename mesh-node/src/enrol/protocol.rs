//! Messages of the enrolment protocol (ZDS: `istio.workload.zds`, one a datagram, a namespace beside `add`), checked.
//!
//! Pure: bytes and descriptors in, requests out. Whatever an agent sends, it is understood or refused here.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use mesh_api::proto::workload::zds::workload_request::Payload;
use mesh_api::proto::workload::zds::workload_response;
use mesh_api::proto::workload::zds::{Ack, AddWorkload, Version, WorkloadRequest, WorkloadResponse, ZdsHello};
use mesh_core::identity::SpiffeId;
use mesh_core::workload::WorkloadUid;
use prost::Message;

/// Longest UID in bytes; Kubernetes' have 36.
const MAX_UID_BYTES: usize = 253;
/// Longest name of a pod in bytes (RFC 1123 subdomain).
const MAX_NAME_BYTES: usize = 253;
/// Longest reason in an answer, in bytes.
const MAX_REASON_BYTES: usize = 1024;

/// What the agent asks for.
#[derive(Debug)]
pub enum Request {
    /// Enrol a workload.
    Add(Add),
    /// It is still there; its namespace cannot be sent again.
    Keep(WorkloadUid),
    /// It is gone.
    Del(WorkloadUid),
    /// It lives on without the mesh.
    LetGo(WorkloadUid),
    /// All that exist were announced.
    SnapshotSent,
}

/// A workload to enrol.
#[derive(Debug)]
pub struct Add {
    /// UID.
    pub uid: WorkloadUid,
    /// Who it is.
    pub info: WorkloadInfo,
    /// Its network namespace.
    pub netns: OwnedFd,
}

/// Who a workload is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadInfo {
    /// Pod name.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Service account.
    pub service_account: Arc<str>,
}

/// Why a message is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// Not this protocol.
    #[error("not a WorkloadRequest: {0}")]
    Undecodable(prost::DecodeError),
    /// Longer than a message may be, or with more descriptors.
    #[error("a message of more than {} bytes or too many descriptors", crate::seqpacket::MAX_MESSAGE_BYTES)]
    Oversized,
    /// Of a version that we do not know.
    #[error("a request without a payload that is known here")]
    NoPayload,
    /// It names nothing that could be a workload.
    #[error("uid is empty, longer than {MAX_UID_BYTES} bytes, or not printable ASCII")]
    Uid,
    /// Without it there is no identity.
    #[error("add without workload_info")]
    NoInfo,
    /// No pod has such a name.
    #[error("workload_info.{0} is not a Kubernetes name")]
    Name(&'static str),
    /// `add` has to bring the namespace, and nothing else does.
    #[error("{verb} with {found} descriptors instead of {expected}")]
    Descriptors {
        /// The request.
        verb: &'static str,
        /// How many came.
        found: usize,
        /// How many it should have.
        expected: usize,
    },
}

/// The first message, ours.
pub fn hello() -> Vec<u8> {
    ZdsHello { version: Version::V1.into() }.encode_to_vec()
}

/// The answer to a request.
pub fn answer(outcome: Result<(), &str>) -> Vec<u8> {
    let error = match outcome {
        Ok(()) => String::new(),
        // An empty error would mean success.
        Err("") => "refused".to_owned(),
        Err(reason) => reason[..reason.floor_char_boundary(MAX_REASON_BYTES)].to_owned(),
    };
    WorkloadResponse { payload: Some(workload_response::Payload::Ack(Ack { error })) }.encode_to_vec()
}

/// Reads a request; descriptors that do not belong to it are closed.
pub fn parse(bytes: &[u8], mut fds: Vec<OwnedFd>) -> Result<Request, BadRequest> {
    let request = WorkloadRequest::decode(bytes).map_err(BadRequest::Undecodable)?;
    let payload = request.payload.ok_or(BadRequest::NoPayload)?;
    let (verb, expected) = match &payload {
        Payload::Add(_) => ("add", 1),
        Payload::Keep(_) => ("keep", 0),
        Payload::Del(_) => ("del", 0),
        Payload::SnapshotSent(_) => ("snapshot_sent", 0),
    };
    if fds.len() != expected {
        return Err(BadRequest::Descriptors { verb, found: fds.len(), expected });
    }
    Ok(match (payload, fds.pop()) {
        (Payload::Add(add), Some(netns)) => Request::Add(read_add(add, netns)?),
        (Payload::Add(_), None) => return Err(BadRequest::Descriptors { verb, found: 0, expected }),
        (Payload::Keep(keep), _) => Request::Keep(uid(&keep.uid)?),
        (Payload::Del(del), _) if del.lives_on => Request::LetGo(uid(&del.uid)?),
        (Payload::Del(del), _) => Request::Del(uid(&del.uid)?),
        (Payload::SnapshotSent(_), _) => Request::SnapshotSent,
    })
}

fn read_add(add: AddWorkload, netns: OwnedFd) -> Result<Add, BadRequest> {
    let uid = uid(&add.uid)?;
    let info = add.workload_info.ok_or(BadRequest::NoInfo)?;
    name("name", &info.name)?;
    name("namespace", &info.namespace)?;
    name("service_account", &info.service_account)?;
    let info = WorkloadInfo {
        name: info.name.into(),
        namespace: info.namespace.into(),
        service_account: info.service_account.into(),
    };
    Ok(Add { uid, info, netns })
}

/// A UID is a part of the names under which descriptors are kept.
pub(super) fn uid(text: &str) -> Result<WorkloadUid, BadRequest> {
    let good = !text.is_empty() && text.len() <= MAX_UID_BYTES && text.bytes().all(|byte| byte.is_ascii_graphic());
    if good { Ok(WorkloadUid(text.into())) } else { Err(BadRequest::Uid) }
}

/// Names are parts of identities, so what a SPIFFE ID cannot hold is refused.
fn name(field: &'static str, text: &str) -> Result<(), BadRequest> {
    let parses = text.len() <= MAX_NAME_BYTES && format!("spiffe://t/ns/{text}/sa/{text}").parse::<SpiffeId>().is_ok();
    if parses { Ok(()) } else { Err(BadRequest::Name(field)) }
}

impl WorkloadInfo {
    /// The identity of this workload in a trust domain.
    pub fn identity(&self, trust_domain: &str) -> SpiffeId {
        SpiffeId::new(trust_domain, &self.namespace, &self.service_account)
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::proto::workload::zds;

    use super::*;

    fn fd() -> OwnedFd {
        std::fs::File::open("/dev/null").expect("open").into()
    }

    fn add(uid: &str, parts: Option<[&str; 3]>) -> Payload {
        let workload_info = parts.map(|[name, namespace, service_account]| zds::WorkloadInfo {
            name: name.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        });
        Payload::Add(AddWorkload { uid: uid.into(), workload_info })
    }

    fn check(payload: Option<Payload>, fds: usize, expected: &str) {
        let bytes = WorkloadRequest { payload }.encode_to_vec();
        let outcome = match parse(&bytes, (0..fds).map(|_| fd()).collect()) {
            Ok(Request::Add(add)) => format!("add {} {} {}", add.uid.0, add.info.name, add.info.identity("t")),
            Ok(Request::Keep(uid)) => format!("keep {}", uid.0),
            Ok(Request::Del(uid)) => format!("del {}", uid.0),
            Ok(Request::LetGo(uid)) => format!("let go {}", uid.0),
            Ok(Request::SnapshotSent) => "snapshot".into(),
            Err(error) => error.to_string(),
        };
        assert!(outcome.starts_with(expected), "got `{outcome}`, expected `{expected}`");
    }

    #[test]
    fn requests_are_read() {
        check(Some(add("u-1", Some(["web-1", "default", "web"]))), 1, "add u-1 web-1 spiffe://t/ns/default/sa/web");
        check(Some(Payload::Keep(zds::KeepWorkload { uid: "a/b//c".into() })), 0, "keep a/b//c");
        check(Some(Payload::Del(zds::DelWorkload { uid: "u".into(), lives_on: false })), 0, "del u");
        check(Some(Payload::Del(zds::DelWorkload { uid: "u".into(), lives_on: true })), 0, "let go u");
        check(Some(Payload::SnapshotSent(zds::SnapshotSent {})), 0, "snapshot");
    }

    #[test]
    fn what_is_wrong_is_refused_with_a_reason() {
        let good = Some(["web-1", "default", "web"]);
        check(None, 0, "a request without a payload");
        check(Some(add("", good)), 1, "uid is empty");
        check(Some(add("a b", good)), 1, "uid is empty, longer");
        check(Some(add(&"x".repeat(254), good)), 1, "uid is empty, longer");
        check(Some(add("u", None)), 1, "add without workload_info");
        check(Some(add("u", Some(["", "d", "w"]))), 1, "workload_info.name");
        check(Some(add("u", Some(["w", "d/sa/admin", "w"]))), 1, "workload_info.namespace");
        check(Some(add("u", Some(["w", "d", "../w"]))), 1, "workload_info.service_account");
        check(Some(add("u", good)), 0, "add with 0 descriptors instead of 1");
        check(Some(add("u", good)), 2, "add with 2 descriptors instead of 1");
        check(Some(Payload::SnapshotSent(zds::SnapshotSent {})), 1, "snapshot_sent with 1 descriptors");
        assert!(matches!(parse(b"\xff\xff\xff", Vec::new()), Err(BadRequest::Undecodable(_))));
    }

    #[test]
    fn an_answer_is_bounded_and_an_error_is_never_empty() {
        for (outcome, expected) in
            [(Ok(()), ""), (Err(""), "refused"), (Err("port 15001 is held"), "port 15001 is held")]
        {
            let response = WorkloadResponse::decode(&answer(outcome)[..]).expect("decodes");
            assert_eq!(response.payload, Some(workload_response::Payload::Ack(Ack { error: expected.into() })));
        }
        assert!(answer(Err(&"ä".repeat(4000))).len() < MAX_REASON_BYTES + 16);
    }
}
