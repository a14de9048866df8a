//! payrelay: a payment outbox for one small machine.
//!
//! A payment that was posted over HTTP is stored with its history and its event in one transaction;
//! the event is published in commit order, consumed, and told to Slack. See ARCHITECTURE.md for the
//! picture.
//!
//! The modules, in reading order:

pub mod clock;
pub mod config;
pub mod payment;

pub mod message;

pub mod event;

pub mod worker;

pub mod store;

pub mod http;

pub mod publisher;

pub mod relay;

mod kafka;

mod topic_reader;

pub mod audit;

pub mod consumer;

pub mod slack;

pub mod pace;

pub mod notifier;

pub mod scheduler;

pub mod sampler;

pub mod outage;
pub mod runtime;

pub mod service;

#[cfg(test)]
mod fuzz;
