//! Enrolment messages, as ztunnel and Istio's CNI agent write them.

use mesh_api::proto::workload::zds::workload_request::Payload;
use mesh_api::proto::workload::zds::{
    Ack, AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, Version, WorkloadInfo, WorkloadRequest,
    WorkloadResponse, ZdsHello, workload_response,
};
use proptest::prelude::*;
use prost::Message;

use crate::raw::{bytes, number};

#[test]
fn messages_by_their_field_numbers() {
    let info = WorkloadInfo { name: "web-1".into(), namespace: "ns".into(), service_account: "sa".into() };
    let add = AddWorkload { uid: "u".into(), workload_info: Some(info) };
    let info_bytes = [bytes(1, b"web-1"), bytes(2, b"ns"), bytes(3, b"sa")].concat();
    let cases = [
        (Payload::Add(add), bytes(1, &[bytes(1, b"u"), bytes(2, &info_bytes)].concat())),
        (Payload::Del(DelWorkload { uid: "u".into(), lives_on: false }), bytes(2, &bytes(2, b"u"))),
        (Payload::SnapshotSent(SnapshotSent {}), bytes(3, b"")),
        (Payload::Keep(KeepWorkload { uid: "u".into() }), bytes(5, &bytes(1, b"u"))),
    ];
    for (payload, expected) in cases {
        let request = WorkloadRequest { payload: Some(payload) };
        assert_eq!(request.encode_to_vec(), expected, "{request:?}");
        assert_eq!(WorkloadRequest::decode(&expected[..]), Ok(request));
    }
    assert_eq!(ZdsHello { version: Version::V1.into() }.encode_to_vec(), number(1, 1));
    let failed = WorkloadResponse { payload: Some(workload_response::Payload::Ack(Ack { error: "why".into() })) };
    assert_eq!(failed.encode_to_vec(), bytes(1, &bytes(1, b"why")));
    let good = WorkloadResponse { payload: Some(workload_response::Payload::Ack(Ack::default())) };
    assert_eq!(good.encode_to_vec(), bytes(1, b""), "success is not an empty message");
}

fn request() -> impl Strategy<Value = WorkloadRequest> {
    let text = || "\\PC{0,20}";
    let info = (text(), text(), text()).prop_map(|(name, namespace, service_account)| WorkloadInfo {
        name,
        namespace,
        service_account,
    });
    let payload = prop_oneof![
        (text(), prop::option::of(info))
            .prop_map(|(uid, workload_info)| Payload::Add(AddWorkload { uid, workload_info })),
        (text(), any::<bool>()).prop_map(|(uid, lives_on)| Payload::Del(DelWorkload { uid, lives_on })),
        text().prop_map(|uid| Payload::Keep(KeepWorkload { uid })),
        Just(Payload::SnapshotSent(SnapshotSent {})),
    ];
    prop::option::of(payload).prop_map(|payload| WorkloadRequest { payload })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn requests_survive_the_wire(request in request()) {
        prop_assert_eq!(WorkloadRequest::decode(&request.encode_to_vec()[..]), Ok(request));
    }

    #[test]
    fn answers_survive_the_wire(error in "\\PC{0,60}") {
        let answer = WorkloadResponse { payload: Some(workload_response::Payload::Ack(Ack { error })) };
        prop_assert_eq!(WorkloadResponse::decode(&answer.encode_to_vec()[..]), Ok(answer));
    }

    /// An agent of a newer version may say more.
    #[test]
    fn fields_that_are_not_known_are_passed_over(request in request(), more in prop::collection::vec(any::<u8>(), 0..20)) {
        let mut encoded = request.encode_to_vec();
        encoded.extend(bytes(200, &more));
        prop_assert_eq!(WorkloadRequest::decode(&encoded[..]), Ok(request));
    }
}
