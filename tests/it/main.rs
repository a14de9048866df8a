//! One test binary: everything from outside the crate, on real parts.
//!
//! The parts: a real Apache Kafka (fetched once with Maven), and the client's fake broker for
//! faults. A fake for Slack over HTTP, and the real binary with real signals.

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
#![expect(unreachable_pub, reason = "the modules of the tests share helpers")]

mod access;
mod alerts;
mod audit;
mod backup;
mod commands;
mod consumer;
mod contract;
mod crash_recovery;
mod docs;
mod edge;
mod end_to_end;
mod fault_injection;
mod fencing;
mod hanging;
mod http;
mod http_fuzz;
mod idempotency;
mod kafka_security;
mod local_socket;
mod log_format;
mod metrics;
mod model;
mod outbox;
mod page;
mod process;
mod remote_commands;
mod restore;
mod ring;
mod slack;
mod tidy;
mod upgrade;
