//! The HTTP edge: hyper round a pure route. The one place that names hyper.
//!
//! One thread, one current-thread runtime. It never waits for the database: writes go to the
//! writer's queue, reads to the readers', and answers come back by a oneshot.

mod access;
mod admin;
mod body;
mod connections;
mod idempotency;
mod limits;
mod mailbox;
mod problem;
mod refusals;
mod routes;
mod server;

pub use access::{Change, Gate, NoToken};
pub use admin::Channel;
pub use routes::{App, Context};
pub use server::spawn;
