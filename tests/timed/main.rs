//! Tests that are bound by wall-clock time: something has to be done within a time, or not before.
//!
//! Cargo runs this binary after the others, and each test here waits for its turn: what one of them
//! measures is no other test's load.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "a test shows what it has measured")]

mod clients;
mod environment;
mod kafka;
mod machine;
mod slack;
mod start_and_stop;
