//! payrelay: a payment outbox for one small machine.
//!
//! A client posts a payment over HTTP. payrelay stores it with its history and its event in one
//! transaction. The relay publishes the event in commit order, the consumer reads it back, and the
//! notifier posts it to Slack. See ARCHITECTURE.md for the picture.
//!
//! The library is an implementation detail of the binary, not a stable API. The modules, in reading
//! order:

pub mod domain;

pub mod config;

pub mod store;

pub mod runtime;

pub mod http;

pub mod relay;

pub mod kafka;

pub mod slack;

pub mod scheduler;

pub mod sampler;

pub mod audit;

pub mod fleet;

pub mod rebuild;

pub mod service;

#[cfg(test)]
mod fuzz;
