//! Workloads, services, policies and enrolment on the wire.

mod enrolment;
mod golden;
mod raw;
mod round_trip;
mod unknown_fields;
mod values;
