//! One test binary: everything from outside the crate, on real parts.
//!
//! A real Apache Kafka (fetched once with Maven), the client's fake broker for faults, a stand-in
//! for Slack over HTTP, the real binary with real signals.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a failed test shows its log"
)]
#![expect(
    unreachable_pub,
    reason = "the harness is the API of the tests, and nobody else's"
)]

mod access;
mod audit;
mod backup;
mod consumer;
mod contract;
mod end_to_end;
mod environment;
mod fencing;
mod force;
mod hanging;
mod harness;
mod http;
mod idempotency;
mod kafka_security;
mod machine;
mod model;
mod outbox;
mod process;
mod requests;
mod restore;
mod slack;
mod tidy;
