//! Apache Kafka: the one place that names krafka.
//!
//! [`publisher`] publishes the outbox, [`consumer`] reads the topic as a member of the group. Each
//! runs krafka on a private runtime in its own thread; no other part of the program knows that
//! there is one.

pub(crate) mod cluster;
mod commit_order;
pub mod consumer;
pub(crate) mod errors;
pub mod fleet_topics;
mod hanging;
pub(crate) mod latest_records;
mod membership;
mod poll_outcome;
mod producer;
mod producer_builder;
mod producer_ring;
pub mod publisher;
mod publisher_options;
pub(crate) mod reachability;
mod reconcile;
mod session;
pub mod status;
mod stored_batch;
mod suspects;
mod tls;
mod topic_config;
pub(crate) mod topic_reader;
pub mod topic_rights;
mod undecodable;
mod watch;

pub(crate) use tls::check;
