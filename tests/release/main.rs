//! Tests before a release: the real binary next to other programs, for minutes.
//!
//! Plain `cargo test` does not run them. `just test-release` does, after it has brought the tools.
//! A module for each program or product, whose figures go to docs/development/release-tests.md.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "a test shows what it has measured")]
#![expect(unreachable_pub, reason = "the modules of the tests share helpers")]

mod clients;
mod examples;
mod litestream;
mod packages;
mod pages;
mod report;
mod tools;
